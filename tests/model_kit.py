"""The methods that tests of the wrapped model try, models with them on, and comparison."""

from collections.abc import Callable
from typing import Any

import tiny
import torch
from torch import Tensor, nn

from softprompt import (
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptModel,
    get_peft_model,
)

METHODS: dict[str, Callable[..., Any]] = {
    "prompt_tuning": lambda **more: PromptTuningConfig(num_virtual_tokens=4, **more),
    "p_tuning_mlp": lambda **more: PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **more),
    "p_tuning_lstm": lambda **more: PromptEncoderConfig(
        num_virtual_tokens=4, encoder_hidden_size=16, encoder_reparameterization_type="LSTM", **more
    ),
    "prefix": lambda **more: PrefixTuningConfig(num_virtual_tokens=4, **more),
    "prefix_ffn": lambda **more: PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16, **more
    ),
}
TWO_KINDS = ("prompt_tuning", "prefix")


def make(family: str, method: str, task: str | None = "CAUSAL_LM", **more: Any) -> SoftPromptModel:
    torch.manual_seed(0)
    return get_peft_model(tiny.build(family), METHODS[method](task_type=task, **more)).eval()


def ids_of(length: int, rows: int = 1) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, length))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=tolerance)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def several() -> SoftPromptModel:
    """Three methods on one model; `default` is active."""
    model = make("llama", "prefix_ffn")
    model.add_adapter("soft", METHODS["prompt_tuning"](task_type="CAUSAL_LM"))
    model.add_adapter("lstm", METHODS["p_tuning_lstm"](task_type="CAUSAL_LM"))
    return model.eval()
