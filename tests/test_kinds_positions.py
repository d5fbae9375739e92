"""Models whose masks, scores or states depend on where a token stands, beyond what positions tell: right, or refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import naive
import pytest
import tiny
import torch
import transformers as hf
from test_backends import flexible as flexible
from torch import Tensor

from softprompt import PrefixTuningConfig, PromptTuningConfig, SoftPromptModel, get_peft_model

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
    if not hasattr(prompt, "layers"):
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
    with pytest.raises(ValueError, match="attends in chunks.*give each sequence a row of its own"):
        model(input_ids=ids, position_ids=positions)
