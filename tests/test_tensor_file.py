"""Our reader of `.safetensors` reads what the library's does, and refuses what that refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from softprompt.checkpoint.tensor_file import DamagedFileError, Layout, read_file, read_text

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64]
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3), "c": torch.ones(3, 0), "d": torch.ones(1).half()}


def theirs(path: Path) -> dict[str, Tensor] | None:
    """As the library reads it; None if it does not."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (this is no dict)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, UnicodeDecodeError):
        return None


def ours(path: Path, mapped: bool = False) -> dict[str, Tensor]:
    return read_file(path, lambda layouts: None, mapped)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(one[name], other[name])
        for name in one
    )


@pytest.mark.parametrize("mapped", [False, True])
@given(
    shapes=st.dictionaries(st.text(max_size=4), st.lists(st.integers(0, 3), max_size=3), max_size=4),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=4, max_size=4),
    spaces=st.integers(0, 9),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_the_library_writes_is_read(
    tmp_path: Path, mapped: bool, shapes: dict[str, list[int]], dtypes: list[torch.dtype], spaces: int
) -> None:
    shapes.pop("__metadata__", None)
    written = {
        name: torch.randint(-9, 9, shape).to(dtype)
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=False)
    }
    data = save(written, {"format": "pt", "more": "é"})
    length = int.from_bytes(data[:8], "little")
    path = tmp_path / "file.safetensors"  # with a header of any length, so that numbers stand at any byte
    path.write_bytes(
        (length + spaces).to_bytes(8, "little") + data[8 : 8 + length] + b" " * spaces + data[8 + length :]
    )
    assert same(ours(path, mapped), written)
    assert read_text(path) == {"format": "pt", "more": "é"}


def test_memory_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(save(TENSORS))
    for mapped in (False, True):
        found = ours(path, mapped)
        found["a"] += 1
        assert same(ours(path, mapped), TENSORS)
    found = ours(path)
    assert len({each.untyped_storage().data_ptr() for each in found.values() if each.numel()}) == 3


def test_a_long_header(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    many = {f"tensor number {number}": torch.full((2,), float(number)) for number in range(500)}
    path.write_bytes(save(many))
    assert same(ours(path), many)


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    listed = [list(each) if isinstance(each, tuple) else each for each in (shape, offsets)]
    return {"dtype": dtype, "shape": listed[0], "data_offsets": listed[1]}


BAD: list[tuple[Any, str]] = [
    ([], "is no JSON object"),
    ({"a": 3}, "an entry that is no tensor"),
    ({"a": {**entry(), "more": 1}}, "an entry that is no tensor"),
    ({"a": {"dtype": "F32"}}, "an entry that is no tensor"),
    ({"a": entry(dtype=3)}, "an entry that is no tensor"),
    ({"a": entry(shape=3)}, "an entry that is no tensor"),
    ({"a": entry(shape=(1.0,))}, "an entry that is no tensor"),
    ({"a": entry(shape=(True,))}, "an entry that is no tensor"),
    ({"a": entry(shape=(-1, -1))}, "an entry that is no tensor"),
    ({"a": entry(shape=(1 << 63,))}, "an entry that is no tensor"),
    ({"a": entry(shape=(1,) * 65)}, "an entry that is no tensor"),
    ({"a": entry(offsets=(0, 4, 4))}, "an entry that is no tensor"),
    ({"a": entry(offsets=(4, 0))}, "a shape and the bytes for it differ"),
    ({"a": entry(shape=(2,))}, "a shape and the bytes for it differ"),
    ({"a": entry(shape=(1 << 62, 1 << 62))}, "a shape and the bytes for it differ"),
    ({"a": entry(dtype="F16")}, "a shape and the bytes for it differ"),
    ({"a": entry(offsets=(4, 8))}, "overlap or leave gaps"),
    ({"a": entry(), "b": entry()}, "overlap or leave gaps"),
    ({}, "its tensors end at byte 0 of 4"),
    ({"a": entry(shape=(2,), offsets=(0, 8))}, "its tensors end at byte 8 of 4"),
    ({"__metadata__": {"a": 1}, "a": entry()}, "its metadata is not text"),
    ({"__metadata__": [1], "a": entry()}, "its metadata is not text"),
]


@pytest.mark.parametrize(("header", "message"), BAD, ids=range(len(BAD)))
def test_bad_headers(tmp_path: Path, header: Any, message: str) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "file.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\0\0")
    for mapped in (False, True):
        with pytest.raises(DamagedFileError, match=message):
            ours(path, mapped)
    assert theirs(path) is None or message in ("an entry that is no tensor", "is no JSON object")


def test_a_name_twice(tmp_path: Path) -> None:
    one = json.dumps({"a": entry()})
    text = f"{one[:-1]}, {one[1:]}".encode()
    path = tmp_path / "file.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\0\0")
    with pytest.raises(DamagedFileError, match="a name twice"):
        ours(path)


def test_types_are_told_and_data_comes_last(tmp_path: Path) -> None:
    path, seen = tmp_path / "file.safetensors", []
    path.write_bytes(save({"a": torch.ones(2).bool(), "b": torch.ones(3)}))

    def check(layouts: dict[str, Layout]) -> None:
        seen.append(layouts)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read_file(path, check)
    assert seen == [{"a": ((2,), "BOOL"), "b": ((3,), torch.float32)}]


@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_the_library_refuses_is_refused(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(save(TENSORS))
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path / "file.safetensors"
    path.write_bytes(data)
    try:
        found = ours(path)
    except (DamagedFileError, ValueError, KeyError):  # bad JSON, bad UTF-8, a type that is not read
        return
    expected = theirs(path)
    assert expected is not None
    assert found.keys() == expected.keys()
    assert all(found[name].numpy(force=True).tobytes() == expected[name].numpy(force=True).tobytes() for name in found)
