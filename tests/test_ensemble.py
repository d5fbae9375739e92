"""Ensembles: one batch gives what the prompts give one by one; votes and means by hand; search on the mean."""

from typing import Any

import families
import pytest
import tiny
import torch
from torch import Tensor

from softprompt import (
    ConfigError,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEnsemble,
    PromptTuningConfig,
    SoftPromptModel,
    get_peft_model,
)
from softprompt.together.ensemble import mean_probabilities, most_votes

P, N = 4, 3
CONFIGS: dict[str, Any] = {
    "prompt": PromptTuningConfig,
    "prefix": PrefixTuningConfig,
    "after_bos": lambda **options: PromptTuningConfig(placement="after_bos", **options),
    "p_tuning": lambda **options: PromptEncoderConfig(encoder_hidden_size=8, **options),
}


def several(family: str, *configs: Any, task: str = "CAUSAL_LM") -> SoftPromptModel:
    """A model with one adapter of each config, each far from the others."""
    model = get_peft_model(families.build(family, task), configs[0], adapter_name="0")
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(str(number), config)
    for number in range(len(configs)):
        encoder = model.encoder(str(number))
        encoder.start_from(torch.randn_like(encoder.saved_vectors()))
    return model.eval()


def alike(family: str, kind: str, task: str = "CAUSAL_LM") -> SoftPromptModel:
    return several(family, *[CONFIGS[kind](task_type=task, num_virtual_tokens=P)] * N, task=task)


@torch.no_grad()
def one_by_one(model: SoftPromptModel, batch: dict[str, Tensor]) -> Tensor:
    found = []
    for name in model.peft_config:
        model.set_adapter(name)
        found.append(model(**batch).logits)
    model.set_adapter("0")
    return torch.stack(found)


# ---- logits ------------------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_batch_gives_what_the_prompts_give_alone(family: str, kind: str, side: str) -> None:
    model, batch = alike(family, kind), tiny.ragged(side=side)
    found, expected = PromptEnsemble(model).logits(**batch), one_by_one(model, batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[:, real], expected[:, real], rtol=0, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_it_is_one_forward_pass_of_all_rows() -> None:
    model = alike("llama", "prefix")
    sizes: list[int] = []
    hook = model.get_base_model().lm_head.register_forward_hook(lambda _, args, out: sizes.append(out.shape[0]))
    PromptEnsemble(model).logits(**tiny.ragged())
    hook.remove()
    assert sizes == [N * 3]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_classifiers_with_heads_of_their_own_are_asked_one_by_one(family: str) -> None:
    model, batch = alike(family, "prompt", task="SEQ_CLS"), tiny.ragged()
    found = PromptEnsemble(model).logits(**batch)
    assert found.shape == (N, 3, tiny.LABELS)
    torch.testing.assert_close(found, one_by_one(model, batch), rtol=0, atol=1e-5)
    assert model.active_adapter == "0"


def test_encoder_decoders() -> None:
    for kind in ("prompt", "prefix"):
        model, batch = alike("t5", kind, task="SEQ_2_SEQ_LM"), tiny.ragged()
        batch["decoder_input_ids"] = batch["input_ids"][:, :4]
        found = PromptEnsemble(model).logits(**batch)
        torch.testing.assert_close(found, one_by_one(model, batch), rtol=0, atol=1e-4)


def test_prompts_of_several_kinds_and_lengths() -> None:
    configs = [
        PromptTuningConfig(num_virtual_tokens=P),
        PrefixTuningConfig(num_virtual_tokens=P),
        PromptTuningConfig(num_virtual_tokens=7),
    ]
    model, batch = several("llama", *configs), tiny.ragged()
    torch.testing.assert_close(PromptEnsemble(model).logits(**batch), one_by_one(model, batch), rtol=0, atol=1e-5)
    pair = PromptEnsemble(model, ["2", "0"]).logits(**batch)
    torch.testing.assert_close(pair, one_by_one(model, batch)[[2, 0]], rtol=0, atol=1e-5)


def test_dropout_is_off_and_modes_come_back() -> None:
    base = tiny.build("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=P)).train()
    one, two = (PromptEnsemble(model).logits(**tiny.ragged()) for _ in range(2))
    assert torch.equal(one, two)
    assert base.training


# ---- votes and means ---------------------------------------------------------------------------------------------


def test_most_prompts_win_and_the_likelier_class_where_they_are_level() -> None:
    probabilities = torch.tensor(
        [  # N = 4 prompts, B = 2 rows, C = 3 classes
            [[0.4, 0.3, 0.3], [0.6, 0.4, 0.0]],
            [[0.4, 0.3, 0.3], [0.6, 0.4, 0.0]],
            [[0.4, 0.3, 0.3], [0.0, 0.9, 0.1]],
            [[0.0, 0.9, 0.1], [0.1, 0.8, 0.1]],
        ]
    )
    mean = mean_probabilities(probabilities.log())
    torch.testing.assert_close(mean, torch.tensor([[0.3, 0.45, 0.25], [0.325, 0.625, 0.05]]))
    assert mean.argmax(-1).tolist() == [1, 1]
    assert most_votes(probabilities.log()).tolist() == [0, 1]  # three of four; two against two


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_language_model_chooses_among_label_words(side: str) -> None:
    model, batch, words = alike("llama", "prompt"), tiny.ragged(side=side), [11, 200, 37]
    ensemble = PromptEnsemble(model)
    found = ensemble.probabilities(label_ids=words, **batch)
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        alone = one_by_one(model, {"input_ids": ids[mask.bool()][None]})[:, 0, -1, words]
        torch.testing.assert_close(found[row], alone.softmax(-1).mean(0), rtol=0, atol=1e-5)
    choices = one_by_one(model, {"input_ids": batch["input_ids"][1:2]})[:, 0, -1, words].argmax(-1)
    assert ensemble.vote(label_ids=words, **batch)[1] in choices  # row 1 has no padding
    unmasked = {"input_ids": batch["input_ids"][1:2]}
    expected = one_by_one(model, unmasked)[:, :, -1, words].softmax(-1).mean(0)
    torch.testing.assert_close(ensemble.probabilities(label_ids=words, **unmasked), expected, rtol=0, atol=1e-5)


# ---- generate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompt", "prefix", "after_bos"])
def test_greedy_search_goes_by_the_mean_of_log_probabilities(kind: str) -> None:
    model, batch = alike("llama", kind), tiny.ragged(side="left")
    found = PromptEnsemble(model).generate(**batch, max_new_tokens=6)
    assert found.shape == (3, batch["input_ids"].shape[1] + 6)
    for row, ids, mask in zip(found, batch["input_ids"], batch["attention_mask"], strict=True):
        grown = ids[mask.bool()][None]
        for _ in range(6):
            mean = one_by_one(model, {"input_ids": grown})[:, :, -1].log_softmax(-1).mean(0)
            grown = torch.cat([grown, mean.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(row[-6:], grown[0, -6:])


def test_copies_of_one_prompt_search_as_that_prompt() -> None:
    model, batch = alike("llama", "prefix"), tiny.ragged(side="left")
    table = model.encoder("0").saved_vectors()
    for name in model.peft_config:
        model.encoder(name).start_from(table)
    for options in ({"num_beams": 3}, {"num_beams": 2, "repetition_penalty": 1.4}, {"eos_token_id": [7, 8, 9]}):
        expected = model.generate(**batch, max_new_tokens=6, **options)
        assert torch.equal(PromptEnsemble(model).generate(**batch, max_new_tokens=6, **options), expected)


def test_what_an_ensemble_cannot_do() -> None:
    model, batch = alike("llama", "prefix"), tiny.ragged(side="left")
    ensemble = PromptEnsemble(model)
    for options, message in (
        ({"do_sample": True}, "do_sample=True"),
        ({"num_return_sequences": 2}, "num_return_sequences=2"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"streamer": object()}, "streamer"),
    ):
        with pytest.raises(ConfigError, match=message):
            ensemble.generate(**batch, **options)
    with pytest.raises(ConfigError, match="labels"):
        ensemble.logits(**batch, labels=batch["input_ids"])
    with pytest.raises(ConfigError, match="input_ids or inputs_embeds"):
        ensemble.logits(attention_mask=batch["attention_mask"])
    with pytest.raises(ConfigError, match="no adapter named 'none'"):
        PromptEnsemble(model, ["none"])
    with pytest.raises(ConfigError, match="empty"):
        PromptEnsemble(model, [])
    with model.disable_adapter(), pytest.raises(ConfigError, match="disabled"):
        ensemble.logits(**batch)
    model.add_adapter("longer", PrefixTuningConfig(num_virtual_tokens=7))
    with pytest.raises(ConfigError, match="one kind and length"):
        PromptEnsemble(model).generate(**batch, max_new_tokens=2)
