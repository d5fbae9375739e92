"""The cells that run by default have every pair of values that the whole grid has, and are few."""

from __future__ import annotations

from itertools import product
from typing import Any

import conformance
import pairs
import peft_cells
import pytest

GRIDS: dict[str, list[tuple[Any, ...]]] = {
    "even": list(product("abcd", range(5), "xyz")),
    "ragged": [cell for cell in product("abcd", range(5), "xyz", (True, False)) if cell != ("a", 0, "x", True)],
    "two axes": list(product("ab", "xyz")),
    "conformance": [(cell.family, cell.method, cell.task) for cell in conformance.cells()],
    "peft": [(cell.family, cell.method, cell.task) for cell in peft_cells.cells()],
}


@pytest.mark.parametrize("name", GRIDS)
def test_every_pair_of_values_is_there(name: str) -> None:
    every = GRIDS[name]
    chosen = pairs.choose(every, lambda cell: cell)
    axes = range(len(every[0]))
    for one, other in product(axes, axes):
        assert {(cell[one], cell[other]) for cell in chosen} == {(cell[one], cell[other]) for cell in every}
    assert pairs.choose(every, lambda cell: cell) == chosen


def test_there_are_few() -> None:
    assert len(pairs.choose(GRIDS["even"], lambda cell: cell)) <= 24  # of 60; 20 at least
    assert pairs.choose(GRIDS["two axes"], lambda cell: cell) == GRIDS["two axes"]
    third = len(GRIDS["conformance"]) / 3
    assert len(pairs.choose(GRIDS["conformance"], lambda cell: cell)) < third


def test_every_value_is_there() -> None:
    chosen = pairs.choose(GRIDS["even"], lambda cell: cell, together=1)
    assert len(chosen) == 5
    assert all({cell[axis] for cell in chosen} == set(values) for axis, values in enumerate(("abcd", range(5), "xyz")))


def test_the_others_are_marked() -> None:
    cells = pairs.grid("abcd", range(5), "xyz")
    marked = [cell for cell in cells if hasattr(cell, "marks")]
    assert len(cells) == 60
    assert 0 < len(marked) <= 40
    assert {mark.name for cell in marked for mark in cell.marks} == {"full"}
    assert {cell[:2] for cell in cells if not hasattr(cell, "marks")} == set(product("abcd", range(5)))
