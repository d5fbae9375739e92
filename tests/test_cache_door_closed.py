"""The cache door while a model trains, fails, is shared or copied; closed, the base model is exactly as it was."""

import copy
import re
import threading
from collections.abc import Callable
from typing import Any

import families
import families_cache
import hf_cache
import naive
import pytest
import tiny
import torch
from cache_kit import (
    FAMILIES,
    FEW,
    METHODS,
    OPTIONS,
    TWO_KINDS,
    close,
    ids_of,
    make,
)
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from softprompt import (
    ConfigError,
    PromptTuningConfig,
    UnsupportedError,
    get_peft_model,
)

# ---- gradient checkpointing --------------------------------------------------------------------------------------


@pytest.mark.pairwise
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
    cache = hf_cache.of(model(input_ids=ids, use_cache=True))
    _checkpoint(model, reentrant=False)
    model.train()
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        model(input_ids=ids, **hf_cache.given(model, cache))


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
@pytest.mark.parametrize("family", FEW)
def test_nothing_is_left_behind_even_by_an_exception(family: str, method: str, call: str) -> None:
    base, ids = families.build(family, "CAUSAL_LM"), ids_of(5)
    keys, before, backend = list(base.state_dict()), base(input_ids=ids).logits, base.config._attn_implementation
    model = get_peft_model(base, METHODS[method]()).eval()
    _checkpoint(model, reentrant=False)
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(input_ids=ids),
        "loss": lambda: model(input_ids=ids, labels=ids).loss.backward(),
        "generate": lambda: model.generate(input_ids=ids, max_new_tokens=2),
        "fold": model.fold,
    }
    calls[call]()  # the hooks of the first call stay, and each later one needs no more
    hooks = [(dict(module._forward_pre_hooks), dict(module._forward_hooks)) for module in base.modules()]
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
def test_folded_vectors_are_what_a_cache_would_hold(family: str) -> None:
    """One head for multi-query attention, all of them for Falcon's groups."""
    model = make(family, "prompt_tuning")
    base, vectors = model.get_base_model(), model.encoder().prompt().vectors
    cache = DynamicCache(config=base.config)
    base(inputs_embeds=vectors, **hf_cache.given(base, cache))
    for layer, pair in zip(cache.layers, model.fold().layers, strict=True):
        for held, folded in zip((layer.keys, layer.values), pair, strict=True):
            close(folded, held)


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
    """Or is right: in some versions of transformers the door reaches it."""
    model, refusal = None, ""
    try:
        model = get_peft_model(families_cache.build("roformer"), PromptTuningConfig()).eval()
    except UnsupportedError as error:
        refusal = str(error)
    if model is None:
        assert re.search(r"RoFormerForCausalLM .*bloom, mpt, falcon or gptj", refusal)
        return
    batch = tiny.ragged(side="left")
    for row, got, mask in zip(naive.rows(batch), model(**batch).logits, batch["attention_mask"], strict=True):
        close(got[mask.bool()], naive.logits(model, row)[0][0])


def test_other_backends_are_refused() -> None:
    model, ids = make("falcon_multi_query", "prefix"), ids_of(4)
    model.get_base_model().config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedError, match="attn_implementation='sdpa' or 'eager'"):
        model(input_ids=ids)
