"""The cells that run by default have every pair of values that the whole grid has, and are few."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product
from types import SimpleNamespace
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


def have(cells: list[tuple[Any, ...]], one: int, other: int) -> set[tuple[Any, Any]]:
    return {(cell[one], cell[other]) for cell in cells}


@pytest.mark.parametrize("name", GRIDS)
def test_every_pair_of_values_is_there(name: str) -> None:
    every = GRIDS[name]
    chosen = pairs.choose(every, tuple)
    axes = range(len(every[0]))
    for one, other in product(axes, axes):
        assert have(chosen, one, other) == have(every, one, other)
    assert pairs.choose(every, tuple) == chosen


def test_there_are_few() -> None:
    assert len(pairs.choose(GRIDS["even"], tuple)) <= 24  # of 60; 20 at least
    assert pairs.choose(GRIDS["two axes"], tuple) == GRIDS["two axes"]
    assert len(pairs.choose(GRIDS["conformance"], tuple)) < len(GRIDS["conformance"]) / 2


def test_every_value_is_there() -> None:
    chosen = pairs.choose(GRIDS["even"], tuple, together=1)
    assert len(chosen) == 5
    assert [set(values) for values in zip(*chosen, strict=True)] == [set("abcd"), set(range(5)), set("xyz")]


def test_the_others_are_marked() -> None:
    cells = pairs.default(GRIDS["even"], tuple)
    marked = [cell for cell in cells if hasattr(cell, "marks")]
    assert {mark.name for cell in marked for mark in cell.marks} == {"full"}
    kept = [cell for cell in cells if not hasattr(cell, "marks")]
    assert kept == pairs.choose(GRIDS["even"], tuple)
    assert len(kept) + len(marked) == len(cells) == 60
    assert {tuple(cell.values) for cell in marked} | set(kept) == set(GRIDS["even"])


@dataclass(eq=False)
class Item:
    """As much of a test of pytest's as tells its cell."""

    nodeid: str
    callspec: SimpleNamespace

    def get_closest_marker(self, name: str) -> Any:
        return pytest.mark.pairwise if name == "pairwise" else None


def test_the_cells_of_a_pairwise_test() -> None:
    """A dataclass's fields are axes of their own; what cannot be hashed is an axis too."""
    grid = list(product("abc", "xyz", [{}, {1: 2}, {3: 4}]))
    params = [{"cell": conformance.Cell(method, "gpt2", task), "one": one} for method, task, one in grid]
    items = [Item(f"tests/test_it.py::test_it[{at}]", SimpleNamespace(params=each)) for at, each in enumerate(params)]
    gone = [item in pairs.left_out(items) for item in items]
    assert 9 <= gone.count(False) <= 12
    kept = [(method, task, str(one)) for (method, task, one), left in zip(grid, gone, strict=True) if not left]
    assert all(len(have(kept, one, other)) == 9 for one, other in combinations(range(3), 2))


def test_what_is_marked_full_is_left_out(request: pytest.FixtureRequest) -> None:
    wide = [item for item in request.session.items if item.get_closest_marker("full")]
    assert not wide or request.config.getoption("--full") or any("::" in each for each in request.config.args)
