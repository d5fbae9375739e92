"""Measuring side by side: all contestants of a group in one process, in turn, round after round.

A contestant ("arm") is made, run once to warm up and be counted, and then timed in every round right after the one
before it, so that a slow moment of the machine hits all of them. A ratio is the median of the ratios of single rounds.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from counts import Peak

SLOW = 25.0  # seconds: what takes longer to run is timed once


@dataclass(frozen=True)
class Arm:
    """`run` is what is timed; if it returns numbers by name (seconds), they are the times, and its whole is not.

    `count` runs it first, to warm up and to count what is not noisy, and returns those numbers by name; `dict` does
    neither, for what needs no warming up.
    """

    run: Callable[[], dict[str, float] | None]
    count: Callable[[], dict[str, int]] | None = None


Makers = Mapping[str, Callable[[], Arm]]
Result = dict[str, Any]  # one arm's times (lists, a value per round) and counts, or {"error": why it did not run}


def compare(makers: Makers, rounds: int, device: str) -> dict[str, Result]:
    """Every arm's result. An arm that cannot be made or run has its reason there; the others go on."""
    arms: dict[str, Arm] = {}
    found: dict[str, Result] = {}
    slow: set[str] = set()
    for name, make in makers.items():
        try:
            arms[name] = make()
            begun = time.perf_counter()
            found[name] = _warm_up(arms[name])
            slow |= {name} if time.perf_counter() - begun > SLOW else set()
        except Exception as error:  # whatever it is, it is a row of the table
            found[name] = {"error": reason(error)}
            arms.pop(name, None)
            gc.collect()
    for turn in range(rounds):
        for name in [name for name in arms if turn == 0 or name not in slow]:
            try:
                slow |= {name} if _time(arms[name], found[name], device, first=turn == 0) > SLOW else set()
            except Exception as error:
                found[name] = {"error": reason(error)}
                del arms[name]
                gc.collect()
    return found


def _warm_up(arm: Arm) -> Result:
    if arm.count is None:
        arm.run()
        return {}
    return dict(arm.count())


def _time(arm: Arm, into: Result, device: str, first: bool) -> float:
    """Run once, add the times (`cpu` is that of all threads), the first time the memory too, and return the seconds."""
    gc.collect()
    peak = Peak(device) if first else None
    wait(device)
    begun, worked = time.perf_counter(), time.process_time()
    parts = arm.run()
    wait(device)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - worked
    for name, value in {**(parts or {"time": seconds}), "cpu": cpu}.items():
        into.setdefault(name, []).append(round(value, 6))
    if peak is not None:
        into["peak"] = peak.bytes()
    return seconds


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def reason(error: Exception) -> str:
    """One line without places on this machine."""
    text = " ".join(str(error).split()) or "no message"
    if "can't allocate memory" in text or isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return "out of memory"
    text = re.sub(r"(?:/[\w.+-]+){2,}", "…", text)
    return f"{type(error).__name__}: {text if len(text) <= 110 else text[:109] + '…'}"


@dataclass(frozen=True)
class Ratio:
    """Of times: the median over rounds and its range. Of counts: the quotient, as often as there are rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return number(self.value)
        return f"{number(self.value)} ({number(self.low)}–{number(self.high)})"


def ratio(arms: Mapping[str, Result], quantity: str, over: str, under: str) -> Ratio | None:
    """How much of a quantity one arm takes for what another takes; None where one of them has none."""
    above, below = (values(arms.get(name, {}).get(quantity)) for name in (over, under))
    if not above or not below or not all(below):
        return None
    parts = [one / other for one, other in zip(above, below, strict=False)]
    return Ratio(statistics.median(parts), min(parts), max(parts))


def values(found: Any) -> list[float]:
    """A quantity as a list, whether it was timed in rounds or counted once."""
    if found is None:
        return []
    return list(found) if isinstance(found, Sequence) else [found]


def number(value: float) -> str:
    """Two decimals, none for large ones."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 20 else f"{value:.2f}"
