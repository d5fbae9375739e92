"""Base models that carry adapters of PEFT's own kind, such as LoRA: a prompt goes on top, and they stay as they are.

Whoever has such a model has imported peft; this library never does, and reads nothing of it but its classes.
"""

import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from softprompt.errors import UnsupportedError


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper, with its adapter layers in place; any other model as it is.

    UnsupportedError for what is no transformers model, and for PEFT's own prompts, which are no layers of one.
    """
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        wrapper: Any = model
        for name, config in wrapper.peft_config.items():
            if config.is_prompt_learning:
                kind = getattr(config.peft_type, "value", config.peft_type)
                raise UnsupportedError(
                    f"the base model has a {kind} prompt of PEFT's before it ({name!r}), and only one prompt can stand "
                    "there; give its get_base_model(), and load that prompt with SoftPromptModel.from_pretrained."
                )
        model = wrapper.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"the base model is a {type(model).__name__}; it must be a transformers PreTrainedModel."
        )
    return model


def freeze(model: nn.Module) -> None:
    """Freeze a base model. Where PEFT has put layers into it, PEFT has frozen the rest, and all stays as found."""
    if not has_layers(model):
        model.requires_grad_(False)


def has_layers(model: nn.Module) -> bool:
    """Whether PEFT has put layers of its own into a model."""
    layers = sys.modules.get("peft.tuners.tuners_utils")
    return layers is not None and any(isinstance(module, layers.BaseTunerLayer) for module in model.modules())


def trained_by_peft(module: nn.Module) -> bool:
    """Whether this is a head that PEFT trains and saves beside its adapters."""
    other = sys.modules.get("peft.utils.other")
    return other is not None and isinstance(module, other.ModulesToSaveWrapper)


def trained_in(model: nn.Module) -> set[str]:
    """The names of the parameters that PEFT's layers and heads in a model train."""
    layers, other = (sys.modules.get(f"peft.{name}") for name in ("tuners.tuners_utils", "utils.other"))
    if layers is None or other is None:
        return set()
    kinds = (layers.BaseTunerLayer, other.AuxiliaryTrainingWrapper)
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, kinds)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
