"""The tables of the sweep of the defaults, from its records."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from common import RESULTS, Records, machine, spread_of, table

DIVERGED = 99.0  # stands for the loss of a run that the trainer gave up


def relative_noise(rows: Sequence[dict[str, Any]]) -> float:
    """The standard deviation of a loss over seeds, as a share of the loss, from a cell's runs with the defaults."""
    squares = []
    for found in _rounds([row for row in rows if row["variant"] == "defaults"]).values():
        losses = [row["loss"] for row in found if row["loss"] < DIVERGED]
        if len(losses) > 1:
            squares.append(statistics.variance(losses) / statistics.mean(losses) ** 2)
    return statistics.mean(squares) ** 0.5 if squares else 0.0


def write_table(records: Records, cells: Mapping[str, str]) -> str:
    """Write benchmarks/results/defaults.md: the methods side by side, then every change that makes a difference."""
    parts = ["# What the defaults rest on\n", _head(), "## Methods, with their defaults\n", _methods(records, cells)]
    parts += ["## One setting changed\n", _legend()]
    for name, title in cells.items():
        rows = _of_cell(records.find(cell=name))
        if rows:
            parts += [f"### {title}\n", table(["method", "change", "loss", "change − defaults", "verdict"], rows)]
    text = "\n".join(parts) + f"\n{machine()}.\n"
    (RESULTS / "defaults.md").write_text(text, encoding="utf-8")
    return text


def _head() -> str:
    return (
        "`python benchmarks/defaults.py`. Held-out loss (nats per target token, or per row where a label is chosen) "
        "after a few steps of 8 rows with 16 virtual tokens. Held out are the last rows of the training files; no dev "
        "or test file is read. tiny-t5 is trained from scratch (benchmarks/defaults_models.py).\n\n"
        "Tried and left out, because nearly all settings stayed near chance in so few steps: SST-2 phrases, as a cloze "
        "task on stories260K (48 steps) and with a classifier on MiniLM (40 and 120), and whether an E2E text welcomes "
        "children, as a cloze task on stories260K; and a BERT from scratch, which had learned no more than how often "
        "tokens are. Settings are chosen and shown by the same held-out rows, which favours them a little; not every "
        "change was tried in every cell.\n"
    )


def _legend() -> str:
    return (
        "Mean ± standard deviation over 2 seeds for the defaults, and for changes that were better at first sight; one "
        "seed elsewhere. A difference counts when it is larger than twice its standard deviation, which is taken from "
        "the seeds of all defaults in its table; smaller ones have no verdict. In bold the defaults that a change is "
        "of: where a method stands twice, first the defaults as they were, then as the first round made them.\n"
    )


def _methods(records: Records, cells: Mapping[str, str]) -> str:
    lines = []
    for name, title in cells.items():
        for (method, around), rows in _rounds(records.find(cell=name, variant="defaults")).items():
            frozen = rows[-1].get("frozen")
            parameters = f"{rows[-1].get('parameters', 0):,}"
            cells_of = [title, f"`{method}`", _short(around), parameters, "–" if frozen is None else f"{frozen:.3f}"]
            start = statistics.mean(row["start"] for row in rows)
            lines.append([*cells_of, f"{start:.3f}", spread_of([row["loss"] for row in rows])])
    return table(["model, data, task", "method", "defaults", "parameters", "frozen", "start", "loss"], lines)


def _short(around: str) -> str:
    """What differs most among defaults: where a prompt starts, its rate and its optimiser."""
    shown = ("init ", "learning_rate ", "optimizer ")
    return ", ".join(part.removeprefix("learning_") for part in around.split(", ") if part.startswith(shown))


def _rounds(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows by method and by the defaults that they were run around, each model's newest weights."""
    weights = {row["cell"]: row["weights"] for row in rows}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["weights"] == weights[row["cell"]]:
            found.setdefault((row["method"], row["around"]), []).append(row)
    return found


def _of_cell(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    lines, noise = [], relative_noise(rows)
    for (method, around), own in _rounds(rows).items():
        base = {row["seed"]: row["loss"] for row in own if row["variant"] == "defaults"}
        lines.append([f"`{method}`", f"**{_short(around)}**", spread_of(list(base.values())), "", ""])
        for variant in dict.fromkeys(row["variant"] for row in own if row["variant"] != "defaults"):
            found = {row["seed"]: row["loss"] for row in own if row["variant"] == variant}
            lines.append(_line(variant, found, base, noise))
    return lines


def _line(variant: str, found: Mapping[int, float], base: Mapping[int, float], noise: float) -> list[str]:
    """A change beside the defaults, with the same seeds; `noise` is the relative deviation of one run."""
    if DIVERGED in found.values():
        return ["", variant, "diverged", "", "worse"]
    pairs = [(loss, base[seed]) for seed, loss in found.items() if seed in base]
    mean = statistics.mean(loss - before for loss, before in pairs)
    bound = 2 * noise * statistics.mean(before for _, before in pairs) * (2 / len(pairs)) ** 0.5
    verdict = "" if abs(mean) <= bound else "better" if mean < 0 else "worse"
    return ["", variant, spread_of(list(found.values())), f"{mean:+.3f}", verdict]
