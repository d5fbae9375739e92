"""Models whose masks or scores depend on where a token stands, beyond what positions tell: right, or refused."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import families
import naive
import pytest
import tiny
import torch
import transformers as hf
from test_backends import flexible as flexible
from torch import Tensor
from transformers.masking_utils import create_chunked_causal_mask

from softprompt import ConfigError, Embeddings, PrefixTuningConfig, PromptTuningConfig, SoftPromptModel, get_peft_model

ROWS = (7, 20, 13)
CHUNK = 8
PLAIN: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}
TEMPERED = {"attn_temperature_tuning": True, "floor_scale": 4, "attn_scale": 1.0}


def made(config_class: Any, model_class: Any, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config_class(**options))
        tiny.perturb(model)
    return model.eval()


@cache
def llama4(backend: str = "sdpa", tempered: bool = False) -> Any:
    more = TEMPERED if tempered else {"attn_temperature_tuning": False}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
    options = {**tiny.GQA, "num_hidden_layers": 4, "attention_chunk_size": CHUNK, "no_rope_layer_interval": 2}
    model = made(hf.Llama4TextConfig, hf.Llama4ForCausalLM, **options, **experts, **more)
    model.set_attn_implementation(backend)
    return model


def wrapped(base: Any, config_class: Any = PromptTuningConfig, length: int = 5, **more: Any) -> SoftPromptModel:
    torch.manual_seed(1)
    return get_peft_model(base, config_class(task_type="CAUSAL_LM", num_virtual_tokens=length), **more).eval()


def each_row(batch: dict[str, Tensor]) -> list[Tensor]:
    return naive.rows(batch)


def alone(model: SoftPromptModel, row: Tensor) -> Tensor:
    """Logits of one row by the base model itself: vectors in the row, or keys and values in a cache of whole layers."""
    prompt = naive.own_prompt(model)
    if isinstance(prompt, Embeddings):
        return naive.logits(model, row)[0]
    held = hf.DynamicCache()
    for layer, (key, value) in enumerate(prompt.layers):
        held.update(key, value, layer)
    seen = torch.ones(1, prompt.length + row.shape[1], dtype=torch.long)
    name = "cache" if "cache" in model.get_base_model().forward.__annotations__ else "past_key_values"
    return model.get_base_model()(input_ids=row, attention_mask=seen, **{name: held}).logits


def check_rows(model: SoftPromptModel, batch: dict[str, Tensor], got: Tensor, tolerance: float = 3e-5) -> None:
    for number, row in enumerate(each_row(batch)):
        want = alone(model, row)[0]
        torch.testing.assert_close(got[number][batch["attention_mask"][number].bool()], want, rtol=1e-4, atol=tolerance)


# ---- chunks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tempered", [False, True], ids=["plain", "tempered"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("config_class", [PromptTuningConfig, PrefixTuningConfig])
@torch.no_grad()
def test_chunks_begin_where_the_rows_own_tokens_say(config_class: Any, backend: str, tempered: bool) -> None:
    """Attention in chunks of 8 behind 5 virtual tokens; scores that grow with the position, counted from the prompt."""
    model = wrapped(llama4(backend, tempered), config_class)
    for side in ("left", "right"):
        batch = tiny.ragged(ROWS, side)
        check_rows(model, batch, model(**batch).logits)


@torch.no_grad()
def test_chunks_in_flex_attention(flexible: None) -> None:
    base = llama4.__wrapped__("sdpa", True)
    model, batch = wrapped(base), tiny.ragged(ROWS, "left")
    expected = model(**batch).logits
    base.set_attn_implementation("flex_attention")
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[seen], expected[seen], rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("held", [None, "static"])
@pytest.mark.parametrize("tempered", [False, True], ids=["plain", "tempered"])
def test_chunks_generate(tempered: bool, held: str | None) -> None:
    if held and "block_sequence_ids" not in inspect.signature(create_chunked_causal_mask).parameters:
        pytest.skip("this transformers makes no mask of chunks for a static cache")
    model = wrapped(llama4("sdpa", tempered))
    batch = tiny.ragged(ROWS, "left")
    got = model.generate(**batch, max_new_tokens=6, cache_implementation=held, **PLAIN)
    for number, row in enumerate(each_row(batch)):
        assert got[number, -6:].tolist() == naive.greedy(model, row, 6)[0].tolist()


@pytest.mark.parametrize("tempered", [False, True], ids=["plain", "tempered"])
def test_chunks_train(tempered: bool) -> None:
    model = wrapped(llama4("sdpa", tempered)).train()
    batch = tiny.ragged(ROWS, "left")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    weights = [each for each in model.parameters() if each.requires_grad]
    got, want = model(**batch, labels=labels).loss, naive.loss(model, batch, labels)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad(got, weights), torch.autograd.grad(want, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_chunks_behind_prompts_of_different_lengths(side: str) -> None:
    """Rows of prompts of 5, 11 (past a chunk), 0 and 3 virtual tokens in one batch, against each alone."""
    model = wrapped(llama4())
    model.add_adapter("long", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=11))
    model.add_adapter("short", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    batch, names = tiny.ragged((7, 20, 13, 9), side), ["default", "long", "__base__", "short"]
    got = model(**batch, adapter_names=names).logits
    texts = None if side == "right" else model.generate(**batch, adapter_names=names, max_new_tokens=4, **PLAIN)
    for number, (name, row) in enumerate(zip(names, each_row(batch), strict=True)):
        seen = batch["attention_mask"][number].bool()
        if name == "__base__":
            want = model.get_base_model()(input_ids=row).logits
        else:
            model.set_adapter(name)
            want = alone(model, row)
            if texts is not None:
                whole = model.generate(input_ids=row, max_new_tokens=4, **PLAIN)
                assert texts[number, -4:].tolist() == whole[0, -4:].tolist()
        torch.testing.assert_close(got[number][seen], want[0], rtol=1e-4, atol=3e-5)


def test_rows_of_several_sequences_in_chunks_are_refused() -> None:
    model = wrapped(llama4())
    ids, positions = torch.arange(3, 13)[None], torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    with pytest.raises(ValueError, match=r"attends in chunks.*give each sequence a row of its own"):
        model(input_ids=ids, position_ids=positions)


# ---- padding between the tokens of a row --------------------------------------------------------------------------


def gpt_neo() -> Any:
    options = {**families._NAMES, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 5}
    types = {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": tiny.CONTEXT}
    return made(hf.GPTNeoConfig, hf.GPTNeoForCausalLM, **options, **types)


def decoder(name: str) -> Any:
    return {"gpt_neo": gpt_neo, "llama4": llama4.__wrapped__}.get(name, lambda: families.build(name, "CAUSAL_LM"))()


def with_holes() -> dict[str, Tensor]:
    torch.manual_seed(2)
    ids, mask = torch.randint(3, tiny.VOCAB, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, 3:5], mask[1, :2], mask[1, 6] = 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("config_class", [PromptTuningConfig, PrefixTuningConfig])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "falcon_alibi"])
@torch.no_grad()
def test_a_row_with_holes_is_the_row_without_these_tokens(family: str, config_class: Any) -> None:
    model, batch = wrapped(decoder(family), config_class), with_holes()
    check_rows(model, batch, model(**batch).logits)


@pytest.mark.parametrize("config_class", [PromptTuningConfig, PrefixTuningConfig])
@pytest.mark.parametrize("family", ["mpt", "gpt_neo", "mistral_window", "gemma3", "llama4"])
@torch.no_grad()
def test_holes_are_refused_where_distances_count_columns(family: str, config_class: Any) -> None:
    """ALiBi by columns (MPT), windows and chunks: the others' sum of positions does not help there."""
    model, batch = wrapped(decoder(family), config_class), with_holes()
    with pytest.raises(ConfigError, match=r"row 0.*by columns; leave these tokens out and pad all rows on one side"):
        model(**batch)
    with pytest.raises(ConfigError, match="by columns"):
        model.generate(**batch, max_new_tokens=2, **PLAIN)
    for side in ("left", "right"):
        padded = tiny.ragged(ROWS, side)
        check_rows(model, padded, model(**padded).logits)


@torch.no_grad()
def test_holes_within_a_window_are_right() -> None:
    base = tiny.build("mistral", sliding_window=9)
    batch = with_holes()
    model = wrapped(base, length=3)
    check_rows(model, batch, model(**batch).logits)


# ---- something beside the attention function ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("config_class", [PromptTuningConfig, PrefixTuningConfig])
def test_diffllama_is_exact_through_its_cache(config_class: Any, backend: str) -> None:
    """It takes its values apart before the attention function sees them, so keys and values go through the cache."""
    base = made(hf.DiffLlamaConfig, hf.DiffLlamaForCausalLM, **tiny.GQA)
    base.set_attn_implementation(backend)
    model = wrapped(base, config_class)
    assert model.way.name == "cache" and model.facts.foldable
    weights = [each for each in model.parameters() if each.requires_grad]
    for side in ("left", "right"):
        batch = tiny.ragged(ROWS, side)
        with torch.no_grad():
            check_rows(model, batch, model(**batch).logits)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        got, want = model(**batch, labels=labels).loss, naive.loss(model, batch, labels)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        for one, other in zip(torch.autograd.grad(got, weights), torch.autograd.grad(want, weights), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    batch = tiny.ragged(ROWS, "left")
    for held in (None, "static"):
        texts = model.generate(**batch, max_new_tokens=5, cache_implementation=held, **PLAIN)
        for number, row in enumerate(each_row(batch)):
            assert texts[number, -5:].tolist() == naive.greedy(model, row, 5)[0].tolist()
