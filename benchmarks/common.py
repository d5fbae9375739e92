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
from importlib.metadata import version
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


def machine() -> str:
    """Processor, versions and date, for the line under a table."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, {packages}, " + (
        f"{datetime.now(UTC):%Y-%m-%d}"
    )


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

    def add(self, row: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        with (Path(tempfile.gettempdir()) / f"softprompt-{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._read()
            self.rows.append(row)
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
