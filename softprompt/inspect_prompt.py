"""What a saved prompt is, in numbers: its method and size, the norms of its vectors, the vocabulary nearest to them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from softprompt.checkpoint import SavedAdapter
from softprompt.config import EmbeddingConfig, KVConfig, PromptConfig
from softprompt.methods import MultitaskPromptTuningConfig
from softprompt.pairs import each_once, narrowed
from softprompt.prompt import KV, METHODS, KVPrompt


@dataclass(frozen=True)
class LayerNorms:
    """Mean Euclidean norm of one layer's key and value heads."""

    key: float
    value: float


@dataclass(frozen=True)
class PromptFacts:
    """All that `softprompt show` prints. `token_norms` has one mean norm per virtual token.

    `layers` is filled for keys and values, `nearest` (token and cosine, best first, per virtual token) for prompts in
    input space when the base model is at hand. `several` are the tasks of a prompt that has more than one; a
    `template` is there where its virtual tokens stand inside the text.
    """

    method: str
    task: str | None
    base_model: str | None
    virtual_tokens: int
    shape: tuple[int, ...]
    parameters: int
    head_parameters: int
    bytes: int
    token_norms: list[float]
    layers: list[LayerNorms] = field(default_factory=list)
    nearest: list[list[tuple[str, float]]] = field(default_factory=list)
    several: list[str] = field(default_factory=list)
    template: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def method_name(peft_type: str | None) -> str:
    """`prefix_tuning` for `PREFIX_TUNING`."""
    return next((name for name, method in METHODS.items() if method.peft_type == peft_type), str(peft_type))


def saved_kv(saved: SavedAdapter) -> KV | None:
    """The keys and values of a saved prompt, or None if it lives in input space. Needs no base model."""
    config = saved.config
    if not issubclass(METHODS[method_name(config.peft_type)], KVPrompt):
        return None
    assert isinstance(config, KVConfig)
    flat = saved.tensors["prompt_embeddings"].float()
    if config.paired and config.num_layers is not None:
        before, flat = flat.shape[1], each_once(flat, config.num_layers)
        config = replace(config, num_layers=config.num_layers * flat.shape[1] // before)
    elif config.padded:
        flat = narrowed(flat, config)
    return KV.from_flat(flat, config)


def tasks_of(config: PromptConfig) -> list[str]:
    """The names of a prompt's tasks, numbers where it has none; empty where there is a single one."""
    if not isinstance(config, MultitaskPromptTuningConfig) or config.num_tasks == 1:
        return []
    return config.task_names or [str(number) for number in range(config.num_tasks)]


def describe(saved: SavedAdapter, folder: Path) -> PromptFacts:
    """Facts about an adapter that need no base model."""
    config, stored = saved.config, saved.tensors["prompt_embeddings"].float()
    kv, method = saved_kv(saved), method_name(config.peft_type)
    prompt = stored[: len(stored) // config.saved_copies] if kv is None else kv.flat()  # PEFT's form has it twice
    others = {name: tensor.numel() for name, tensor in saved.tensors.items() if name != "prompt_embeddings"}
    own = prompt.numel() + sum(size for name, size in others.items() if name in METHODS[method].saved_names)
    return PromptFacts(
        method=method,
        task=str(config.task_type) if config.task_type else None,
        base_model=config.base_model_name_or_path,
        virtual_tokens=config.num_virtual_tokens,
        shape=tuple(prompt.shape),
        parameters=own,
        head_parameters=prompt.numel() + sum(others.values()) - own,
        several=tasks_of(config),
        template=config.template if isinstance(config, EmbeddingConfig) else None,
        bytes=sum(path.stat().st_size for path in folder.glob("adapter_model.*") if path.is_file()),
        token_norms=token_norms(kv) if kv else prompt.norm(dim=1).tolist(),
        layers=layer_norms(kv) if kv else [],
    )


def describe_kv(kv: KV, path: Path) -> PromptFacts:
    """Facts about a key-value file."""
    key = kv.pairs[0][0]
    parameters = sum(part.numel() for pair in kv.pairs for part in pair)
    shape = (len(kv.pairs), 2, *key.shape[1:])
    return PromptFacts("key-value file", None, None, kv.length, shape, parameters, 0, path.stat().st_size,
                       token_norms(kv), layer_norms(kv))  # fmt: skip


def token_norms(kv: KV) -> list[float]:
    """Mean norm of the heads' keys and values, per virtual token."""
    parts = [part[0].float().norm(dim=-1).mean(0) for pair in kv.pairs for part in pair]
    return torch.stack(parts).mean(0).tolist()


def layer_norms(kv: KV) -> list[LayerNorms]:
    return [LayerNorms(*(float(part.float().norm(dim=-1).mean()) for part in pair)) for pair in kv.pairs]


def summary(values: Sequence[float]) -> str:
    """`mean (least to greatest)`."""
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"
