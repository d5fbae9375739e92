"""Whether the files of an adapter are still those that were read."""

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from softprompt.checkpoint import CONFIG_NAME, ENCODER_NAME, OLD_WEIGHTS_NAME, WEIGHTS_NAME
from softprompt.checkpoint.files import Find, local_files

Stamps = tuple[tuple[int, ...] | None, ...]
"""One of each file that an adapter may have; None: it is not there."""

READS, PAUSE = 20, 0.002  # of files that change while they are read; seconds
_FILES: tuple[str, ...] = (CONFIG_NAME, WEIGHTS_NAME, OLD_WEIGHTS_NAME, ENCODER_NAME)


def stamps_of(folder: str, names: Iterable[str] = _FILES) -> Stamps:
    """What changes with the files in `folder`."""
    return tuple([_stamp(f"{folder}/{name}") for name in names])


def same(folder: str, stamps: Stamps) -> bool:
    """Whether the files that were there are still the same."""
    there = [number for number, stamp in enumerate(stamps) if stamp is not None]
    return stamps_of(folder, [_FILES[number] for number in there]) == tuple([stamps[number] for number in there])


def _stamp(path: str) -> tuple[int, ...] | None:
    """Whether it is a file and no link, and what changes with it (or with what the link leads to); None: not there."""
    try:
        found = os.lstat(path)
    except (OSError, ValueError):
        return None
    plain = stat.S_ISREG(found.st_mode)
    if not plain:
        with suppress(OSError):
            found = os.stat(path)
    return plain, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def finder(folder: Path, stamps: Stamps) -> Find:
    """`local_files(folder)`, which asks the system nothing that the stamps say already."""
    known, ask = dict(zip(_FILES, stamps, strict=True)), local_files(folder)

    def find(name: str) -> Path | None:
        stamp = known[name]
        return None if stamp is None else folder / name if stamp[0] else ask(name)

    return find
