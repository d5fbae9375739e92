"""The cache door, on families that attend in code of their own: what test_attention_door.py asks of the other door."""

from typing import Any

import families
import families_cache
import hf_cache
import naive
import pytest
import tiny
import torch
from cache_kit import (
    ALIBI_FROM_MASK,
    FAMILIES,
    FEW,
    METHODS,
    OPTIONS,
    TWO_KINDS,
    WITH_POSITIONS,
    close,
    each_row_alone,
    ids_of,
    make,
)
from torch import Tensor
from transformers import DynamicCache, StaticCache

from softprompt import (
    ConfigError,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    initialize_kv_prefix_from_text,
)
from softprompt.prompt import KV

# ---- rows, positions, masks --------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", [*FAMILIES, *families_cache.OTHERS])
def test_padded_rows_equal_single_ones(family: str, method: str, side: str) -> None:
    """Long padding: MPT's ALiBi and GPT-Neo's window count columns, and must not take it for distance."""
    model, batch = make(family, method), tiny.ragged((3, 14, 5), side=side)
    with torch.no_grad():
        each_row_alone(model, batch, model(**batch).logits)
        each_row_alone(model, batch, model(**batch, use_cache=False).logits)


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", families_cache.OTHERS)
def test_loss_and_gradients_of_other_decoders(family: str, method: str, side: str) -> None:
    model, batch = make(family, method), tiny.ragged(side=side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    parameters = list(model.prompt_encoder.parameters())
    loss, expected = model(**batch, labels=labels).loss, naive.loss(model, batch, labels)
    close(loss, expected)
    for got, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert torch.count_nonzero(wanted)
        close(got, wanted)


@pytest.mark.pairwise
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", WITH_POSITIONS)
def test_the_callers_positions_count_real_tokens(family: str, method: str, labelled: bool) -> None:
    model, batch = make(family, method), tiny.ragged(side="left")
    given = {"position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
    if labelled:
        given["labels"] = batch["input_ids"]
    each_row_alone(model, batch, model(**batch, **given).logits)


@pytest.mark.pairwise
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", WITH_POSITIONS)
def test_packed_rows(family: str, method: str, labelled: bool) -> None:
    """Several sequences in one row, told apart by positions that start again: each sees the prompt and itself."""
    model, rows = make(family, method), [ids_of(4), ids_of(6), ids_of(3)]
    packed = torch.cat(rows, dim=1)
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    more = {"labels": packed} if labelled else {}
    out = model(input_ids=packed, position_ids=positions, use_cache=False, **more).logits
    for row, got in zip(rows, out.split([4, 6, 3], dim=1), strict=True):
        close(got, naive.logits(model, row)[0])


@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("mpt", "CAUSAL_LM"),
        ("mpt", "FEATURE_EXTRACTION"),
        ("bloom", "CAUSAL_LM"),
        ("falcon_multi_query", "SEQ_CLS"),
        ("falcon_alibi", "CAUSAL_LM"),
    ],
)
def test_packed_rows_are_refused_where_positions_are_ignored(family: str, task: str, method: str) -> None:
    model = get_peft_model(families.build(family, task), METHODS[method]()).eval()
    model(input_ids=ids_of(4), position_ids=torch.tensor([[0, 1, 2, 3]]))
    with pytest.raises(ConfigError, match="give each"):
        model(input_ids=ids_of(4), position_ids=torch.tensor([[0, 1, 0, 1]]))


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ALIBI_FROM_MASK])
def test_four_dimensional_masks(family: str, method: str, kind: str) -> None:
    """A mask that hides token 1 from all later ones; the prompt is visible to all."""
    model, ids = make(family, method), ids_of(6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[2:, 1] = False
    out = model(input_ids=ids, attention_mask=_as(kind, mask)).logits
    base = model.get_base_model()
    cache = naive.in_cache(base, model.fold())
    seen = torch.cat([torch.ones(6, 6, dtype=torch.bool), mask], dim=1)
    positions = {"position_ids": torch.arange(6, 12)[None]} if family in WITH_POSITIONS else {}
    expected = base(input_ids=ids, attention_mask=_as("float", seen), **hf_cache.given(base, cache), **positions).logits
    close(out, expected)
    assert not torch.allclose(out, model(input_ids=ids).logits, atol=1e-3)  # the mask does something


def _as(kind: str, visible: Tensor) -> Tensor:
    if kind == "bool":
        return visible[None, None]
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", ALIBI_FROM_MASK)
def test_a_square_mask_that_a_family_cannot_take_is_refused(family: str, method: str) -> None:
    model, ids = make(family, method), ids_of(4)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    with pytest.raises(ConfigError, match="one of two dimensions"):
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.pairwise
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_embedded_inputs_equal_ids(family: str, method: str, labelled: bool) -> None:
    model, batch = make(family, method), tiny.ragged(side="left")
    embedded = model.get_base_model().get_input_embeddings()(batch["input_ids"])
    more = {"labels": batch["input_ids"]} if labelled else {}
    expected = model(**batch, **more)
    got = model(inputs_embeds=embedded, attention_mask=batch["attention_mask"], **more)
    close(got.logits, expected.logits)
    if labelled:
        close(got.loss, expected.loss)


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", ["falcon_multi_query", "falcon_gqa", "falcon_alibi"])
def test_falcon_attends_in_two_ways(family: str, method: str, side: str) -> None:
    """Eager attention too equals single rows; the two ways agree except for ALiBi, which Falcon's eager adds twice."""
    model, batch = make(family, method, eager=True), tiny.ragged(side=side)
    with torch.no_grad():
        eager = model(**batch).logits
        each_row_alone(model, batch, eager)
        sdpa = make(family, method)(**batch).logits
    real = batch["attention_mask"].bool()
    assert torch.allclose(eager[real], sdpa[real], atol=1e-5) == (family != "falcon_alibi")


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", FEW)
def test_attention_weights_are_those_of_real_tokens(family: str, method: str, side: str) -> None:
    model, batch = make(family, method, eager=True), tiny.ragged(side=side)
    base = model.get_base_model()
    out = model(**batch, output_attentions=True)
    for index, (row, mask) in enumerate(zip(naive.rows(batch), batch["attention_mask"].bool(), strict=True)):
        with naive.prefilled(base, model.fold()):
            alone = base(input_ids=row, output_attentions=True).attentions
        for got, expected in zip(out.attentions, alone, strict=True):
            assert got.shape[2:] == (9, 9)
            close(got[index][:, mask][:, :, mask], expected[0][:, :, 6:])


@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", FEW)
def test_tuples(family: str, method: str) -> None:
    model, ids = make(family, method), ids_of(5)
    expected = model(input_ids=ids, use_cache=True)
    got = model(input_ids=ids, use_cache=True, return_dict=False)
    close(got[0], expected.logits)
    assert type(got[1]) is DynamicCache
    assert got[1].get_seq_length() == 5
    without = model(input_ids=ids, use_cache=False, return_dict=False)
    assert len(without) == 1
    close(without[0], expected.logits)


@pytest.mark.parametrize("family", ["mpt", "gptj"])
def test_tokens_beyond_the_table_are_refused(family: str) -> None:
    model = make(family, "prefix")
    with torch.no_grad():
        model(input_ids=ids_of(tiny.CONTEXT - 6))
        with pytest.raises(ConfigError, match=f"161 tokens.* {tiny.CONTEXT} positions"):
            model(input_ids=ids_of(tiny.CONTEXT - 5))
        with pytest.raises(ConfigError, match=f"context of {tiny.CONTEXT}"):
            get_peft_model(model.get_base_model(), PrefixTuningConfig(num_virtual_tokens=tiny.CONTEXT))


@pytest.mark.parametrize("family", FEW)
def test_each_row_has_its_own_prefix(family: str) -> None:
    """One of three prefixes per row, in batches that beams have widened as well."""
    model, batch = make(family, "prefix"), tiny.ragged(side="left")
    base, generator = model.get_base_model(), torch.Generator().manual_seed(1)
    three = [model.fold().map(lambda part: torch.randn(part.shape, generator=generator)) for _ in range(3)]
    both = KV(
        tuple(
            (torch.cat([kv.layers[n][0] for kv in three]), torch.cat([kv.layers[n][1] for kv in three]))
            for n in range(2)
        ),
        rows=torch.tensor([2, 0, 2]),
    )
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 2, "eos_token_id": None, "pad_token_id": tiny.PAD}
    with torch.no_grad(), model.way.open(both):
        out, tokens = base(**batch).logits, base.generate(**batch, **options)
    for index, (row, chosen) in enumerate(zip(naive.rows(batch), (2, 0, 2), strict=True)):
        with torch.no_grad(), model.way.open(three[chosen]):
            alone = base(input_ids=row).logits[0]
            close(out[index][batch["attention_mask"][index].bool()], alone)
            mask = torch.ones_like(row)
            again = base.generate(input_ids=row, attention_mask=mask, **options)
            assert torch.equal(tokens[index, -5:], again[0, -5:])
    with model.way.open(both), pytest.raises(ConfigError, match="3 rows"):
        base(input_ids=ids_of(4, rows=2))


@pytest.mark.parametrize("family", FEW)
def test_tasks_by_row(family: str) -> None:
    config = MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3)
    model = get_peft_model(families.build(family, "CAUSAL_LM"), config).eval()
    batch, tasks = tiny.ragged(side="left"), torch.tensor([1, 0, 1])
    out = model(**batch, task_ids=tasks).logits
    for row, task, got, mask in zip(naive.rows(batch), tasks, out, batch["attention_mask"].bool(), strict=True):
        close(got[mask], naive.run(model.get_base_model(), model.encoder().prompt(task[None]), row).logits[0, 4:])


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_inside_the_row(family: str, side: str) -> None:
    """After the first token, and at slots of a template; generation from there equals the plain one."""
    for placement in ("after_bos", "template"):
        config = PromptTuningConfig(num_virtual_tokens=3, placement=placement)
        model, batch = get_peft_model(families.build(family, "CAUSAL_LM"), config).eval(), tiny.ragged(side=side)
        base, vectors = model.get_base_model(), model.encoder().prompt().vectors
        table, slots = base.get_input_embeddings(), torch.full_like(batch["input_ids"], -1)
        for row in range(3):  # tokens 1, 3 and 4 of each row are virtual
            start = int(batch["attention_mask"][row].argmax())
            slots[row, start + torch.tensor([1, 3, 4])] = torch.arange(3)
        more = {"slots": slots} if placement == "template" else {}
        with torch.no_grad():
            out = model(**batch, **more).logits
            for index, row in enumerate(naive.rows(batch)):
                embedded = table(row)
                if placement == "template":
                    embedded[:, [1, 3, 4]] = vectors
                else:
                    embedded = torch.cat([embedded[:, :1], vectors, embedded[:, 1:]], dim=1)
                expected = base(inputs_embeds=embedded).logits[0]
                real = [0, *range(4, expected.shape[0])] if placement == "after_bos" else slice(None)
                close(out[index][batch["attention_mask"][index].bool()], expected[real])
                if side == "left":
                    tokens = model.generate(**batch, **more, **OPTIONS)[index, -6:]
                    for token in tokens:
                        assert token == base(inputs_embeds=embedded).logits[0, -1].argmax()
                        embedded = torch.cat([embedded, table(token[None, None])], dim=1)


@pytest.mark.parametrize("family", [*FAMILIES, *families_cache.OTHERS])
def test_a_prefix_from_a_text_is_that_text_in_front(family: str) -> None:
    model, tokenizer, row = make(family, "prefix"), tiny.tokenizer(), ids_of(5)
    text = "the cat sat on the mat and the dog ran"
    initialize_kv_prefix_from_text(model, tokenizer, text=text, use_chat_template=False)
    front = tokenizer(text, return_tensors="pt").input_ids[:, :6]
    with torch.no_grad():
        close(model(input_ids=row).logits, model.get_base_model()(torch.cat([front, row], dim=1)).logits[:, 6:])


# ---- caches and generation ---------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_by_hand_with_a_cache(family: str, method: str, side: str) -> None:
    """Chunk by chunk on the caller's cache equals one forward over everything."""
    if (family, side) == ("mpt", "right"):
        return  # MPT takes padding between two tokens for distance, with or without a prompt
    model, batch, more = make(family, method), tiny.ragged(side=side), ids_of(4, rows=3)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], dim=1)
    everything = torch.cat([batch["input_ids"], more], dim=1)
    cache = DynamicCache(config=model.get_base_model().config)
    with torch.no_grad():
        expected = model(input_ids=everything, attention_mask=mask, use_cache=False).logits
        out = model(**batch, **hf_cache.given(model, cache))
        assert hf_cache.of(out) is cache
        assert cache.get_seq_length() == batch["input_ids"].shape[1]  # real tokens only
        width, steps = batch["input_ids"].shape[1], []
        for start, stop in ((0, 2), (2, 3), (3, 4)):
            seen = mask[:, : width + stop]
            steps.append(
                model(input_ids=more[:, start:stop], attention_mask=seen, **hf_cache.given(model, cache)).logits
            )
    close(torch.cat(steps, dim=1), expected[:, width:])
    each_row_alone(model, {"input_ids": everything, "attention_mask": mask}, expected)


@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_without_a_mask(family: str, method: str) -> None:
    model, ids = make(family, method), ids_of(9)
    first = model(input_ids=ids[:, :5], use_cache=True)
    second = model(input_ids=ids[:, 5:], **hf_cache.given(model, hf_cache.of(first)))
    close(torch.cat([first.logits, second.logits], dim=1), naive.logits(model, ids)[0])


@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "falcon_alibi"])
def test_a_static_cache(family: str, method: str) -> None:
    model, ids = make(family, method), ids_of(9)
    base = model.get_base_model()
    try:
        base(input_ids=ids, **hf_cache.given(base, StaticCache(config=base.config, max_cache_len=20)))
    except RuntimeError as error:
        pytest.skip(f"this version's {family} itself takes no static cache without a mask: {error}")
    cache = StaticCache(config=base.config, max_cache_len=20)
    with torch.no_grad():
        outputs = [model(input_ids=part, **hf_cache.given(model, cache)).logits for part in ids.split([5, 3, 1], dim=1)]
    close(torch.cat(outputs, dim=1), naive.logits(model, ids)[0])


@pytest.mark.pairwise
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [*FAMILIES, *families_cache.OTHERS])
def test_generating_for_a_batch_equals_single_rows(family: str, method: str) -> None:
    model, batch = make(family, method), tiny.ragged((3, 14, 5), side="left")
    tokens = model.generate(**batch, **OPTIONS)[:, -6:]
    beams = model.generate(**batch, **OPTIONS, num_beams=3, num_return_sequences=2)[:, -6:]
    for index, row in enumerate(naive.rows(batch)):
        with torch.no_grad():
            assert torch.equal(tokens[index][None], naive.greedy(model, row, 6))
        alone = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **OPTIONS, num_beams=3)
        assert torch.equal(beams[2 * index], alone[0, -6:])


@pytest.mark.pairwise
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_of_decoding_gives_the_same_tokens(family: str, method: str) -> None:
    model, batch = make(family, method), tiny.ragged(side="left")
    expected = model.generate(**batch, **OPTIONS)
    assert torch.equal(model.generate(**batch, **{**OPTIONS, "use_cache": False}), expected)
    if family != "falcon_alibi":  # which has no static cache of its own either
        assert torch.equal(model.generate(**batch, **OPTIONS, cache_implementation="static"), expected)
    if family != "gptj" and not method.startswith("prefix"):  # generate takes embeddings where a model is made to
        embedded = model.get_base_model().get_input_embeddings()(batch["input_ids"])
        start = {"inputs_embeds": embedded, "attention_mask": batch["attention_mask"]}
        assert torch.equal(model.generate(**start, **OPTIONS), expected[:, -6:])
    one = {"input_ids": batch["input_ids"][1:2], "attention_mask": batch["attention_mask"][1:2]}  # has no padding
    assert torch.equal(model.generate(**one, **OPTIONS, prompt_lookup_num_tokens=2), expected[1:2])
    cache = DynamicCache(config=model.get_base_model().config)
    model(input_ids=one["input_ids"][:, :-2], **hf_cache.given(model, cache))  # prefilled by the caller
    assert torch.equal(model.generate(**one, **OPTIONS, **hf_cache.given(model, cache)), expected[1:2])
    assert cache.get_seq_length() == one["input_ids"].shape[1] + 5
