"""A prefix started from the caches that models fill, of every kind, is the one started from the text."""

import warnings
from typing import Any

import families
import pytest
import tiny
import torch
import transformers as hf
from test_peft_layers import build as build_uneven
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from softprompt import (
    ConfigError,
    PrefixTuningConfig,
    SoftPromptModel,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)

TEXT = "the cat sat on the mat and the dog ran to the red house by the river while it rained all night long"
COUNT = 4
HYBRIDS = ("lfm2", "qwen3_next", "jamba")
PLAIN = ("llama", "gpt2", "bloom", "falcon_multi_query", "mpt", "gemma2", "mistral_window")
UNEVEN = ("size", "size and heads", "narrower", "sharing and size", "sharing")


def build(family: str) -> PreTrainedModel:
    return build_uneven(family) if family in UNEVEN else families.build(family, "CAUSAL_LM")


def ids_of(count: int = COUNT) -> Tensor:
    return torch.tensor([tiny.tokenizer()(TEXT)["input_ids"][:count]])


@torch.no_grad()
def cache_of(model: PreTrainedModel, ids: Tensor, cache: Any = None) -> Any:
    """What a call leaves behind; transformers 5.24 calls it `cache`."""
    named = {} if cache is None else {name_of_cache(model): cache}
    output = model(input_ids=ids, use_cache=True, **named)
    return output["cache"] if "cache" in output else output["past_key_values"]


def name_of_cache(model: PreTrainedModel) -> str:
    from inspect import signature

    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def from_text(family: str) -> tuple[SoftPromptModel, Tensor]:
    model = get_peft_model(build(family), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT)).eval()
    return model, initialize_kv_prefix_from_text(model, tiny.tokenizer(), text=TEXT, use_chat_template=False)


def started(model: SoftPromptModel, cache: Any) -> Tensor:
    return initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)


@pytest.mark.parametrize("family", PLAIN + UNEVEN)
def test_as_from_the_text(family: str) -> None:
    model, expected = from_text(family)
    cache = cache_of(build(family), ids_of())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flat = started(model, cache)
    torch.testing.assert_close(flat, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encoder().saved_vectors(), expected.float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=COUNT), flat)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrids_states_are_left_out_and_told_of(family: str) -> None:
    model, expected = from_text(family)
    with pytest.warns(UserWarning, match="layers of this cache keep a state, which a prefix cannot hold"):
        flat = started(model, cache_of(build(family), ids_of()))
    torch.testing.assert_close(flat, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        behind = model(input_ids=ids_of(12)[:, COUNT:]).logits
        whole = build(family)(input_ids=ids_of(12)).logits[:, COUNT:]
    assert (behind - whole).abs().max() > 1e-4, "the states matter, which is why a warning tells of them"


KINDS: dict[str, Any] = {
    "static": lambda config: StaticCache(config=config, max_cache_len=20),
    "of the model": lambda config: DynamicCache(config=config),
    "without a config": lambda _: DynamicCache(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_window", "size and heads"])
def test_kinds_of_caches(family: str, kind: str) -> None:
    model, expected = from_text(family)
    base = build(family)
    cache = cache_of(base, ids_of(), KINDS[kind](base.config))
    torch.testing.assert_close(started(model, cache), expected, atol=1e-5, rtol=1e-5)
    pairs = [(layer.keys[:, :, :COUNT], layer.values[:, :, :COUNT]) for layer in cache.layers]
    for plain in (pairs, tuple(tuple(pair) for pair in pairs)):
        torch.testing.assert_close(started(model, plain), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoders_cache_is_its_decoders(family: str) -> None:
    base = families.build(family, "SEQ_2_SEQ_LM")
    model = get_peft_model(base, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=COUNT)).eval()
    expected = initialize_kv_prefix_from_text(model, tiny.tokenizer(), text=TEXT, use_chat_template=False)
    with torch.no_grad(), model.disable_adapter():
        output = base(input_ids=ids_of(), decoder_input_ids=ids_of(), use_cache=True)
    cache = output["cache"] if "cache" in output else output["past_key_values"]
    assert isinstance(cache, EncoderDecoderCache)
    torch.testing.assert_close(started(model, cache), expected, atol=1e-5, rtol=1e-5)
    pairs = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
    fours = [(own.keys, own.values, cross.keys, cross.values) for own, cross in pairs]
    torch.testing.assert_close(started(model, fours), expected, atol=1e-5, rtol=1e-5)


def test_a_prefix_of_more_than_the_decoder_has_no_such_cache() -> None:
    base = families.build("t5", "SEQ_2_SEQ_LM")
    model = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=COUNT, encoder_prefix=True)).eval()
    with torch.no_grad(), model.disable_adapter():
        output = base(input_ids=ids_of(), decoder_input_ids=ids_of(), use_cache=True)
    with pytest.raises(ConfigError, match="use initialize_kv_prefix_from_text"):
        started(model, output["cache"] if "cache" in output else output["past_key_values"])


@pytest.mark.parametrize(
    ("family", "other"), [("llama", "gpt2"), ("size", "narrower"), ("lfm2", "llama"), ("deepseek_v3", "deepseek_v3")]
)
def test_layers_of_another_model(family: str, other: str) -> None:
    """Or of the same one, where it caches what keys are made of (DeepSeek)."""
    model, before = from_text(family)
    with pytest.raises(ConfigError, match=r"layers of \[heads, key size.*use initialize_kv_prefix_from_text"):
        started(model, cache_of(build(other), ids_of()))
    torch.testing.assert_close(model.encoder().saved_vectors(), before.float())


def test_a_cache_whose_numbers_are_rounded() -> None:
    class Rounded:
        keys, values, _quantized_keys = torch.tensor([]), torch.tensor([]), torch.ones(1)

    cache = DynamicCache()
    cache.layers = [Rounded()]
    with pytest.raises(ConfigError, match="Rounded, whose numbers are rounded; run the model with a DynamicCache"):
        prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=1)


@pytest.mark.parametrize("family", ["mistral_window", "size"])
def test_a_window_that_has_moved_on(family: str) -> None:
    model, _ = from_text(family)
    with pytest.raises(ConfigError, match=r"the last \d+ of 14 tokens in a layer with a sliding window"):
        started(model, cache_of(build(family), ids_of(14)))


def test_a_model_of_states_alone_has_none() -> None:
    config = hf.MambaConfig(vocab_size=tiny.VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2, use_cache=True)
    with torch.no_grad():
        output = hf.MambaForCausalLM(config)(input_ids=ids_of(), use_cache=True)
    cache = next(output[name] for name in ("cache", "cache_params") if name in output)
    with pytest.warns(UserWarning, match="2 layers"), pytest.raises(ConfigError, match="Empty"):
        prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=1)
