"""What other people's training loops ask of a model beyond `forward`, `generate` and `save_pretrained`."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt import transformers_api as api
from softprompt.base_model import BaseModel
from softprompt.batch.find import placement_of
from softprompt.checkpoint.training_state import packed_configs
from softprompt.config import EmbeddingConfig, Placement, PromptConfig
from softprompt.elsewhere import own_class, place_of
from softprompt.running.token_scores import Asked


class InLoops(nn.Module):
    """What a prompted model is to transformers' Trainer, to TRL's, to Accelerate and to evaluation harnesses.

    None of them knows this library; each asks a model for its class name, its loss, its configuration and its state.
    """

    base_model: PreTrainedModel
    found: BaseModel
    peft_config: dict[str, PromptConfig]
    active_adapter: str

    _hf_peft_config_loaded = True
    """transformers' word for a model that has an adapter: Trainer trains nothing else over quantised weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(_asks_per_token, with_kwargs=True)

    @property
    def loss_type(self) -> str | None:
        """The base model's; None where a virtual token predicts a row's first, so that Trainer counts its label too."""
        config = self.peft_config[self.active_adapter]
        front = placement_of(config) is Placement.FRONT
        first = front and isinstance(config, EmbeddingConfig) and self.found.facts.causal
        return None if first else api.loss_kind(self.base_model)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss is divided by the labels of a whole step where Trainer says how many those are.

        Trainer would guess it from `forward`; wrongly, it does not divide what it accumulates at all.
        """
        return self.found.facts.divides_loss

    @property
    def device(self) -> torch.device:
        """Where inputs belong: the base model's, or where its first layer is brought for a call."""
        return place_of(self.base_model)

    @property
    def generation_config(self) -> Any:
        """The base model's, also when it is set: Seq2SeqTrainer sets it on the model it is given."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.base_model.generation_config = config

    def _get_name(self) -> str:
        """The base model's class: by this name Trainer decides whether smoothed labels have to be shifted."""
        return own_class(self.base_model).__name__

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)

    def saved_config(self, adapter_name: str) -> PromptConfig:
        """The config of an adapter as a checkpoint has it."""
        config, kind = self.peft_config[adapter_name], own_class(self.base_model)
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        return replace(config.as_saved(), auto_mapping=mapping if config.task_type is None else None)

    def get_extra_state(self) -> Tensor:
        """What `state_dict()` has beside the numbers, so that a loop's own checkpoint can be loaded as a prompt."""
        configs = {name: self.saved_config(name) for name in self.peft_config}
        return packed_configs(self.active_adapter, configs)

    def set_extra_state(self, state: Any) -> None:
        """Nothing: a model that takes in a state has its own configs."""


def _asks_per_token(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A pre-hook that answers TRL, which puts a `forward` of its own into a model and asks it for scores per token.

    That runs what it takes for the model's body, which would be the base model without its prompt. Asked in words of
    our own, it hands the call on to the model's own `forward`.
    """
    asked = api.pop_fused_scores(model, kwargs)
    return None if asked is None else (args, {**kwargs, "per_token": Asked(**asked)})
