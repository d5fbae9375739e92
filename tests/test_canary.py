"""The canary: what the next release or another family does otherwise is refused in one sentence, never merely wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
import transformers as hf
from model_kit import close, ids_of
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from softprompt import (
    PrefixTuningConfig,
    PromptTuningConfig,
    SoftPromptModel,
    UnsupportedError,
    base_model,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    transformers_api,
)

KINDS = (PromptTuningConfig, PrefixTuningConfig)


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "_KNOWN", {})


def refused(base: PreTrainedModel, *said: str) -> None:
    """Every kind of prompt is, in one sentence that says what and why."""
    for kind in KINDS:
        with pytest.raises(UnsupportedError) as caught:
            get_peft_model(copy.deepcopy(base), kind(num_virtual_tokens=4))
        message = str(caught.value)
        assert all(each in message for each in (type(base).__name__, *said)), message
        assert "\n" not in message


def exact_or_refused(base: PreTrainedModel) -> bool:
    """Keys and values are refused, or those of real tokens are these tokens in the row; whether they are."""
    try:
        model = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=4)).eval()
    except UnsupportedError:
        return False
    prompt, ids = ids_of(4), ids_of(9)
    with torch.no_grad():
        output = base(input_ids=prompt, use_cache=True)
        found = transformers_api.cache_in(output)
        assert found is not None
        initialize_kv_prefix_from_past_key_values(model, past_key_values=found[1])
        want = base(input_ids=torch.cat([prompt, ids], dim=1)).logits[:, 4:]
        close(model(ids).logits, want, 1e-4)
        written = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)[:, 9:]
        plain = base.generate(torch.cat([prompt, ids], dim=1), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert written.equal(plain[:, 13:])
    return True


# ---- other names -----------------------------------------------------------------------------------------------------


@dataclass
class Renamed(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    kv_store: Any = None


def renamed(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A class that takes and gives its cache by a new name."""

    class NextRelease(kind):
        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            kv_store: Any = None,
            inputs_embeds: Tensor | None = None,
            labels: Tensor | None = None,
            use_cache: bool | None = None,
            **kwargs: Any,
        ) -> Any:
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
            given |= {"labels": labels, "use_cache": use_cache, **kwargs}
            if kind is not hf.BloomForCausalLM:
                given["position_ids"] = position_ids
            given[transformers_api.cache_name(super().forward) or ""] = kv_store
            given.pop("return_dict", None)
            output = super().forward(**given, return_dict=True)
            found = transformers_api.cache_in(output)
            named = {name: value for name, value in output.items() if name in ("loss", "logits", "last_hidden_state")}
            return Renamed(**named, kv_store=None if found is None else found[1])

    return NextRelease


CLASSES = {"llama": hf.LlamaForCausalLM, "gpt2": hf.GPT2LMHeadModel, "bloom": hf.BloomForCausalLM}


@pytest.mark.parametrize("family", CLASSES)
def test_a_cache_by_a_new_name_is_refused(family: str) -> None:
    base = families.build(family, "CAUSAL_LM")
    base.__class__ = renamed(CLASSES[family])
    refused(base, "'kv_store'", "transformers")


def test_a_cache_way_whose_body_takes_a_new_name_is_refused() -> None:
    base = families.build("bloom", "CAUSAL_LM")
    base.transformer.__class__ = renamed(hf.BloomModel)
    refused(base)


# ---- other masks -----------------------------------------------------------------------------------------------------


def test_windows_of_another_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window is one token wider than a layer says."""
    from transformers import masking_utils

    inner = masking_utils.sliding_window_overlay
    monkeypatch.setattr(masking_utils, "sliding_window_overlay", lambda size: inner(size + 1))
    refused_keys(families.build("mistral_window", "CAUSAL_LM"), "window of 5")


def refused_keys(base: PreTrainedModel, *said: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=4))
    assert all(each in str(caught.value) for each in (type(base).__name__, *said)), str(caught.value)


@pytest.mark.parametrize("family", ["mistral_window", "gemma3", "cohere2"])
def test_a_window_by_another_name_is_found_or_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then no layer seems to have any."""
    inner = transformers_api.Asked.__init__

    def unknowing(self: Any, module: nn.Module, keywords: Any) -> None:
        inner(self, module, {name: value for name, value in keywords.items() if name != "sliding_window"})

    monkeypatch.setattr(transformers_api.Asked, "__init__", unknowing)
    exact_or_refused(families.build(family, "CAUSAL_LM"))


def llama4(chunk: int = 6) -> PreTrainedModel:
    options = {**tiny.GQA, "attention_chunk_size": chunk, "intermediate_size_mlp": 48, "num_local_experts": 2}
    config = hf.Llama4TextConfig(**options, layer_types=["chunked_attention", "full_attention"])
    torch.manual_seed(0)
    base = hf.Llama4ForCausalLM(config).eval()
    tiny.perturb(base)
    return base


@pytest.mark.parametrize("lost", ["chunk_of", "chunk_in", "both"])
def test_chunks_by_another_name_are_found_or_refused(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("chunk_of", "chunk_in") if lost == "both" else (lost,):
        monkeypatch.setattr(transformers_api, name, lambda _: None)
    exact_or_refused(llama4())


def test_a_mask_maker_that_takes_other_options_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def strict(options: Any) -> Any:
        raise TypeError("make_mask() got an unexpected keyword argument 'allow_is_causal_skip'")

    monkeypatch.setattr(transformers_api, "whole_mask", strict)
    refused_keys(llama4(), "allow_is_causal_skip")


def test_positions_by_another_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that takes `position_ids` and reads something else."""
    inner = hf.LlamaModel.forward

    def forward(self: Any, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return inner(self, *args, **kwargs)

    base = tiny.build("llama")
    base.model.forward = forward.__get__(base.model)
    refused_keys(base)


# ---- a family's own --------------------------------------------------------------------------------------------------


def with_attention(forward: Callable[..., Any]) -> PreTrainedModel:
    """A small Llama whose layers attend by `forward(attention, inner, states, …)`, `inner` being Llama's own."""
    base = tiny.build("llama")
    for layer in base.model.layers:
        attention, inner = layer.self_attn, layer.self_attn.forward
        attention.forward = lambda *args, attention=attention, inner=inner, **kw: forward(attention, inner, *args, **kw)
    return base


def test_a_layer_that_attends_twice_is_exact_or_refused() -> None:
    """As DiffLlama does, with the same keys and two parts of the values."""
    torch.manual_seed(0)
    options = {name: value for name, value in tiny.GQA.items() if name != "head_dim"}
    base = hf.DiffLlamaForCausalLM(hf.DiffLlamaConfig(**options)).eval()
    tiny.perturb(base)
    assert exact_or_refused(base)


def test_what_is_added_beside_the_attention_function_is_refused_or_exact() -> None:
    """A sum over the raw keys of the row: no prefix is among them."""

    def forward(attention: Any, inner: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = inner(hidden_states, *args, **kwargs)
        return output + attention.k_proj(hidden_states).cumsum(dim=1).mean(-1, keepdim=True), weights

    refused_keys(with_attention(forward))


def test_what_is_added_of_the_cached_keys_goes_through_the_cache() -> None:
    """The same of what the cache gives: there a prefix is."""

    def forward(attention: Any, inner: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen: list[Tensor] = []
        name = transformers_api.layer_cache_name(kwargs)
        cache = kwargs.get(name) if name else None
        if cache is None:
            seen.append(attention.k_proj(hidden_states))
        else:
            kwargs[name] = Spy(cache, seen)
        output, weights = inner(hidden_states, *args, **kwargs)
        keys = seen[0] if cache is None else seen[0].transpose(1, 2).flatten(2)
        return output + 0.1 * keys.norm(dim=-1).mean(dim=1)[:, None, None], weights

    class Spy:
        def __init__(self, cache: Any, seen: list[Tensor]) -> None:
            self.cache, self.seen = cache, seen

        def update(self, *args: Any, **kwargs: Any) -> Any:
            key, value = self.cache.update(*args, **kwargs)
            self.seen.append(key)
            return key, value

        def __getattr__(self, name: str) -> Any:
            return getattr(self.cache, name)

    refused_keys(with_attention(forward))


def test_queries_that_are_scaled_by_their_column_are_refused() -> None:
    def forward(attention: Any, inner: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        columns = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        return inner(hidden_states * (1 + 0.2 * columns)[None, :, None], *args, **kwargs)

    refused_keys(with_attention(forward))


# ---- when it is asked ------------------------------------------------------------------------------------------------


def test_verify_off_asks_nothing() -> None:
    base = tiny.build("llama")
    base.__class__ = renamed(hf.LlamaForCausalLM)
    model = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=4), verify=False)
    assert model.found.compared == []
    assert base_model._KNOWN == {}


def counted(base: PreTrainedModel, do: Callable[[], Any]) -> int:
    """How many times a model's body runs meanwhile."""
    runs: list[int] = []
    handle = base.base_model.register_forward_pre_hook(lambda *_: runs.append(1))
    do()
    handle.remove()
    return len(runs)


def test_the_verdict_is_for_a_class_a_config_and_a_backend() -> None:
    def wrapped(**overrides: Any) -> int:
        attention = overrides.pop("attention", "sdpa")
        base = tiny.build("llama", **overrides)
        base.set_attn_implementation(attention)
        return counted(base, lambda: get_peft_model(base, PromptTuningConfig(num_virtual_tokens=2)))

    first, again = wrapped(), wrapped()
    assert again < first
    assert first <= again + 12
    assert wrapped(attention="eager") == first
    assert wrapped(num_hidden_layers=3) == first
    assert wrapped(attention="eager") == again
    base = tiny.build("llama")
    assert counted(base, lambda: get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=2), verify=False)) <= again


def test_another_version_is_another_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.build("llama")
    get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=2))
    known = counted(base, lambda: get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=2)))
    monkeypatch.setattr(base_model.transformers, "__version__", "6.0.0")
    assert counted(base, lambda: get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=2))) > known


def test_loading_a_prompt_tries_a_model_once(tmp_path: Path) -> None:
    base = tiny.build("llama")
    made = counted(base, lambda: get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=2)))
    get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=2)).save_pretrained(tmp_path)
    base_model._KNOWN.clear()
    assert counted(base, lambda: SoftPromptModel.from_pretrained(base, tmp_path)) <= made  # (which also tried a loss)


def test_a_model_that_fails_is_refused_by_its_name_with_the_cause() -> None:
    def fails(attention: Any, inner: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.shape[1] > 2:
            raise ZeroDivisionError("no room for a third token")
        return inner(hidden_states, *args, **kwargs)

    refused(with_attention(fails), "ZeroDivisionError", "no room for a third token")

    def never(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("not even one")

    refused(with_attention(never), "ZeroDivisionError", "not even one")
