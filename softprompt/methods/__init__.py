"""One file per method. Importing this package registers them; `METHODS` is the registry by name."""

from enum import StrEnum
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from softprompt.config import PromptConfig
from softprompt.errors import ConfigError
from softprompt.methods.cartridge import CartridgeConfig, CartridgeEncoder
from softprompt.methods.cpt import CPTConfig, CPTEmbedding
from softprompt.methods.multitask_prompt_tuning import (
    MultitaskPromptEmbedding,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
)
from softprompt.methods.p_tuning import PromptEncoder, PromptEncoderConfig, PromptEncoderReparameterizationType
from softprompt.methods.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from softprompt.methods.prompt_tuning import PromptEmbedding, PromptTuningConfig, PromptTuningInit
from softprompt.prompt import METHODS

for _module in iter_modules(__path__):  # a new file here is a new method: nothing to list
    import_module(f"{__name__}.{_module.name}")

PeftType = StrEnum("PeftType", {method.peft_type: method.peft_type for method in METHODS.values()})
"""The `peft_type` of every method here, for scripts that compare with it."""


def get_peft_config(config_dict: dict[str, Any]) -> PromptConfig:
    """The config that a dictionary with a `peft_type` describes. ConfigError for another type or an unknown field."""
    for method in METHODS.values():
        if method.peft_type == config_dict.get("peft_type"):
            return method.config_class.from_dict(config_dict)
    known = ", ".join(method.peft_type for method in METHODS.values())
    raise ConfigError(f"peft_type={config_dict.get('peft_type')!r} is no method here; use one of {known}.")


__all__ = [
    "METHODS",
    "CPTConfig",
    "CPTEmbedding",
    "CartridgeConfig",
    "CartridgeEncoder",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "PeftType",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "get_peft_config",
]
