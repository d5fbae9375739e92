"""Models whose numbers are rounded, by their type or by the whole batch: no fact and no refusal comes from rounding."""

from __future__ import annotations

from functools import cache
from typing import Any

import families
import pytest
import tiny
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from softprompt import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from softprompt.base_model import BaseModel
from softprompt.canary import compare_keys
from softprompt.facts import probed

DECODERS = ("llama", "gpt2", "bloom", "opt")
TASKS = {**dict.fromkeys(DECODERS, "CAUSAL_LM"), "bert": "MASKED_LM", "t5": "SEQ_2_SEQ_LM"}
BOTH = [PromptTuningConfig, PrefixTuningConfig]


class Rounded(nn.Linear):
    """Activations as so many whole steps of the batch's maximum, as LLM.int8 has them; with a gradient or without."""

    def take(self, weight: Tensor, bias: Tensor | None, steps: int, differentiable: bool) -> Rounded:
        self.weight, self.bias = nn.Parameter(weight.detach().clone()), bias
        self.steps, self.differentiable = steps, differentiable
        return self

    def forward(self, input: Tensor) -> Tensor:
        x = input
        step = x.detach().abs().amax() / self.steps
        rounded = (x / step).round() * step
        rounded = x + (rounded - x).detach() if self.differentiable else rounded.detach()
        return linear(rounded, self.weight, self.bias)


def rounded(family: str, differentiable: bool, steps: int = 127) -> Any:
    base = families.build(family, TASKS[family])
    for module in list(base.modules()):
        for name, part in list(module.named_children()):
            if not isinstance(part, nn.Linear | Conv1D) or "head" in name:
                continue
            weight = part.weight.T if isinstance(part, Conv1D) else part.weight
            other = Rounded(weight.shape[1], weight.shape[0]).take(weight, part.bias, steps, differentiable)
            setattr(module, name, other)
    return base


@pytest.mark.parametrize("differentiable", [True, False], ids=["gradient", "no gradient"])
@pytest.mark.parametrize("family", TASKS)
def test_layers_that_round_by_the_batch(family: str, differentiable: bool) -> None:
    """A decoder is causal, an encoder is not, whatever its layers round by, or cut the gradient off."""
    base = rounded(family, differentiable)
    task = None if family == "bert" else TASKS[family]
    batch = tiny.ragged((5, 9), "left")
    for config_class in BOTH:
        model = get_peft_model(base, config_class(task_type=task, num_virtual_tokens=4))
        assert model.facts.causal == (family in DECODERS)
        assert model.facts.foldable == (family in DECODERS)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if not differentiable:
            continue
        weights = [each for each in model.parameters() if each.requires_grad]
        before = model.train()(**batch, labels=labels).loss
        step = torch.optim.Adam(weights, 0.1)
        for _ in range(3):
            model(**batch, labels=labels).loss.backward()
            step.step()
            step.zero_grad()
        assert bool(model(**batch, labels=labels).loss < before)
        if family != "bert":
            assert (
                model.eval()
                .generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=3)
                .shape[0]
                == 2
            )


@pytest.mark.parametrize("steps", [7, 15], ids=["4 bits", "5 bits"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_rounding_to_few_steps_is_no_reason_to_refuse(family: str, steps: int) -> None:
    for config_class in BOTH:
        task = None if family == "bert" else TASKS[family]
        get_peft_model(rounded(family, True, steps), config_class(task_type=task, num_virtual_tokens=4))


# ---- narrow types --------------------------------------------------------------------------------------------------

_WIDE: dict[str, Any] = {
    **tiny.GQA,
    "vocab_size": 500,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
}
_HEADS: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
_EXPERTS: dict[str, Any] = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128}


@cache
def wide(name: str, spread: float, seed: int = 0) -> Any:
    options: dict[str, Any] = {**_WIDE, **_HEADS, "initializer_range": spread}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == "llama":
            return hf.LlamaForCausalLM(hf.LlamaConfig(**options)).eval()
        if name == "gemma3":
            return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**options, sliding_window=16)).eval()
        return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**options, **_EXPERTS)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("spread", [0.02, 0.2])
@pytest.mark.parametrize("name", ["llama", "gemma3", "experts"])
def test_narrow_types_are_not_taken_for_errors(name: str, spread: float, dtype: torch.dtype) -> None:
    """Eight layers of 256, and experts of which a hair decides: all that is compared is called equal."""
    base = wide(name, spread).to(dtype)
    found = BaseModel.of(base)
    assert not found.facts.no_prefix
    assert not found.facts.no_vectors
    wide.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "experts"])
def test_a_real_error_is_found_in_every_type(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real tokens at the positions of the virtual ones."""
    base = wide(name, 0.2).to(dtype)
    way, facts, _ = probed(base)
    assert all(each.good for each in compare_keys(way, facts))
    from softprompt.injection.scope import Scope

    monkeypatch.setattr(Scope, "shift", lambda self, batch, device: 0)
    assert not all(each.good for each in compare_keys(way, facts))
    monkeypatch.undo()
    monkeypatch.setattr(Scope, "pair", lambda self, module: None)  # no layer sees the prompt
    assert not all(each.good for each in compare_keys(way, facts))
    wide.cache_clear()
