"""Reading `.safetensors` files, if possible without mapping them into memory.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the length of a JSON header, little
endian; the header, `{name: {"dtype", "shape", "data_offsets"}}` and `__metadata__`; the data, without gaps. The
library's own reader maps the file, and a process that touches a map of a file that somebody has shortened since (`cp`
over it does) is killed by the system. Here every byte is read, so that the worst of files is an error, and what has
been checked stays as it was. Mapping is for those who ask for it: it is the faster, the more the larger a prompt is.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from math import prod
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEADER_BYTES = 1_000_000
FIRST_BYTES = 2048  # read at once, in which the header of most files ends
BINARY = getattr(os, "O_BINARY", 0)  # of Windows alone
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
"""The types a checkpoint may hold; a tensor of any other is only ever named in a message."""

Layout = tuple[tuple[int, ...], torch.dtype | str]
"""Shape and type of one stored tensor; a type that no checkpoint may hold stays the file's own word for it."""


class DamagedFileError(Exception):
    """What is wrong with a file's own structure, in a few words."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its shape, its type in the file's words, and where its data begins and ends, in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int

    @property
    def layout(self) -> Layout:
        return self.shape, DTYPES.get(self.dtype, self.dtype)


def read_file(
    path: Path,
    check: Callable[[dict[str, Layout]], None],
    mapped: bool = False,
    check_size: Callable[[int], None] = lambda size: None,
) -> dict[str, Tensor]:
    """Every tensor of a file, each in its own memory, if `check_size` accepts its size and `check` their layouts.

    `mapped`: in the memory of the file, which has to be replaced as a whole or not at all as long as they are used;
    writing into them does not change the file. Raises what the checks do, DamagedFileError and OSError; no data is read
    before `check` has seen the header.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        check_size(size)
        stored, start, _ = _read_header(file, size)
        check({each.name: each.layout for each in stored})
        if mapped:
            pages = mmap(file.fileno(), 0, access=ACCESS_COPY)
            return {each.name: _mapped_tensor(pages, start, each) for each in stored}
        file.seek(start)
        return {each.name: _read_tensor(file, each) for each in stored}


def read_text(path: Path) -> dict[str, str]:
    """The text metadata of a file. Raises DamagedFileError and OSError."""
    with open(path, "rb", buffering=0) as file:
        return _read_header(file, os.fstat(file.fileno()).st_size)[2]


def _read_header(file: FileIO, size: int) -> tuple[list[Stored], int, dict[str, str]]:
    """The tensors in the order of their data, where that begins, and the metadata, of a file of `size` bytes."""
    first = file.read(FIRST_BYTES) or b""
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > min(HEADER_BYTES, size - 8):
        raise DamagedFileError(f"its header claims {length:,} bytes")
    text = first[8 : 8 + length]
    if len(text) < length:
        text += _bytes(file, length - len(text))
    header = _JSON.decode(text.decode("utf-8"))
    if not isinstance(header, dict):
        raise DamagedFileError("its header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise DamagedFileError("its metadata is not text")
    stored = sorted((_stored(name, entry) for name, entry in header.items()), key=lambda each: (each.begin, each.end))
    reached = 0
    for each in stored:
        if each.begin != reached:
            raise DamagedFileError("its tensors overlap or leave gaps")
        reached = each.end
    if reached != size - 8 - length:
        raise DamagedFileError(f"its tensors end at byte {reached:,} of {size - 8 - length:,}")
    return stored, 8 + length, metadata


def _stored(name: str, entry: Any) -> Stored:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise DamagedFileError("its header has an entry that is no tensor")
    shape, dtype, offsets = entry["shape"], entry["dtype"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise DamagedFileError("its header has an entry that is no tensor")
    begin, end = offsets
    size = prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - begin
    if end < begin or size != end - begin:
        raise DamagedFileError("a shape and the bytes for it differ")
    return Stored(name, tuple(shape), dtype, begin, end)


def _are_counts(values: Any) -> bool:
    """Whether it is a list as torch could take for a shape."""
    some = isinstance(values, list) and len(values) <= 64
    return some and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise DamagedFileError("its header gives a name twice")
    return values


_JSON = json.JSONDecoder(object_pairs_hook=_no_duplicates)


def _read_tensor(file: FileIO, stored: Stored) -> Tensor:
    data = torch.empty(stored.end - stored.begin, dtype=torch.uint8)
    _fill(file, data.numpy().data)
    return data.view(DTYPES[stored.dtype]).view(stored.shape)


def _mapped_tensor(pages: mmap, start: int, stored: Stored) -> Tensor:
    dtype, begin = DTYPES[stored.dtype], start + stored.begin
    count = (stored.end - stored.begin) // dtype.itemsize
    if not count or begin % dtype.itemsize:  # nothing to map, or not where a number may stand
        data = torch.frombuffer(bytearray(pages[begin : start + stored.end]), dtype=dtype) if count else torch.empty(0)
        return data.to(dtype).view(stored.shape)
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=begin).view(stored.shape)


def _bytes(file: FileIO, count: int) -> bytes:
    data = bytearray(count)
    _fill(file, memoryview(data))
    return bytes(data)


def _fill(file: FileIO, data: memoryview) -> None:
    """One call of the system reads at most 2 GiB."""
    while len(data):
        count = file.readinto(data)
        if not count:
            raise DamagedFileError("it ends too early")
        data = data[count:]
