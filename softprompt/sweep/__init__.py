"""Sweeps: one recipe, many settings, tried by as many workers as there are processes on the sweep's folder.

``space.py`` reads what is varied, ``study.py`` keeps the books, ``worker.py`` takes settings and trains them,
``results.py`` writes the table and the page, and ``run.py`` starts it all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from softprompt.errors import ConfigError

SAMPLERS = ("grid", "tpe", "random")
Direction = Literal["minimize", "maximize"]
METRICS: dict[str, Direction] = {"loss": "minimize", "accuracy": "maximize", "p_at_1": "maximize"}
NAMES = {"loss": "held-out loss", "accuracy": "held-out accuracy", "p_at_1": "held-out P@1"}


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is run; what it varies stands in the recipe. ``ConfigError`` for a value that means nothing."""

    trials: int | None = field(
        default=None, metadata={"help": "settings to try in all; default: every one of a grid, else 20"}
    )
    jobs: int = field(default=1, metadata={"help": "worker processes of this command"})
    sampler: str | None = field(
        default=None, metadata={"help": "grid, tpe or random; default: grid if everything is a list, else tpe"}
    )
    metric: str | None = field(
        default=None, metadata={"help": "what to judge by: loss, accuracy or p_at_1; default: as the task is judged"}
    )
    prune: bool = field(
        default=False, metadata={"help": "give up a setting that does worse than the median did at the same step"}
    )

    def __post_init__(self) -> None:
        for name in ("trials", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        for name, known in (("sampler", SAMPLERS), ("metric", METRICS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
