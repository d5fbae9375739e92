"""The table of quality_mpt.py, from its records."""

from __future__ import annotations

import statistics
from typing import Any

from common import RESULTS, Records, machine, spread_of, table
from mpt_tasks import SOURCES, TARGETS, TEST

TOKENS, BATCH, WARMUP = 20, 16, 0.06
SHOTS, DRAWS = (16, 32, 64), 5
WHY_SHOTS, WHY_DRAWS = 32, 3  # of what the result depends on
STEPS, SMALL_BATCH = 40, 8  # of an adaptation
TEACHER_STEPS = 80
MAIN = {
    "plain": "a prompt of its own",
    "peft": "PEFT's MPT, mean of the sources",
    "mpt": "MPT, mean of the sources",
    "nearest": "MPT, the source that fits the k rows best",
}
WHY = {  # each differs from "mpt" in one thing
    "scratch": "no sources: P* from a text, u and v 1",
    "folded": "a plain prompt, started at P* ∘ u vᵀ",
    "untaught": "no teachers (λ = 0)",
    "small": "no teachers, and u, v from N(0, 0.02) as in PEFT",
    "heavy": "λ = 4",
    "shared": "u and v learn slowly on the sources (rate 0.02)",
    "long": "three times as many steps on the sources",
    "three": "three sources: name, food, describe",
}
ARMS = {**MAIN, **WHY}
# (rate of the prompt, rate of u and v); PEFT's users have one optimiser with one rate
RATES: dict[str, list[tuple[float, float | None]]] = {
    "plain": [(0.3, None), (0.6, None), (1.2, None)],
    "folded": [(0.6, None), (1.2, None), (2.4, None)],
    "mpt": [(0.3, 0.3), (0.6, 0.6), (1.0, 1.0), (0.3, 0.6)],
    "scratch": [(0.3, 0.3), (0.6, 0.6), (1.0, 1.0), (0.3, 0.6)],
    "peft": [(0.6, None), (1.2, None), (2.4, None)],
}

READING = """**What it says.** The paper's claim, that MPT is better than separately tuned prompts, holds here where the
target is like a source: `weather` (cards to sentences, as `describe`) and `near` (a name to copy, as `name`). On `area`
the two are even. On `sentiment`, which is like no source, MPT is worse with 16 and 32 rows. Most differences are below
the deviation between draws; the last two targets have two answers each, so exact answers are near chance or jump.

- *The start, not the form.* A plain prompt that starts where MPT starts does as well. Without sources the form loses on
  `weather` and `near`, and wins on the other two.
- *Not too few sources, but too different ones.* With three sources the result is no worse, if anything better. The mean
  of six tasks' u and v is no task's: at the start its loss on `area` is that of a random prompt. From the source that
  fits the k rows `weather` gains twice as much, and the targets that are like no source lose.
- *Learning rates.* The best rates are high, for a prompt of its own too. u and v that learn slowly on the sources leave
  a worse prompt there and for the targets like them.
- *Initial scale.* With u and v from N(0, 0.02) instead of 1 and everything else the same, the loss on the sources ends
  clearly higher, and the mean over the targets is higher too. PEFT's MPT starts there; that it is trained by AdamW with
  one rate, and has no teachers, are its other differences from ours, not told apart here.
- *λ.* Teachers lower the loss on the sources a little, λ = 4 raises it; on the targets this is within the deviation.
"""


def write_table(records: Records) -> str:
    """Write benchmarks/results/mpt.md from the records of the newest weights."""
    rows = records.find(weights=records.rows[-1]["weights"])
    done = {arm: _chosen(rows, arm) for arm in ARMS}
    done = {arm: found for arm, found in done.items() if found}
    parts = []
    for target in TARGETS:
        lines = []
        for arm in (arm for arm in done if arm in MAIN):
            mine = [row for row in done[arm] if row["target"] == target]
            cells = [_cell(mine, shots, what) for shots in SHOTS for what in ("loss", "exact")]
            far = [row["moved"] for row in mine]
            lines.append([MAIN[arm], *cells, spread_of([row["start_loss"] for row in mine], 1), spread_of(far, 1)])
        header = [
            "arm",
            *(f"{what}, k = {shots}" for shots in SHOTS for what in ("loss", "exact %")),
            "loss at start",
            "moved",
        ]
        parts.append(f"**{target}**\n\n" + table(header, lines))
    parts.append("**All targets and k together**: loss against a prompt of its own on the same rows\n\n" + _pairs(done))
    parts.append(_what_it_depends_on(rows, done))
    text = "\n".join(parts) + "\n" + READING + "\n" + _footer(rows, done)
    (RESULTS / "mpt.md").write_text(text, encoding="utf-8")
    return text


def _pairs(done: dict[str, list[dict[str, Any]]]) -> str:
    """How often, and by how much in the mean, each arm's loss is below that of a plain prompt on the same rows."""

    def by_draw(arm: str) -> dict[tuple[Any, ...], float]:
        return {(row["target"], row["shots"], row["draw"]): row["loss"] for row in done[arm]}

    own, lines = by_draw("plain"), []
    for arm in (arm for arm in done if arm in MAIN and arm != "plain"):
        apart = {key: loss - own[key] for key, loss in by_draw(arm).items() if key in own}
        means = [statistics.mean(value for key, value in apart.items() if key[0] == target) for target in TARGETS]
        wins = f"{sum(value < 0 for value in apart.values())} of {len(apart)}"
        lines.append([MAIN[arm], wins, f"{statistics.mean(apart.values()):+.3f}", *(f"{mean:+.3f}" for mean in means)])
    return table(["arm", "lower in", "mean difference", *TARGETS], lines)


def _what_it_depends_on(rows: list[dict[str, Any]], done: dict[str, list[dict[str, Any]]]) -> str:
    """The arms that differ from MPT in one thing, as far as they are done, and MPT, on the same draws."""
    first = {arm: [row for row in found if row["draw"] < WHY_DRAWS] for arm, found in done.items()}
    first = {arm: [row for row in found if row["shots"] == WHY_SHOTS] for arm, found in first.items()}
    whole = [arm for arm in ("mpt", *WHY) if len(first.get(arm, [])) == WHY_DRAWS * len(TARGETS)]
    lines = []
    for arm in whole:
        cells = [_cell([row for row in first[arm] if row["target"] == target], WHY_SHOTS, "loss") for target in TARGETS]
        mean = f"{statistics.mean(row['loss'] for row in first[arm]):.3f}"
        lines.append([{"mpt": "MPT as above", **WHY}[arm], *cells, mean, _source_loss(rows, arm)])
    head = f"**What it depends on**: loss, k = {WHY_SHOTS}, {WHY_DRAWS} draws\n\n"
    return head + table(["what is different", *TARGETS, "mean", "loss on the sources"], lines)


def _chosen(rows: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    """The reported rows of an arm, with the rates that were chosen last."""
    mine = [row for row in rows if row["arm"] == arm and "draw" in row and row["draw"] < DRAWS]
    return [row for row in mine if row["setting"] == mine[-1]["setting"]]


def _cell(rows: list[dict[str, Any]], shots: int, what: str) -> str:
    found = [row[what] * (100 if what == "exact" else 1) for row in rows if row["shots"] == shots]
    return spread_of(found, 1 if what == "exact" else 3) if found else "–"


def _source_loss(rows: list[dict[str, Any]], arm: str) -> str:
    found = [r["loss"] for r in rows if r["arm"] == "source" and r["name"] == {"mpt": "taught"}.get(arm, arm)]
    return f"{found[-1]:.2f}" if found else "–"


def _footer(rows: list[dict[str, Any]], done: dict[str, list[dict[str, Any]]]) -> str:
    said = "; ".join(
        f"{MAIN[arm]}: {' and '.join(f'{rate:g}' for rate in found[-1]['setting'] if rate is not None)}"
        for arm, found in done.items()
        if arm in MAIN
    )
    source = {row["name"]: row for row in rows if row["arm"] == "source"}
    losses = ", ".join(f"{name} {source[key]['loss']:.2f}" for key, name in (("taught", "MPT"), ("peft", "PEFT")))
    return (
        f"The embedded model, {TOKENS} virtual tokens, rank 1. Loss in nats per target token and exact answers (every "
        f"token the likeliest) on at most {TEST} test rows; moved: how far the prompt went, in lengths "
        f"of its start; mean ± standard deviation over {DRAWS} draws of k rows. {STEPS} "
        f"steps of {SMALL_BATCH} rows. Sources: {', '.join(SOURCES)}; {source['taught']['steps']} steps of {BATCH} for "
        f"both libraries, ours after {TEACHER_STEPS} for each teacher; mean held-out loss on them: {losses}. Rates (of "
        f"the prompt and, where two, of u and v), the best of {min(map(len, RATES.values()))} or "
        f"{max(map(len, RATES.values()))} per arm: {said}. PEFT with AdamW, the others with Muon. {machine()}.\n"
    )
