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

    markers: dict[str, Any]

    def get_closest_marker(self, name: str) -> Any:
        return self.markers.get(name)


@pytest.mark.parametrize("fast", [1, 2])
@pytest.mark.parametrize("slow", [False, True])
def test_the_cells_of_a_pairwise_test(fast: int, slow: bool) -> None:
    """A dataclass's fields are axes of their own; what cannot be hashed is an axis too."""
    grid = list(product("abc", "xyz", [{}, {1: 2}, {3: 4}]))
    params = [{"cell": conformance.Cell(method, "gpt2", task), "one": one} for method, task, one in grid]
    markers = {"pairwise": pytest.mark.pairwise(fast=fast) if fast == 2 else pytest.mark.pairwise}
    markers |= {"slow": pytest.mark.slow} if slow else {}
    items = [
        Item(f"tests/test_it.py::test_it[{at}]", SimpleNamespace(params=each), markers)
        for at, each in enumerate(params)
    ]
    found = pairs.tiers(items)
    by_default = [cell for cell, item in zip(grid, items, strict=True) if found[item] == "fast"]
    if slow:
        assert not by_default
    elif fast == 1:
        assert 3 <= len(by_default) <= 4
        assert all(len({str(cell[axis]) for cell in by_default}) == 3 for axis in range(3))
    else:
        assert 9 <= len(by_default) <= 12
    kept = [(*cell[:2], str(cell[2])) for cell, item in zip(grid, items, strict=True) if found[item] != "full"]
    assert 9 <= len(kept) <= 15
    assert all(len(have(kept, one, other)) == 9 for one, other in combinations(range(3), 2))


def test_what_is_marked_full_is_left_out(request: pytest.FixtureRequest) -> None:
    """And in a run of the fast ones what is slow, and the other way round."""
    option, named = request.config.getoption, any("::" in each for each in request.config.args)
    wide = [item for item in request.session.items if item.get_closest_marker("full")]
    assert not wide or option("--full") or named
    slow = [item for item in request.session.items if item.get_closest_marker("slow")]
    assert not slow or option("--slow") or option("--full") or named
