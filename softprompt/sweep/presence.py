"""Which workers of a sweep are there: each holds a file in OUT/workers, locked and touched while it lives.

A worker that was killed cannot say so. On the same machine its lock is free at once; from another machine, where locks
cannot be relied on, it counts as dead when its file has not been touched for ``STALE`` seconds.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self, final

TOUCH, STALE = 15.0, 300.0


@final
class Presence:
    """This process as a worker of the sweep in ``folder``, while the context lasts. ``name`` is its file's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "workers"
        self.name = f"{platform.node() or 'host'}.{_machine()}.{os.getpid()}.{uuid.uuid4().hex[:6]}"
        self._stop = threading.Event()
        self._file = -1

    def __enter__(self) -> Self:
        import fcntl

        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path(self.name), os.O_CREAT | os.O_RDWR, 0o666)
        with contextlib.suppress(OSError):  # without locks the time of the last touch has to do
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        threading.Thread(target=self._touch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._path(self.name).unlink(missing_ok=True)
        os.close(self._file)

    def gone(self, worker: str | None) -> bool:
        """Whether a worker has surely ended, so that its run folders are free."""
        if worker is None or worker == self.name:
            return worker is None
        path = self._path(worker)
        if not path.exists():
            return True
        return worker.split(".")[-3] == _machine() and _unlocked(path)

    def lost(self, worker: str | None) -> bool:
        """Whether a worker has ended, or not been heard of for long."""
        return self.gone(worker) or (worker != self.name and self._age(str(worker)) > STALE)

    def _age(self, worker: str) -> float:
        """Seconds since a worker touched its file, by the clock of the file system."""
        own = self._path(self.name)
        os.utime(own)
        try:
            return own.stat().st_mtime - self._path(worker).stat().st_mtime
        except FileNotFoundError:
            return STALE + 1

    def _path(self, worker: str) -> Path:
        return self.folder / worker

    def _touch(self) -> None:
        while not self._stop.wait(TOUCH):
            try:
                os.utime(self._path(self.name))
            except OSError:
                continue  # the disk may come back


def _machine() -> str:
    """What tells this start of this machine from every other, as far as that can be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")[:12]
    except OSError:
        return f"{uuid.getnode():012x}"


def _unlocked(path: Path) -> bool:
    """Whether nobody holds a worker's lock. Where there are no locks nothing is known, which is False."""
    import fcntl

    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(file)
    return True
