"""`adapter_config.json` to and from a config dataclass. PEFT's fields are the fields.

Reading distrusts every byte: the file may come from anyone. Nothing in it is opened, imported or run; names and paths
in it are only ever shown. Everything wrong with it is one CheckpointError that names the file, the field and the value.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from softprompt.checkpoint.tensor_file import BINARY
from softprompt.config import PromptConfig
from softprompt.errors import CheckpointError, SoftPromptError
from softprompt.methods import METHODS
from softprompt.prompt import KVPrompt, SoftPrompt

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1_000_000
MAX_COUNT = 1_000_000  # no width, length or number of layers of a real model comes near
MAX_LAYERS = 10_000
MAX_DEPTH = 10

# What PEFT 0.21 writes for its prompt methods. These are always written; any other field of a config is ours alone,
# and is written only when it says something, because PEFT warns about names it does not know.
# fmt: off
PEFT_FIELDS = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads",
    "num_layers", "modules_to_save", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
    "tokenizer_kwargs", "init_weights", "encoder_hidden_size", "prefix_projection",
    "encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout",
    "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task", "num_ranks", "num_tasks", "num_frozen_tokens",
    "cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "opt_weighted_loss_type", "opt_loss_decay_factor",
    "opt_projection_epsilon", "opt_projection_format_epsilon",
})
# fmt: on
_NAME_FIELDS = ("base_model_name_or_path", "revision", "tokenizer_name_or_path", "peft_version")
_MODULE_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
_TOKENIZER_RISKS = re.compile(r"trust_remote_code|code_revision|auto_map|.*(_file|_dir|_path|token)")


def config_to_json(config: PromptConfig) -> str:
    """The text of `adapter_config.json` for `config`, with `inference_mode` true.

    Fields that PEFT does not know are left out at their default. Tokenizer arguments that a reader would refuse
    (`trust_remote_code` and the like) are left out too: they served the initialisation, which is over.
    """
    values: dict[str, Any] = config.to_dict() | {"inference_mode": True}
    for each in fields(config):
        if each.name not in PEFT_FIELDS and values[each.name] == _default(each):
            del values[each.name]
    tokenizer_kwargs = values.get("tokenizer_kwargs")
    if isinstance(tokenizer_kwargs, dict):  # PEFT refuses them beside any other start than a text
        values["tokenizer_kwargs"] = (
            _without_risks(tokenizer_kwargs) if values.get("prompt_tuning_init") == "TEXT" else None
        )
    return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _default(each: Field) -> Any:
    value = each.default if each.default_factory is MISSING else each.default_factory()
    return value.value if isinstance(value, Enum) else value


def read_config(path: Path) -> PromptConfig:
    """The config in the file `path`. Raises CheckpointError."""
    return parse_config(config_bytes(path), path)


def config_bytes(path: Path) -> bytes:
    """What stands in the file `path`, up to a byte more than a config may have. Raises CheckpointError."""
    try:
        handle = os.open(path, os.O_RDONLY | BINARY)  # each call of the system counts where adapters are many
        try:
            return os.read(handle, min(os.fstat(handle).st_size, MAX_CONFIG_BYTES) + 1)
        finally:
            os.close(handle)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def parse_config(data: bytes, path: Path) -> PromptConfig:
    """The config in the bytes of `adapter_config.json`; `path` is for the messages. Raises CheckpointError."""
    values = _parse_json(data, path)
    method = method_of(values.get("peft_type"), path)
    config_class = method.config_class
    hints = _hints(config_class)
    known = {each.name for each in fields(config_class)}
    for name, value in values.items():
        if name in known:
            _check_field(name, value, hints[name], path)
        elif value is not None and value is not False:
            # a newer PEFT may add switches; one that is off cannot change what the prompt means
            raise CheckpointError(
                f"{path}: the field {name!r} is unknown to {config_class.__name__}, so its value {_show(value)} cannot "
                f"be honoured; remove it if the prompt does not depend on it, or update softprompt."
            )
    if values.get("tokenizer_kwargs"):
        values["tokenizer_kwargs"] = _without_risks(values["tokenizer_kwargs"])
    _check_sizes(values, issubclass(method, KVPrompt), path)
    try:
        return config_class(**{name: value for name, value in values.items() if name in known})
    except SoftPromptError as error:
        raise CheckpointError(f"{path}: {error}") from error


@cache
def _hints(config_class: type[PromptConfig]) -> Mapping[str, Any]:
    return get_type_hints(config_class)


def _check_sizes(values: Mapping[str, Any], key_values: bool, path: Path) -> None:
    """The sizes that decide the shape of the prompt have to be there, and to fit each other."""
    names = ("num_virtual_tokens", "token_dim") + (("num_layers", "num_attention_heads") if key_values else ())
    for name in names:
        if not values.get(name):
            raise CheckpointError(f"{path}: {name} is missing or zero; add it, or save the adapter again.")
    if key_values and values["token_dim"] % values["num_attention_heads"]:
        raise CheckpointError(
            f"{path}: token_dim {values['token_dim']} is not a multiple of num_attention_heads "
            f"{values['num_attention_heads']}; save the adapter again."
        )


def _parse_json(data: bytes, path: Path) -> dict[str, Any]:
    if len(data) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_CONFIG_BYTES:,} bytes; that is no adapter config.")
    try:
        values = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deeply; that is no adapter config.") from error
    except ValueError as error:  # bad UTF-8, bad JSON, a number of thousands of digits, or one of the hooks
        raise CheckpointError(f"{path} is not valid JSON ({error}); save or copy the adapter again.") from error
    if _depth_exceeds(values, MAX_DEPTH):
        raise CheckpointError(f"{path} is nested too deeply; that is no adapter config.")
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {_show(values)} instead of a JSON object; save or copy the adapter again.")
    return values


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Whether lists and objects in a JSON value stand more than `limit` deep in each other."""
    level = [value]
    for _ in range(limit + 1):
        nested = [each for each in level if isinstance(each, list | dict)]
        level = [inner for each in nested for inner in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return False
    return True


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {_show(twice)} is given twice")
    return values


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is out of range")
    return value


def method_of(peft_type: Any, path: Path) -> type[SoftPrompt]:
    """The method a checkpoint is of, by its `peft_type`. Raises CheckpointError naming what there is."""
    for method in METHODS.values():
        if method.peft_type == peft_type:
            return method
    supported = ", ".join(sorted(method.peft_type for method in METHODS.values()))
    if peft_type is None:
        raise CheckpointError(f"{path} does not say its 'peft_type'; it must be one of {supported}.")
    raise CheckpointError(
        f"{path}: peft_type {_show(peft_type)} is no soft prompt known here ({supported}); use PEFT for it."
    )


def _check_field(name: str, value: Any, hint: Any, path: Path) -> None:
    """Type, range and contents of one known field. Raises CheckpointError."""
    if not _accepts(hint, value):
        raise CheckpointError(f"{path}: {name} is {_show(value)} but must be {_describe(hint)}.")
    if isinstance(value, int) and not isinstance(value, bool):
        limit = MAX_LAYERS if name.endswith("layers") else MAX_COUNT
        if not 0 <= value <= limit:
            raise CheckpointError(f"{path}: {name} is {_show(value)} but must be between 0 and {limit:,}.")
    for text in _texts(value):
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise CheckpointError(f"{path}: {name} holds text that is not valid Unicode.")
    check = _CHECKS.get(name, _check_nothing)
    check(name, value, path)


def _check_nothing(name: str, value: Any, path: Path) -> None:
    """Most fields are harmless once their type is right."""


def _check_name(name: str, value: Any, path: Path) -> None:
    """Names are shown on terminals and may be typed into shells by people: no control characters."""
    if value is not None and not value.isprintable():
        raise CheckpointError(f"{path}: {name} is {_show(value)}, which holds control characters.")


def _check_modules(name: str, value: Any, path: Path) -> None:
    for module in value or ():
        if not _MODULE_NAME.fullmatch(module):
            raise CheckpointError(f"{path}: {name} lists {_show(module)}, which is not the name of a module.")


def _check_tokenizer(name: str, value: Any, path: Path) -> None:
    for key, setting in (value or {}).items():
        if not _harmless(key, setting):
            raise CheckpointError(
                f"{path}: {name} sets {_show(key)} to {_show(setting)}; a config may not make a tokenizer run code or "
                f"read other files, so remove it."
            )


def _check_mapping(name: str, value: Any, path: Path) -> None:
    for key, setting in (value or {}).items():
        if not (setting is None or (isinstance(setting, str) and setting.isprintable())):
            raise CheckpointError(f"{path}: {name} sets {_show(key)} to {_show(setting)}; only names belong there.")


_CHECKS: Mapping[str, Callable[[str, Any, Path], None]] = {
    **dict.fromkeys(_NAME_FIELDS, _check_name),
    "modules_to_save": _check_modules,
    "tokenizer_kwargs": _check_tokenizer,
    "auto_mapping": _check_mapping,
}


def _harmless(key: str, value: Any) -> bool:
    """Whether a tokenizer argument is a plain setting that can neither run code nor open another file."""
    if _TOKENIZER_RISKS.fullmatch(key):
        return value is None or value is False
    return value is None or isinstance(value, str | int | float | bool)


def _without_risks(tokenizer_kwargs: dict[str, Any]) -> dict[str, Any] | None:
    kept = {key: value for key, value in tokenizer_kwargs.items() if _harmless(key, value)}
    return {key: value for key, value in kept.items() if not _TOKENIZER_RISKS.fullmatch(key)} or None


def _accepts(hint: Any, value: Any) -> bool:
    """Whether the JSON value `value` may stand in a dataclass field of type `hint`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_accepts(each, value) for each in args)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in args)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_accepts(args[0], each) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_accepts(args[1], each) for each in value.values())
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, str)  # the config class knows the members and their spelling
    return type(value) is hint


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


def _describe(hint: Any) -> str:
    """A type in a reader's words, for messages."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_describe(each) for each in args))
    if origin is Literal:
        return " or ".join(repr(each) for each in args)
    if origin in (list, tuple):
        return f"a list of {_describe(args[0])}"
    if origin is dict:
        return "an object"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "text"
    return _KINDS.get(hint, "something else")


def _texts(value: Any) -> list[str]:
    """Every string in a JSON value, keys included; the depth is bounded by the parser."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    if isinstance(value, dict):
        return [text for key, each in value.items() for text in [key, *_texts(each)]]
    return []


def _show(value: Any) -> str:
    """A value in a message: JSON, on one line, at most 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
