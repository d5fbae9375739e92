"""Transfer between tasks: SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer, https://arxiv.org/abs/2110.07904

A prompt for one task may start from that of another, and how alike two tasks are is the cosine between their prompts:
of the average tokens, cos(1/p Σ e_i, 1/q Σ f_j), or averaged over all pairs of tokens, 1/pq Σ_i Σ_j cos(e_i, f_j).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from softprompt.checkpoint import SavedAdapter, load_adapter
from softprompt.config import KVConfig, PromptConfig
from softprompt.errors import ConfigError
from softprompt.methods import METHODS, MultitaskPromptTuningConfig
from softprompt.model import SoftPromptModel
from softprompt.prompt import KV, KVPrompt, SoftPrompt


@dataclass(frozen=True)
class TaskPrompt:
    """One task's prompt as vectors `[p, width]`, each a virtual token in input space or its keys and values."""

    name: str
    vectors: Tensor
    config: PromptConfig

    @property
    def kind(self) -> str:
        return "keys and values" if isinstance(self.config, KVConfig) else "vectors in input space"


@dataclass(frozen=True)
class Comparison:
    """How alike prompts are: `similarity[i][j]` is the cosine of the prompts `names[i]` and `names[j]`."""

    names: list[str]
    metric: str
    similarity: list[list[float]]
    base_models: list[str | None]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_prompts(paths: Sequence[str | Path], metric: str = "average") -> Comparison:
    """The cosine between all saved prompts in these folders; a prompt of several tasks counts as one for each.

    Raises ConfigError for fewer than two, and for prompts that are not of one kind and width.
    """
    prompts = [prompt for path in paths for prompt in read_prompts(path)]
    if len(prompts) < 2:
        raise ConfigError(f"{len(prompts)} prompts were given to compare; give at least 2.")
    for prompt in prompts[1:]:
        _check_comparable(prompts[0], prompt)
    rows = [[similarity(one.vectors, other.vectors, metric) for other in prompts] for one in prompts]
    bases = [prompt.config.base_model_name_or_path for prompt in prompts]
    return Comparison([prompt.name for prompt in prompts], metric, rows, bases)


def similarity(one: Tensor, other: Tensor, metric: str = "average") -> float:
    """The cosine between two prompts `[p, width]` and `[q, width]`, from −1 to 1; 0 where one is all zeros."""
    one, other = one.double(), other.double()
    if metric == "average":
        return float(normalize(one.mean(0), dim=0) @ normalize(other.mean(0), dim=0))
    if metric == "per-token":
        return float(normalize(one, dim=1).mean(0) @ normalize(other, dim=1).mean(0))
    raise ConfigError(f"metric={metric!r} is not known; use average or per-token.")


def read_prompts(path: str | Path, like: PromptConfig | None = None) -> list[TaskPrompt]:
    """The prompts in a folder (or hub id): one, or as many as it has tasks.

    `like` is the config of a prompt on the same base model, which says how many layers a prefix in PEFT's form for
    encoder-decoders is for (see `pairs`).
    """
    saved = load_adapter(path)
    config = saved.config
    if isinstance(config, KVConfig) and isinstance(like, KVConfig) and config.paired and like.paired:
        config = replace(config, num_layers=like.num_layers)
    encoder = _encoder_of(config, saved)
    if isinstance(config, MultitaskPromptTuningConfig) and config.num_tasks > 1:
        names = config.task_names or [str(task) for task in range(config.num_tasks)]
        return [TaskPrompt(f"{path}:{name}", _vectors(encoder, task), config) for task, name in enumerate(names)]
    return [TaskPrompt(str(path), _vectors(encoder), config)]


@torch.no_grad()
def initialize_from_prompt(
    model: SoftPromptModel, path: str | Path, adapter_name: str | None = None, task: str | int | None = None
) -> None:
    """Start a prompt from one saved for another task; `task` chooses one from a prompt of several.

    The two need not be made by one method, but both of vectors in input space or both of keys and values, and for base
    models of one width. A longer prompt is cut to its first tokens; a shorter one in input space is repeated, as a text
    is. Keys and values have positions, and cannot be. Task heads stay as they are.
    """
    encoder = model.encoder(adapter_name)
    config = encoder.config
    source = _chosen(read_prompts(path, like=config), path, task)
    _check_comparable(TaskPrompt("this prompt", encoder.saved_vectors(), config), source)
    count, there = config.num_virtual_tokens, len(source.vectors)
    if there < count and isinstance(encoder, KVPrompt):
        raise ConfigError(
            f"{source.name} has {there} virtual tokens, this prompt {count}; keys and values have positions and cannot "
            f"be repeated, so use num_virtual_tokens={there} or fewer."
        )
    encoder.start_from(source.vectors.repeat(-(-count // there), 1)[:count])


def _chosen(prompts: list[TaskPrompt], path: str | Path, task: str | int | None) -> TaskPrompt:
    if len(prompts) == 1 and task is None:
        return prompts[0]
    config = prompts[0].config
    if task is None or not isinstance(config, MultitaskPromptTuningConfig):
        have = f"{len(prompts)} tasks, so say which" if len(prompts) > 1 else "one task, so name none"
        raise ConfigError(f"{path} has the prompt of {have}.")
    number = config.task_number(task) if isinstance(task, str) else task
    if not 0 <= number < len(prompts):
        raise ConfigError(f"{path} has tasks 0…{len(prompts) - 1}, not {number}.")
    return prompts[number]


def _check_comparable(one: TaskPrompt, other: TaskPrompt) -> None:
    if one.kind != other.kind:
        raise ConfigError(
            f"{one.name} is made of {one.kind}, {other.name} of {other.kind}, which have no measure in common; use "
            "prompts of one kind (convert --to prefix turns any into keys and values)."
        )
    widths = one.vectors.shape[1], other.vectors.shape[1]
    layers = _layers(one.config), _layers(other.config)
    if widths[0] != widths[1] or layers[0] != layers[1]:
        shapes = f"; their layers have {layers[0]} and {layers[1]}" if layers[0] != layers[1] else ""
        raise ConfigError(
            f"{one.name} has virtual tokens of width {widths[0]}, {other.name} of {widths[1]}{shapes}; use prompts for "
            "one base model."
        )


def _layers(config: PromptConfig) -> str:
    """The (heads, key size, value size) of the layers that keys and values are for."""
    return str(config.prefix_shapes) if isinstance(config, KVConfig) else ""


def _encoder_of(config: PromptConfig, saved: SavedAdapter) -> SoftPrompt:
    """The prompt alone, without a base model."""
    method = next(each for each in METHODS.values() if each.peft_type == config.peft_type)
    encoder = method(replace(config, inference_mode=True))
    encoder.load_saved({name: saved.tensors[name].float() for name in method.saved_names})
    return encoder


@torch.no_grad()
def _vectors(encoder: SoftPrompt, task: int | None = None) -> Tensor:
    prompt = encoder.prompt(None if task is None else torch.tensor([task]))
    return prompt.flat() if isinstance(prompt, KV) else prompt.vectors[0]
