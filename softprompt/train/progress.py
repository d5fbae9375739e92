"""What is seen of a run while it runs, and how it is asked to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop after the current step; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._put_back()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._put_back()

    def _put_back(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)


class TrainingProgress:
    """A bar with loss and tokens per second on a terminal; elsewhere one line per evaluation."""

    def __init__(self, console: Console, total: int, done: int = 0) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=total, completed=done, loss="–", speed="–")
        self._loss: float | None = None
        self._speed: float | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:  # elsewhere rich 14 prints an empty line when it stops
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """Show a step's row; the numbers in the bar are running averages."""
        self._loss = _average(self._loss, row["loss"])
        self._speed = _average(self._speed, row["tokens_per_s"])
        self._bar.update(self._task, completed=row["step"], loss=f"{self._loss:.3f}", speed=f"{self._speed:,.0f}")
        if "eval_loss" in row:
            self.evaluated(row)

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """One line with the scores of an evaluation."""
        parts = [f"step {row['step']:>5}"]
        if self._loss is not None:
            parts.append(f"training loss {self._loss:.3f}")
        names = {"frozen_loss": "frozen model", "eval_loss": "held-out loss", "eval_accuracy": "held-out accuracy"}
        parts += [f"{words} {row[name]:.3f}" for name, words in names.items() if name in row]
        if len(parts) > 1:
            self.console.print("  ".join(parts), highlight=False)


def _average(before: float | None, value: float) -> float:
    return value if before is None else 0.9 * before + 0.1 * value
