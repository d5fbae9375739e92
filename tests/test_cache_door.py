"""The cache door, on families that attend in code of their own: what test_attention_door.py asks of the other door."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import families
import families_cache
import naive
import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel, StaticCache

from softprompt import (
    ConfigError,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    UnsupportedError,
    get_peft_model,
)
from softprompt.doors.cache import CacheDoor, Recording
from softprompt.prompt import KV

METHODS: dict[str, Callable[..., Any]] = {
    "prompt_tuning": lambda **more: PromptTuningConfig(num_virtual_tokens=6, **more),
    "p_tuning": lambda **more: PromptEncoderConfig(num_virtual_tokens=6, encoder_hidden_size=16, **more),
    "prefix": lambda **more: PrefixTuningConfig(num_virtual_tokens=6, **more),
    "prefix_ffn": lambda **more: PrefixTuningConfig(
        num_virtual_tokens=6, prefix_projection=True, encoder_hidden_size=16, **more
    ),
}
TWO_KINDS = ("prompt_tuning", "prefix")
FAMILIES = ("bloom", "mpt", "falcon_multi_query", "falcon_gqa", "falcon_alibi", "gptj")
ALIBI_FROM_MASK = ("bloom", "falcon_alibi")  # their code takes no 4-D mask
WITH_POSITIONS = ("falcon_multi_query", "falcon_gqa", "gptj")
FEW = ("mpt", "falcon_multi_query", "gptj")


def make(family: str, method: str, eager: bool = False) -> SoftPromptModel:
    base = families_cache.build(family) if family in families_cache.OTHERS else families.build(family, "CAUSAL_LM")
    if eager:  # these families cannot change it later
        state = base.state_dict()
        base = type(base)._from_config(copy.deepcopy(base.config), attn_implementation="eager").eval()
        base.load_state_dict(state)
        assert base.base_model.config._attn_implementation == "eager"
    torch.manual_seed(0)
    model = get_peft_model(base, METHODS[method]()).eval()
    assert isinstance(model.door, CacheDoor)
    return model


def ids_of(length: int, rows: int = 1) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, length))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=tolerance)


def each_row_alone(model: SoftPromptModel, batch: dict[str, Tensor], got: Tensor) -> None:
    """`got` `[B, T, V]` is, at real tokens, what the plain formulation gives for each row alone."""
    for row, out, mask in zip(naive.rows(batch), got, batch["attention_mask"], strict=True):
        close(out[mask.bool()], naive.logits(model, row)[0][0])


# ---- rows, positions, masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", [*FAMILIES, *families_cache.OTHERS])
def test_padded_rows_equal_single_ones(family: str, method: str, side: str) -> None:
    """Long padding: MPT's ALiBi and GPT-Neo's window count columns, and must not take it for distance."""
    model, batch = make(family, method), tiny.ragged((3, 14, 5), side=side)
    with torch.no_grad():
        each_row_alone(model, batch, model(**batch).logits)
        each_row_alone(model, batch, model(**batch, use_cache=False).logits)


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


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", WITH_POSITIONS)
def test_the_callers_positions_count_real_tokens(family: str, method: str, labelled: bool) -> None:
    model, batch = make(family, method), tiny.ragged(side="left")
    given = {"position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
    if labelled:
        given["labels"] = batch["input_ids"]
    each_row_alone(model, batch, model(**batch, **given).logits)


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
    expected = base(input_ids=ids, attention_mask=_as("float", seen), past_key_values=cache, **positions).logits
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
    with model.door.open(model.fold()):  # nor does the base model itself show the stand-in
        inside = model.get_base_model()(input_ids=ids, use_cache=False, return_dict=False)
    assert len(inside) == 1
    close(inside[0], expected.logits)


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
    with torch.no_grad(), model.door.open(both):
        out, tokens = base(**batch).logits, base.generate(**batch, **options)
    for index, (row, chosen) in enumerate(zip(naive.rows(batch), (2, 0, 2), strict=True)):
        with torch.no_grad(), model.door.open(three[chosen]):
            alone = base(input_ids=row).logits[0]
            close(out[index][batch["attention_mask"][index].bool()], alone)
            mask = torch.ones_like(row)
            again = base.generate(input_ids=row, attention_mask=mask, **options)
            assert torch.equal(tokens[index, -5:], again[0, -5:])
    with model.door.open(both), pytest.raises(ConfigError, match="3 rows"):
        base(input_ids=ids_of(4, rows=2))


@pytest.mark.parametrize("family", FEW)
def test_tasks_by_row(family: str) -> None:
    config = MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3)
    model = get_peft_model(families.build(family, "CAUSAL_LM"), config).eval()
    batch, tasks = tiny.ragged(side="left"), torch.tensor([1, 0, 1])
    out = model(**batch, task_ids=tasks).logits
    for row, task, got, mask in zip(naive.rows(batch), tasks, out, batch["attention_mask"].bool(), strict=True):
        close(got[mask], naive.run(model.get_base_model(), model.encoder().prompt(task[None]), row).logits[0, 4:])


# ---- caches and generation ---------------------------------------------------------------------------------------


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
        out = model(**batch, past_key_values=cache)
        assert out.past_key_values is cache
        assert cache.get_seq_length() == batch["input_ids"].shape[1]  # real tokens only
        width, steps = batch["input_ids"].shape[1], []
        for start, stop in ((0, 2), (2, 3), (3, 4)):
            seen = mask[:, : width + stop]
            steps.append(model(input_ids=more[:, start:stop], attention_mask=seen, past_key_values=cache).logits)
    close(torch.cat(steps, dim=1), expected[:, width:])
    each_row_alone(model, {"input_ids": everything, "attention_mask": mask}, expected)


@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_without_a_mask(family: str, method: str) -> None:
    model, ids = make(family, method), ids_of(9)
    first = model(input_ids=ids[:, :5], use_cache=True)
    second = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, second.logits], dim=1), naive.logits(model, ids)[0])


@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "falcon_alibi"])
def test_a_static_cache(family: str, method: str) -> None:
    model, ids = make(family, method), ids_of(9)
    cache = StaticCache(config=model.get_base_model().config, max_cache_len=20)
    with torch.no_grad():
        outputs = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([5, 3, 1], dim=1)]
    close(torch.cat(outputs, dim=1), naive.logits(model, ids)[0])


OPTIONS: dict[str, Any] = {
    "max_new_tokens": 6,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": tiny.PAD,
    "use_cache": True,
}


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
    model(input_ids=one["input_ids"][:, :-2], past_key_values=cache)  # prefilled by the caller
    assert torch.equal(model.generate(**one, **OPTIONS, past_key_values=cache), expected[1:2])
    assert cache.get_seq_length() == one["input_ids"].shape[1] + 5


# ---- gradient checkpointing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("before_wrapping", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(
    family: str, method: str, before_wrapping: bool, reentrant: bool
) -> None:
    batch = tiny.ragged(side="left")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    base, plain = families.build(family, "CAUSAL_LM"), make(family, method).train()
    if before_wrapping:
        _checkpoint(base, reentrant)
    model = get_peft_model(base, METHODS[method]()).train()
    if not before_wrapping:
        _checkpoint(model, reentrant)
    model.prompt_encoder.load_state_dict(plain.prompt_encoder.state_dict())
    gradients = []
    for each in (plain, model):
        each(**batch, labels=labels).loss.backward()
        gradients.append([parameter.grad for parameter in each.prompt_encoder.parameters()])
    for got, expected in zip(gradients[1], gradients[0], strict=True):
        assert torch.count_nonzero(expected)
        close(got, expected, 1e-6)


def _checkpoint(model: Any, reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})  # the first is the name in newer versions


def test_checkpointing_runs_the_layers_again() -> None:
    """The test above would pass if checkpointing were switched off on the way."""
    model, ids = make("bloom", "prefix").train(), ids_of(5)
    _checkpoint(model, reentrant=False)
    runs: list[int] = []
    model.get_base_model().transformer.h[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(runs) == 2


def test_checkpointing_every_other_layer() -> None:
    """The layers in between get the stand-in for the cache as they always do, once."""
    model, batch = make("bloom", "prefix").train(), tiny.ragged(side="left")
    parameters = list(model.prompt_encoder.parameters())
    expected = torch.autograd.grad(model(**batch, labels=batch["input_ids"]).loss, parameters)
    _checkpoint(model, reentrant=False)
    model.get_base_model().transformer.h[1].gradient_checkpointing = False
    got = torch.autograd.grad(model(**batch, labels=batch["input_ids"]).loss, parameters)
    close(got[0], expected[0], 1e-6)


def test_a_filled_cache_under_checkpointing_is_refused() -> None:
    model, ids = make("bloom", "prefix"), ids_of(5)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    _checkpoint(model, reentrant=False)
    model.train()
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        model(input_ids=ids, past_key_values=cache)


# ---- the base model is as it was ---------------------------------------------------------------------------------


class _StopError(Exception):
    pass


def _fail_inside(base: PreTrainedModel) -> Any:
    def hook(*_: Any) -> None:
        raise _StopError

    return base.base_model.register_forward_hook(hook)


@pytest.mark.parametrize("call", ["forward", "loss", "generate", "fold"])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", FEW)
def test_nothing_is_left_behind_even_by_an_exception(family: str, method: str, call: str) -> None:
    base, ids = families.build(family, "CAUSAL_LM"), ids_of(5)
    keys, before, backend = list(base.state_dict()), base(input_ids=ids).logits, base.config._attn_implementation
    model = get_peft_model(base, METHODS[method]()).eval()
    _checkpoint(model, reentrant=False)
    functions = [module.__dict__.get("_gradient_checkpointing_func") for module in base.modules()]
    hooks = [(dict(module._forward_pre_hooks), dict(module._forward_hooks)) for module in base.modules()]
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(input_ids=ids),
        "loss": lambda: model(input_ids=ids, labels=ids).loss.backward(),
        "generate": lambda: model.generate(input_ids=ids, max_new_tokens=2),
        "fold": model.fold,
    }
    for fails in (False, True):
        if call == "fold" and method == "prefix":
            fails = False  # nothing runs
        handle = _fail_inside(base) if fails else None
        if fails:
            with pytest.raises(_StopError):
                calls[call]()
        else:
            calls[call]()
        if handle is not None:
            handle.remove()
        assert base.config._attn_implementation == backend
        assert [(m._forward_pre_hooks, m._forward_hooks) for m in base.modules()] == hooks
        assert [m.__dict__.get("_gradient_checkpointing_func") for m in base.modules()] == functions
        assert list(base.state_dict()) == keys
        assert torch.equal(base(input_ids=ids).logits, before)


@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_it_is_the_base_model(family: str, method: str) -> None:
    model, batch = make(family, method), tiny.ragged(side="left")
    plain = families.build(family, "CAUSAL_LM")
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
        assert torch.equal(model.generate(**batch, **OPTIONS), plain.generate(**batch, **OPTIONS))


@pytest.mark.parametrize("family", FEW)
def test_threads_share_one_model(family: str) -> None:
    """While one thread is inside, another one's prompt and the plain model are what they are alone."""
    model, ids = make(family, "prefix"), ids_of(6)
    base = model.get_base_model()
    with torch.no_grad():
        plain, prompted = base(input_ids=ids).logits, model(input_ids=ids).logits
    inside, release, seen = threading.Event(), threading.Event(), {}

    def wait(*_: Any) -> None:
        if threading.current_thread().name == "slow":
            inside.set()
            assert release.wait(20)

    handle = base.get_input_embeddings().register_forward_pre_hook(wait)

    def slow() -> None:
        with torch.no_grad():
            seen["slow"] = model(input_ids=ids).logits

    thread = threading.Thread(target=slow, name="slow")
    thread.start()
    assert inside.wait(20)
    with torch.no_grad():
        seen["plain"], seen["prompted"] = base(input_ids=ids).logits, model(input_ids=ids).logits
    release.set()
    thread.join()
    handle.remove()
    close(seen["plain"], plain)
    close(seen["prompted"], prompted)
    close(seen["slow"], prompted)
    assert not base.base_model._forward_pre_hooks


@pytest.mark.parametrize("method", TWO_KINDS)
def test_a_deep_copy_is_a_model_of_its_own(method: str) -> None:
    model, ids = make("gptj", method), ids_of(5)
    again = copy.deepcopy(model)
    expected = model(input_ids=ids).logits
    close(again(input_ids=ids).logits, expected)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    close(model(input_ids=ids).logits, expected)
    assert not torch.allclose(again(input_ids=ids).logits, expected, atol=1e-3)


@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_float32_prompt_trains_on_a_bfloat16_base(family: str, method: str) -> None:
    batch = tiny.ragged(side="left")
    model = get_peft_model(families.build(family, "CAUSAL_LM").to(torch.bfloat16), METHODS[method]())
    exact = make(family, method)
    model.prompt_encoder.load_state_dict(exact.prompt_encoder.state_dict())
    out = model(**batch, labels=batch["input_ids"])
    out.loss.backward()
    assert out.logits.dtype is torch.bfloat16
    for parameter in model.prompt_encoder.parameters():
        assert parameter.grad.dtype is torch.float32
        assert parameter.grad.isfinite().all()
        assert torch.count_nonzero(parameter.grad)
    assert abs(out.loss.item() - exact(**batch, labels=batch["input_ids"]).loss.item()) < 0.3


# ---- the door itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_recorded_is_what_a_cache_would_hold(family: str) -> None:
    """Shapes come from what goes through the cache: one head for multi-query, all of them for Falcon's groups."""
    base, ids = families.build(family, "CAUSAL_LM"), ids_of(4)
    cache, recording = DynamicCache(config=base.config), Recording()
    base(input_ids=ids, past_key_values=cache)
    with CacheDoor(base).open(None, recording):
        base.base_model(input_ids=ids, use_cache=False)
    for layer, (key, value), module in zip(cache.layers, recording.layers, recording.modules, strict=True):
        assert torch.equal(layer.keys, key)
        assert torch.equal(layer.values, value)
        assert type(module).__name__.endswith("Attention")
    assert len({id(module) for module in recording.modules}) == 2


def test_a_recording_keeps_its_gradient_under_checkpointing() -> None:
    """A fold while the model trains: the loss reaches the prompt through keys that checkpointing would have cut."""
    model = make("gptj", "prompt_tuning").train()
    _checkpoint(model, reentrant=True)
    ids = ids_of(5)
    cross_entropy(model(input_ids=ids).logits[0], ids[0]).backward()
    (prompt,) = model.prompt_encoder.parameters()
    assert prompt.grad is not None
    assert torch.count_nonzero(prompt.grad)


def test_a_decoder_that_the_door_gets_wrong_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"RoFormerForCausalLM .*bloom, mpt, falcon or gptj"):
        get_peft_model(families_cache.build("roformer"), PromptTuningConfig())


def test_other_backends_are_refused() -> None:
    model, ids = make("falcon_multi_query", "prefix"), ids_of(4)
    model.get_base_model().config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedError, match="attn_implementation='sdpa' or 'eager'"):
        model(input_ids=ids)
