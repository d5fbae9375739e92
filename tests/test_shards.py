"""Rows that are read one by one from files and named data sets, from any place on, and how they are shared out."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.data.rows import read_rows
from softprompt.data.shards import FileShards, NamedShards, Pass, open_shards, shared_out
from softprompt.errors import DataError


def files_of(folder: Path, sizes: Sequence[int]) -> FileShards:
    """Files with so many rows each, numbered through."""
    numbers = itertools.count()
    files = [folder / f"{name:03}.jsonl" for name in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        file.write_text("".join(f'{{"id": "{next(numbers):06}"}}\n' for _ in range(size)))
    return FileShards(str(folder), files)


def saved(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The state as it comes back from a disk."""
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def test_shards_are_shared_out_evenly_or_not_at_all() -> None:
    assert shared_out([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]
    assert shared_out([5, 1, 4, 2], 2) == [[0, 1], [2, 3]]
    assert shared_out([1] * 1003, 8) is not None
    for sizes, processes in (([1, 1, 1], 2), ([1, 9], 2), ([1], 2), ([0, 9], 2), ([1, 1], 1)):
        assert shared_out(sizes, processes) is None
    assert shared_out([0, 0], 2) == [[0], [1]]  # nothing to share: told when a row is asked for


WORDS = ["plain", 'with "quotes", commas', "two\nlines", "Ünï ☃ text", " spaces ", "NA", "2020-01-02", "007"]


def write_as(path: Path, ending: str) -> str:
    """The same rows in any format."""
    rows = [{"id": str(number), "text": f"{WORDS[number % 8]} {number}"} for number in range(40)]
    file = path / f"data{ending}"
    if ending == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=7)
        return str(file)
    out = io.StringIO(newline="")
    if ".txt" in ending:
        out.write("".join(f"{row['id']}\r\n\n" for row in rows))
    elif ".jsonl" in ending:
        out.write("\n".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows))
    else:
        writer = csv.DictWriter(out, ["id", "text"], delimiter="\t" if ".tsv" in ending else ",")
        writer.writeheader()
        writer.writerows(rows)
    content = out.getvalue().encode("utf-8-sig")
    file.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    return str(file)


@pytest.mark.parametrize(
    "ending", [".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz", ".csv.gz", ".tsv.gz", ".txt.gz"]
)
def test_rows_are_those_read_into_memory_and_reading_goes_on_anywhere(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softprompt.data.shards.PARQUET_ROWS", 3)  # a row group of 7 is three batches
    source = write_as(tmp_path, ending)
    plain = write_as(tmp_path, ending.removesuffix(".gz"))
    expected = [(row.where.replace(plain, source), row.values) for row in read_rows(plain)]
    shards, places = open_shards(source), []
    whole = Pass(shards, [0])
    places.append(whole.place())
    found = []
    for row in whole:
        found.append((row.where, row.values))
        places.append(whole.place())
    assert found == expected
    assert len(found) == 40
    for number, place in enumerate(places):
        assert [(row.where, row.values) for row in Pass(shards, [0], place)] == expected[number:]


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A data set of four shards as `datasets` streams it, 30 rows."""
    import datasets

    folder = tmp_path_factory.mktemp("named")
    files = files_of(folder, [9, 6, 8, 7]).files
    return datasets.load_dataset("json", data_files=[str(file) for file in files], split="train", streaming=True)


def test_a_named_data_set_is_read_by_shard_and_goes_on_anywhere(named: Any, tmp_path: Path) -> None:
    shards = NamedShards("somebody/numbers", "train", named)
    assert shards.sizes == [1] * 4
    for order in ([2, 0], [3]):
        whole = Pass(shards, order)
        places, found = [whole.place()], []
        for row in whole:
            found.append(row)
            places.append(saved({"place": whole.place()}, tmp_path)["place"])
        assert found[0].where == f"somebody/numbers train shard {order[0] + 1} row 1"
        assert len({row.values["id"] for row in found}) == len(found) == sum([9, 6, 8, 7][number] for number in order)
        for number, place in enumerate(places):
            assert list(Pass(shards, order, place)) == found[number:]


def test_a_named_data_set_that_breaks_off_says_where() -> None:
    import datasets

    def rows() -> Any:
        yield {"id": 1}
        raise ConnectionError("the line is dead.\nmore")

    broken = datasets.IterableDataset.from_generator(rows)
    with pytest.raises(DataError, match=r"^far/away train cannot be read after row 1 \(the line is dead\); go on"):
        list(Pass(NamedShards("far/away", "train", broken), [0]))


BROKEN: list[tuple[str, bytes, str]] = [
    ("bad.jsonl", b'{"id": 1}\n\n{"id" 2}\n', r"bad.jsonl line 3 is not valid JSON"),
    ("list.jsonl", b'{"id": 1}\n[2]\n', r"list.jsonl line 2 holds a list"),
    ("latin.jsonl", b'{"id": 1}\n{"id": "\xe9"}\n', r"latin.jsonl line 2 is not UTF-8 text \(its byte 8 is 0xe9\)"),
    ("ragged.csv", b"id,text\n1,a\n2,b,c\n", r"ragged.csv line 3 has 3 fields but the header names 2"),
    ("twice.csv", b"id,id\n1,a\n", r"twice.csv line 1 names a column twice"),
    ("open.csv", b'id,text\n1,a\n2,"b\n', r"open.csv line 3 is not valid CSV"),
    ("torn.jsonl.gz", gzip.compress(b'{"id": 1}\n' * 99)[:-9], r"torn.jsonl.gz is not a whole gzip file"),
    ("no.jsonl.gz", b'{"id": 1}\n', r"no.jsonl.gz is not a whole gzip file"),
    ("no.parquet", b'{"id": 1}\n', r"no.parquet is not a readable Parquet file"),
    ("rows.json", b"[]", r"rows.json cannot be streamed, since .json is read as a whole; write it as .jsonl"),
    ("rows.parquet.gz", b"", r"rows.parquet.gz cannot be streamed; give one of .jsonl"),
    ("rows.xml", b"", r"rows.xml cannot be streamed; give one of .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[name for name, _, _ in BROKEN])
def test_a_broken_file_is_told_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(Pass(open_shards(str(tmp_path / name)), [0]))


def test_patterns_name_files_and_folders_are_told(tmp_path: Path) -> None:
    files_of(tmp_path, [2, 3])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "more.jsonl").write_text('{"id": "9"}\n')
    assert len(open_shards(f"{tmp_path}/*.jsonl").sizes) == 2
    assert [row.values["id"] for row in Pass(open_shards(f"{tmp_path}/**/*.jsonl"), range(3))][-1] == "9"
    with pytest.raises(DataError, match=r"no file fits the pattern .*\*.csv"):
        open_shards(f"{tmp_path}/*.csv")
    with pytest.raises(DataError, match=r"is a folder; name the files in it by a pattern such as .*\*.jsonl"):
        open_shards(str(tmp_path))
    with pytest.raises(DataError, match=r"there is no file .*00.jsonl; did you mean"):
        open_shards(str(tmp_path / "00.jsonl"))
    with pytest.raises(DataError, match=r"there is no file no/such.jsonl.gz; its folder no does not exist"):
        open_shards("no/such.jsonl.gz")
    with pytest.raises(DataError, match="is neither a file here nor a data set"):
        open_shards("nobody/nothing")
