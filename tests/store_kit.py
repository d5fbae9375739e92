"""Small adapters in folders, and what a store says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from softprompt import Embeddings, PromptStore, PromptTuningConfig, SoftPromptError
from softprompt.checkpoint import save_adapter
from softprompt.facts import Facts, LayerShape

WIDTH, TOKENS = 32, 4
GEOMETRY = Facts((LayerShape(4, 8, 8),) * 2, WIDTH, 4, True, tiny.CONTEXT, True, 0)
CONFIG = PromptTuningConfig(
    task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, token_dim=WIDTH, num_layers=2, num_attention_heads=4,
    num_transformer_submodules=1,
)  # fmt: skip
BYTES = TOKENS * WIDTH * 4
WEIGHTS = "adapter_model.safetensors"


def table(number: float) -> Tensor:
    return torch.arange(TOKENS * WIDTH).view(TOKENS, WIDTH) / 64 + number


def write(folder: Path, number: float, config: Any = CONFIG) -> Path:
    save_adapter(folder, config, {"prompt_embeddings": table(number)})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight adapters, p0…p7."""
    for number in range(8):
        write(tmp_path / "prompts" / f"p{number}", number)
    return tmp_path / "prompts"


def vectors(store: PromptStore, name: str) -> Tensor:
    good, bad = store.load([name], GEOMETRY)
    assert not bad
    prompt = good[name].prompt()
    assert isinstance(prompt, Embeddings)
    return prompt.vectors


def error_of(store: PromptStore, name: str, facts: Facts = GEOMETRY) -> SoftPromptError:
    good, bad = store.load([name], facts)
    assert not good
    assert "\n" not in str(bad[name])
    return bad[name]
