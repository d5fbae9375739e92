"""Which tests run when, and of a grid of cells which.

Fast ones run by default (`make test`), slow ones with ``--slow`` (`make test-slow`, which every CI run calls as well),
and all with ``--full`` (`make test-full`). A test that is marked ``pairwise`` is a grid: each parameter is an axis, or
each field of one that is a dataclass. Cells that have every value of every axis are fast, what is needed beside them
for every pair of values of any two axes is slow; ``pairwise(fast=2)`` has the pairs among the fast ones. `default`
marks cells itself, where a grid has axes of another kind. conftest.py sees to it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from itertools import combinations
from typing import Any, TypeVar

import pytest

Cell = TypeVar("Cell")
Axes = Callable[[Cell], Iterable[Hashable]]


def choose(cells: Iterable[Cell], axes: Axes[Cell], together: int = 2) -> list[Cell]:
    """Some of the cells, in their order, with every pair of values that any of the cells has.

    `together`: 1 for every value, 2 for pairs. The cell with the most that no cell before had is next, the first one of
    equals: always the same choice.
    """
    every = list(cells)
    pairs = [set(combinations(enumerate(axes(cell)), together)) for cell in every]
    missing, chosen = set().union(*pairs), []
    while missing:
        for each in pairs:
            each &= missing
        best = max(range(len(every)), key=lambda index: len(pairs[index]))
        missing -= pairs[best]
        chosen.append(best)
    return [every[index] for index in sorted(chosen)]


def default(cells: Iterable[Any], axes: Axes[Any], together: int = 2) -> list[Any]:
    """All cells as parameters (tuples as several), those that `choose` leaves out marked ``full``."""
    every = list(cells)
    chosen = {id(cell) for cell in choose(every, axes, together)}
    return [
        cell if id(cell) in chosen else pytest.param(*(cell if type(cell) is tuple else [cell]), marks=pytest.mark.full)
        for cell in every
    ]


def tiers(items: Iterable[Any]) -> dict[Any, str]:
    """When each test runs: fast, slow or full."""
    found, grids = {}, {}
    for item in items:
        found[item] = (
            "full" if item.get_closest_marker("full") else "slow" if item.get_closest_marker("slow") else "fast"
        )
        if item.get_closest_marker("pairwise"):
            grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for every in grids.values():
        fast = every[0].get_closest_marker("pairwise").kwargs.get("fast", 1)
        values, pairs = ({*choose(every, _axes, together)} for together in (fast, 2))
        for item in every:
            if item not in values:
                found[item] = "slow" if item in pairs and found[item] != "full" else "full"
    return found


def _axes(item: Any) -> Iterator[Hashable]:
    for value in item.callspec.params.values():
        parts = [getattr(value, field.name) for field in fields(value)] if is_dataclass(value) else [value]
        yield from (part if isinstance(part, Hashable) else repr(part) for part in parts)
