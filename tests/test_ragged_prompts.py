"""Rows with prompts of different lengths in one batch, on every door: each gets what it gets alone."""

from typing import Any

import hf_cache
import pytest
import ragged_kit as kit
import tiny
import torch
from ragged_kit import PLAIN, TOKENS, Model

from softprompt.call import Call
from softprompt.config import Placement

SIDES = ("left", "right")
IN_ROWS = ("bert", "roberta", "deberta_v2", "modernbert")  # vectors stand in the rows
STATEFUL = ("mamba", "qwen3_next", "lfm2", "jamba")
IN_CACHE = ("bloom", "mpt", "falcon_multi_query", "falcon_gqa", "falcon_alibi", "gptj")
FOLDED = ("gpt2", "llama", "mistral_window")
SEQ2SEQ = ("t5", "bart", "mbart", "pegasus", "blenderbot")
AFTER, FRONT = Placement.AFTER_BOS, Placement.FRONT


def check_logits(model: Model, kind: str, side: str, placement: Placement = FRONT, masked: bool = True) -> None:
    _, joined, single = model.prompts(kind)
    batch = tiny.ragged(TOKENS if masked else (5,) * len(TOKENS), side=side)
    given = batch if masked else {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        got = model.run(joined, placement).forward(Call.of(dict(given))).logits
        for row, ids in enumerate(kit.each_row(batch)):
            expected = model.forward_alone(single[row], placement, input_ids=ids).logits[0]
            kit.close(got[row][batch["attention_mask"][row].bool()], expected)


@pytest.mark.pairwise
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("placement", [FRONT, AFTER])
@pytest.mark.parametrize("family", IN_ROWS)
def test_encoders(family: str, placement: Placement, side: str) -> None:
    check_logits(Model(family, "MASKED_LM"), "vectors", side, placement)


@pytest.mark.parametrize("placement", [FRONT, AFTER])
@pytest.mark.parametrize("family", IN_ROWS)
def test_encoders_without_a_mask(family: str, placement: Placement) -> None:
    check_logits(Model(family, "MASKED_LM"), "vectors", "right", placement, masked=False)


@pytest.mark.pairwise
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["keys", "both"])
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_keys_and_values_on_encoders(family: str, kind: str, side: str) -> None:
    """`both`: vectors in some rows, keys and values for another, each where the other has none."""
    check_logits(Model(family, "MASKED_LM"), kind, side)


@pytest.mark.pairwise
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("placement", [FRONT, AFTER])
@pytest.mark.parametrize("family", STATEFUL)
def test_models_with_a_state(family: str, placement: Placement, side: str) -> None:
    check_logits(Model(family), "vectors", side, placement)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("family", ["qwen3_next", "lfm2"])
def test_hybrids_with_both_kinds(family: str, masked: bool) -> None:
    check_logits(Model(family), "both", "left", masked=masked)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", FOLDED)
def test_behind_the_first_token_of_a_decoder(family: str, side: str) -> None:
    check_logits(Model(family), "vectors", side, AFTER)
    check_logits(Model(family), "both", side, AFTER)


@pytest.mark.pairwise
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["vectors", "keys"])
@pytest.mark.parametrize("family", FOLDED + IN_CACHE)
def test_decoders(family: str, kind: str, side: str) -> None:
    check_logits(Model(family), kind, side)


@pytest.mark.parametrize("kind", ["vectors", "keys"])
@pytest.mark.parametrize("family", FOLDED + IN_CACHE)
def test_decoders_without_a_mask(family: str, kind: str) -> None:
    check_logits(Model(family), kind, "right", masked=False)


# ---- loss and gradients --------------------------------------------------------------------------------------------


def check_loss(model: Model, kind: str, side: str, placement: Placement = FRONT, causal: bool = True) -> None:
    """The joint loss is the mean over all labels of what each row's tokens cost alone."""
    leaves, joined, single = model.prompts(kind)
    batch = tiny.ragged(TOKENS, side=side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    got = model.run(joined, placement).forward(Call.of({**batch, "labels": labels})).loss
    total, count = torch.zeros(()), 0
    for row, ids in enumerate(kit.each_row(batch)):
        prompt = single[row]
        predicted = not causal or (hasattr(prompt, "vectors") and placement is FRONT)  # something precedes the first
        number = ids.shape[1] - (not predicted)
        total = total + number * model.forward_alone(prompt, placement, input_ids=ids, labels=ids).loss
        count += number
    kit.close(got, total / count)
    kit.same_gradients(got, total / count, leaves)


@pytest.mark.pairwise
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["vectors", "keys"])
@pytest.mark.parametrize("family", [*FOLDED, "bloom", "mpt", "falcon_alibi", "gptj"])
def test_loss_of_decoders(family: str, kind: str, side: str) -> None:
    check_loss(Model(family), kind, side)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", STATEFUL)
def test_loss_of_models_with_a_state(family: str, side: str) -> None:
    model = Model(family)
    check_loss(model, "vectors", side)
    check_loss(model, "vectors", side, AFTER)


@pytest.mark.pairwise
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["vectors", "keys", "both"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_loss_of_encoders(family: str, kind: str, side: str) -> None:
    check_loss(Model(family, "MASKED_LM"), kind, side, causal=False)


@pytest.mark.parametrize("kind", ["vectors", "keys"])
@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_gradient_checkpointing(family: str, kind: str) -> None:
    model = Model(family)
    leaves, joined, _ = model.prompts(kind)
    batch = tiny.ragged(TOKENS)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    plain = model.run(joined).forward(Call.of({**batch, "labels": labels, "use_cache": False})).loss
    base: Any = model.base
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.base.train()
    got = model.run(joined).forward(Call.of({**batch, "labels": labels, "use_cache": False})).loss
    kit.close(got, plain)
    kit.same_gradients(got, plain, leaves)


# ---- generation ----------------------------------------------------------------------------------------------------


def check_generate(model: Model, kind: str, beams: int, placement: Placement = FRONT, **more: Any) -> None:
    _, joined, single = model.prompts(kind)
    batch = tiny.ragged(TOKENS, side="left")
    options = {**PLAIN, "num_beams": beams, **more}
    with torch.no_grad():
        got = model.run(joined, placement).generate(**batch, **options)
        for row, ids in enumerate(kit.each_row(batch)):
            prompt, mask = single[row], torch.ones_like(ids)
            run: Any = model.base if prompt is None else model.run(prompt, placement)
            expected = run.generate(input_ids=ids, attention_mask=mask, **options)
            assert torch.equal(got[row, -5:], expected[0, -5:]), row


@pytest.mark.pairwise
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["vectors", "keys"])
@pytest.mark.parametrize("family", [*FOLDED, "bloom", "mpt", "gptj"])
def test_generate(family: str, kind: str, beams: int) -> None:
    check_generate(Model(family), kind, beams)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_generate_with_a_state(family: str, beams: int) -> None:
    check_generate(Model(family), "vectors", beams)
    check_generate(Model(family), "vectors", beams, AFTER)


@pytest.mark.parametrize("family", ["gptj", "mpt", "llama"])
def test_generate_with_a_static_cache_and_without_any(family: str) -> None:
    model = Model(family)
    check_generate(model, "keys", 1, cache_implementation="static")
    check_generate(model, "keys", 1, use_cache=False)


def test_later_steps_of_rows_with_vectors_in_them() -> None:
    """A hybrid's cache holds the vectors; the next call is given the mask of real tokens."""
    model = Model("lfm2")
    _, joined, single = model.prompts("vectors")
    batch = tiny.ragged(TOKENS, side="left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    first = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], "use_cache": True}
    with torch.no_grad():
        cache = hf_cache.of(model.run(joined).forward(Call.of(first)))
        rest = {"input_ids": ids[:, -1:], "attention_mask": mask, **hf_cache.given(model.base, cache)}
        got = model.run(joined).forward(Call.of(rest)).logits[:, -1]
        for row, own in enumerate(kit.each_row(batch)):
            kit.close(got[row], model.forward_alone(single[row], input_ids=own).logits[0, -1])


@pytest.mark.parametrize("kind", ["vectors", "keys", "both"])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "bert", "t5", "bart"])
def test_eager_attention(family: str, kind: str) -> None:
    task = {"bert": "MASKED_LM", "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}.get(family, "CAUSAL_LM")
    model = Model(family, task)
    _, joined, _ = model.prompts(kind)
    batch = tiny.ragged(TOKENS, side="left")
    given = {**batch, "decoder_input_ids": batch["input_ids"].flip(1)} if task == "SEQ_2_SEQ_LM" else batch
    placement = AFTER if kind == "both" and task == "CAUSAL_LM" else FRONT
    real = batch["attention_mask"].bool() if task != "SEQ_2_SEQ_LM" else ...
    with torch.no_grad():
        expected = model.run(joined, placement).forward(Call.of(dict(given))).logits[real]
        model.base.set_attn_implementation("eager")
        kit.close(model.run(joined, placement).forward(Call.of(dict(given))).logits[real], expected)
