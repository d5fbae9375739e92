"""One file with all that a run needs to go on: a torch archive, then its SHA-256, by which a torn one is known as such.

A rename puts a file there whole or not at all, but what becomes of it on the disk is another matter: a machine that
lost its power may keep the name and lose the bytes. So nothing is read before all of it has been checked.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, final

import torch

from softprompt.errors import CheckpointError

VERSION = 2
_MARK = b"\nsha256 "
_TAIL = len(_MARK) + 64 + 1  # the mark, the digest in hexadecimal, a line's end
_CHUNK = 1 << 20


class TornState(Exception):
    """A file that is not, or no longer, what was written; its text says how that shows."""


@final
class _Digested:
    """A file to write to that adds up what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_state(file: BinaryIO, state: Mapping[str, Any]) -> None:
    """Write a state, tensors and plain values, into an empty file. OSError or torch's RuntimeError where it fails."""
    digested = _Digested(file)
    torch.save({"version": VERSION, **state}, digested)  # type: ignore[arg-type]  # it asks for no more than write
    file.write(_MARK + digested.digest.hexdigest().encode() + b"\n")


def read_state(path: Path) -> dict[str, Any]:
    """The state in a file, tensors on the CPU. Only tensors and plain values are read, never code.

    TornState where the file is not whole; CheckpointError where it is, but is no state of this version.
    """
    _check_whole(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged ({reason}); start a new run in another `out`") from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise CheckpointError(f"{path} was not written by this version; start a new run in another `out`")
    return state


def _check_whole(path: Path) -> None:
    try:
        left, digest = path.stat().st_size - _TAIL, hashlib.sha256()
        with open(path, "rb") as file:
            while left > 0 and (chunk := file.read(min(left, _CHUNK))):
                digest.update(chunk)
                left -= len(chunk)
            tail = file.read()
    except OSError as error:
        raise TornState(str(error.strerror)) from None
    if left != 0 or not tail.startswith(_MARK) or not tail.endswith(b"\n"):
        raise TornState("it ends too early")
    if tail[len(_MARK) : -1] != digest.hexdigest().encode():
        raise TornState("its checksum is another")
