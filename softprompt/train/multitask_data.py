"""Several tasks in one run: their examples side by side, and which of them make up a step's batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.data import Encoded, Example, expand, load_examples
from softprompt.evaluate import evaluate_loss
from softprompt.recipe import Recipe
from softprompt.recipe.tasks import task_data
from softprompt.train.batches import batches_per_epoch, spread
from softprompt.train.run_data import EVAL_PAIRS, RunData, Source, as_text, encode_texts

SIZE_LIMIT = 2**18  # a larger task is drawn as if it had this many examples (2303.02861, section 3.2)


@final
@dataclass
class TaskSource(Source):
    """The examples of every task, one task after the other, each with its task's number."""

    train: list[Example]
    held_out: list[Example]
    names: list[str]

    @classmethod
    def read(cls, recipe: Recipe) -> TaskSource:
        found = cls([], [], list(recipe.tasks))
        for number, data in enumerate(task_data(recipe).values()):
            columns = (data.template, data.input_column, data.target_column)
            train = expand(load_examples(data.train, *columns, limit=data.train_limit, only=data.only))
            held_out = load_examples(data.eval, *columns, split="validation", only=data.only) if data.eval else []
            found.train += [replace(example, task=number) for example in train]
            found.held_out += [replace(example, task=number) for example in held_out]
        return found

    def texts(self) -> list[str]:
        return [as_text(example) for example in self.train]

    def encode(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int, base: PreTrainedModel
    ) -> RunData:
        """Held-out pairs and samples are shared out evenly among the tasks."""
        count = len(self.names)
        pairs = self._of_each(expand(self.held_out), max(1, (recipe.eval_limit or EVAL_PAIRS) // count))
        shown = self._of_each(self.held_out or self.train, -(-recipe.samples // count))[: recipe.samples]
        train, scored = (encode_texts(part, recipe, tokenizer, context, base) for part in (self.train, pairs))
        return RunData(train, scored, shown, task_names=self.names)

    def _of_each(self, examples: Sequence[Example], limit: int) -> list[Example]:
        """At most `limit` examples of each task, evenly spread over it."""
        groups = [[each for each in examples if each.task == number] for number in range(len(self.names))]
        return [group[place] for group in groups for place in spread(len(group), limit)]


@final
class TaskOrder:
    """`order[step]`: the example numbers of that step (from 0).

    A batch holds a random number of tasks, from 2 to as many as there are, drawn with probabilities proportional to
    their sizes (2303.02861, section 3.2); each drawn task has at least one row, the others are shared by size. Within a
    task every example comes once before any comes again. Steps follow from the seed alone.
    """

    def __init__(self, tasks: Sequence[int], batch_size: int, seed: int) -> None:
        """`tasks` is the task of every training example."""
        self.members = [[n for n, task in enumerate(tasks) if task == k] for k in range(max(tasks) + 1)]
        self.sizes = torch.tensor([min(len(group), SIZE_LIMIT) for group in self.members], dtype=torch.float)
        self.batch_size = batch_size
        self.per_epoch = batches_per_epoch(len(tasks), batch_size)
        self._random = torch.Generator().manual_seed(seed)
        self._left: list[list[int]] = [[] for _ in self.members]
        self._steps: list[list[int]] = []

    def __getitem__(self, step: int) -> list[int]:
        while len(self._steps) <= step:
            self._steps.append(self._draw())
        return self._steps[step]

    def _draw(self) -> list[int]:
        most = min(len(self.members), self.batch_size)
        count = int(torch.randint(min(2, most), most + 1, (1,), generator=self._random))
        chosen = torch.multinomial(self.sizes, count, generator=self._random)
        rest = self.batch_size - count
        more = torch.multinomial(self.sizes[chosen], rest, replacement=True, generator=self._random) if rest else []
        return [self._next(task) for task in [*chosen.tolist(), *(int(chosen[place]) for place in more)]]

    def _next(self, task: int) -> int:
        if not self._left[task]:
            order = torch.randperm(len(self.members[task]), generator=self._random).tolist()
            self._left[task] = [self.members[task][place] for place in order]
        return self._left[task].pop()


def evaluate_tasks(
    model: nn.Module, encoded: Sequence[Encoded], names: Sequence[str], batch_size: int = 32
) -> dict[str, float]:
    """`loss`, the mean of the tasks' losses in nats per target token, and `loss_<name>` of each that has rows."""
    losses = {}
    for number, name in enumerate(names):
        rows = [row for row in encoded if row.task == number]
        if rows:
            losses[f"loss_{name}"] = evaluate_loss(model, rows, batch_size)["loss"]
    return {"loss": sum(losses.values()) / len(losses), **losses}
