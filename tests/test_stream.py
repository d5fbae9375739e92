"""Data that is streamed: every row once in a pass, the same rows after resuming, shared out, with bounded memory."""

from __future__ import annotations

import gc
import itertools
import json
import random
import tempfile
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_many_processes import Stop, together
from test_shards import files_of, named, saved  # noqa: F401  (named is a fixture)
from test_train import StopAfter, recipe, rows_of, workplace, write_rows  # noqa: F401  (workplace is a fixture)

from softprompt.data.rows import Row
from softprompt.data.shards import NamedShards, Pass, Shards, open_shards
from softprompt.errors import ConfigError, DataError, RunInterrupted
from softprompt.recipe import Recipe
from softprompt.train import train
from softprompt.train.distributed import Team
from softprompt.train.run_data import read_source
from softprompt.train.stream import Stream, Streamed
from softprompt.train.stream_data import StreamSource


def ids_stream(shards: Shards, only: str | None = None) -> Stream:
    """Rows of numbers, with lengths that are not in their order."""
    return Stream(shards, lambda row: [int(row.values["id"])], list, lambda number: number * 7 % 5, only)


def steps(batches: Streamed, first: int, last: int) -> list[list[int]]:
    return [batches.rows(step) for step in range(first, last)]


def flat(batches: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(batches))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    sizes = draw(st.one_of(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.lists(st.just(4), max_size=6)))
    if sum(sizes) == 0:
        sizes = [*sizes, 3]
    return {
        "sizes": sizes,
        "window": draw(st.integers(1, 14)),
        "batch": draw(st.integers(1, 7)),
        "world": draw(st.integers(1, 3)),
        "stop": draw(st.integers(0, 15)),
        "by_length": draw(st.booleans()),
        "seed": draw(st.integers(0, 3)),
    }


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(cases())
def test_every_row_comes_once_in_a_pass_and_resuming_changes_nothing(case: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        shards = files_of(Path(place), case["sizes"])
        stream, world, last = ids_stream(shards), case["world"], 20

        def batches(rank: int, size: int = world) -> Streamed:
            return Streamed(stream, case["batch"], case["window"], case["seed"], case["by_length"], Team(rank, size))

        members = [batches(rank) for rank in range(world)]
        found, states = [], []
        for member in members:
            before = steps(member, 0, case["stop"])
            states.append(saved(member.state(), Path(place)))
            found.append(before + steps(member, case["stop"], last))
        for rank, state in enumerate(states):
            member = batches(rank)
            member.restore(state)
            assert steps(member, case["stop"], last) == found[rank][case["stop"] :]
        assert all(sum(len(rows[step]) for rows in found) == case["batch"] for step in range(last))
        if members[0].shares is None:
            check_shared_by_row(found, steps(batches(0, size=1), 0, last), sum(case["sizes"]))
        else:
            check_shared_by_shard(found, members[0].shares, case["sizes"])


def check_shared_by_row(found: list[list[list[int]]], alone: list[list[int]], count: int) -> None:
    """Each process has every W-th row of what a single one takes, which passes over all rows again and again."""
    for rank, rows in enumerate(found):
        assert rows == [batch[rank :: len(found)] for batch in alone]
    rows = flat(alone)
    for start in range(0, len(rows), count):
        part = Counter(rows[start : start + count])
        assert part <= Counter(range(count))
        assert part.total() == count or start + count > len(rows)


def check_shared_by_shard(found: list[list[list[int]]], shares: list[list[int]], sizes: list[int]) -> None:
    """Each process passes over its share, then over the next one; the shares hold each row once."""
    ends = list(itertools.accumulate(sizes))
    rows_in = [
        Counter(n for shard in share for n in range(ends[shard] - sizes[shard], ends[shard])) for share in shares
    ]
    assert sum(rows_in, Counter()) == Counter(range(sum(sizes)))
    for rank, steps_of in enumerate(found):
        rows, epoch = flat(steps_of), 0
        while rows:
            share = rows_in[(rank + epoch) % len(found)]
            part, rows, epoch = Counter(rows[: share.total()]), rows[share.total() :], epoch + 1
            assert part <= share
            assert part == share or not rows


def test_the_order_is_mixed_and_differs_from_pass_to_pass_and_from_seed_to_seed(tmp_path: Path) -> None:
    stream = ids_stream(files_of(tmp_path, [50, 50]))

    def order(seed: int, epoch: int, window: int = 25) -> list[int]:
        batches = Streamed(stream, 10, window, seed, False, Team())
        return flat(steps(batches, 0, 20))[100 * epoch : 100 * epoch + 100]

    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert order(0, 0) == order(0, 0) != list(range(100))
    first = order(0, 0)[:20]  # a window of 25 is two whole batches of 10
    assert max(first) - min(first) == 19
    assert order(0, 0, window=1)[:50] in (list(range(50)), list(range(50, 100)))  # files in any order, rows in theirs


def test_examples_of_similar_length_come_together(tmp_path: Path) -> None:
    shards = files_of(tmp_path, [200])
    stream = Stream(shards, lambda row: [int(row.values["id"])], list, lambda number: number * 37 % 101)
    spreads = []
    for by_length in (True, False):
        batches = steps(Streamed(stream, 10, 105, 0, by_length, Team()), 0, 20)
        spreads.append(
            sum(max(lengths) - min(lengths) for rows in batches for lengths in [[n * 37 % 101 for n in rows]])
        )
    assert spreads[0] < 0.4 * spreads[1]


@pytest.mark.parametrize(("batch", "only"), [(5, None), (1, None), (4, "half=0")])
def test_what_cannot_be_shared_evenly_is_shared_by_row(tmp_path: Path, batch: int, only: str | None) -> None:
    shards = files_of(tmp_path, [10, 10])
    members = [Streamed(ids_stream(shards, only), batch, 8, 0, True, Team(rank, 2)) for rank in range(2)]
    assert [member.shares for member in members] == [None, None]
    assert Streamed(ids_stream(shards), 4, 8, 0, True, Team(0, 2)).shares is not None


def test_another_number_of_processes_goes_on_with_rows_and_not_with_shares(tmp_path: Path) -> None:
    stream = ids_stream(files_of(tmp_path, [10, 10]))
    alone = Streamed(stream, 4, 8, 0, True, Team())
    steps(alone, 0, 3)
    state, rest = alone.state(), steps(alone, 3, 9)
    for rank in range(2):
        member = Streamed(stream, 4, 8, 0, True, Team(rank, 2))
        assert member.shares is not None
        member.restore(state)
        assert steps(member, 3, 9) == [rows[rank::2] for rows in rest]
    apart = Streamed(stream, 4, 8, 0, True, Team(1, 2))
    steps(apart, 0, 2)
    with pytest.raises(ConfigError, match="2 processes have read this run's data, each its own files, and 1 cannot"):
        Streamed(stream, 4, 8, 0, True, Team()).restore(apart.state())


def test_a_pass_skips_a_share_that_holds_no_rows(tmp_path: Path) -> None:
    shards = files_of(tmp_path, [3, 3])
    shards.files[1].write_text("\n" * shards.sizes[1])
    members = [Streamed(ids_stream(shards), 2, 4, 0, False, Team(rank, 2)) for rank in range(2)]
    assert [member.shares for member in members] == [[[0], [1]]] * 2
    assert [Counter(flat(steps(member, 0, 6))) for member in members] == [Counter([0, 1, 2] * 2)] * 2
    shards.files[0].write_text("\n")
    with pytest.raises(DataError, match="holds no rows, so there is nothing to train on"):
        Streamed(ids_stream(shards), 2, 4, 0, False, Team(0, 2)).rows(0)


def test_steps_are_asked_for_in_order_and_the_rows_read_again_are_the_same(tmp_path: Path) -> None:
    shards = files_of(tmp_path, [10])
    batches = Streamed(ids_stream(shards), 2, 6, 0, False, Team())
    steps(batches, 0, 2)
    with pytest.raises(RuntimeError, match="step 1 was asked for, and 2 is next"):
        batches.rows(1)
    state = batches.state()
    shards.files[0].write_text(shards.files[0].read_text().replace("000004", "000011"))
    with pytest.raises(DataError, match="gives other rows than when the run was saved"):
        Streamed(ids_stream(shards), 2, 6, 0, False, Team()).restore(state)


def test_rows_alive_are_bounded_by_the_window(tmp_path: Path) -> None:
    class Thing:
        """What a row becomes."""

    shards, window, batch = files_of(tmp_path, [300, 300]), 40, 8
    seen: list[weakref.ref[Any]] = []

    def examples(row: Row) -> list[Any]:
        things = [Thing(), Thing()]
        seen.extend([weakref.ref(row), *map(weakref.ref, things)])
        return things

    batches, most = Streamed(Stream(shards, examples, list, lambda _: 1), batch, window, 0, True, Team()), 0
    for step in range(300):  # two passes: a row gives two examples
        rows = batches.rows(step)
        seen = [each for each in seen if each() is not None]
        most = max(most, len(seen))
        del rows
    assert 2 * window - batch <= most <= 2 * window + batch


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps({"id": number, "text": f"{number} " * 100}) + "\n" for number in range(6_000))
    assert path.stat().st_size > 3_000_000
    batches = Streamed(ids_stream(open_shards(str(path))), 50, 200, 0, True, Team())
    found = set(batches.rows(0))
    gc.collect()
    tracemalloc.start()
    for step in range(1, 120):
        found.update(batches.rows(step))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 6_000
    assert peak < 1_500_000  # half of it the numbers found


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_named_data_set_is_shared_out(named: Any, world: int) -> None:  # noqa: F811
    stream = ids_stream(NamedShards("numbers", "train", named))
    found = []
    for rank in range(world):
        batches = Streamed(stream, 12, 5, 0, True, Team(rank, world))
        assert (batches.shares is None) == (world in (1, 3))
        rows = steps(batches, 0, 1)
        state = batches.state()
        again = Streamed(stream, 12, 5, 0, True, Team(rank, world))
        again.restore(state)
        rest = steps(batches, 1, 4)
        assert steps(again, 1, 4) == rest
        found += flat(rows + rest[:1])
    assert len(found) == 24 == len(set(found))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2.0}, "epochs is 2, but how many rows a stream has is not known before it ends; give steps"),
        ({"train_limit": 5}, "streaming reads all rows, but train_limit is 5"),
        ({"task": "CLOZE", "template": "{a} [MASK]", "candidates": "train"}, "not for task CLOZE"),
        ({"train": "", "tasks": {"a": {"train": "a"}, "b": {"train": "b"}}}, "not for several tasks"),
        ({"shuffle_window": 0}, "shuffle_window is 0; it must be at least 1"),
    ],
)
def test_what_does_not_go_with_a_stream_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**{"train": "a.jsonl", "streaming": True, **changes})


def read_all(settings: Recipe) -> None:
    source = read_source(settings)
    if isinstance(source, StreamSource):
        assert flat(map(source.read, Pass(source.shards, [0])))


def labelled(path: Path, labels: Sequence[Any]) -> str:
    return write_rows(path, [{"text": f"the cat {number}", "label": label} for number, label in enumerate(labels)])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b"] * 600 + ["c"], "line 1201: label 'c' is not one of a, b: the classes of a stream are those of its"),
        ([0] * 1100 + [1], "first 1000 rows, which are all labelled '0'; mix the rows"),
        (["a", "b"] * 600 + [None], "line 1201: label None is not one of a, b"),
    ],
)
def test_a_class_that_was_not_known_before_is_an_error(tmp_path: Path, labels: list[Any], message: str) -> None:
    data = labelled(tmp_path / "rows.jsonl", labels)
    settings = Recipe(train=data, task="SEQ_CLS", streaming=True, shuffle_window=100, steps=1)
    with pytest.raises(DataError, match=message):
        read_all(settings)


def test_malformed_rows_are_told_as_in_memory(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"input": "a", "target": "b"}] * 1200 + [{"input": "a", "target": " "}])
    messages = []
    for streaming in (False, True):
        with pytest.raises(DataError) as error:
            read_all(Recipe(train=data, streaming=streaming))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "line 1201" in messages[0]


# Whole runs


def streamed(place: Path, out: Path, **changes: Any) -> Recipe:
    return recipe(place, out, streaming=True, shuffle_window=12, batch_size=6, steps=17, eval_steps=6, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "labels"])
def test_a_streamed_run_that_is_stopped_goes_on_to_the_same_bits(workplace: Path, tmp_path: Path, kind: str) -> None:  # noqa: F811
    changes = {} if kind == "text" else {"task": "SEQ_CLS", "method": "prompt_tuning"}
    whole = train(streamed(workplace, tmp_path / "whole", **changes))
    stopped = streamed(workplace, tmp_path / "stopped", **changes)
    for step in (3, 8):  # in a window, and in the second pass over 44 or 40 rows
        with pytest.raises(RunInterrupted):
            train(stopped, resume=step > 3, on_step=StopAfter(step))
    result = train(stopped, resume=True)
    assert rows_of(result.folder) == rows_of(whole.folder)
    assert "epoch" not in rows_of(result.folder)[1]
    ends = [load_file(folder / "adapter_model.safetensors") for folder in (whole.folder, result.folder)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert whole.best["loss"] < whole.start["loss"]
    assert "on a stream of examples" in (whole.folder / "report.html").read_text()


@pytest.mark.parametrize("change", [("cat 3", "dog 3"), ("\n", "\n\n")], ids=["other words", "another size"])
def test_a_streamed_run_knows_its_data(workplace: Path, tmp_path: Path, change: tuple[str, str]) -> None:  # noqa: F811
    data = tmp_path / "train.jsonl"
    data.write_bytes((workplace / "train.jsonl").read_bytes())
    settings = streamed(workplace, tmp_path / "run", train=str(data), init="examples")
    with pytest.raises(RunInterrupted):
        train(settings, on_step=StopAfter(2))
    data.write_text(data.read_text().replace(*change))
    with pytest.raises(ConfigError, match="has changed since it was saved"):
        train(settings, resume=True)


def test_several_references_are_several_examples_and_all_come(tmp_path: Path) -> None:
    rows = [{"input": f"in {number}", "target": [f"a{number}", f"b{number}"]} for number in range(9)]
    random.Random(0).shuffle(rows)
    source = StreamSource.open(Recipe(train=write_rows(tmp_path / "rows.jsonl", rows), streaming=True))
    stream = Stream(source.shards, source.read, list, lambda example: len(example.input))
    batches = Streamed(stream, 4, 4, 0, True, Team())
    targets = Counter(example.targets[0] for step in range(9) for example in batches.rows(step))
    assert targets == Counter(2 * [f"{letter}{number}" for letter in "ab" for number in range(9)])


@pytest.mark.slow
def test_processes_that_read_files_of_their_own_go_on_to_the_same_bits(workplace: Path, tmp_path: Path) -> None:  # noqa: F811
    lines = (workplace / "train.jsonl").read_text().splitlines(keepends=True)
    for number in range(2):
        (tmp_path / f"part{number}.jsonl").write_text("".join(lines[number::2]))
    whole, stopped = (
        streamed(workplace, tmp_path / name, train=str(tmp_path / "part*.jsonl")) for name in ("whole", "stopped")
    )
    assert together(2, [whole]) == [0, 0]
    assert together(2, [stopped], on_step=Stop(1, 5)) == [1, 1]  # RunInterrupted
    assert together(2, [stopped], resume=True) == [0, 0]
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")
    ends = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    with pytest.raises(ConfigError, match="2 processes have read this run's data, each its own files, and 1 cannot"):
        train(stopped, resume=True)
