"""Which cells of a grid run by default: few of them, with every pair of values of any two of its axes.

``@pytest.mark.parametrize("cell", pairs.default(CELLS, lambda cell: (cell.family, cell.method)))`` keeps every cell
and marks those that the others stand for as ``full``: they run with ``--full`` only (`make test-full`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import combinations, product
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
        new = [len(each & missing) for each in pairs]
        best = max(range(len(every)), key=new.__getitem__)
        missing -= pairs[best]
        chosen.append(best)
    return [every[index] for index in sorted(chosen)]


def default(cells: Iterable[Cell], axes: Axes[Cell], together: int = 2) -> list[Any]:
    """All cells as parameters, those that `choose` leaves out marked ``full``."""
    every = list(cells)
    chosen = {id(cell) for cell in choose(every, axes, together)}
    return [cell if id(cell) in chosen else pytest.param(cell, marks=pytest.mark.full) for cell in every]


def grid(*values: Iterable[Any], axes: Axes[Any] = tuple, together: int = 2) -> list[Any]:
    """The product of some values as parameters of as many names; `axes` of a cell, which is a tuple of them."""
    cells = list(product(*values))
    chosen = set(choose(cells, axes, together))
    return [cell if cell in chosen else pytest.param(*cell, marks=pytest.mark.full) for cell in cells]
