"""Where a new classification head starts: at the regression on what it sees before training.

A head that is drawn at random sends the prompt nowhere, and both lose their first steps to that. What a head's last
layer sees does not depend on its weights, so these can be found first: multinomial logistic regression on training
rows (linear probing before tuning: Kumar et al. 2022, https://arxiv.org/abs/2202.10054, section 3). How strongly it is
held back is chosen on every fourth row, and a head that is better there as it is, since somebody trained it, stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from softprompt.data import EncodedLabel, collate
from softprompt.elsewhere import batch_on
from softprompt.model import SoftPromptModel
from softprompt.prompt import evaluating
from softprompt.recipe import Recipe
from softprompt.start import drawn
from softprompt.train.objective import quietly

ROWS = 512
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # on half the squared weights of standardised inputs, beside the mean loss
APART = 4


def start_head(recipe: Recipe, model: SoftPromptModel, rows: Sequence[Any], pad_id: int, console: Console) -> None:
    """Start the head of a new run as its recipe says."""
    if recipe.task != "SEQ_CLS" or recipe.head_init == "given":
        return
    some = [rows[number] for number in drawn(len(rows), recipe.seed, draw=-2)[:ROWS]]
    if fit_head(model, some, recipe.eval_batch_size, pad_id):
        console.print(f"the classification head starts from a regression on {len(some)} training rows", highlight=False)


def fit_head(model: SoftPromptModel, rows: Sequence[EncodedLabel], batch_size: int, pad_id: int) -> bool:
    """Start the active adapter's head, and tell whether that changed it.

    A head whose last layer is no linear map to the classes stays as it is, as does one that too few rows would start.
    """
    last = _last_layer(model)
    labels = torch.tensor([row.label for row in rows])
    if last is None or len(labels) < 2 * APART or len(labels.unique()) < 2:
        return False
    seen = _seen(model, last, rows, batch_size, pad_id)
    weight, bias = last.weight.detach().cpu().double(), _bias(last)
    aside = torch.arange(len(labels)) % APART == 0
    classes = len(weight)
    tried = [regression(seen[~aside], labels[~aside], classes, penalty) for penalty in PENALTIES]
    losses = [_loss(seen[aside], labels[aside], *found) for found in tried]
    best = min(range(len(tried)), key=lambda place: losses[place])
    if losses[best] >= _loss(seen[aside], labels[aside], weight, bias):
        return False
    weight, bias = regression(seen, labels, classes, PENALTIES[best])
    with torch.no_grad():
        last.weight.copy_(weight)
        if last.bias is not None:
            last.bias.copy_(bias)
    return True


def regression(seen: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights `[classes, d]` and biases `[classes]` of the regression of `labels` `[n]` on `seen` `[n, d]`, float64."""
    mean, spread = seen.mean(0), seen.std(0).clamp_min(1e-6)
    scaled = (seen - mean) / spread
    weight = torch.zeros(classes, seen.shape[1], dtype=seen.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=seen.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = nn.functional.cross_entropy(scaled @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)
    found = weight.detach() / spread
    return found, bias.detach() - found @ mean


def _last_layer(model: SoftPromptModel) -> nn.Linear | None:
    """The head's last linear layer that gives a number for each class."""
    classes = model.config.num_labels
    heads = model.heads.copies[model.active_adapter]
    found = [each for each in heads.modules() if isinstance(each, nn.Linear) and each.out_features == classes]
    return found[-1] if found and classes > 1 else None


def _seen(
    model: SoftPromptModel, last: nn.Linear, rows: Sequence[EncodedLabel], batch_size: int, pad_id: int
) -> Tensor:
    """What the layer sees of each row, `[rows, d]`, float64: the model picks the place as it picks that of logits."""
    parts = []
    hook = last.register_forward_hook(lambda layer, inputs, output: inputs[0])
    try:
        with quietly(model), evaluating(model), torch.no_grad():
            for begin in range(0, len(rows), batch_size):
                batch = collate(rows[begin : begin + batch_size], pad_id)
                del batch["labels"]
                parts.append(model(**batch_on(model, batch)).logits.cpu().double())
    finally:
        hook.remove()
    return torch.cat(parts)


def _bias(last: nn.Linear) -> Tensor:
    return torch.zeros(last.out_features).double() if last.bias is None else last.bias.detach().cpu().double()


def _loss(seen: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> float:
    return float(nn.functional.cross_entropy(seen @ weight.T + bias, labels))
