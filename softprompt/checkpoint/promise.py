"""What the config of an adapter promises about its tensors, before one of them is read.

Many adapters of one base model have the same config, or one that differs in where it came from only: what has been
worked out once is kept.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from softprompt.checkpoint.config_file import CONFIG_NAME, config_bytes, method_of, parse_config
from softprompt.checkpoint.undrawn import Undrawn
from softprompt.config import KVConfig, PromptConfig
from softprompt.errors import CheckpointError, SoftPromptError

KEPT_BYTES = 16_384  # a longer config is worked out anew each time, so that no file makes much be kept


@dataclass(frozen=True, eq=False)
class Promise:
    """A config, in `inference_mode`, and name and shape of the prompt's own tensors, for any number of adapters."""

    config: PromptConfig
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def nbytes(self) -> int:
        """Of the prompt's own tensors in float32."""
        return 4 * sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class Alike:
    """A config, equal to another one if a method makes the same module of both."""

    key: str
    config: PromptConfig = field(compare=False)

    @staticmethod
    def of(config: PromptConfig) -> "Alike":
        """Without what only says where a prompt comes from and what heads stand beside it."""
        plain = replace(
            config, base_model_name_or_path=None, revision=None, auto_mapping=None, peft_version=None,
            modules_to_save=None,
        )  # fmt: skip
        return Alike(repr(plain), plain)


def read_promise(path: Path) -> Promise:
    """What the file `path`, an `adapter_config.json`, promises. Raises CheckpointError."""
    data = config_bytes(path)
    if len(data) <= KEPT_BYTES:
        try:
            return _known(data)
        except CheckpointError:
            pass  # once more, for a message with its path
    return promise_of(parse_config(data, path), path)


@lru_cache(maxsize=1024)
def _known(data: bytes) -> Promise:
    return promise_of(parse_config(data, Path(CONFIG_NAME)), Path(CONFIG_NAME))


def promise_of(config: PromptConfig, path: Path) -> Promise:
    """What `config`, of the file `path`, promises. Raises CheckpointError."""
    config = replace(config, inference_mode=True)  # whatever it says: its start is over
    plain = config
    if isinstance(config, KVConfig) and config.padded and config.layer_shapes is not None:
        plain = replace(config, layer_shapes=None, num_layers=len(config.layer_shapes))  # one shape for all of them
    state, method = _state_shapes(plain, path), method_of(config.peft_type, path)
    shapes = {name: list(state[own]) for name, own in method.saved_names.items()}
    for name, dim in method.token_dims.items():
        shapes[name][dim] *= config.saved_copies
    return Promise(config, {name: tuple(shape) for name, shape in shapes.items()})


def encoder_shapes(config: PromptConfig, path: Path) -> Mapping[str, tuple[int, ...]]:
    """Of the encoder as it was trained, with the layers of its model. Raises CheckpointError."""
    paired = isinstance(config, KVConfig) and config.paired
    layers = (config.num_layers or 0) // 2 if paired else config.num_layers
    return _state_shapes(replace(config, inference_mode=False, num_layers=layers or None), path)


def _state_shapes(config: PromptConfig, path: Path) -> Mapping[str, tuple[int, ...]]:
    try:
        return _shapes_on_meta(Alike.of(config))
    except SoftPromptError as error:
        raise CheckpointError(f"{path}: {error}") from error


@lru_cache(maxsize=256)
def _shapes_on_meta(alike: Alike) -> Mapping[str, tuple[int, ...]]:
    """The shapes in the state of the method's module, which is built without memory for its numbers."""
    with torch.device("meta"), Undrawn():
        module = method_of(alike.config.peft_type, Path(CONFIG_NAME))(alike.config)
    return {name: tuple(each.shape) for name, each in module.state_dict().items()}
