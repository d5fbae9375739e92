"""The folder of a run: what lies in it, and how each file is written so that a crash leaves the old one or the new.

adapter_config.json, adapter_model.safetensors   the best prompt so far (readable by PEFT)
recipe.yaml      the recipe as run                metrics.jsonl   one JSON object per logged step
samples.json     answers before and after         summary.json    numbers, versions, nearest tokens
report.html      all of it to look at             checkpoint/     what --resume needs
verbalizer.json  of a cloze task: its words   base/           the base model, where it was tuned too
teachers/        of a run of several tasks: each one's plain prompt, a run folder too
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from softprompt.errors import CheckpointError, ConfigError, TrainingError
from softprompt.recipe import Recipe

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.json"
SUMMARY = "summary.json"
REPORT = "report.html"
VERBALIZER = "verbalizer.json"
BASE = "base"
STATE = "checkpoint/state.pt"
STATE_VERSION = 1


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
        if folder.is_dir() and any(folder.iterdir()):
            begun = (folder / RECIPE).exists()
            remedy = "go on with the run in it by --resume, or choose" if begun else "choose"
            raise ConfigError(f"the run folder {folder} is not empty; {remedy} another `out`")
        nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise ConfigError(f"the run folder {folder} is not writable (at {nearest}); choose another `out`")
        return cls(folder)

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
            raise ConfigError(f"there is no run in {folder} (no {RECIPE}); start one without --resume")
        return cls(folder)

    def write_text(self, name: str, text: str) -> Path:
        """Write a whole file or leave the old one."""
        target = self.path / name
        if not self.writes:
            return target
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _unwritable(target, error) from None
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
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def rewind_metrics(self, step: int) -> None:
        """Drop the rows after ``step``: the resumed run writes them again."""
        kept = [row for row in self.metrics() if row.get("step", 0) <= step]
        self.write_text(METRICS, "".join(json.dumps(row) + "\n" for row in kept))

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Write what ``load_state`` needs to go on; the old state stays until the new one is complete."""
        if not self.writes:
            return
        target = self.path / STATE
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save({"version": STATE_VERSION, **state}, file)
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:  # torch may wrap a full disk in an error of its own
            temporary.unlink(missing_ok=True)
            raise _unwritable(target, error) from None

    def load_state(self) -> dict[str, Any] | None:
        """The saved state, tensors on the CPU, or None if the run never got to save one.

        Only tensors and plain values are read, never code.
        """
        path = self.path / STATE
        if not path.is_file():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path} is damaged ({reason}); start a new run in another `out`") from None
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise CheckpointError(f"{path} was not written by this version; start a new run in another `out`")
        return state


def remove_run(path: str | Path) -> None:
    """Delete an earlier run, and nothing else: a folder that holds any file a run does not write is refused."""
    folder = Path(path)
    if not folder.exists():
        return
    ours = {RECIPE, METRICS, SAMPLES, SUMMARY, REPORT, "checkpoint", "teachers", VERBALIZER, BASE, "README.md"}
    ours |= {"adapter_config.json", "adapter_model.safetensors", "encoder.safetensors"}
    strangers = sorted(
        item.name for item in folder.iterdir() if item.name not in ours and not item.name.endswith(".tmp")
    )
    if strangers or folder.is_symlink():
        found = ", ".join(strangers) or "a link"
        raise TrainingError(f"{folder} holds what no run wrote ({found}); move it away, or choose another folder")
    shutil.rmtree(folder)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unwritable(path: Path, error: Exception) -> CheckpointError:
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    reason = cause.strerror if isinstance(cause, OSError) else "the file could not be written to its end"
    return CheckpointError(f"{path} cannot be written: {reason}; free some space or choose another `out`")
