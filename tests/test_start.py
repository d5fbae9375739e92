"""A prompt started from training examples: every method, on every kind of model; the best of several by its loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import hf_cache
import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt import (
    CartridgeConfig,
    ConfigError,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    get_peft_model,
    initialize_from_examples,
)
from softprompt.prompt import KV
from softprompt.start import best_of, drawn, examples_text

COUNT = 12
EXAMPLES = ["the cat sat on the mat", "the dog ran to the red house", "it rained by the river", "the red cat ran"]
MANY = [f"{first} and {second}" for first in EXAMPLES for second in EXAMPLES]
CONFIGS: dict[str, Any] = {
    "prompt_tuning": PromptTuningConfig(num_virtual_tokens=COUNT),
    "p_tuning_mlp": PromptEncoderConfig(num_virtual_tokens=COUNT, encoder_hidden_size=64),
    "p_tuning_lstm": PromptEncoderConfig(
        num_virtual_tokens=COUNT, encoder_hidden_size=32, encoder_reparameterization_type="LSTM"
    ),
    "prefix": PrefixTuningConfig(num_virtual_tokens=COUNT),
    "prefix_ffn": PrefixTuningConfig(num_virtual_tokens=COUNT, prefix_projection=True, encoder_hidden_size=32),
    "multitask": MultitaskPromptTuningConfig(num_virtual_tokens=COUNT, num_tasks=1, num_ranks=2),
    "cartridge": CartridgeConfig(num_virtual_tokens=COUNT),
    "cpt": CPTConfig(num_virtual_tokens=COUNT),
}
BASES = {"decoder": ("llama", "CAUSAL_LM"), "encoder": ("bert", "SEQ_CLS"), "masked": ("bert", "MASKED_LM"),
         "encoder-decoder": ("t5", "SEQ_2_SEQ_LM")}  # fmt: skip
CELLS = [(kind, name) for kind in BASES for name in CONFIGS if name != "cpt" or kind == "decoder"]


def ids_of(seed: int = 0, instruction: str = "") -> Tensor:
    """The tokens that a prompt starts from, written out plainly: `[1, COUNT]`."""
    order = torch.randperm(len(EXAMPLES), generator=torch.Generator().manual_seed(seed)).tolist()
    text = instruction + "\n".join(EXAMPLES[n] for n in order)
    return torch.tensor([tiny.tokenizer()(text)["input_ids"][:COUNT]])


def keys_in_context(base: PreTrainedModel, ids: Tensor) -> Tensor:
    """A decoder's or a T5 decoder's own keys and values of these tokens, flat `[COUNT, width]`."""
    more = {"decoder_input_ids": ids} if base.config.is_encoder_decoder else {}
    with torch.no_grad():
        cache = hf_cache.of(base(input_ids=ids, use_cache=True, **more))
    cache = getattr(cache, "self_attention_cache", cache)
    return KV(tuple((layer.keys, layer.values) for layer in cache.layers)).flat()


@pytest.mark.parametrize(("kind", "name"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_every_method_starts_as_the_examples(kind: str, name: str) -> None:
    base = families.build(*BASES[kind])
    model = get_peft_model(base, CONFIGS[name])
    started = initialize_from_examples(model, tiny.tokenizer(), EXAMPLES, instruction="by night :", seed=3)
    assert started.start == "examples" and not started.losses
    assert started.misfit < 1e-4
    found, ids = model.encoder().saved_vectors(), ids_of(3, "by night :\n")
    if "prefix" not in name and name != "cartridge":
        torch.testing.assert_close(found, base.get_input_embeddings()(ids)[0], rtol=0, atol=2e-4)
    elif kind in ("decoder", "encoder-decoder"):
        torch.testing.assert_close(found, keys_in_context(base, ids), rtol=0, atol=2e-4)
    assert all(parameter.requires_grad for parameter in model.prompt_encoder.parameters())


def test_an_encoder_that_is_too_small_says_how_far_it_is() -> None:
    config = PrefixTuningConfig(num_virtual_tokens=COUNT, prefix_projection=True, encoder_hidden_size=4)
    model = get_peft_model(tiny.build("gpt2"), config)
    started = initialize_from_examples(model, tiny.tokenizer(), EXAMPLES)
    target = keys_in_context(model.get_base_model(), ids_of())
    assert started.misfit == pytest.approx(float((model.encoder().saved_vectors() - target).norm() / target.norm()))
    assert 0.01 < started.misfit < 1


# ---- the best of several -----------------------------------------------------------------------------------------


def batch_loss(model: SoftPromptModel) -> Callable[[], float]:
    batch = tiny.ragged((9, 12, 7), seed=5)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def loss() -> float:
        assert not model.training and not torch.is_grad_enabled()
        return float(model(**batch, labels=labels).loss)

    return loss


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning_lstm", "prefix_ffn", "cartridge"])
def test_the_best_candidate_is_kept(name: str) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        model = get_peft_model(tiny.build("llama"), CONFIGS[name]).train()
        before = torch.get_rng_state()
        loss = batch_loss(model)
        found.append(initialize_from_examples(model, tiny.tokenizer(), MANY, candidates=3, loss=loss))
        assert model.training
        assert torch.equal(torch.get_rng_state(), before)
        model.eval()
        with torch.no_grad():
            assert loss() == min(found[-1].losses.values()) == found[-1].losses[found[-1].start]
    assert found[0] == found[1]
    names = [*(f"examples, draw {number}" for number in range(3)), "vocabulary", "random"]
    assert list(found[0].losses) == names
    assert len(set(found[0].losses.values())) == 5


@pytest.mark.parametrize("name", ["p_tuning_mlp", "prefix_ffn"])
def test_every_candidate_begins_from_the_encoder_as_it_was_drawn(name: str) -> None:
    """What a candidate is compared by does not depend on those before it, and `random` is the prompt as it was."""
    torch.manual_seed(1)
    model = get_peft_model(tiny.build("llama"), CONFIGS[name]).eval()
    fresh = {key: value.clone() for key, value in model.encoder().state_dict().items()}
    alone = get_peft_model(tiny.build("llama"), CONFIGS[name]).eval()
    alone.encoder().load_state_dict(fresh)
    loss = batch_loss(model)
    with torch.no_grad():
        random = loss()
    losses = initialize_from_examples(model, tiny.tokenizer(), EXAMPLES, candidates=2, loss=loss).losses
    assert losses["random"] == random
    initialize_from_examples(alone, tiny.tokenizer(), EXAMPLES)
    with torch.no_grad():
        assert losses["examples, draw 0"] == batch_loss(alone)()


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    encoder = get_peft_model(tiny.build("gpt2"), CONFIGS["prompt_tuning"]).encoder()
    fresh, losses = encoder.saved_vectors(), iter([float("nan"), 2.0, float("nan"), 3.0])

    def begin(value: float) -> float:
        encoder.start_from(torch.full_like(fresh, value))
        return 0.0

    best = best_of(encoder, {str(n): lambda n=n: begin(n) for n in range(4)}, lambda: next(losses))
    assert best.start == "1"
    assert torch.equal(encoder.saved_vectors(), torch.ones_like(fresh))


# ---- texts -------------------------------------------------------------------------------------------------------


def test_few_examples_are_taken_over_again() -> None:
    text = examples_text(["the cat", "a dog"], tiny.tokenizer(), 20)
    assert text.startswith("the cat\na dog\nthe cat\n")
    assert len(tiny.tokenizer()(text)["input_ids"]) > 20


def test_draws_differ_and_the_first_is_the_seed_alone() -> None:
    generator = torch.Generator().manual_seed(4)
    assert drawn(50, 4) == torch.randperm(50, generator=generator).tolist()
    assert len({tuple(drawn(50, 4, draw)) for draw in range(-1, 5)}) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": []}, "there is no text in the training examples"),
        ({"examples": ["", "  "]}, "there is no text in the training examples"),
        (
            {"instruction": "the cat sat on the mat by the river " * 3},
            r"the instruction takes \d+ tokens.*=12 leaves no",
        ),
        ({"candidates": 2}, "candidates=2 are compared by their loss"),
    ],
)
def test_what_cannot_be_a_start_is_named(options: dict[str, Any], message: str) -> None:
    model = get_peft_model(tiny.build("gpt2"), CONFIGS["prefix"])
    before = model.encoder().saved_vectors()
    with pytest.raises(ConfigError, match=message):
        initialize_from_examples(model, tiny.tokenizer(), **{"examples": EXAMPLES, **options})
    assert torch.equal(model.encoder().saved_vectors(), before)


def test_an_instruction_stands_before_a_context_of_examples() -> None:
    rows = [([5, 6, 7], [-100, -100, 7]), ([9, 10], [-100, 10])]
    config = CPTConfig(num_virtual_tokens=8).with_examples(rows, [3, 4])
    assert config.cpt_token_ids == [3, 4, 5, 6, 7, 9, 10]
    assert config.cpt_tokens_type_mask == [1, 1, 2, 2, 4, 6, 8]
    with pytest.raises(ConfigError, match="the instruction takes 2 tokens"):
        CPTConfig(num_virtual_tokens=2).with_examples(rows, [3, 4])


def test_the_docstring_runs(tmp_path: Path) -> None:
    """The lines that `initialize_from_examples` shows, as they stand there."""
    documented = (initialize_from_examples.__doc__ or "").splitlines()
    lines = [line.strip() for line in documented if line.startswith(" " * 8)]
    assert len(lines) == 3

    def collate(texts: list[str]) -> dict[str, Tensor]:
        batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    tokenizer, model = tiny.tokenizer(), get_peft_model(tiny.build("llama"), CONFIGS["prefix"])
    texts = MANY * 5
    names = {"collate": collate, "rows": texts, "texts": texts, "model": model, "tokenizer": tokenizer}
    names["initialize_from_examples"] = initialize_from_examples
    before = model.encoder().saved_vectors()
    exec("\n".join(lines), names)  # noqa: S102
    assert not torch.equal(model.encoder().saved_vectors(), before)
