"""How far a run is while it runs, and what it came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from softprompt.recipe import Recipe


@dataclass
class Progress:
    """How far a run is; all of it is saved with the state. Scores are metric names with their values."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    frozen: dict[str, float] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    first_loss: float | None = None
    above: list[int] = field(default_factory=list)  # late steps whose loss was above what `divergence` allows


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    ``frozen`` are the scores of the base model alone, ``start`` of the prompt before training, ``best`` of the one
    kept. They are empty without held-out data; ``frozen`` is empty for a task whose head starts untrained. ``seconds``
    are those of the steps in this process, the one number ``rank`` of ``processes``; number 0 has written the folder.
    """

    folder: Path
    recipe: Recipe
    steps: int
    best_step: int
    frozen: dict[str, float]
    start: dict[str, float]
    best: dict[str, float]
    trainable_parameters: int
    base_parameters: int
    seconds: float
    rank: int = 0
    processes: int = 1
