"""Both doors: positions, masks, caches, checkpointing, threads; closed, the base model is exactly as it was."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import hf_cache
import naive
import pytest
import tiny
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from softprompt import (
    ConfigError,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    UnsupportedError,
    get_peft_model,
)

METHODS: dict[str, Callable[..., Any]] = {
    "prompt_tuning": lambda **more: PromptTuningConfig(num_virtual_tokens=6, **more),
    "p_tuning": lambda **more: PromptEncoderConfig(num_virtual_tokens=6, encoder_hidden_size=16, **more),
    "prefix": lambda **more: PrefixTuningConfig(num_virtual_tokens=6, **more),
    "prefix_ffn": lambda **more: PrefixTuningConfig(
        num_virtual_tokens=6, prefix_projection=True, encoder_hidden_size=16, **more
    ),
}
TWO_KINDS = ("prompt_tuning", "prefix")
FEW = ("gpt2", "llama", "gemma3")


def make(family: str, method: str, **overrides: Any) -> SoftPromptModel:
    torch.manual_seed(0)
    return get_peft_model(tiny.build(family, **overrides), METHODS[method]()).eval()


def ids_of(length: int, rows: int = 1) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, length))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=tolerance)


# ---- positions ---------------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", FEW)
def test_the_callers_positions_count_real_tokens(family: str, method: str, labelled: bool) -> None:
    model, batch = make(family, method), tiny.ragged(side="left")
    given = {"position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
    if labelled:
        given["labels"] = batch["input_ids"]
    out = model(**batch, **given).logits
    for row, got, mask in zip(naive.rows(batch), out, batch["attention_mask"], strict=True):
        close(got[mask.bool()], naive.logits(model, row)[0][0])


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("method", TWO_KINDS)
def test_positions_that_leave_a_gap(method: str, labelled: bool) -> None:
    """The prompt stays at 0…p−1, whatever the caller's positions are."""
    model, ids = make("llama", method), ids_of(5)
    positions = torch.tensor([[3, 4, 6, 7, 11]])
    more = {"labels": ids} if labelled else {}
    base, prompt = model.get_base_model(), model.encoder().prompt()
    if method == "prefix":
        expected = base(input_ids=ids, position_ids=positions + 6, **hf_cache.given(base, prompt.to_cache())).logits
    else:
        embedded = torch.cat([prompt.vectors, base.get_input_embeddings()(ids)], dim=1)
        everywhere = torch.cat([torch.arange(6)[None], positions + 6], dim=1)
        mask = torch.ones(11, 11, dtype=torch.bool).tril()[None, None]
        expected = base(inputs_embeds=embedded, position_ids=everywhere, attention_mask=mask).logits[:, 6:]
    close(model(input_ids=ids, position_ids=positions, **more).logits, expected)


@pytest.mark.pairwise
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", FEW)
def test_packed_rows(family: str, method: str, labelled: bool) -> None:
    """Several sequences in one row, told apart by positions that start again: each sees the prompt and itself."""
    model, rows = make(family, method), [ids_of(4), ids_of(6), ids_of(3)]
    packed = torch.cat(rows, dim=1)
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    more = {"labels": packed} if labelled else {}
    out = model(input_ids=packed, position_ids=positions, use_cache=False, **more).logits
    for row, got in zip(rows, out.split([4, 6, 3], dim=1), strict=True):
        close(got, naive.logits(model, row)[0])


# ---- masks and inputs --------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("method", [*TWO_KINDS, "p_tuning"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_four_dimensional_masks(backend: str, method: str, kind: str, labelled: bool) -> None:
    """A mask that hides token 1 from all later ones; the prompt is visible to all."""
    if backend == "eager" and kind == "bool":
        return  # transformers' eager attention adds the mask
    model, ids = make("llama", method, attn_implementation=backend), ids_of(6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[2:, 1] = False
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    visible[6:, 6:] = mask
    more = {"labels": ids} if labelled else {}
    out = model(input_ids=ids, attention_mask=_as(kind, mask), **more)
    base, prompt = model.get_base_model(), model.encoder().prompt()
    whole = {"position_ids": torch.arange(12)[None], "attention_mask": _as(kind, visible)}
    if method == "prefix":
        rest = {"position_ids": torch.arange(6, 12)[None], "attention_mask": _as(kind, visible[6:])}
        expected = base(input_ids=ids, **hf_cache.given(base, prompt.to_cache()), **rest).logits
    else:
        embedded = torch.cat([prompt.vectors, base.get_input_embeddings()(ids)], dim=1)
        expected = base(inputs_embeds=embedded, **whole).logits[:, 6:]
    close(out.logits, expected)
    assert not torch.allclose(out.logits, model(input_ids=ids).logits, atol=1e-3)  # the mask does something


def _as(kind: str, visible: Tensor) -> Tensor:
    if kind == "bool":
        return visible[None, None]
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.pairwise
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [*FEW, "bert"])
def test_embedded_inputs_equal_ids(family: str, method: str, labelled: bool) -> None:
    model, batch = make(family, method), tiny.ragged(side="left")
    embedded = model.get_base_model().get_input_embeddings()(batch["input_ids"])
    labels = torch.tensor([0, 1, 2]) if family == "bert" else batch["input_ids"]
    more = {"labels": labels} if labelled else {}
    expected = model(**batch, **more)
    got = model(inputs_embeds=embedded, attention_mask=batch["attention_mask"], **more)
    close(got.logits, expected.logits)
    if labelled:
        close(got.loss, expected.loss)


@pytest.mark.pairwise
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen3", "gemma3", "opt", "bert", "roberta"])
def test_backends_agree(family: str, method: str) -> None:
    batch = tiny.ragged(side="left")
    outputs = [make(family, method, attn_implementation=backend)(**batch).logits for backend in ("sdpa", "eager")]
    real = batch["attention_mask"].bool() if outputs[0].ndim == 3 else slice(None)
    close(outputs[0][real], outputs[1][real])


# ---- caches ------------------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_decoding_by_hand_with_a_cache(family: str, method: str, side: str) -> None:
    """Chunk by chunk on the caller's cache equals one forward over everything, with masks and without."""
    model, batch, more = make(family, method), tiny.ragged(side=side), ids_of(4, rows=3)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], dim=1)
    everything = torch.cat([batch["input_ids"], more], dim=1)
    expected = model(input_ids=everything, attention_mask=mask, use_cache=False).logits
    cache = DynamicCache(config=model.get_base_model().config)
    model(**batch, **hf_cache.given(model, cache))
    assert cache.get_seq_length() == batch["input_ids"].shape[1]  # real tokens only
    width, steps = batch["input_ids"].shape[1], []
    for start, stop in ((0, 2), (2, 3), (3, 4)):
        out = model(
            input_ids=more[:, start:stop], attention_mask=mask[:, : width + stop], **hf_cache.given(model, cache)
        )
        steps.append(out.logits)
    close(torch.cat(steps, dim=1), expected[:, width:])


@pytest.mark.parametrize("method", TWO_KINDS)
def test_a_cache_without_a_mask(method: str) -> None:
    model, ids = make("gpt2", method), ids_of(9)
    first = model(input_ids=ids[:, :5], use_cache=True)
    second = model(input_ids=ids[:, 5:], **hf_cache.given(model, hf_cache.of(first)))
    close(torch.cat([first.logits, second.logits], dim=1), naive.logits(model, ids)[0])


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", FEW)
def test_a_static_cache(family: str, method: str, backend: str) -> None:
    model, ids = make(family, method, attn_implementation=backend), ids_of(9)
    cache = StaticCache(config=model.get_base_model().config, max_cache_len=20)
    outputs = [model(input_ids=part, **hf_cache.given(model, cache)).logits for part in ids.split([5, 3, 1], dim=1)]
    close(torch.cat(outputs, dim=1), naive.logits(model, ids)[0])


@pytest.mark.parametrize("method", TWO_KINDS)
def test_labels_and_a_cache_together(method: str) -> None:
    """The rows stay as they are when every token has a label, so the cache they fill can be gone on from."""
    model, ids, cache = make("gpt2", method), ids_of(6), DynamicCache()
    first = model(input_ids=ids[:, :4], labels=ids[:, :4], **hf_cache.given(model, cache))
    torch.testing.assert_close(first.loss, model(input_ids=ids[:, :4], labels=ids[:, :4]).loss)
    rest = model(input_ids=ids[:, 4:], **hf_cache.given(model, hf_cache.of(first)))
    close(torch.cat([first.logits, rest.logits], dim=1), naive.logits(model, ids)[0])


# ---- windows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TWO_KINDS)
def test_windows_while_decoding_with_a_cache(method: str) -> None:
    """A window shorter than the text: chunks on a cache see just what one forward over the whole text sees."""
    model = make("mistral", method, sliding_window=5)
    batch = tiny.ragged((9, 4, 12), side="left")
    expected = model(**batch, use_cache=False).logits
    assert not torch.allclose(expected, make("mistral", method)(**batch).logits, atol=1e-3)
    cache = DynamicCache(config=model.get_base_model().config)
    steps = []
    for start, stop in ((0, 7), (7, 8), (8, 11), (11, 12)):
        ids, mask = batch["input_ids"][:, start:stop], batch["attention_mask"][:, :stop]
        steps.append(model(input_ids=ids, attention_mask=mask, **hf_cache.given(model, cache)).logits)
    real = batch["attention_mask"].bool()
    close(torch.cat(steps, dim=1)[real], expected[real])


# ---- gradient checkpointing --------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("before_wrapping", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_gradient_checkpointing_changes_no_gradient(
    family: str, method: str, before_wrapping: bool, reentrant: bool
) -> None:
    batch = tiny.ragged(side="left")
    labels = torch.tensor([0, 1, 2]) if family == "bert" else batch["input_ids"]
    base, plain = tiny.build(family), make(family, method).train()
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
    assert base.config._attn_implementation == "sdpa"


def _checkpoint(model: Any, reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})  # the first is the name in newer versions


def test_checkpointing_runs_the_layers_again() -> None:
    """The test above would pass if checkpointing were switched off on the way."""
    model, ids = make("llama", "prefix").train(), ids_of(5)
    _checkpoint(model, reentrant=False)
    runs: list[int] = []
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(runs) == 2


# ---- the base model is as it was ---------------------------------------------------------------------------------


class _StopError(Exception):
    pass


def _fail_inside(base: PreTrainedModel) -> Any:
    def hook(*_: Any) -> None:
        raise _StopError

    return base.base_model.register_forward_hook(hook)


@pytest.mark.pairwise
@pytest.mark.parametrize("call", ["forward", "loss", "generate", "fold"])
@pytest.mark.parametrize("method", TWO_KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_nothing_is_left_behind_even_by_an_exception(family: str, method: str, call: str) -> None:
    base, ids = tiny.build(family), ids_of(5)
    keys, before = list(base.state_dict()), base(input_ids=ids).logits
    model = get_peft_model(base, METHODS[method]()).eval()
    _checkpoint(model, reentrant=False)
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
        assert base.config._attn_implementation == "sdpa"
        assert list(base.state_dict()) == keys
        assert torch.equal(base(input_ids=ids).logits, before)


def test_probing_leaves_modes_alone() -> None:
    base = tiny.build("gpt2").train()
    base.lm_head.eval()
    modes = {name: module.training for name, module in base.named_modules()}
    get_peft_model(base, PrefixTuningConfig())
    assert {name: module.training for name, module in base.named_modules()} == modes


def test_threads_share_one_model() -> None:
    """While one thread is inside, another one's prompt and the plain model are what they are alone."""
    model, ids = make("llama", "prefix"), ids_of(6)
    base = model.get_base_model()
    with torch.no_grad():
        plain, prompted = base(input_ids=ids).logits, model(input_ids=ids).logits
    inside, release, seen = threading.Event(), threading.Event(), {}

    def wait(*_: Any) -> None:
        if threading.current_thread().name == "slow":
            inside.set()
            assert release.wait(20)

    handle = base.base_model.layers[0].register_forward_pre_hook(wait)

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
    assert base.config._attn_implementation == "sdpa"


def test_two_wrappers_of_one_base() -> None:
    base, ids = tiny.build("llama"), ids_of(5)
    one, two = (get_peft_model(base, METHODS[method]()).eval() for method in TWO_KINDS)
    close(one(input_ids=ids).logits, naive.logits(one, ids)[0])
    close(two(input_ids=ids).logits, naive.logits(two, ids)[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_deep_copy_is_a_model_of_its_own(method: str) -> None:
    model, ids = make("llama", method), ids_of(5)
    again = copy.deepcopy(model)
    expected = model(input_ids=ids).logits
    close(again(input_ids=ids).logits, expected)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    close(model(input_ids=ids).logits, expected)
    assert not torch.allclose(again(input_ids=ids).logits, expected, atol=1e-3)


# ---- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_float32_prompt_trains_on_a_bfloat16_base(family: str, method: str) -> None:
    batch = tiny.ragged(side="left")
    labels = torch.tensor([0, 1, 2]) if family == "bert" else batch["input_ids"]
    model = get_peft_model(tiny.build(family).to(torch.bfloat16), METHODS[method]())
    exact = make(family, method)
    model.prompt_encoder.load_state_dict(exact.prompt_encoder.state_dict())
    assert {p.dtype for p in model.prompt_encoder.parameters()} == {torch.float32}
    out = model(**batch, labels=labels)
    out.loss.backward()
    assert out.logits.dtype is torch.bfloat16
    for parameter in model.prompt_encoder.parameters():
        assert parameter.grad.dtype is torch.float32
        assert parameter.grad.isfinite().all()
        assert torch.count_nonzero(parameter.grad)
    assert abs(out.loss.item() - exact(**batch, labels=labels).loss.item()) < 0.3


# ---- models without a door ---------------------------------------------------------------------------------------


def _built(name: str, **options: Any) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(name, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config)


def _t5() -> PreTrainedModel:
    return _built("t5", d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)


def _bart(**options: Any) -> PreTrainedModel:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return _built("bart", d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **layers, **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: _bart(is_encoder_decoder=False, is_decoder=True), "BartForCausalLM.*no position_ids.*llama"),
    ],
    ids=["bart_decoder"],
)
@pytest.mark.parametrize("config", [PromptTuningConfig(), PrefixTuningConfig()])
def test_a_model_without_a_door_says_so(build: Callable[[], PreTrainedModel], message: str, config: Any) -> None:
    base = build()
    with pytest.raises(UnsupportedError, match=message):
        get_peft_model(base, config)
    assert all(parameter.requires_grad for parameter in base.parameters())  # nothing has been changed


def test_something_that_is_no_transformers_model() -> None:
    with pytest.raises(UnsupportedError, match=r"Linear.*PreTrainedModel"):
        get_peft_model(torch.nn.Linear(2, 2), PrefixTuningConfig())  # pyright: ignore[reportArgumentType]


def test_a_backend_without_a_door() -> None:
    base = tiny.build("llama")
    AttentionInterface.register("of_ones_own", sdpa_attention_forward)
    base.set_attn_implementation("of_ones_own")
    with pytest.raises(UnsupportedError, match=r"'of_ones_own'.*'sdpa' or 'eager'"):
        get_peft_model(base, PrefixTuningConfig())
    assert base.config._attn_implementation == "of_ones_own"


def test_experts_are_causal() -> None:
    """Rounding differs with the number of tokens an expert gets; that is not a view of the next token."""
    from transformers import MixtralConfig

    options = tiny.CONFIGS["mistral"][1] | {"num_local_experts": 4, "num_experts_per_tok": 2}
    from transformers import AutoModelForCausalLM

    for seed in range(3):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_config(MixtralConfig(**options)).eval()
        model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=5)).eval()
        ids = ids_of(6)
        close(model(input_ids=ids).logits, naive.logits(model, ids)[0])
        cache = DynamicCache(config=base.config)  # which only a causal model may go on from
        parts = [model(input_ids=part, **hf_cache.given(model, cache)).logits for part in ids.split(3, dim=1)]
        close(torch.cat(parts, dim=1), naive.logits(model, ids)[0])


# ---- room --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "context"), [("gpt2", 160), ("opt", 160), ("bert", 160), ("roberta", 161)])
def test_learned_positions_end(family: str, context: int, method: str) -> None:
    model = make(family, method)
    fits, too_long = ids_of(context - 6), ids_of(context - 5)
    assert model(input_ids=fits).logits.isfinite().all()
    with pytest.raises(ConfigError, match=rf"{context + 1} tokens.*{context} learned.*shorten") as caught:
        model(input_ids=too_long)
    assert "\n" not in str(caught.value)
    padded = torch.cat([fits, torch.zeros(1, 6, dtype=torch.long)], dim=1)  # padded to the whole context: it fits
    mask = torch.ones_like(padded).index_fill(1, torch.arange(context - 6, context), 0)
    out = model(input_ids=padded, attention_mask=mask).logits
    close(out if out.ndim == 2 else out[:, : context - 6], model(input_ids=fits).logits, 1e-4)


def test_rotary_positions_do_not_end() -> None:
    assert make("llama", "prefix")(input_ids=ids_of(tiny.CONTEXT + 5)).logits.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_longer_than_the_context(method: str) -> None:
    config = type(METHODS[method]())(num_virtual_tokens=tiny.CONTEXT)
    with pytest.raises(ConfigError, match=r"num_virtual_tokens=160.*context of 160.*fewer"):
        get_peft_model(tiny.build("gpt2"), config)
