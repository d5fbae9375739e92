"""The tables of quality.py, from its records: one per task, one of ours beside PEFT's, and what was measured how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Records, machine, spread_of, table
from quality_arms import ARMS, choose, settings_of
from quality_compare import DIGITS, SHOWN, comparisons, overview
from quality_tasks import TASKS, Task

Row = dict[str, Any]
SHARES = ("accuracy", "p_at_1")  # 0 to 1 in the records, shown in percent


@dataclass(frozen=True)
class Result:
    """A task on a base model under one budget: the reported rows of every arm, by seed."""

    task: Task
    model: str
    budget: str
    arms: Mapping[str, list[Row]]

    def values(self, arm: str, measure: str) -> dict[int, float]:
        """Seed → score on test rows."""
        scale = 100 if measure in SHARES else 1
        rows = [row for row in self.arms.get(arm, []) if measure in row.get("test", {})]
        return {row["seed"]: scale * row["test"][measure] for row in rows}


def results_of(records: Records) -> list[Result]:
    """The newest budget, rows and weights of every task on every model, in the tasks' order."""
    found = []
    for name, task in TASKS.items():
        models = dict.fromkeys([task.model, *(row["model"] for row in records.find(task=name))])
        for model in models:
            rows = records.find(task=name, model=model)
            if rows:
                newest = {key: rows[-1][key] for key in ("weights", "rows", "budget")}
                rows = [row for row in rows if all(row[key] == value for key, value in newest.items())]
                found.append(Result(task, model, newest["budget"], {arm: _reported(rows, arm, task) for arm in ARMS}))
    return found


def _reported(rows: Sequence[Row], arm: str, task: Task) -> list[Row]:
    """The reported rows of an arm's setting, by seed; none where the choice is not made yet."""
    settings = settings_of(arm, task)
    if not settings:
        return []
    kinds = {setting.kind for setting in settings}
    mine = [row for row in rows if row["kind"] in kinds]
    if "ours" in kinds:  # of each setting what was run last: our defaults may have changed since
        last = {row["setting"]: row["defaults"] for row in mine}
        mine = [row for row in mine if row["defaults"] == last[row["setting"]]]
    by_run = {(row["setting"], row["part"], row["seed"]): row for row in mine}

    def dev(part: str) -> Any:
        return lambda setting: (by_run.get((str(setting), part, 0)) or {}).get("dev")

    setting = choose(settings, dev("grid"), dev("main"))
    chosen = [row for (name, part, _), row in by_run.items() if name == str(setting) and part == "main"]
    return sorted((row for row in chosen if "test" in row), key=lambda row: row["seed"])


def write_table(records: Records, folder: Path) -> str:
    """Write quality.md and its beginning, quality_summary.md, into the folder, from the records."""
    results = results_of(records)
    own = [result for result in results if result.model == result.task.model]
    parts = [_of_task(result) for result in results]
    summary = [overview(own), *comparisons(own)] if own else []
    (folder / "quality_summary.md").write_text("\n".join([*summary, _footer()]), encoding="utf-8")
    text = "\n".join([*summary, *parts, _footer()])
    (folder / "quality.md").write_text(text, encoding="utf-8")
    return text


def _of_task(result: Result) -> str:
    task = result.task
    steps, batch = result.budget.split("x")
    lines = []
    for arm, label in ARMS.items():
        rows = result.arms[arm]
        if not rows:
            continue
        cells = [_cell(result.values(arm, measure), measure) for measure in task.measures]
        if arm == "ours":
            label, cells = f"**{label}**", [f"**{cell}**" for cell in cells]
        lines.append([label, _setting(rows[0]), f"{rows[0]['parameters']:,}", *cells, str(len(rows))])
    head = f"**{task.name}** on {result.model}, {steps} steps of {batch}\n\n"
    columns = [
        "arm",
        "setting",
        "trained parameters",
        *(SHOWN.get(measure, measure) for measure in task.measures),
        "seeds",
    ]
    return head + table(columns, lines)


def _cell(values: Mapping[int, float], measure: str) -> str:
    return spread_of(list(values.values()), DIGITS.get(measure, 1)) if values else "–"


def _setting(row: Row) -> str:
    if row["kind"] == "context":
        return f"{row['context']} tokens of text"
    if row["kind"] == "ours":
        return row["used"]
    return row["setting"] if row["kind"] in ("peft", "lora", "full", "head") else "–"


def _footer() -> str:
    return (
        "Test rows; mean ± standard deviation (of the sample) over the seeds. Loss in nats per target token (of a "
        "choice: per row). Settings and the step that is kept are chosen on dev rows, in all arms alike: every setting "
        "of an arm for three tenths of the steps with the first seed, the best two again for all steps, the best of "
        "those with all seeds. The same rows in the same order, batches, warm-up, linear decay and clipping for all, "
        "float32, 20 virtual tokens for PEFT. Ours starts a classifier from a regression on training rows; that was "
        "built after a first run of this table, whose SST-2 test rows were thus seen. What the tasks are: "
        "benchmarks/quality_tasks.py; the grids: "
        f"benchmarks/quality_arms.py. {machine()}.\n"
    )
