"""Muon, the optimiser that the embedding methods train with by default: momentum whose matrices are made orthogonal.

Source: https://kellerjordan.github.io/posts/muon/. Every direction of a matrix moves equally far, not only the few in
which the gradients of all virtual tokens agree. Measured in benchmarks/results/e2e_defaults.md: P-tuning's encoder
gains most. torch.optim.Muon takes matrices only, so an encoder's biases would need a second optimiser.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from softprompt.model import SoftPromptModel
from softprompt.recipe import Recipe

# Newton–Schulz: five rounds of s → as + bs³ + cs⁵ bring every singular value in (0, 1] close to 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


def orthogonalized(matrix: Tensor) -> Tensor:
    """`matrix` `[m, n]` with all its singular values near 1 (0.7 to 1.2)."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-20)
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


@final
class Muon(torch.optim.Optimizer):
    """Nesterov momentum; a step's root mean square is about `lr`, for matrices (orthogonalised) and vectors alike."""

    def __init__(
        self, params: Iterable[Any], lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(self._direction(parameter, group["momentum"]), alpha=-group["lr"])

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """The step `[…]` of one parameter, with a root mean square of about 1."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - momentum)
        ahead = gradient.lerp(state["momentum"], momentum)
        if ahead.ndim != 2:
            return ahead * (math.sqrt(ahead.numel()) / (ahead.norm() + 1e-20))
        return orthogonalized(ahead) * math.sqrt(max(ahead.shape))


def build_optimizer(
    recipe: Recipe, model: SoftPromptModel, trainable: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """The recipe's optimiser.

    One group for the prompt and, where there is such a thing, one for what each of several tasks has of its own, one
    for a head and one for a base model that is tuned too.
    """
    assert recipe.beta1 is not None and recipe.beta2 is not None  # the recipe is resolved
    encoder = model.encoder()
    own = {id(parameter): "task" for name, parameter in encoder.named_parameters() if name in encoder.task_parameters}
    kinds = {id(parameter): "prompt" for parameter in encoder.parameters()} | own
    if recipe.base_learning_rate is not None:
        kinds |= {id(parameter): "base" for parameter in model.get_base_model().parameters()}
    rates = {
        "prompt": recipe.learning_rate,
        "task": recipe.task_learning_rate,
        "head": recipe.head_learning_rate,
        "base": recipe.base_learning_rate,
    }
    groups = [
        {"params": [p for p in trainable.values() if kinds.get(id(p), "head") == kind], "peak": rate, "lr": rate}
        for kind, rate in rates.items()
    ]
    groups, decay = [group for group in groups if group["params"]], recipe.weight_decay or 0.0
    if recipe.optimizer == "muon":
        return Muon(groups, momentum=recipe.beta1, weight_decay=decay)
    return torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), weight_decay=decay)
