"""What the rows of a run ask of a model: the loss to train on, the scores to be judged by, the answers to show."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from softprompt.cloze import Cloze
from softprompt.data import IGNORED, Example, LabelledExample, collate, encode_labels
from softprompt.data.cloze import ClozeExample, as_text
from softprompt.data.examples import without_slots as bare_example
from softprompt.elsewhere import batch_on, place_of
from softprompt.evaluate import (
    evaluate_accuracy,
    evaluate_cloze,
    evaluate_loss,
    generate_texts,
    pad_id,
    predict_cloze,
    predict_labels,
)
from softprompt.model import SoftPromptModel
from softprompt.prompt import Embeddings, evaluating
from softprompt.recipe import Recipe
from softprompt.running.context_loss import predicting_tokens
from softprompt.train.multitask_data import evaluate_tasks
from softprompt.train.run_data import RunData

LossFunction = Callable[[SoftPromptModel, Mapping[str, Tensor]], tuple[Tensor, dict[str, float]]]
"""From a model and a batch to the loss, and to its parts by name, which are logged."""


class Objective(ABC):
    """`compares`: the frozen model can be measured by the same rows, without the virtual tokens inside them."""

    compares: bool = True

    @property
    @abstractmethod
    def weighs(self) -> str | None:
        """The score by which the others weigh where parts of the rows are scored apart; None where they cannot be."""

    @abstractmethod
    def loss(self, model: SoftPromptModel, rows: Sequence[Any]) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch, and its parts by name, which are logged."""

    @abstractmethod
    def counted(self, rows: Sequence[Any]) -> int:
        """How many things the loss of these rows is the mean of, by which losses of parts of a batch are weighed."""

    @abstractmethod
    def evaluate(self, model: nn.Module, rows: Sequence[Any], batch_size: int, bare: bool = False) -> dict[str, float]:
        """Scores by name, `loss` among them; `bare` for the model without its prompt."""

    @abstractmethod
    def answers(self, model: SoftPromptModel, shown: Sequence[Any], batch_size: int, bare: bool = False) -> list[str]:
        """The model's answers to examples."""

    @abstractmethod
    def shown(self, example: Any) -> dict[str, Any]:
        """An example for the report: its input as text, and its references."""


def own_loss(model: SoftPromptModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The task's loss, as the model has it."""
    return model(**batch).loss, {}


@final
@dataclass(frozen=True)
class TextObjective(Objective):
    """Targets to write. `answers_in_prompt` are tokens of the prompt itself that the loss counts with every row."""

    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    task_names: list[str] | None
    function: LossFunction
    answers_in_prompt: int = 0

    @property
    def weighs(self) -> str | None:
        return None if self.task_names else "tokens"

    def loss(self, model: SoftPromptModel, rows: Sequence[Any]) -> tuple[Tensor, dict[str, float]]:
        return self.function(model, batch_on(model, collate(rows, pad_id(self.tokenizer))))

    def counted(self, rows: Sequence[Any]) -> int:
        return sum(self.answers_in_prompt + sum(label != IGNORED for label in row.labels) for row in rows)

    def evaluate(self, model: nn.Module, rows: Sequence[Any], batch_size: int, bare: bool = False) -> dict[str, float]:
        rows = [row.without_slots() for row in rows] if bare else rows
        if self.task_names is not None:
            return evaluate_tasks(model, rows, self.task_names, batch_size)
        return evaluate_loss(model, rows, batch_size)

    def answers(self, model: SoftPromptModel, shown: Sequence[Any], batch_size: int, bare: bool = False) -> list[str]:
        shown = [bare_example(example) for example in shown] if bare else shown
        return generate_texts(model, self.tokenizer, shown, self.max_new_tokens, batch_size=batch_size)

    def shown(self, example: Example) -> dict[str, Any]:
        turns = example.messages[:-1] if example.messages else []
        chat = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        return {"input": chat or example.input, "references": list(example.targets)}


@final
@dataclass(frozen=True)
class LabelObjective(Objective):
    """Classes to choose with a classifier, which is new: the frozen model has none."""

    tokenizer: PreTrainedTokenizerBase
    label_names: list[str]
    length: int
    compares = False

    @property
    def weighs(self) -> str | None:
        return "rows"

    def loss(self, model: SoftPromptModel, rows: Sequence[Any]) -> tuple[Tensor, dict[str, float]]:
        return own_loss(model, batch_on(model, collate(rows, pad_id(self.tokenizer))))

    def counted(self, rows: Sequence[Any]) -> int:
        return len(rows)

    def evaluate(self, model: nn.Module, rows: Sequence[Any], batch_size: int, bare: bool = False) -> dict[str, float]:
        return evaluate_accuracy(model, rows, batch_size, pad_id(self.tokenizer))

    def answers(self, model: SoftPromptModel, shown: Sequence[Any], batch_size: int, bare: bool = False) -> list[str]:
        rows = encode_labels(shown, self.tokenizer, self.length, truncate=True)
        places = predict_labels(model, rows, batch_size, pad_id(self.tokenizer))
        return [self.label_names[place] for place in places]

    def shown(self, example: LabelledExample) -> dict[str, Any]:
        return {"input": example.text, "references": [self.label_names[example.label]]}


@final
@dataclass(frozen=True)
class ClozeObjective(Objective):
    """Labels to choose by their words."""

    cloze: Cloze
    length: int

    @property
    def weighs(self) -> str | None:
        return None

    def loss(self, model: SoftPromptModel, rows: Sequence[Any]) -> tuple[Tensor, dict[str, float]]:
        return self.cloze.loss(model, rows), {}

    def counted(self, rows: Sequence[Any]) -> int:
        return len(rows)

    def evaluate(self, model: nn.Module, rows: Sequence[Any], batch_size: int, bare: bool = False) -> dict[str, float]:
        return evaluate_cloze(model, self.cloze, [row.without_slots() for row in rows] if bare else rows, batch_size)

    def answers(self, model: SoftPromptModel, shown: Sequence[Any], batch_size: int, bare: bool = False) -> list[str]:
        rows = self.cloze.encode([replace(example, label="") for example in shown], self.length)
        rows = [row.without_slots() for row in rows] if bare else rows
        return predict_cloze(model, self.cloze, rows, batch_size)

    def shown(self, example: ClozeExample) -> dict[str, Any]:
        return {"input": as_text(example, self.cloze.template, "[MASK]"), "references": [example.label]}


def objective_of(
    recipe: Recipe,
    data: RunData,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    model: SoftPromptModel,
    loss: LossFunction = own_loss,
) -> Objective:
    """What a recipe trains on; `length` is the longest row in tokens, `loss` another loss than the task's own."""
    if data.cloze is not None:
        return ClozeObjective(data.cloze, length)
    if data.label_names is not None:
        return LabelObjective(tokenizer, data.label_names, length)
    return TextObjective(tokenizer, recipe.max_new_tokens, data.task_names, loss, answers_in_prompt(model))


def answers_in_prompt(model: SoftPromptModel) -> int:
    """Tokens of the prompt that the loss counts with every row: those of the answers in a prompt that is a text."""
    encoder = model.encoder()
    if encoder.num_tasks > 1:
        return 0
    with torch.no_grad(), evaluating(encoder):
        prompt = encoder.prompt()
    context = prompt.context if isinstance(prompt, Embeddings) else None
    return 0 if context is None else len(predicting_tokens(context)) - 1


def merged(parts: Sequence[Mapping[str, float]], weighs: str) -> dict[str, float]:
    """The scores of all rows from those of parts of them."""
    weights = [part[weighs] for part in parts]
    means = {
        name: sum(part[name] * weight for part, weight in zip(parts, weights, strict=True)) / sum(weights)
        for name in parts[0]
    }
    means[weighs] = sum(weights)
    if "perplexity" in means:
        means["perplexity"] = math.exp(min(means["loss"], 700.0))
    return means


def quietly(model: nn.Module) -> Any:
    """A context in which no random numbers are drawn that training would draw."""
    device = place_of(model)
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
