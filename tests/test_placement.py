"""Prompts inside the rows: behind the first token, at slots, and on models with a state; equal to plain single rows."""

from typing import Any

import hf_cache
import pytest
import tiny
import torch
from families import build
from torch import Tensor
from torch.nn.functional import cross_entropy

from softprompt import (
    ConfigError,
    Embeddings,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    UnsupportedError,
    get_peft_model,
)

STATE = ("mamba", "lfm2", "qwen3_next", "jamba")
WITH_SLOTS = (
    ("llama", "CAUSAL_LM"),
    ("gpt2", "CAUSAL_LM"),
    ("lfm2", "CAUSAL_LM"),
    ("bloom", "CAUSAL_LM"),
    ("bert", "MASKED_LM"),
    ("roberta", "MASKED_LM"),
    ("t5", "SEQ_2_SEQ_LM"),
    ("bart", "SEQ_2_SEQ_LM"),
)


def make(family: str, task: str, config: Any) -> SoftPromptModel:
    torch.manual_seed(0)
    return get_peft_model(build(family, task), config).eval()


def rows_of(batch: dict[str, Tensor], *names: str) -> list[tuple[Tensor, ...]]:
    masks = batch["attention_mask"].bool()
    return [tuple(batch[name][row][mask][None] for name in names) for row, mask in enumerate(masks)]


def vectors_of(model: SoftPromptModel) -> Tensor:
    prompt = model.encoder().prompt()
    assert isinstance(prompt, Embeddings)
    return prompt.vectors


def embedded(model: SoftPromptModel, ids: Tensor) -> Tensor:
    base = model.get_base_model()
    table = base.get_encoder() if base.config.is_encoder_decoder else base
    return table.get_input_embeddings()(ids)


def gradients_agree(model: SoftPromptModel, loss: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, parameters)
    for got, want in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-3)


# ---- behind the first token --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "task"), [("bert", "SEQ_CLS"), ("roberta", "SEQ_CLS"), ("distilbert", "TOKEN_CLS"),
                                              ("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM")])  # fmt: skip
def test_after_bos_keeps_the_first_token_first(family: str, task: str, side: str) -> None:
    config = PromptTuningConfig(num_virtual_tokens=3, placement="after_bos")
    model, batch = make(family, task, config), tiny.ragged(side=side)
    out = model(**batch)
    for row, (ids,) in enumerate(rows_of(batch, "input_ids")):
        tokens = embedded(model, ids)
        joined = torch.cat([tokens[:, :1], vectors_of(model), tokens[:, 1:]], dim=1)
        expected = model.get_base_model()(inputs_embeds=joined).logits
        if task == "SEQ_CLS":
            torch.testing.assert_close(out.logits[row], expected[0], atol=1e-5, rtol=1e-4)
        else:
            expected = torch.cat([expected[:, :1], expected[:, 4:]], dim=1)
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(out.logits[row][real], expected[0], atol=1e-5, rtol=1e-4)


def test_after_bos_differs_from_the_front_and_is_saved(tmp_path: Any) -> None:
    batch = tiny.ragged(side="left")
    front = make("bert", "SEQ_CLS", PromptTuningConfig(num_virtual_tokens=3))
    model = make("bert", "SEQ_CLS", PromptTuningConfig(num_virtual_tokens=3, placement="after_bos"))
    assert (model(**batch).logits - front(**batch).logits).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    loaded = SoftPromptModel.from_pretrained(build("bert", "SEQ_CLS"), tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_after_bos_on_a_decoder_trains_and_generates(side: str) -> None:
    model = make("llama", "CAUSAL_LM", PromptTuningConfig(num_virtual_tokens=3, placement="after_bos"))
    batch = tiny.ragged(side=side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    total, count = torch.zeros(()), 0
    for (ids,) in rows_of(batch, "input_ids"):
        tokens = embedded(model, ids)
        joined = torch.cat([tokens[:, :1], vectors_of(model), tokens[:, 1:]], dim=1)
        logits = model.get_base_model()(inputs_embeds=joined).logits
        total = total + cross_entropy(logits[0, 3:-1], ids[0, 1:], reduction="sum")
        count += ids.shape[1] - 1
    gradients_agree(model, model(**batch, labels=labels).loss, total / count)
    if side == "left":
        generate_agrees(model, batch)


# ---- generation from rows ----------------------------------------------------------------------------------------


def generate_agrees(model: SoftPromptModel, batch: dict[str, Tensor], **more: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5, "use_cache": True}
    for beams in (1, 2):
        together = model.generate(**batch, num_beams=beams, **options, **more)
        width = batch["input_ids"].shape[1]
        assert torch.equal(together[:, :width], batch["input_ids"])
        names = [name for name in batch if name != "attention_mask"]
        for row, values in enumerate(rows_of(batch, *names)):
            alone = model.generate(**dict(zip(names, values, strict=True)), num_beams=beams, **options, **more)
            assert torch.equal(alone[0, values[0].shape[1] :], together[row, width:])


@pytest.mark.pairwise
@pytest.mark.parametrize("family", STATE)
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix"])
def test_models_with_a_state(family: str, method: str) -> None:
    configs: dict[str, Any] = {
        "prompt_tuning": PromptTuningConfig(num_virtual_tokens=3),
        "p_tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
        "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    }
    if family == "mamba" and method == "prefix":
        with pytest.raises(UnsupportedError, match=r"state instead of attention.*use prompt_tuning or p_tuning"):
            make(family, "CAUSAL_LM", configs[method])
        return
    model = make(family, "CAUSAL_LM", configs[method])
    for side in ("left", "right"):
        batch = tiny.ragged(side=side)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        result = model(**batch, labels=labels)
        total, count = torch.zeros(()), 0
        for row, (ids,) in enumerate(rows_of(batch, "input_ids")):
            if method == "prefix":
                expected, first = model(input_ids=ids).logits, 1  # alone; what it is equal to is tested elsewhere
            else:
                joined = torch.cat([vectors_of(model), embedded(model, ids)], dim=1)
                expected, first = model.get_base_model()(inputs_embeds=joined).logits[:, 3:], 0
                whole = model.get_base_model()(inputs_embeds=joined).logits
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(result.logits[row][real], expected[0], atol=2e-5, rtol=1e-3)
            predicting = expected[0, :-1] if first else whole[0, 2:-1]
            total = total + cross_entropy(predicting, ids[0, first:], reduction="sum")
            count += ids.shape[1] - first
        gradients_agree(model, result.loss, total / count)
    generate_agrees(model, tiny.ragged(side="left"))


def test_a_state_is_carried_on_by_hand() -> None:
    """A manual decoding loop: the cache of the first call has seen the prompt, later calls bring only new tokens."""
    model = make("lfm2", "CAUSAL_LM", PromptTuningConfig(num_virtual_tokens=3))
    batch = tiny.ragged(side="left")
    out = model(**batch, use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
    step = model(input_ids=token, attention_mask=mask, **hf_cache.given(model, hf_cache.of(out))).logits
    whole = model(input_ids=torch.cat([batch["input_ids"], token], dim=1), attention_mask=mask).logits
    torch.testing.assert_close(step[:, -1], whole[:, -1], atol=2e-5, rtol=1e-3)


# ---- slots -------------------------------------------------------------------------------------------------------


def with_slots(side: str) -> dict[str, Tensor]:
    """Rows with virtual tokens 0…2 in different places, one of them twice, padded on a side."""
    places = [[-1, 0, -1, 1, 2], [0, -1, -1, 1, -1, 2, -1, 0, -1], [-1, -1, 0, 1, 2, -1, -1]]
    batch = tiny.ragged(side=side)
    slots = torch.full_like(batch["input_ids"], -1)
    for row, (where, mask) in enumerate(zip(places, batch["attention_mask"], strict=True)):
        slots[row, mask.bool()] = torch.tensor(where)
    return {**batch, "slots": slots, "input_ids": batch["input_ids"].masked_fill(slots >= 0, tiny.PAD)}


def by_slots(model: SoftPromptModel, ids: Tensor, slots: Tensor) -> Tensor:
    tokens = embedded(model, ids).clone()
    for column, index in enumerate(slots[0].tolist()):
        if index >= 0:
            tokens[0, column] = vectors_of(model)[0, index]
    return tokens


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "task"), WITH_SLOTS)
def test_slots_equal_single_rows_embedded_by_hand(family: str, task: str, side: str) -> None:
    model = make(family, task, PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, placement="template"))
    batch = with_slots(side)
    labels = torch.randint(3, tiny.VOCAB, batch["input_ids"].shape)
    labels = labels.masked_fill((batch["attention_mask"] == 0) | (batch["slots"] >= 0), -100)
    if task == "SEQ_2_SEQ_LM":
        labels = torch.randint(3, tiny.VOCAB, (3, 4))
    result = model(**batch, labels=labels)
    total, count = torch.zeros(()), 0
    for row, (ids, slots) in enumerate(rows_of(batch, "input_ids", "slots")):
        more = {"labels": labels[row][None]} if task == "SEQ_2_SEQ_LM" else {}
        expected = model.get_base_model()(inputs_embeds=by_slots(model, ids, slots), **more).logits[0]
        if more:
            torch.testing.assert_close(result.logits[row], expected, atol=2e-5, rtol=1e-3)
            wanted, predicting = labels[row], expected
        else:
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(result.logits[row][real], expected, atol=2e-5, rtol=1e-3)
            causal = task == "CAUSAL_LM"
            wanted = labels[row][real][1:] if causal else labels[row][real]
            predicting = expected[:-1] if causal else expected
        total = total + cross_entropy(predicting, wanted, ignore_index=-100, reduction="sum")
        count += int((wanted != -100).sum())
    gradients_agree(model, result.loss, total / count)


@pytest.mark.parametrize("family", ["llama", "gpt2", "lfm2", "bloom"])
def test_generation_from_slots(family: str) -> None:
    model = make(family, "CAUSAL_LM", PromptTuningConfig(num_virtual_tokens=3, placement="template"))
    generate_agrees(model, with_slots("left"))
    generate_agrees(model, with_slots("left"), repetition_penalty=1.7, no_repeat_ngram_size=2)


def test_processors_see_no_placeholder() -> None:
    """With a penalty strong enough to forbid any id that was seen, the placeholder's own id is still free."""
    model = make("llama", "CAUSAL_LM", PromptTuningConfig(num_virtual_tokens=3, placement="template"))
    seen: list[Tensor] = []

    class Look:
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(ids)
            return scores

    batch = with_slots("left")
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["slots"] >= 0, 77)
    model.generate(**batch, max_new_tokens=2, logits_processor=[Look()])
    for row, slots in enumerate(batch["slots"]):
        real = batch["input_ids"][row][(batch["attention_mask"][row] == 1) & (slots < 0)]
        assert torch.equal(seen[0][row][-len(real) :], real)
        assert set(seen[0][row].tolist()) == set(real.tolist())


@pytest.mark.parametrize("right", [False, True])
def test_generation_from_slots_on_an_encoder_decoder(right: bool) -> None:
    model = make("t5", "SEQ_2_SEQ_LM", PromptTuningConfig(num_virtual_tokens=3, placement="template"))
    batch = with_slots("right" if right else "left")
    together = model.generate(**batch, max_new_tokens=4, min_new_tokens=4)
    for row, (ids, slots) in enumerate(rows_of(batch, "input_ids", "slots")):
        assert torch.equal(
            model.generate(input_ids=ids, slots=slots, max_new_tokens=4, min_new_tokens=4)[0], together[row]
        )


def test_bad_slots_are_named() -> None:
    model = make("llama", "CAUSAL_LM", PromptTuningConfig(num_virtual_tokens=3, placement="template"))
    batch = with_slots("right")
    with pytest.raises(ConfigError, match="needs slots"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(ConfigError, match=r"slots go from -1 to 3, but the prompt has 3"):
        model(**{**batch, "slots": batch["slots"] + (batch["slots"] == 2)})
    with pytest.raises(ConfigError, match=r"slots have shape"):
        model(**{**batch, "slots": batch["slots"][:, 1:]})
    front = make("llama", "CAUSAL_LM", PromptTuningConfig(num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="takes no slots"):
        front(**batch)
    with pytest.raises(ConfigError, match=r"after_bos.*template"):
        PromptTuningConfig(placement="after_bos", template="{text} [P]")
