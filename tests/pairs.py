"""Which cells of a grid run by default: few of them, with every pair of values of any two of its axes.

A test that is marked ``pairwise`` runs in those of its cells that `choose` takes: each parameter is an axis, or each
field of one that is a dataclass. `default` marks the others itself, where a grid has axes of another kind. With
``--full`` (`make test-full`) every cell runs. conftest.py sees to both.
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


def left_out(items: Iterable[Any]) -> set[Any]:
    """The tests that run with `--full` only."""
    found, cells = set(), {}
    for item in items:
        if item.get_closest_marker("full"):
            found.add(item)
        elif item.get_closest_marker("pairwise"):
            cells.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return found.union(*({*every} - {*choose(every, _axes)} for every in cells.values()))


def _axes(item: Any) -> Iterator[Hashable]:
    for value in item.callspec.params.values():
        parts = [getattr(value, field.name) for field in fields(value)] if is_dataclass(value) else [value]
        yield from (part if isinstance(part, Hashable) else repr(part) for part in parts)
