"""How good is a prompt, by default and at its best, beside PEFT's, LoRA, full fine-tuning and no training at all?

    python benchmarks/quality.py                          runs what is missing (hours), writes the tables
    python benchmarks/quality.py --list                   what there is to run, and about how long it takes
    python benchmarks/quality.py --tasks e2e,style --arms ours,peft-best --seeds 1
    python benchmarks/quality.py --models stories260K     another base model than each task's own
    python benchmarks/quality.py --quick                  everything in a few steps, into a temporary folder
    python benchmarks/quality.py --table                  only writes benchmarks/results/quality.md

Tasks: quality_tasks.py. Arms and the settings each may choose from: quality_arms.py. How runs are made alike:
quality_bench.py. Every run is a row of benchmarks/results/quality.json as soon as it is over, so a run that is killed
goes on. Chosen are settings and steps on dev rows, reported are test rows; the test rows play no part before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Records
from quality_arms import ARMS, FINALISTS, SEEDLESS, Setting, choose, settings_of
from quality_bench import Bench
from quality_table import write_table
from quality_tasks import MINILM, TASKS, Task

from softprompt.errors import SoftPromptError

OURS = ("model", "train", "eval", "out", "seed", "steps", "batch_size", "eval_steps", "eval_batch_size", "save_steps")
FAILED = {"loss": 1e9}


@dataclass(frozen=True)
class Budget:
    """Steps of a run, and of one that only helps to choose a setting; by default the task's, three tenths of them."""

    seeds: int = 3
    steps: int | None = None
    grid_steps: int | None = None

    def of(self, task: Task) -> tuple[int, int]:
        steps = self.steps or task.steps
        return steps, self.grid_steps or max(1, steps * 3 // 10)


class Cell:
    """A task on a base model: its runs, found in the records or made."""

    def __init__(self, task: Task, model: str, budget: Budget, records: Records, work: Path) -> None:
        self.task, self.model, self.records, self.work = task, model, records, work
        self.seeds = budget.seeds
        self.steps, self.grid_steps = budget.of(task)
        self.budget = f"{self.steps}x{task.batch}"

    @cached_property
    def bench(self) -> Bench:
        return Bench(self.task, self.model, self.work / self.model)

    def key(self, setting: Setting, seed: int, part: str) -> dict[str, Any]:
        """What a run is found by: `part` is grid (few steps, no test rows) or main."""
        bench = self.bench
        key = {"task": self.task.name, "model": self.model, "weights": bench.weights, "rows": bench.digest}
        key |= {"budget": self.budget, "kind": setting.kind, "setting": str(setting)}
        if setting.kind == "ours":
            key["defaults"] = self.defaults(setting)
        return {**key, "part": part, "seed": seed}

    def defaults(self, setting: Setting) -> str:
        """Eight digits that change with what our runs take, as far as the task does not say it."""
        recipe = self.bench.recipe(0, self.steps, out="-", **setting.options).resolved().to_dict()
        kept = {name: value for name, value in recipe.items() if name not in OURS}
        return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:8]

    def find(self, setting: Setting, seed: int, part: str) -> dict[str, Any] | None:
        rows = self.records.find(**self.key(setting, seed, part))
        return rows[-1] if rows else None

    def run(self, setting: Setting, seed: int, part: str) -> dict[str, Any]:
        """The row of a run, made unless it is there."""
        row = self.find(setting, seed, part)
        if row is not None:
            return row
        steps = self.steps if part == "main" else self.grid_steps
        try:
            found = self.bench.run(setting, seed, steps, report=part == "main")
        except SoftPromptError as error:  # a setting that makes the loss no number is a bad setting
            found = {"dev": FAILED, "error": type(error).__name__}
        self.records.put(self.key(setting, seed, part), {"steps": steps, **found})
        row = self.find(setting, seed, part)
        assert row is not None
        return row

    def chosen(self, arm: str, make: bool = True) -> Setting | None:
        """The arm's setting, by runs with the first seed; None where some are missing and are not to be made."""

        def scores(part: str) -> Any:
            return lambda setting: (self.run if make else self.find)(setting, 0, part)

        def dev(part: str) -> Any:
            return lambda setting: None if (row := scores(part)(setting)) is None else row["dev"]

        return choose(settings_of(arm, self.task), dev("grid"), dev("main"))

    def report(self, arm: str, seed: int) -> None:
        """One reported run of an arm."""
        if not settings_of(arm, self.task) or (seed and arm in SEEDLESS):
            return
        setting = self.chosen(arm)
        assert setting is not None
        self.run(setting, seed, "main")

    def missing(self, arm: str) -> list[str]:
        """The parts, grid or main, of the runs that an arm still needs."""
        settings = settings_of(arm, self.task)
        if not settings:
            return []
        grid = [s for s in settings if len(settings) > 1 and self.find(s, 0, "grid") is None]
        setting, seeds = self.chosen(arm, make=False), range(1 if arm in SEEDLESS else self.seeds)
        if setting is None:
            done = sum(self.find(s, 0, "main") is not None for s in settings)
            return ["grid"] * len(grid) + ["main"] * (FINALISTS - min(done, FINALISTS) + self.seeds - 1)
        return ["main"] * sum(self.find(setting, seed, "main") is None for seed in seeds)

    def seconds(self, part: str) -> float:
        """About how long a run takes: what runs of this part took, or a guess."""
        known = self.records.find(task=self.task.name, model=self.model, part=part, budget=self.budget)
        took = [row["seconds"] for row in known if row.get("curve")]
        guess = self.task.seconds * self.steps / self.task.steps
        return sum(took) / len(took) if took else guess * (1.0 if part == "main" else 0.35)


def cells(wanted: argparse.Namespace, records: Records, work: Path) -> list[Cell]:
    """The tasks with their own base models, or with those asked for that fit the task."""
    budget = Budget(wanted.seeds, wanted.steps, wanted.grid_steps)
    found = []
    for name in wanted.tasks:
        task = TASKS[name].quick() if wanted.quick else TASKS[name]
        models = [m for m in wanted.models or [task.model] if (m == MINILM) == (task.kind == "SEQ_CLS")]
        found += [Cell(task, model, budget, records, work) for model in models]
    return found


def list_runs(found: Sequence[Cell], arms: Sequence[str]) -> str:
    """One line per task and arm with runs to do, and the sum."""
    lines, total = [], 0.0
    for cell in found:
        for arm in arms:
            parts = cell.missing(arm)
            seconds = sum(cell.seconds(part) for part in parts)
            total += seconds
            if parts:
                count = ", ".join(f"{parts.count(part)} {part}" for part in dict.fromkeys(parts))
                lines.append(f"{cell.task.name:15} {cell.model:12} {arm:13} {count:18} about {seconds / 60:5.1f} min")
    return "\n".join([*lines, f"in all about {total / 60:.0f} minutes on one core"])


def run(found: Sequence[Cell], arms: Sequence[str]) -> None:
    """Seed by seed, so that a run that is stopped has something of everything."""
    for seed in range(max((cell.seeds for cell in found), default=0)):
        for cell in found:
            for arm in arms:
                cell.report(arm, seed)


def _names(text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"there is no {name!r}; known are {', '.join(known)}")
    return names


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"of {', '.join(TASKS)}, separated by commas")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join(ARMS)}, separated by commas")
    parser.add_argument("--models", help=f"embedded, {MINILM} or folders in assets/models, instead of each task's own")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of each task's")
    parser.add_argument("--grid-steps", type=int, help="steps of a run that helps to choose; default: three tenths")
    parser.add_argument("--quick", action="store_true", help="few rows and steps, one seed")
    parser.add_argument("--list", action="store_true", help="run nothing, say what there is to run")
    parser.add_argument("--table", action="store_true", help="run nothing, write the tables")
    parser.add_argument("--results", type=Path, help="folder of quality.json; default: benchmarks/results")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    wanted = parser.parse_args(arguments)
    wanted.tasks, wanted.arms = _names(wanted.tasks, list(TASKS)), _names(wanted.arms, list(ARMS))
    wanted.models = wanted.models.split(",") if wanted.models else None
    if wanted.quick:
        wanted.seeds, wanted.steps, wanted.grid_steps = 1, wanted.steps or 4, wanted.grid_steps or 2
    return wanted


def main(arguments: Sequence[str] | None = None) -> None:
    wanted = _arguments(arguments)
    torch.set_num_threads(wanted.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        results = wanted.results or (work if wanted.quick else RESULTS)
        records = Records(results / "quality.json")
        if not wanted.table:
            found = cells(wanted, records, work)
            if wanted.list:
                print(list_runs(found, wanted.arms))
                return
            run(found, wanted.arms)
        print(write_table(records, results))


if __name__ == "__main__":
    main()
