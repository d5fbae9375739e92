"""The order of the training examples and the learning rate, both as plain functions of the step.

Step k of a run always sees the same examples at the same learning rate, so a resumed run needs no more than its step
number to go on exactly where it was; only a stream also has to say where it was.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, final

import torch

from softprompt.train.distributed import Team

WINDOW = 50  # batches that are sorted by length together; larger means less padding and less mixing


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, by_length: bool = True
) -> list[list[int]]:
    """The batches of one epoch as lists of example numbers; every example occurs once.

    ``by_length`` sorts the shuffled examples by length within windows of ``WINDOW`` batches and then shuffles the
    batches, so that a batch holds examples of similar length and the order still does not follow length.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if by_length:
        span = WINDOW * batch_size
        windows = (order[start : start + span] for start in range(0, len(order), span))
        order = [number for window in windows for number in sorted(window, key=lambda n: (lengths[n], n))]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[number] for number in shuffled] if by_length else batches


def batches_per_epoch(examples: int, batch_size: int) -> int:
    return math.ceil(examples / batch_size)


class BatchOrder:
    """``order[step]``: the example numbers of that step (from 0), over as many epochs as it takes."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, by_length: bool = True) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.by_length = by_length
        self.per_epoch = batches_per_epoch(len(lengths), batch_size)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def __getitem__(self, step: int) -> list[int]:
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._batches = epoch_batches(self.lengths, self.batch_size, self.seed, epoch, self.by_length)
            self._epoch = epoch
        return self._batches[index]


class Order(Protocol):
    """The example numbers of a step, from 0."""

    per_epoch: int

    def __getitem__(self, step: int) -> list[int]: ...


class Batches(ABC):
    """The training rows of each step. `per_epoch` is the number of steps in a pass, None where nobody knows."""

    per_epoch: int | None

    @abstractmethod
    def rows(self, step: int) -> list[Any]:
        """This process's rows of a step, from 0; there may be none. Steps are asked for in their order."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on after the last step that was asked for, beside the step's number."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state of this process."""


@final
class InMemory(Batches):
    """Rows that are all there, in an order that follows from the step."""

    def __init__(self, data: Sequence[Any], order: Order, team: Team) -> None:
        self.data = data
        self.order = order
        self.team = team
        self.per_epoch = order.per_epoch

    def rows(self, step: int) -> list[Any]:
        return [self.data[number] for number in self.team.share(self.order[step])]

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing: a step's rows follow from its number."""


def rate_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """Share of the peak learning rate at a step (from 0): a linear rise over ``warmup * total`` steps, then the decay.

    ``linear`` and ``cosine`` end just above 0 at the last step; ``constant`` stays at 1.
    """
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    if schedule == "constant":
        return 1.0
    left = 1 - (step - rise) / max(1, total - rise)
    return left if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))


def spread(count: int, limit: int) -> list[int]:
    """At most ``limit`` numbers below ``count``, evenly spread and in order."""
    if count <= limit:
        return list(range(count))
    return [number * count // limit for number in range(limit)]
