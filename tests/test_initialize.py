"""A prefix started from a text, a chat or a cache behaves as that text in the plain model's context."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_cache
import pytest
import tiny
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, RobertaConfig, RobertaForCausalLM, StaticCache

from softprompt import (
    KV,
    CheckpointError,
    ConfigError,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    get_peft_model,
    initialize_from_text,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)

TEXT = "the cat sat on the mat and the dog ran to the red house by the river while it rained all night long " * 2
COUNT = 20


def prefixed(base: PreTrainedModel, **options: Any) -> SoftPromptModel:
    return get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT, **options))


def continuation(length: int = 12) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (1, length))


def greedy(model: Any, ids: Tensor, steps: int = 10) -> Tensor:
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False, eos_token_id=None
    )
    return out[:, ids.shape[1] :]


def assert_as_in_context(model: SoftPromptModel, context: Tensor, tolerance: float = 1e-4) -> None:
    base, ids = model.get_base_model(), continuation()
    whole = torch.cat([context, ids], dim=1)
    with torch.no_grad():
        expected = base(input_ids=whole).logits[:, context.shape[1] :]
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=tolerance)
    assert torch.equal(greedy(model, ids), greedy(base, whole))


def text_ids(count: int = COUNT) -> Tensor:
    return torch.tensor([tiny.tokenizer()(TEXT)["input_ids"][:count]])


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.DECODERS + tiny.MORE_DECODERS)
def test_the_snippet_is_exact(family: str, backend: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny.build(family).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=backend)
    tok = AutoTokenizer.from_pretrained(tmp_path)
    cfg = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, prefix_projection=False)
    model = get_peft_model(base, cfg)
    flat = initialize_kv_prefix_from_text(model, tok, text=TEXT, use_chat_template=False)
    assert torch.equal(flat, model.encoder().saved_vectors())
    assert_as_in_context(model.eval(), text_ids())


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_with_the_ffn_fitted(family: str) -> None:
    model = prefixed(tiny.build(family), prefix_projection=True, encoder_hidden_size=32)
    initialize_kv_prefix_from_text(model, tiny.tokenizer(), text=TEXT, use_chat_template=False)
    assert_as_in_context(model.eval(), text_ids())
    ids = continuation()
    model(input_ids=ids, labels=ids).loss.backward()  # and it still trains
    assert all(torch.count_nonzero(p.grad) for p in model.prompt_encoder.parameters())


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_positions_that_do_not_begin_at_zero(config: Any) -> None:
    """RoBERTa counts from `padding_idx + 1`, as a decoder too (transformers' own `generate` forgets it there)."""
    torch.manual_seed(0)
    options = tiny.CONFIGS["roberta"][1]
    base = RobertaForCausalLM(RobertaConfig(**options, is_decoder=True)).eval()
    model = get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=COUNT)).eval()
    initialize_from_text(model, tiny.tokenizer(), TEXT)
    ids = continuation()
    expected = base(input_ids=torch.cat([text_ids(), ids], dim=1)).logits[:, COUNT:]
    positions = torch.arange(12)[None] + 1  # as RoBERTa's callers count them
    for more in ({}, {"labels": ids}):
        torch.testing.assert_close(model(input_ids=ids, **more).logits, expected, rtol=0, atol=1e-4)
        given = model(input_ids=ids, position_ids=positions, **more).logits
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)


def test_a_model_in_training_mode_starts_from_the_same_keys() -> None:
    base = tiny.build("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    model = prefixed(base, prefix_dropout=0.5).train()
    initialize_kv_prefix_from_text(model, tiny.tokenizer(), text=TEXT, use_chat_template=False)
    assert base.training
    assert model.encoder().training
    assert_as_in_context(model.eval(), text_ids())


def test_a_chat_is_a_system_message() -> None:
    tokenizer, model = tiny.tokenizer(), prefixed(tiny.build("llama"))
    initialize_kv_prefix_from_text(model, tokenizer, text=TEXT)
    chat = tokenizer.apply_chat_template([{"role": "system", "content": TEXT}], tokenize=False)
    ids = torch.tensor([tokenizer(chat, add_special_tokens=False)["input_ids"][:COUNT]])
    assert not torch.equal(ids, text_ids())
    assert_as_in_context(model.eval(), ids)


def test_without_a_template_a_chat_is_the_text() -> None:
    tokenizer, model = tiny.tokenizer(), prefixed(tiny.build("llama"))
    tokenizer.chat_template = None
    initialize_kv_prefix_from_text(model, tokenizer, text=TEXT)
    assert_as_in_context(model.eval(), text_ids())


@pytest.mark.parametrize("as_pairs", [False, True])
def test_from_a_cache(as_pairs: bool) -> None:
    base = tiny.build("llama")
    cache: Any = hf_cache.of(base(input_ids=text_ids(30), use_cache=True))
    if as_pairs:
        cache = tuple((layer.keys, layer.values) for layer in cache.layers)
    model = prefixed(base)
    flat = initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    assert flat.shape == (COUNT, 2 * 2 * 2 * 8)
    assert torch.equal(flat, prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=COUNT))
    assert_as_in_context(model.eval(), text_ids())


def test_from_a_static_cache_only_what_it_has_seen() -> None:
    base = tiny.build("llama")
    cache = StaticCache(config=base.config, max_cache_len=40)
    base(input_ids=text_ids(22), **hf_cache.given(base, cache))
    model = prefixed(base)
    initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    assert_as_in_context(model.eval(), text_ids())
    with pytest.raises(ConfigError, match=r"at least 23.*got 22"):
        prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=23)


def test_a_sliding_cache_that_has_dropped_the_first_tokens_is_refused() -> None:
    base = tiny.build("mistral", sliding_window=24)
    with torch.no_grad():
        cache = hf_cache.of(base(input_ids=text_ids(30), use_cache=True))
    with pytest.raises(ConfigError, match=r"last 23 of 30 tokens"):
        initialize_kv_prefix_from_past_key_values(prefixed(base), past_key_values=cache)


def test_another_number_of_tokens_than_the_prefix_has() -> None:
    base, model = tiny.build("llama"), prefixed(tiny.build("llama"))
    cache = hf_cache.of(base(input_ids=text_ids(30)))
    before = model.encoder().saved_vectors()
    with pytest.raises(ConfigError, match=r"\(10, 64\).*\(20, 64\)"):
        initialize_kv_prefix_from_past_key_values(model, past_key_values=cache, num_virtual_tokens=10)
    assert torch.equal(model.encoder().saved_vectors(), before)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (DynamicCache(), "Empty"),
        ([], "Empty"),
        ("cache", "str"),
        ([(torch.ones(2, 1, 30, 4), torch.ones(2, 1, 30, 4))], "one sequence"),
        ([(torch.ones(1, 30, 4), torch.ones(1, 30, 4))], r"\[1, heads, tokens, size\]"),
        ([(torch.ones(1, 1, 9, 4), torch.ones(1, 1, 9, 4))], "at least 20.*got 9"),
        ([(torch.ones(1, 1, 30, 4), torch.ones(1, 2, 30, 4))], "different heads or tokens"),
        ([(torch.ones(1, 1, t, 4), torch.ones(1, 1, t, 4)) for t in (30, 31)], "different heads or tokens"),
        ([torch.ones(2, 1, 1, 30, 4)], r"layer 0 .* is a Tensor"),
        ([(None, None)], r"layer 0 .*give \(key, value\) tensors"),
    ],
)
def test_caches_that_are_no_prefix(cache: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=20)


@pytest.mark.parametrize(
    "initialize",
    [
        lambda model, text: initialize_kv_prefix_from_text(model, tiny.tokenizer(), text=text, use_chat_template=False),
        lambda model, text: initialize_from_text(model, tiny.tokenizer(), text),
    ],
)
def test_a_text_too_short_names_both_counts(initialize: Callable[[SoftPromptModel, str], Any]) -> None:
    model = prefixed(tiny.build("gpt2"))
    before, text = model.encoder().saved_vectors(), "the cat sat"
    have = len(tiny.tokenizer()(text)["input_ids"])
    with pytest.raises(ValueError, match=rf"{have} tokens.*{COUNT}"):
        initialize(model, text)
    assert torch.equal(model.encoder().saved_vectors(), before)


def test_max_length_cuts_the_text() -> None:
    model = prefixed(tiny.build("gpt2"))
    with pytest.raises(ValueError, match=rf"12 tokens.*{COUNT}"):
        initialize_kv_prefix_from_text(model, tiny.tokenizer(), text=TEXT, max_length=12, use_chat_template=False)


def test_embedding_methods_are_sent_to_the_other_function() -> None:
    model = get_peft_model(tiny.build("gpt2"), PromptTuningConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="initialize_from_text"):
        initialize_kv_prefix_from_text(model, tiny.tokenizer(), text=TEXT)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(num_virtual_tokens=COUNT),
        PromptEncoderConfig(num_virtual_tokens=COUNT, encoder_hidden_size=64),
        PromptEncoderConfig(num_virtual_tokens=COUNT, encoder_hidden_size=64, encoder_reparameterization_type="LSTM"),
        PrefixTuningConfig(num_virtual_tokens=COUNT),
        PrefixTuningConfig(num_virtual_tokens=COUNT, prefix_projection=True),
    ],
    ids=["table", "mlp", "lstm", "flat", "ffn"],
)
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_any_method_starts_as_the_text(family: str, config: Any) -> None:
    model = get_peft_model(tiny.build(family), config).eval()
    initialize_from_text(model, tiny.tokenizer(), TEXT)
    lstm = getattr(config, "encoder_reparameterization_type", None) == "LSTM"
    assert_as_in_context(model, text_ids(), tolerance=2e-3 if lstm else 1e-4)


def test_only_the_named_adapter_starts() -> None:
    model = prefixed(tiny.build("gpt2"))
    model.add_adapter("other", PrefixTuningConfig(num_virtual_tokens=COUNT))
    before = model.encoder("default").saved_vectors()
    initialize_from_text(model, tiny.tokenizer(), TEXT, adapter_name="other")
    assert torch.equal(model.encoder("default").saved_vectors(), before)
    model.set_adapter("other")
    assert_as_in_context(model.eval(), text_ids())


# ---- KV files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_a_folded_prompt_serves_the_plain_model(family: str, method: Any, tmp_path: Path) -> None:
    base = tiny.build(family)
    model = get_peft_model(base, method(task_type="CAUSAL_LM", num_virtual_tokens=6)).eval()
    kv = model.fold()
    assert kv.length == 6
    kv.save(tmp_path / "prompt.safetensors")
    again = KV.load(tmp_path / "prompt.safetensors")
    for (key, value), (other_key, other_value) in zip(kv.layers, again.layers, strict=True):
        assert torch.equal(key, other_key)
        assert torch.equal(value, other_value)
    ids = continuation(8).repeat(3, 1)
    ids[1:] = torch.randint(3, tiny.VOCAB, (2, 8))
    with torch.no_grad():
        out = base(
            input_ids=ids,
            attention_mask=torch.ones(3, 14, dtype=torch.long),
            position_ids=torch.arange(6, 14)[None],
            **hf_cache.given(base, again.to_cache(3)),
        ).logits
        torch.testing.assert_close(out, model(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_flat_and_layers_are_the_same_prompt() -> None:
    flat = torch.randn(5, 3 * 2 * 2 * 4)
    config = PrefixTuningConfig(num_layers=3, num_attention_heads=2, token_dim=8)
    kv = KV.from_flat(flat, config)
    assert torch.equal(kv.flat(), flat)
    assert torch.equal(kv.layers[1][0][0, 1, 3], flat[3].view(3, 2, 2, 4)[1, 0, 1])
    assert kv.truncate(2).length == 2
    assert torch.equal(kv.truncate(2).flat(), flat[:2])


def test_a_file_that_is_no_prompt(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        KV.load(tmp_path / "none.safetensors")
