"""What state a prompted model is in, under the names of PEFT's `TunerModelStatus` (which PEFT has for layers only)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from softprompt.config import KVConfig

if TYPE_CHECKING:
    from softprompt.model import SoftPromptModel


@dataclass(frozen=True)
class ModelStatus:
    """`num_adapter_layers` is how many attention layers the active prompt reaches with keys and values of their own.

    `requires_grad` and `devices` are by adapter; nothing is ever merged.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def model_status(model: "SoftPromptModel") -> ModelStatus:
    """The state of a model and of every prompt on it."""
    encoder, config = model.encoder(), model.active_peft_config
    trainable, total = model.get_nb_trainable_parameters()
    parts = {name: [model.encoder(name), model.heads.copies[name]] for name in model.peft_config}
    return ModelStatus(
        base_model_type=type(model.base_model).__name__,
        adapter_model_type=type(encoder).__name__,
        peft_types={name: config.PEFT_TYPE for name, config in model.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(model.facts.prefix_layers(config)) if isinstance(config, KVConfig) else 0,
        enabled=model.enabled,
        active_adapters=model.active_adapters,
        merged_adapters=[],
        requires_grad={name: any(each.requires_grad for each in _parameters(part)) for name, part in parts.items()},
        available_adapters=sorted(model.peft_config),
        devices={name: sorted({each.device.type for each in _parameters(part)}) for name, part in parts.items()},
    )


def _parameters(parts: list[nn.Module]) -> list[nn.Parameter]:
    return [parameter for part in parts for parameter in part.parameters()]
