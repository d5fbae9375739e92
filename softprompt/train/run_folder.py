"""The folder of a run: what lies in it, and how each file is written so that a crash leaves the old one or the new.

A process may be killed, or its machine lose its power, at any moment. A file is written under another name, flushed to
the disk and renamed, so it is the old one or the new one; metrics alone are appended to, and a last line that was cut
short is dropped. What is newer than the state that a run goes on from is written again, to the same bits.

adapter_config.json, adapter_model.safetensors   the best prompt so far (readable by PEFT)
recipe.yaml      the recipe as run                metrics.jsonl   one JSON object per logged step
samples.json     answers before and after         summary.json    numbers, versions, nearest tokens
report.html      all of it to look at             checkpoint/     what --resume needs, of the last two saved steps
verbalizer.json  of a cloze task: its words   base/           the base model, where it was tuned too
teachers/        of a run of several tasks: each one's plain prompt, a run folder too
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from softprompt.checkpoint.files import sync_folder
from softprompt.errors import CheckpointError, ConfigError, TrainingError
from softprompt.recipe import Recipe
from softprompt.train.state_file import TornState, read_state, write_state

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.json"
SUMMARY = "summary.json"
REPORT = "report.html"
VERBALIZER = "verbalizer.json"
BASE = "base"
CHECKPOINT = "checkpoint"
KEPT = 2  # states; the one before the last is there for the day that the last cannot be read

# What a process leaves that is killed while it writes: here, and in `checkpoint.files`.
_LEFT_OVER = re.compile(r"\..+\.\d+\.tmp|\.[0-9a-f]{12}\..+\.(new|old)")
_STATE = re.compile(r"step-(\d{8,})\.pt")


class RunFolder:
    """One run's folder. From ``check_free`` (a new run) or ``reopen`` (one to go on with or to read).

    One that does not ``write`` belongs to a process beside the one that does.
    """

    writes: bool = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def there(self) -> bool:
        """Whether a run has begun in it."""
        return (self.path / RECIPE).is_file()

    @classmethod
    def check_free(cls, path: str | Path) -> RunFolder:
        """A new or empty folder, not made yet; one that holds anything is refused: it may be somebody's work."""
        folder = Path(path)
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"the run folder {folder} is a file; choose another `out`")
        if folder.is_dir() and any(not _LEFT_OVER.fullmatch(item.name) for item in folder.iterdir()):
            begun = (folder / RECIPE).exists()
            remedy = "go on with the run in it by --resume, or choose" if begun else "choose"
            raise ConfigError(f"the run folder {folder} is not empty; {remedy} another `out`")
        nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise ConfigError(f"the run folder {folder} is not writable (at {nearest}); choose another `out`")
        return cls(folder)

    @classmethod
    def to_resume(cls, path: str | Path) -> RunFolder:
        """The folder of a run to go on with, or one as ``check_free`` wants it, where none has begun yet."""
        return cls(Path(path)) if cls(Path(path)).there() else cls.check_free(path)

    def begin(self, recipe: Recipe) -> None:
        """Make the folder, with the recipe in it."""
        self.make()
        self.write_text(RECIPE, recipe.to_yaml())

    def make(self) -> None:
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror
            raise ConfigError(f"the run folder {self.path} cannot be made: {reason}; choose another `out`") from None

    @classmethod
    def reopen(cls, path: str | Path) -> RunFolder:
        folder = Path(path)
        if not (folder / RECIPE).is_file():
            raise ConfigError(f"there is no run in {folder} (no {RECIPE}); give a run's folder, or begin one there")
        return cls(folder)

    def write_text(self, name: str, text: str) -> Path:
        """Write a whole file or leave the old one."""
        target = self.path / name
        if not self.writes:
            return target
        _put(target, lambda file: file.write(text.encode()))
        return target

    def write_json(self, name: str, value: Any) -> Path:
        return self.write_text(name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / name} cannot be read: {error}") from None

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to the metrics; numbers that are not finite become null, so that every line is JSON."""
        if not self.writes:
            return
        line = json.dumps({key: _finite(value) for key, value in row.items()})
        try:
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise _unwritable(self.path / METRICS, error) from None

    def metrics(self) -> list[dict[str, Any]]:
        """All rows; a last line that a crash cut short is left out."""
        path = self.path / METRICS
        rows = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def rewind(self, step: int) -> None:
        """Go back to ``step``: drop the metrics and states after it, and what a killed process left half-written.

        The run writes them again. A run that stands at 0 drops the row of its start too, which it measures again.
        """
        if not self.writes:
            return
        kept = [row for row in self.metrics() if row.get("step", 0) <= (step or -1)]
        self.write_text(METRICS, "".join(json.dumps(row) + "\n" for row in kept))
        later = [path for number, path in self.states() if number > step]
        halves = [item for place in (self.path, self.path / CHECKPOINT) for item in _left_over(place)]
        for path in (*later, *halves):
            with suppress(OSError):
                path.unlink()

    def states(self) -> list[tuple[int, Path]]:
        """The steps of the saved states and their files, in order."""
        names = os.listdir(self.path / CHECKPOINT) if (self.path / CHECKPOINT).is_dir() else []
        steps = sorted(int(found[1]) for name in names if (found := _STATE.fullmatch(name)))
        return [(step, self.state_path(step)) for step in steps]

    def state_path(self, step: int) -> Path:
        return self.path / CHECKPOINT / f"step-{step:08d}.pt"

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Write what ``load_state`` needs to go on; the state of two saves ago goes once this one is on the disk."""
        if not self.writes:
            return
        with suppress(FileNotFoundError), open(self.path / METRICS, "rb") as metrics:
            os.fsync(metrics.fileno())  # the rows up to a state are there if it is
        _put(self.state_path(state["progress"]["step"]), lambda file: write_state(file, state))
        for _, path in self.states()[:-KEPT]:
            with suppress(OSError):
                path.unlink()

    def load_state(self, tell: Callable[[str], None] = lambda message: None) -> dict[str, Any] | None:
        """The last whole state, tensors on the CPU, or None if the run never got to save one.

        ``tell`` hears of those that are torn and skipped. CheckpointError where all are, or this version wrote none.
        """
        states = self.states()
        for number, path in reversed(states):
            try:
                return read_state(path)
            except TornState as torn:
                tell(f"the state of step {number}, {path}, is torn ({torn}) and skipped")
        place = self.path / CHECKPOINT
        if states:
            raise CheckpointError(
                f"no state in {place} is whole; delete {place} to train again from the start, or start a new run in "
                "another `out`"
            )
        if (place / "state.pt").exists():
            raise CheckpointError(
                f"{place / 'state.pt'} was not written by this version; start a new run in another `out`"
            )
        return None


def remove_run(path: str | Path) -> None:
    """Delete an earlier run, and nothing else: a folder that holds any file a run does not write is refused."""
    folder = Path(path)
    if not folder.exists():
        return
    ours = {RECIPE, METRICS, SAMPLES, SUMMARY, REPORT, CHECKPOINT, "teachers", VERBALIZER, BASE, "README.md"}
    ours |= {"adapter_config.json", "adapter_model.safetensors", "encoder.safetensors", "start.json", "tensorboard"}
    ours |= {item.name for item in folder.iterdir() if item.name.endswith(".tmp")}
    strangers = sorted({item.name for item in folder.iterdir()} - ours - {item.name for item in _left_over(folder)})
    if strangers or folder.is_symlink():
        found = ", ".join(strangers) or "a link"
        raise TrainingError(f"{folder} holds what no run wrote ({found}); move it away, or choose another folder")
    shutil.rmtree(folder)


def _left_over(folder: Path) -> list[Path]:
    names = os.listdir(folder) if folder.is_dir() else []
    return [folder / name for name in names if _LEFT_OVER.fullmatch(name)]


def _put(target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a whole file, down to the disk, or leave the old one; CheckpointError where it cannot be written."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException as error:
        with suppress(OSError):  # a read-only disk refuses to delete even what is not there
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError | RuntimeError):
            raise
        raise _unwritable(target, error) from None  # torch may wrap a full disk in an error of its own


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unwritable(path: Path, error: Exception) -> CheckpointError:
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    reason = cause.strerror if isinstance(cause, OSError) else "the file could not be written to its end"
    return CheckpointError(f"{path} cannot be written: {reason}; free some space or choose another `out`")
