"""Runs that have left the rails: a loss that is no number, or one that has exploded and does not come back.

*Exploded* is a training loss above twice the larger of two losses – the run's first one, and that of guessing, the
logarithm of the vocabulary's size – in half of the last 50 steps. Why no healthy run gets there:

- a loss above 2 · ln V gives the right tokens a geometric mean probability below 1/V², far worse than what knows
  nothing: the model is sure of something else, batch after batch, so that the prompt holds nothing to go back to;
- a run that starts badly (a random prompt before a model that never saw one) is measured by its own start;
- a bad batch, or the shock when a warm-up ends, lasts a few steps, and each counts once, however high it goes; runs of
  under 25 steps cannot trip it at all;
- losses that are no cross-entropy over words are either smaller (a choice of few classes) or, like a distillation's
  sum, start high. Of 55 runs at hand, good and bad, the worst loss of any step was 1.9 times the first.

It is half of them, not all on end, because batches of one class have no loss at all under a classifier that always
says that class, however far it has gone astray. What is stopped here would have run to its end for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from softprompt.errors import TrainingError
from softprompt.train.run_result import Progress

LAST, OF_THEM = 50, 25
TIMES = 2.0


@final
@dataclass(frozen=True)
class Watch:
    """Looks at a run's numbers and ends it, by TrainingError, where they mean nothing any more.

    `learning_rate`, `place` (the run's folder) and `vocabulary` (its size, in tokens) are the run's own.
    """

    learning_rate: float
    place: Path
    vocabulary: int

    def number(self, progress: Progress, value: float, what: str, step: int | None = None) -> None:
        """The loss, the gradient's norm or the held-out loss at a step (default: the one that the run is at)."""
        if not math.isfinite(value):
            self._end(progress, f"the {what} is {value} at step {progress.step if step is None else step}")

    def loss(self, progress: Progress, value: float, step: int) -> None:
        """The training loss of a step; what has to be remembered is kept in `progress`, which is saved."""
        self.number(progress, value, "loss", step)
        if progress.first_loss is None:
            progress.first_loss = value
        line = TIMES * max(progress.first_loss, math.log(max(2, self.vocabulary)))
        late = [number for number in progress.above if number > step - LAST]
        progress.above = [*late, step] if value > line else late
        if len(progress.above) >= OF_THEM:
            self._end(
                progress,
                f"the loss has exploded: it is {value:.4g} at step {step} and was above {line:.4g} in {OF_THEM} of the "
                f"last {LAST} steps, from {progress.first_loss:.4g} at the first",
            )

    def parameters(self, progress: Progress, trainable: Mapping[str, Tensor]) -> None:
        """What is about to be saved."""
        for name, parameter in trainable.items():
            if not bool(torch.isfinite(parameter).all()):
                self._end(progress, f"{name} holds numbers that are not finite at step {progress.step}")

    def _end(self, progress: Progress, what: str) -> None:
        raise TrainingError(
            f"{what}; lower learning_rate (now {self.learning_rate:g}); the best prompt so far, of step "
            f"{progress.best_step}, is kept in {self.place}"
        )
