"""The cells of the matrix method × family × task, and what every one of them is asked: used by test_conformance.py.

A cell's rows are kept one by one, without padding (`Row`); `collate` makes a padded batch of them. `alone` runs one row
through the plain formulation, `together` a batch through the library; both give the same names and shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import families
import naive
import tiny
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from softprompt import METHODS, Embeddings, SoftPromptModel, TaskType, get_peft_model
from softprompt.prompt import KVPrompt

TOKENS = 4  # virtual ones
LENGTHS = (3, 6)
WORDS = range(3, tiny.VOCAB - 8)  # without the ids that mean something to a model
OUTPUTS = {
    "SEQ_CLS": ("logits",),
    "QUESTION_ANS": ("start_logits", "end_logits"),
    "FEATURE_EXTRACTION": ("last_hidden_state",),
}  # of every other task: logits, one row of them per token
Outputs = dict[str, Tensor]


VARIANTS: dict[str, tuple[str, dict[str, Any], Callable[[Cell], bool]]] = {
    # what a kind of prompt can do beside its default, whichever method it comes from: one method, options, where
    "after_bos": ("prompt_tuning", {"placement": "after_bos"}, lambda cell: True),
    "three_prefixes": (
        "prefix_tuning",
        {"encoder_prefix": True, "cross_prefix": True},
        lambda cell: cell.kind == "encoder-decoder" and cell.task != "TOKEN_CLS",  # which T5 does without a decoder
    ),
}


@dataclass(frozen=True)
class Cell:
    """One method before one head of one family, as it is by default or in one of `VARIANTS`."""

    method: str
    family: str
    task: str
    variant: str | None = None

    @property
    def kind(self) -> str:
        return families.FAMILIES[self.family].kind

    @property
    def decodes(self) -> bool:
        """Whether the head reads a sequence of the caller's on the decoder's side."""
        return self.kind == "encoder-decoder" and self.task in ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")

    @property
    def refusal(self) -> str | None:
        """What the refusal must say where the cell cannot exist: which kind of prompt, or which head, it is about."""
        method, family = METHODS[self.method], families.FAMILIES[self.family]
        if self.task not in [str(each) for each in method.task_types] and method.task_types != tuple(TaskType):
            return method.peft_type
        return family.no_keys if issubclass(method, KVPrompt) else None

    @property
    def tasks(self) -> int:
        """How many tasks the prompt has, each row being of one; 0 where there are no tasks."""
        return self.config().num_tasks if METHODS[self.method].task_parameters else 0

    def config(self) -> Any:
        method, task_type = METHODS[self.method], None if self.task == "MASKED_LM" else self.task
        options = {**method.example, **(VARIANTS[self.variant][1] if self.variant else {})}
        return method.config_class(task_type=task_type, num_virtual_tokens=TOKENS, **options)

    def model(self) -> SoftPromptModel:
        """A new, seeded model with its prompt, in eval mode. UnsupportedError for a cell that cannot exist."""
        base = families.build(self.family, self.task)
        torch.manual_seed(1)
        return get_peft_model(base, self.config()).eval()

    @property
    def first(self) -> int:
        """How many real tokens stand before an embedding prompt."""
        return int(self.variant == "after_bos")

    def __str__(self) -> str:
        return f"{self.family}-{self.task}-{self.variant or self.method}"


def cells() -> Iterator[Cell]:
    """Every cell: each registered method × each family × each head that transformers has for the family."""
    for name, family in families.FAMILIES.items():
        for task in family.tasks:
            for method in METHODS:
                yield Cell(method, name, task)


def variants() -> Iterator[Cell]:
    """Every variant before each head it is for."""
    for variant, (method, _, applies) in VARIANTS.items():
        for name, family in families.FAMILIES.items():
            yield from filter(applies, (Cell(method, name, task, variant) for task in family.tasks))


# ---- rows and batches --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row: `ids` `[t]`, and what its head is trained with: one label, a span, or one entry per token.

    `task_ids` `[1]` is the row's task of a prompt with several.
    """

    ids: Tensor
    target: Tensor
    decoder: Tensor | None = None
    task_ids: Tensor | None = None

    @property
    def of_task(self) -> dict[str, Tensor]:
        return {} if self.task_ids is None else {"task_ids": self.task_ids}


def rows(cell: Cell, seed: int = 0) -> list[Row]:
    """Two rows of different lengths; each ends with the end token, which the heads of encoder-decoders look for."""
    random = torch.Generator().manual_seed(seed)

    def draw(count: int, choices: range) -> Tensor:
        return torch.randint(choices.start, choices.stop, (count,), generator=random)

    found = [_row(cell, torch.cat([draw(length - 1, WORDS), torch.tensor([tiny.EOS])]), draw) for length in LENGTHS]
    if not cell.tasks:
        return found
    return [replace(row, task_ids=torch.tensor([number % cell.tasks])) for number, row in enumerate(found)]


def _row(cell: Cell, ids: Tensor, draw: Callable[[int, range], Tensor]) -> Row:
    length, decoder = len(ids), None
    if cell.decodes:
        length = len(ids) - 1
        decoder = draw(length, WORDS)
    if cell.task == "SEQ_CLS":
        target = draw(1, range(tiny.LABELS))
    elif cell.task == "QUESTION_ANS":
        target = torch.tensor([length // 3, length - 2])
    elif cell.task == "FEATURE_EXTRACTION":
        target = torch.randn(length, 32, generator=torch.Generator().manual_seed(length))
    elif cell.task == "CAUSAL_LM":
        target = ids.clone()
    else:
        target = draw(length, range(tiny.LABELS) if cell.task == "TOKEN_CLS" else WORDS)
    if target.ndim == 1 and len(target) == LENGTHS[-1]:
        target[[0, 3]] = -100  # a label that does not count, also for a row's first token
    return Row(ids, target, decoder)


def collate(cell: Cell, some: list[Row], side: str) -> dict[str, Tensor]:
    """A batch padded on `side`, without its targets."""
    ids = pad([row.ids for row in some], tiny.PAD, side)
    mask = pad([torch.ones_like(row.ids) for row in some], 0, side)
    batch = {"input_ids": ids, "attention_mask": mask}
    if cell.task == "FEATURE_EXTRACTION" and cell.decodes:
        batch["decoder_input_ids"] = pad([row.decoder for row in some if row.decoder is not None], tiny.PAD, "right")
    if cell.tasks:
        batch["task_ids"] = torch.cat([row.task_ids for row in some if row.task_ids is not None])
    if cell.task == "SEQ_2_SEQ_LM":
        batch["labels"] = pad([row.target for row in some], -100, "right")
    return batch


def with_targets(cell: Cell, some: list[Row], side: str) -> dict[str, Tensor]:
    """The batch with what the library needs to return a loss (a body alone has none)."""
    batch = collate(cell, some, side)
    if cell.task == "SEQ_CLS":
        batch["labels"] = torch.cat([row.target for row in some])
    elif cell.task == "QUESTION_ANS":
        first = batch["attention_mask"].argmax(1)
        spans = torch.stack([row.target for row in some]) + first[:, None]
        batch["start_positions"], batch["end_positions"] = spans.T
    elif cell.task not in ("FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"):
        batch["labels"] = pad([row.target for row in some], -100, side)
    return batch


def pad(parts: list[Tensor], filler: int, side: str) -> Tensor:
    width = max(len(part) for part in parts)
    full = [part.new_full((width - len(part),), filler) for part in parts]
    joined = zip(full, parts, strict=True) if side == "left" else zip(parts, full, strict=True)
    return torch.stack([torch.cat(pair) for pair in joined])


# ---- one row alone, and a batch ----------------------------------------------------------------------------------


def alone(cell: Cell, model: SoftPromptModel, row: Row) -> Outputs:
    """The plain formulation's outputs for real tokens `[t, …]`; `virtual` are the logits at the virtual tokens."""
    prompt, base = naive.own_prompt(model, **row.of_task), model.get_base_model()
    more = {}
    if cell.decodes:
        labels = cell.task == "SEQ_2_SEQ_LM"
        more = {"labels": row.target[None]} if labels else {"decoder_input_ids": row.decoder[None]}
    out = naive.run(base, prompt, row.ids[None], first=cell.first, **more)
    found = {name: out[name][0] for name in OUTPUTS.get(cell.task, ("logits",))}
    if isinstance(prompt, Embeddings) and cell.task != "SEQ_CLS" and not naive.encodes_and_decodes(base):
        parts = {
            name: value.split([cell.first, prompt.length, len(row.ids) - cell.first]) for name, value in found.items()
        }
        found = {name: torch.cat([before, behind]) for name, (before, _, behind) in parts.items()}
        if cell.task == "CAUSAL_LM":
            found["virtual"] = parts["logits"][1]
            found["virtual_labels"], found["virtual_weights"] = _answers(prompt)
    return found


def _answers(prompt: Embeddings) -> tuple[Tensor, Tensor]:
    """Labels of the virtual tokens and how much they count: those of a text with one answer before the row's own."""
    labels, context = torch.full((prompt.length,), -100), prompt.context
    if context is None:
        return labels, torch.zeros(prompt.length)
    labels[context.types == 4] = context.ids[context.types == 4]
    return labels, torch.full((prompt.length,), context.decay)


def together(cell: Cell, output: Any, some: list[Row], side: str) -> list[Outputs]:
    """A batch's outputs row by row, real tokens only."""
    found = []
    for index, row in enumerate(some):
        one = {name: output[name][index] for name in OUTPUTS.get(cell.task, ("logits",))}
        if cell.task != "SEQ_CLS":
            length = len(row.decoder) if row.decoder is not None else len(row.ids)
            where = slice(-length, None) if side == "left" and not cell.decodes else slice(0, length)
            one = {name: value[where] for name, value in one.items()}
        found.append(one)
    return found


def loss(cell: Cell, outputs: list[Outputs], some: list[Row]) -> Tensor:
    """The task's loss over real tokens, from outputs row by row."""
    if cell.task == "FEATURE_EXTRACTION":
        return mse_loss(
            torch.cat([each["last_hidden_state"] for each in outputs]), torch.cat([row.target for row in some])
        )
    if cell.task == "QUESTION_ANS":
        parts = [
            cross_entropy(each[name][None], row.target[at : at + 1])
            for each, row in zip(outputs, some, strict=True)
            for at, name in enumerate(OUTPUTS[cell.task])
        ]
        return torch.stack(parts).mean()
    predicted, targets, weights = [], [], []
    for each, row in zip(outputs, some, strict=True):
        scores, target, weight = each["logits"], row.target, torch.ones(len(row.target))
        if "virtual" in each:
            scores = _insert(cell.first, each["virtual"], scores)
            target = _insert(cell.first, each["virtual_labels"], target)
            weight = _insert(cell.first, each["virtual_weights"], weight)
        if cell.task == "CAUSAL_LM":  # every token but the very first is predicted by the one before it
            scores, target, weight = scores[:-1], target[1:], weight[1:]
        predicted.append(scores.view(len(target), -1))
        targets.append(target)
        weights.append(weight)
    every, target = cross_entropy(torch.cat(predicted), torch.cat(targets), reduction="none"), torch.cat(targets)
    return (every * torch.cat(weights)).sum() / (target != -100).sum()


def _insert(place: int, part: Tensor, whole: Tensor) -> Tensor:
    return torch.cat([whole[:place], part, whole[place:]])


def library_loss(cell: Cell, model: SoftPromptModel, some: list[Row], side: str) -> Tensor:
    """The loss as a user gets it: the model's own, or for a body alone one of the user's on its output."""
    output = model(**with_targets(cell, some, side))
    return loss(cell, together(cell, output, some, side), some) if output.get("loss") is None else output.loss


@torch.no_grad()
def flat_outputs(cell: Cell, model: SoftPromptModel) -> dict[str, Tensor]:
    """A batch's outputs as plain contiguous tensors, to be written and compared."""
    output = model(**collate(cell, rows(cell), "right"))
    return {name: output[name].contiguous() for name in OUTPUTS.get(cell.task, ("logits",))}
