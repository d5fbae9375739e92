"""Ours beside PEFT's best: who is better on each task, by how much, how surely, and after how many steps.

Tests. For each task a paired t-test over the seeds on the measure that decides: runs of one seed have the same rows in
the same order. With three seeds it has two degrees of freedom: it finds only differences of about 2.5 times their own
standard deviation (p < 0.05), and takes them for normal; a test by ranks or permutations could not go below p = 0.25.
Over all tasks and seeds a Wilcoxon signed-rank test on the relative difference of test losses. It takes the runs of one
task for independent, so it speaks of these tasks with other seeds, not of other tasks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common import spread_of, table
from quality_arms import ARMS

if TYPE_CHECKING:
    from quality_table import Result

OURS, BEST, DEFAULT = "ours", "peft-best", "peft-default"
DIGITS = {"loss": 3}
SHOWN = {"accuracy": "accuracy %", "p_at_1": "P@1 %", "bleu": "BLEU", "rouge_l": "ROUGE-L", "chrf": "chrF"}
LOWER = ("loss",)  # measures of which less is better
Values = dict[int, float]


def groups_of(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The tasks that count as one in the summary, such as all relations of LAMA."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.task.group, []).append(result)
    return found


def mean_values(results: Sequence[Result], arm: str, measure: str) -> Values:
    """Seed → mean over the tasks of a group, of the seeds that all of them have."""
    each = [result.values(arm, measure) for result in results]
    seeds = set.intersection(*(set(values) for values in each)) if each else set()
    return {seed: statistics.mean(values[seed] for values in each) for seed in sorted(seeds)}


def overview(results: Sequence[Result]) -> str:
    """All arms by all tasks: test scores by the measure that decides, and BLEU where texts are written."""
    groups = groups_of(results)
    columns = [(name, measure) for name, group in groups.items() for measure in group[0].task.measures[:1]]
    columns += [(name, "bleu") for name, group in groups.items() if "bleu" in group[0].task.measures]
    columns.sort(key=lambda column: list(groups).index(column[0]))
    lines = []
    for arm, label in ARMS.items():
        cells = [_spread(mean_values(groups[name], arm, measure), measure) for name, measure in columns]
        if any(cell != "–" for cell in cells):
            lines.append([f"**{label}**" if arm == OURS else label, *cells])
    heads = [f"{name}{_count(groups[name])}, {SHOWN.get(measure, measure)}" for name, measure in columns]
    return table(["arm", *heads], lines)


def _count(group: Sequence[Result]) -> str:
    return f" (mean of {len(group)})" if len(group) > 1 else ""


def comparisons(results: Sequence[Result]) -> list[str]:
    """The summary tables; empty where ours or PEFT's has not been run."""
    lines = [line for name, group in groups_of(results).items() if (line := _line(name, group))]
    if not lines:
        return []
    header = ["task", "measure", "ours, default", "ours, best", "PEFT, best", "PEFT, default", "ours − PEFT's best",
              "p", "steps to PEFT's lowest dev loss"]  # fmt: skip
    text = table(header, lines)
    return ["**Ours beside PEFT's**\n\n" + text, *_gap(results), _goals(results), _overall(results)]


def _line(name: str, group: Sequence[Result]) -> list[str]:
    measure = group[0].task.measures[0]
    found = {arm: mean_values(group, arm, measure) for arm in (OURS, "ours-best", BEST, DEFAULT)}
    if not found[OURS] or not (found[BEST] or found[DEFAULT]):
        return []
    cells = [_spread(found[arm], measure) for arm in found]
    better = compared(found[OURS], found[BEST], measure)
    return [name + _count(group), SHOWN.get(measure, measure), *cells, *better, reached(group)]


def _spread(values: Values, measure: str) -> str:
    return spread_of(list(values.values()), DIGITS.get(measure, 1)) if values else "–"


def compared(ours: Values, theirs: Values, measure: str) -> tuple[str, str]:
    """Mean difference over the seeds that both have, with a word on who is ahead, and the p of a paired t-test."""
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return "–", "–"
    apart = [ours[seed] - theirs[seed] for seed in seeds]
    mean = statistics.mean(apart)
    ahead = "even" if mean == 0 else "better" if (mean < 0) == (measure in LOWER) else "worse"
    return f"{mean:+.{DIGITS.get(measure, 1)}f} ({ahead})", paired_t(apart)


def paired_t(apart: Sequence[float]) -> str:
    """p of a two-sided paired t-test; "–" with fewer than two pairs or no spread."""
    from scipy.stats import ttest_1samp

    if len(apart) < 2 or statistics.stdev(apart) == 0:
        return "–"
    found: Any = ttest_1samp(apart, 0.0)
    return f"{float(found.pvalue):.3f}"


def reached(group: Sequence[Result]) -> str:
    """`steps_to` as text; a run of ours that never gets there is counted aloud."""
    ours, theirs, never, runs = steps_to(group)
    missed = f" ({never} of {runs} never)" if never else ""
    return f"{ours:.0f} of {theirs:.0f}{missed}" if runs else "–"


def steps_to(group: Sequence[Result]) -> tuple[float, float, int, int]:
    """The step at which our dev loss is as low as PEFT's ever is, and that at which PEFT's is (means over runs).

    Then in how many runs ours never is (they count with all their steps), and how many runs there are.
    """
    ours_at, theirs_at, never = [], [], 0
    for result in group:
        curves = {row["seed"]: row["curve"] for row in result.arms.get(BEST, [])}
        for row in result.arms.get(OURS, []):
            if row["seed"] not in curves:
                continue
            lowest, last = min((loss, step) for step, loss in curves[row["seed"]])
            steps = [step for step, loss in row["curve"] if loss <= lowest]
            never += not steps
            ours_at.append(steps[0] if steps else row["curve"][-1][0])
            theirs_at.append(last)
    if not ours_at:
        return 0.0, 0.0, 0, 0
    return statistics.mean(ours_at), statistics.mean(theirs_at), never, len(ours_at)


def _goals(results: Sequence[Result]) -> str:
    """What was aimed at, and what was reached."""
    groups = list(groups_of(results).values())
    best, default = (
        [ahead for each in groups if (ahead := who_is_ahead(each, arm)) is not None] for arm in (BEST, DEFAULT)
    )
    lines = [
        ["ahead of PEFT's best on 4 of 5 tasks", f"{sum(best)} of {len(best)}", sum(best) >= 4],
        ["ahead of PEFT's defaults on all tasks", f"{sum(default)} of {len(default)}", all(default)],
    ]
    closed = share_closed([result for result in results if result.task.name == "e2e"])
    if closed is not None:
        share, size = closed
        goal = "E2E loss: 85 % of the gap closed with at most 0.5 % of the parameters"
        lines.append([goal, f"{share:.0%} with {size:.2%}", share >= 0.85 and size <= 0.005])
    steps = [found for each in groups if (found := steps_to(each))[3]]
    if steps:
        half = sum(ours <= theirs / 2 for ours, theirs, *_ in steps)
        goal = "PEFT's lowest dev loss in at most half of its steps, on every task"
        lines.append([goal, f"on {half} of {len(steps)}", half == len(steps)])
    spread = spread_ratio(results)
    if spread:
        lines.append(
            [
                "spread of test losses over seeds ÷ PEFT's best, median of tasks ≤ 1",
                spread,
                float(spread.split()[0]) <= 1,
            ]
        )
    shown = [[goal, measured, "yes" if met else "**no**"] for goal, measured, met in lines]
    return "**Goals, for ours by default**\n\n" + table(["goal", "measured", "met"], shown)


def share_closed(results: Sequence[Result]) -> tuple[float, float] | None:
    """Of the way from the frozen model's loss to the fully tuned one's, and the share of parameters it took."""
    for result in results:
        loss = [result.values(arm, "loss").values() for arm in ("frozen", "full", OURS)]
        if all(loss):
            frozen, full, ours = (statistics.mean(values) for values in loss)
            row = result.arms[OURS][0]
            return (frozen - ours) / (frozen - full), row["parameters"] / row["base"]
    return None


def _gap(results: Sequence[Result]) -> list[str]:
    """Share of the way from the frozen model's loss to the fully tuned one's, on E2E."""
    found = [result for result in results if result.task.name == "e2e"]
    lines = []
    for result in found:
        loss = {arm: statistics.mean(values.values()) for arm in result.arms if (values := result.values(arm, "loss"))}
        if "frozen" not in loss or "full" not in loss:
            return []
        for arm in (OURS, "ours-best", BEST, DEFAULT, "lora", "context"):
            if arm in loss:
                row = result.arms[arm][0]
                share = (loss["frozen"] - loss[arm]) / (loss["frozen"] - loss["full"])
                size = f"{row['parameters']:,} ({row['parameters'] / row['base']:.2%})"
                lines.append([arm, size, f"{loss[arm]:.3f}", f"{share:.0%}"])
        head = f"frozen {loss['frozen']:.3f}, fully tuned {loss['full']:.3f}"
        columns = ["arm", "trained parameters (of the base model's)", "loss", "share of the gap closed"]
        return [f"**E2E loss: the gap between frozen and fully tuned** ({head})\n\n" + table(columns, lines)]
    return []


def _overall(results: Sequence[Result]) -> str:
    """The test over all runs."""
    parts = []
    apart = loss_ratios(results)
    if apart:
        lower = sum(value < 0 for value in apart)
        mean = math.expm1(statistics.mean(apart))
        parts.append(
            f"Of {len(apart)} runs (tasks × seeds) ours has the lower test loss in {lower}, by {-mean:.1%} in the mean"
            f"{wilcoxon(apart)}."
        )
    return " ".join(parts) + "\n"


def who_is_ahead(group: Sequence[Result], arm: str = BEST) -> bool | None:
    """Whether ours is better than another arm by the measure that decides; None where one is missing."""
    measure = group[0].task.measures[0]
    ours, theirs = (mean_values(group, each, measure) for each in (OURS, arm))
    seeds = set(ours) & set(theirs)
    if not seeds:
        return None
    apart = statistics.mean(ours[seed] - theirs[seed] for seed in seeds)
    return apart < 0 if measure in LOWER else apart > 0


def loss_ratios(results: Sequence[Result]) -> list[float]:
    """Logarithms of our test loss over PEFT's best, of every task and seed that both have."""
    found = []
    for result in results:
        ours, theirs = (result.values(arm, "loss") for arm in (OURS, BEST))
        found += [math.log(ours[seed] / theirs[seed]) for seed in sorted(set(ours) & set(theirs))]
    return found


def wilcoxon(apart: Sequence[float]) -> str:
    """`; Wilcoxon p = …`, or nothing with fewer than six pairs, of which no result could be significant."""
    from scipy.stats import wilcoxon as test

    if len([value for value in apart if value]) < 6:
        return ""
    found: Any = test(apart)
    return f"; Wilcoxon signed-rank test over all of them p = {float(found.pvalue):.2g}"


def spread_ratio(results: Sequence[Result]) -> str:
    """The median over tasks of our standard deviation over seeds by PEFT's."""
    ratios = []
    for result in results:
        spreads = [_deviation(result.values(arm, "loss")) for arm in (OURS, BEST)]
        if spreads[0] is not None and spreads[1]:
            ratios.append(spreads[0] / spreads[1])
    return f"{statistics.median(ratios):.2f} ({len(ratios)} tasks)" if ratios else ""


def _deviation(values: Mapping[int, float]) -> float | None:
    return statistics.stdev(values.values()) if len(values) > 1 else None
