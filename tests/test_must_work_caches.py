"""Every kind of cache, and every way of decoding on one, with a prompt in front: the caller's cache is like any other.

Where the other tests stop: families that attend in code of their own, encoder-decoders, caches that round or move what
they hold, caches that users write and share, and drafts by assistants with prompts of their own. The reference is the
plain formulation of `naive.py`, one row at a time, recomputed for every token.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import hf_cache
import naive
import pytest
import tiny
import torch
import transformers
from families import build
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache

from softprompt import ConfigError, PrefixTuningConfig, PromptTuningConfig, SoftPromptModel, get_peft_model

COUNT, NEW = 4, 6
METHODS: dict[str, Callable[..., Any]] = {
    "prompt_tuning": lambda **more: PromptTuningConfig(num_virtual_tokens=COUNT, **more),
    "prefix": lambda **more: PrefixTuningConfig(num_virtual_tokens=COUNT, **more),
}
DOORS = ("gpt2", "llama")  # through the attention door
OWN_CODE = ("bloom", "mpt", "falcon_multi_query", "gptj")  # through the cache door
BOTH_STACKS = ("t5", "bart")
OPTIONS: dict[str, Any] = {
    "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True
}  # fmt: skip


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def make(family: str, method: str, seed: int = 0) -> SoftPromptModel:
    task = "SEQ_2_SEQ_LM" if family in BOTH_STACKS else "CAUSAL_LM"
    base = build(family, task, seed)
    torch.manual_seed(seed)
    return get_peft_model(base, METHODS[method](task_type=task)).eval()


def ids_of(length: int = 6, rows: int = 1) -> Tensor:
    return torch.randint(3, tiny.VOCAB - 8, (rows, length))


def plain(model: SoftPromptModel, row: Tensor) -> Tensor:
    """What follows a row, by the plain formulation."""
    decode = naive.decode if naive.encodes_and_decodes(model.get_base_model()) else naive.greedy
    return decode(model, row, NEW)


def ours(model: SoftPromptModel, ids: Tensor, **options: Any) -> Tensor:
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{**OPTIONS, **options})
    return out[:, -NEW:]


# ---- the caches generate makes -----------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in OWN_CODE + BOTH_STACKS for kind in ("static", "dynamic", "none", "lookup")]
    + [(family, "chunks") for family in OWN_CODE],  # of an encoder's row transformers would cut the mask
)
@pytest.mark.parametrize("method", METHODS)
def test_padded_batches_on_each_cache_of_generate(family: str, method: str, kind: str) -> None:
    model, batch = make(family, method), tiny.ragged(side="left")
    options: dict[str, Any] = {
        "static": {"cache_implementation": "static"},
        "dynamic": {},
        "none": {"use_cache": False},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "chunks": {"prefill_chunk_size": 2},
    }[kind]
    expected = [plain(model, row) for row in naive.rows(batch)]
    if kind == "lookup":  # transformers drafts for one row at a time
        got = [ours(model, row.repeat(1, 1), **options) for row in naive.rows(batch)]
    else:
        got = [model.generate(**batch, **{**OPTIONS, **options})[:, -NEW:]]
    assert torch.equal(torch.cat(got), torch.cat(expected))


# ---- caches that round what they hold ----------------------------------------------------------------------------


class Rounding(DynamicCache):
    """A user's own quantised cache: what it held before this call comes back in steps of 1/8."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key, value, layer_idx, *args, **kwargs)
        old = keys.shape[2] - key.shape[2]
        return tuple(
            torch.cat([(8 * each[:, :, :old]).round() / 8, each[:, :, old:]], dim=2) for each in (keys, values)
        )  # type: ignore[return-value]


def rounding(kind: str, model: SoftPromptModel) -> Any:
    if kind == "own":
        return Rounding()
    if kind == "fp8" and not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this version of transformers has no fp8 cache")
    if kind != "fp8":
        pytest.importorskip({"quanto": "optimum.quanto.tensor", "hqq": "hqq"}[kind])
    groups = {} if kind == "fp8" else {"q_group_size": 8}  # as wide as the tiny models' heads
    return QuantizedCache(backend=kind, config=model.get_base_model().config, **groups)


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", ["own", "fp8", "quanto", "hqq"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", DOORS + OWN_CODE)
def test_a_quantised_cache_rounds_real_tokens_and_not_the_prompt(family: str, method: str, kind: str) -> None:
    model, ids = make(family, method), ids_of(9)
    kv, parts = model.fold(), ids.split([5, 1, 1, 2], dim=1)

    def by_hand(key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        own = type(plain_cache).update(plain_cache, key, value, layer_idx, *args, **kwargs)
        return tuple(torch.cat(pair, dim=2) for pair in zip(kv.layers[layer_idx], own, strict=True))  # type: ignore[return-value]

    plain_cache = rounding(kind, model)
    length = plain_cache.get_seq_length
    plain_cache.update = by_hand
    plain_cache.get_seq_length = lambda *args, **kwargs: COUNT + length(*args, **kwargs)
    plain_cache.get_mask_sizes = lambda tokens, *args, **kwargs: (COUNT + length() + tokens, 0)
    cache, exact = rounding(kind, model), DynamicCache()
    seen, apart = COUNT, 0.0
    for part in parts:
        got = model(input_ids=part, **hf_cache.given(model, cache), use_cache=True).logits
        seen += part.shape[1]
        expected = model.get_base_model()(
            input_ids=part,
            **hf_cache.given(model.get_base_model(), plain_cache),
            attention_mask=torch.ones(1, seen),
            use_cache=True,
        ).logits
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        unrounded = model(input_ids=part, **hf_cache.given(model, exact), use_cache=True).logits
        apart = max(apart, (got - unrounded).abs().max().item())
    assert apart > 1e-4  # the cache does round


# ---- caches of the user's own ------------------------------------------------------------------------------------


class Elsewhere(DynamicCache):
    """Offloading by hand: between two calls everything lies outside of torch, and what stays is not a number."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held = self.__dict__.setdefault("held", {})
        if layer_idx in held:
            self._set(layer_idx, *(torch.from_numpy(each) for each in held[layer_idx]))
        keys, values = super().update(key, value, layer_idx, *args, **kwargs)
        held[layer_idx] = keys.numpy(), values.numpy()
        self._set(layer_idx, *[torch.full_like(keys, torch.nan)] * 2)
        return keys, values

    def _set(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        layer: Any = self.layers[layer_idx]
        layer.keys, layer.values = keys, values


def own_cache(kind: str, model: SoftPromptModel) -> Any:
    config = model.get_base_model().config
    if kind == "elsewhere":
        one = Elsewhere
    elif kind == "offloaded":
        if not torch.cuda.is_available():
            pytest.skip("transformers offloads from a GPU")
        model.to("cuda")
        one = lambda: DynamicCache(offloading=True)  # noqa: E731
    else:
        one = {"dynamic": DynamicCache, "static": lambda: StaticCache(config=config, max_cache_len=24)}[kind]
    both = naive.encodes_and_decodes(model.get_base_model())
    return EncoderDecoderCache(one(), DynamicCache()) if both else one()


KINDS = ("dynamic", "static", "elsewhere", "offloaded")


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", DOORS + OWN_CODE + BOTH_STACKS)
def test_generate_on_a_cache_that_the_user_brings(family: str, method: str, kind: str) -> None:
    model, ids = make(family, method), ids_of()
    expected = plain(model, ids)
    cache = own_cache(kind, model)
    device = model.get_base_model().device
    out = ours(model, ids.to(device), **hf_cache.given(model, cache))
    assert torch.equal(out.cpu(), expected)
    written = NEW if naive.encodes_and_decodes(model.get_base_model()) else ids.shape[1] + NEW - 1
    assert int(cache.get_seq_length()) == written  # real tokens only


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", OWN_CODE)
def test_a_loop_by_hand_on_a_padded_batch(family: str, method: str, kind: str) -> None:
    """Chunks of several tokens and single ones; each sees what one call over everything sees."""
    model = make(family, method)
    batch, more = tiny.ragged(side="left"), ids_of(4, rows=3)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], dim=1)
    everything = torch.cat([batch["input_ids"], more], dim=1)
    expected = [
        naive.logits(model, row)[0][0, -4:] for row in naive.rows({"input_ids": everything, "attention_mask": mask})
    ]
    cache, width, steps = own_cache(kind, model), batch["input_ids"].shape[1], []
    device = model.get_base_model().device
    room = 24 if (family, kind) == ("bloom", "static") else None  # it reads the width of its ALiBi from the mask
    mask = mask if room is None else torch.nn.functional.pad(mask, (0, room - mask.shape[1]))
    first = mask[:, : room or width].to(device)
    model(input_ids=batch["input_ids"].to(device), attention_mask=first, **hf_cache.given(model, cache), use_cache=True)
    for start, stop in ((0, 2), (2, 3), (3, 4)):
        step = model(
            input_ids=more[:, start:stop].to(device),
            attention_mask=mask[:, : room or width + stop].to(device),
            **hf_cache.given(model, cache),
            use_cache=True,
        )
        steps.append(step.logits.cpu())
    torch.testing.assert_close(torch.cat(steps, dim=1), torch.stack(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", BOTH_STACKS)
def test_a_loop_by_hand_in_the_decoder(family: str, method: str, kind: str) -> None:
    """One token at a time, with a cache for what is written and for what the encoder said."""
    model, ids, written = make(family, method), ids_of(), ids_of(4)
    prompt = model.encoder().prompt()
    expected = naive.run(model.get_base_model(), prompt, ids, decoder_input_ids=written)["logits"]
    cache = own_cache(kind, model)
    device = model.get_base_model().device
    got = []
    for part in written.split(1, dim=1):
        out = model(
            input_ids=ids.to(device), decoder_input_ids=part.to(device), **hf_cache.given(model, cache), use_cache=True
        )
        got.append(out.logits.cpu())
    torch.testing.assert_close(torch.cat(got, dim=1), expected, atol=1e-5, rtol=1e-4)


# ---- one cache of a system prompt for many rows ------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [*DOORS, "gemma3", *OWN_CODE])
def test_a_system_prompt_is_prefilled_once_and_shared(family: str, method: str) -> None:
    """Copied, copied per row of a batch, and cut back to be used again."""
    model, system = make(family, method), ids_of(5)
    cache = DynamicCache(config=model.get_base_model().config)
    model(input_ids=system, **hf_cache.given(model, cache), use_cache=True)
    assert cache.get_seq_length() == 5
    users = [ids_of(length) for length in (3, 4)]
    for user in users:
        whole = torch.cat([system, user], dim=1)
        assert torch.equal(ours(model, whole, **hf_cache.given(model, copy.deepcopy(cache))), plain(model, whole))
    pair = torch.cat([system.repeat(2, 1), ids_of(3, rows=2)], dim=1)
    shared = copy.deepcopy(cache)
    shared.batch_repeat_interleave(2)
    expected = torch.cat([plain(model, row[None]) for row in pair])
    assert torch.equal(ours(model, pair, **hf_cache.given(model, shared)), expected)
    if family != "gemma3":  # a sliding layer has forgotten what it would go back to
        for user in users:
            whole = torch.cat([system, user], dim=1)
            assert torch.equal(ours(model, whole, **hf_cache.given(model, cache)), plain(model, whole))
            cache.crop(5 - cache.get_seq_length())


@pytest.mark.pairwise
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [*DOORS, "bloom", "falcon_multi_query", "gptj"])  # MPT counts hidden columns too
def test_a_shared_system_prompt_before_rows_of_different_lengths(family: str, method: str) -> None:
    """Padding then stands between the system prompt and the row, where a mask hides it."""
    model, system, batch = make(family, method), ids_of(5), tiny.ragged(side="left")
    cache = DynamicCache(config=model.get_base_model().config)
    model(input_ids=system, **hf_cache.given(model, cache), use_cache=True)
    cache.batch_repeat_interleave(3)
    whole = torch.cat([system.repeat(3, 1), batch["input_ids"]], dim=1)
    mask = torch.cat([torch.ones(3, 5, dtype=torch.long), batch["attention_mask"]], dim=1)
    got = model.generate(input_ids=whole, attention_mask=mask, **hf_cache.given(model, cache), **OPTIONS)[:, -NEW:]
    expected = [plain(model, torch.cat([system, row], dim=1)) for row in naive.rows(batch)]
    assert torch.equal(got, torch.cat(expected))


# ---- drafts ------------------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("drafts", ["plain", "prompted", "itself"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [*DOORS, "bloom", "gptj", *BOTH_STACKS])
def test_an_assistant_with_and_without_a_prompt_of_its_own(family: str, method: str, drafts: str) -> None:
    model, ids = make(family, method), ids_of()
    expected = plain(model, ids)
    task = "SEQ_2_SEQ_LM" if family in BOTH_STACKS else "CAUSAL_LM"
    assistant: Any = (
        build(family, task, seed=1) if drafts == "plain" else make(family, method, seed=drafts == "prompted")
    )
    calls: list[int] = []
    handle = model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(ours(model, ids, assistant_model=assistant), expected)
    handle.remove()
    if drafts == "itself":  # the same model with the same prompt drafts what will be accepted
        assert len(calls) < NEW
    assert torch.equal(ours(model, ids), expected)


# ---- generation from embeddings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", OWN_CODE + BOTH_STACKS)
def test_generation_from_embedded_inputs(family: str, method: str) -> None:
    model, ids = make(family, method), ids_of()
    embedded = model.get_base_model().get_input_embeddings()(ids)
    out = model.generate(inputs_embeds=embedded, attention_mask=torch.ones_like(ids), **OPTIONS)[:, -NEW:]
    assert torch.equal(out, plain(model, ids))


# ---- prompts inside the rows -------------------------------------------------------------------------------------


def inside(family: str, **options: Any) -> SoftPromptModel:
    torch.manual_seed(0)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT, **options)
    return get_peft_model(build(family, "CAUSAL_LM"), config).eval()


INSIDE = {"llama": {"placement": "after_bos"}, "bloom": {"placement": "after_bos"}, "lfm2": {}, "qwen3_next": {}}


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", ["static", "none", "own"])
@pytest.mark.parametrize("family", INSIDE)
def test_prompts_inside_the_rows_on_other_caches(family: str, kind: str) -> None:
    model, batch = inside(family, **INSIDE[family]), tiny.ragged(side="left")
    expected = model.generate(**batch, **OPTIONS)
    options: dict[str, Any] = {
        "static": {"cache_implementation": "static"},
        "none": {"use_cache": False},
        "own": hf_cache.given(model, DynamicCache(config=model.get_base_model().config)),
    }[kind]
    assert torch.equal(model.generate(**batch, **{**OPTIONS, **options}), expected)


@pytest.mark.parametrize("family", INSIDE)
def test_what_would_count_ids_for_columns_is_refused(family: str) -> None:
    model, ids = inside(family, **INSIDE[family]), ids_of()
    config = transformers.GenerationConfig(prompt_lookup_num_tokens=3)
    refused: list[dict[str, Any]] = [
        {"prompt_lookup_num_tokens": 3},
        {"generation_config": config},
        {"assistant_model": build("llama", "CAUSAL_LM")},
        {"prefill_chunk_size": 2},
    ]
    for options in refused:
        with pytest.raises(ConfigError, match=r"inside the rows, so generate cannot use .*leave it out"):
            model.generate(ids, **OPTIONS, **options)


# ---- compiled steps ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_steps_that_transformers_compiles(family: str) -> None:
    """On a GPU it compiles the steps on a static cache of its own accord; a later call compiles nothing again."""
    model, batch = make(family, "prefix"), tiny.ragged(side="left")
    kind: Any = transformers.CompileConfig
    compiling = kind(backend="eager", mode=None)
    compiling._compile_all_devices = True  # on the CPU too
    options = {**OPTIONS, "cache_implementation": "static", "compile_config": compiling}
    expected = torch.cat([plain(model, row) for row in naive.rows(batch)])
    assert torch.equal(model.generate(**batch, **options)[:, -NEW:], expected)
    counters = torch._dynamo.utils.counters["stats"]
    graphs = counters["unique_graphs"]
    assert graphs > 0
    assert torch.equal(model.generate(**batch, **options)[:, -NEW:], expected)
    assert counters["unique_graphs"] == graphs
