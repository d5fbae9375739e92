"""The checkpoint of a foreign training loop: a prompted model's `state_dict()`, as Trainer and Accelerate write it.

It lies in `model.safetensors`, with the encoder as it is trained, so that training can go on from it. Beside the
numbers stand the configs of all adapters (JSON, in whole numbers of eight bytes), so it can be loaded as a prompt too.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompt.checkpoint.config_file import MAX_CONFIG_BYTES, config_to_json, method_of, parse_config
from softprompt.checkpoint.guard import check_finite, check_layouts, damage
from softprompt.checkpoint.promise import encoder_shapes
from softprompt.checkpoint.tensor_file import Layout, read_file
from softprompt.checkpoint.undrawn import Undrawn
from softprompt.config import KVConfig, PromptConfig
from softprompt.errors import CheckpointError

STATE_NAME = "model.safetensors"
CONFIGS = "_extra_state"
"""The name torch gives to what a module saves beside its tensors."""


class _NotOursError(Exception):
    """A file of that name which holds something else, such as a whole model."""


def packed_configs(active: str, configs: Mapping[str, PromptConfig]) -> Tensor:
    """The configs of adapters, as they are saved, and which one is active: JSON in whole numbers `[n]`."""
    values = {name: json.loads(config_to_json(config)) for name, config in configs.items()}
    text = json.dumps({"active": active, "adapters": values}).encode()
    return torch.frombuffer(bytearray(text.ljust(-(-len(text) // 8) * 8)), dtype=torch.int64)


def read_training_state(path: Path) -> tuple[PromptConfig, dict[str, Tensor], dict[str, Tensor] | None] | None:
    """Config, tensors and encoder, as of a `SavedAdapter`, of the active adapter; None if the file is not ours.

    Raises CheckpointError for one that is, and is damaged.
    """
    try:
        with damage(path, _NotOursError):
            tensors = read_file(path, lambda found: _check_types(path, found))
    except _NotOursError:
        return None
    name, config = _active(path, tensors.pop(CONFIGS))
    check_finite(path, tensors)
    state = _below(f"prompt_encoder.{name}.", tensors)
    layouts: dict[str, Layout] = {key: (tuple(each.shape), each.dtype) for key, each in state.items()}
    check_layouts(path, layouts, encoder_shapes(config, path), None)
    heads = {_head_name(key): each for key, each in _below(f"heads.copies.{name}.", tensors).items()}
    saved = _saved_tensors(config, path, state)
    return config, saved | heads, None if tuple(state) == ("embedding.weight",) else state


def _check_types(path: Path, found: Mapping[str, Layout]) -> None:
    """_NotOursError unless a prompted model's configs are there; CheckpointError for what no prompt has."""
    shape, dtype = found.get(CONFIGS, ((), None))
    if dtype is not torch.int64 or len(shape) != 1 or 8 * shape[0] > MAX_CONFIG_BYTES:
        raise _NotOursError
    for name, (_, kind) in found.items():
        if name.startswith("base_model."):
            raise CheckpointError(
                f"{path} also holds what was trained in the base model ({name}); put the same layers into it and read "
                "the file with load_state_dict."
            )
        if not isinstance(kind, torch.dtype):
            raise CheckpointError(f"{path}: {name} has type {kind}; a prompt is made of real numbers.")


def _active(path: Path, packed: Tensor) -> tuple[str, PromptConfig]:
    """Name and config of the active adapter."""
    with damage(path):
        values: Any = json.loads(packed.numpy().tobytes())
        name = values["active"]
        text = json.dumps(values["adapters"][name]).encode()
    return str(name), parse_config(text, path)


def _saved_tensors(config: PromptConfig, path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds of a prompt whose encoder has this state."""
    layers = (config.num_layers or 0) // 2 if isinstance(config, KVConfig) and config.paired else config.num_layers
    with Undrawn():
        live = replace(config, inference_mode=False, num_layers=layers or None)
        encoder = method_of(config.peft_type, path)(live)
    encoder.load_state_dict(state)
    return encoder.saved_tensors()


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def _head_name(key: str) -> str:
    """`<path with '/'>.<parameter>` as a checkpoint names it."""
    path, _, parameter = key.partition(".")
    return f"base_model.{path.replace('/', '.')}.{parameter}"
