"""Base models that carry adapters of PEFT's own kind, such as LoRA: a prompt goes on top, and they stay as they are.

Whoever has such a model has imported peft; this library never does, and reads nothing of it but its classes.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from softprompt import transformers_api as api
from softprompt.errors import UnsupportedError


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper, with its adapter layers in place; any other model as it is.

    UnsupportedError for what is no transformers model, and for PEFT's own prompts, which are no layers of one.
    """
    if api.is_peft_model(model):
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
    return api.peft_layers(model.modules())


def trained_by_peft(module: nn.Module) -> bool:
    """Whether this is a head that PEFT trains and saves beside its adapters."""
    return api.saved_by_peft(module)


def trained_in(model: nn.Module) -> set[str]:
    """The names of the parameters that PEFT's layers and heads in a model train."""
    kinds = api.trained_kinds()
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, kinds)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
