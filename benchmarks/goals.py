"""Every goal for speed and memory, in one list, and whether the newest measurements meet it.

    python benchmarks/goals.py      print the list with what was measured

A goal is a bound on a quantity of one arm, alone or divided by another arm's, in the groups it is stated for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import RESULTS, table
from measure import Ratio, number, ratio, values

# "multitask, 4 tasks" has no goal: its rows have four different prompts, which is four times the prompt's work.
EMBEDDING_METHODS = ("prompt tuning", "P-tuning MLP", "P-tuning LSTM", "multitask", "CPT")
PLAIN = tuple(name for name in EMBEDDING_METHODS if name != "P-tuning LSTM")  # its encoder is counted apart
CPU = {"model": "gpt2", "dtype": "float32", "device": "cpu"}
STEP = {**CPU, "p": 100, "T": 128, "B": 8}
EACH = {**CPU, "prompts": 64}
SERVED = {"prompts": 64, "device": "cpu"}
GPU = {"model": "llama-1b", "dtype": "bfloat16", "device": "cuda"}


@dataclass(frozen=True)
class Goal:
    """`sign` is ≤ or ≥. Without `under` the quantity itself is bounded, in the unit it was measured in."""

    says: str
    table: str
    where: Mapping[str, Any]
    quantity: str
    bound: float
    sign: str = "≤"
    over: str = "ours"
    under: str | None = "bare"
    shown: str = field(default="", kw_only=True)  # the bound as a reader wants it, where the number alone is odd

    def applies(self, setting: Mapping[str, Any]) -> bool:
        """Whether a group is one that the goal is stated for."""
        return all(
            setting.get(name) in wanted if isinstance(wanted, tuple) else setting.get(name) == wanted
            for name, wanted in self.where.items()
        )

    def measured(self, arms: Mapping[str, Mapping[str, Any]]) -> Ratio | None:
        if self.under is not None:
            return ratio(arms, self.quantity, self.over, self.under)  # pyright: ignore[reportArgumentType]
        found = values(arms.get(self.over, {}).get(self.quantity))
        return Ratio(sorted(found)[len(found) // 2], min(found), max(found)) if found else None

    def met(self, arms: Mapping[str, Mapping[str, Any]]) -> bool | None:
        """None where it was not measured. The median counts, not rounded in anyone's favour."""
        found = self.measured(arms)
        if found is None:
            return None
        return found.value <= self.bound if self.sign == "≤" else found.value >= self.bound

    @property
    def text(self) -> str:
        return self.shown or f"{self.sign} {number(self.bound)}"


def _step(says: str, quantity: str, bound: float, methods: Any, sign: str = "≤", **more: Any) -> Goal:
    arms = {name: more.pop(name) for name in ("over", "under") if name in more}
    return Goal(says, "speed_step", {**STEP, "method": methods, **more}, quantity, bound, sign, **arms)


PEFT_OURS = {"over": "PEFT", "under": "ours"}

GOALS: tuple[Goal, ...] = (
    _step("training step: FLOPs ÷ bare", "flops", 1.09, PLAIN),
    _step("training step: saved tensors ÷ bare", "saved", 1.12, PLAIN),
    _step("training step: time ÷ bare", "time", 1.10, PLAIN),
    _step("training step: time, PEFT ÷ ours", "time", 1.6, EMBEDDING_METHODS, "≥", **PEFT_OURS),
    _step("prefix with FFN 800: FLOPs ÷ bare", "flops", 1.04, "prefix FFN 800"),
    _step("short rows: time, PEFT ÷ ours", "time", 2.5, "prompt tuning", "≥", T=32, **PEFT_OURS),
    Goal("prefill ÷ bare", "speed_generate", {**CPU, "p": 1000, "B": 8}, "prefill", 1.10),
    Goal("decode step ÷ bare", "speed_generate", {**CPU, "p": 1000, "B": 32}, "decode", 1.25),
    Goal("KV held beyond bare and one prefix", "speed_generate", CPU, "kv_beyond", 0, under=None, shown="0 bytes"),
    Goal("decode step ÷ bare, batch 1", "speed_generate", {**CPU, "p": 20, "B": 1}, "decode", 1.03),
    Goal("64 rows, 64 prompts: tokens/s ÷ bare", "speed_prompts", EACH, "speed", 0.9, "≥"),
    Goal("64 rows, 64 prompts: tokens/s, ours ÷ PEFT", "speed_prompts", EACH, "speed", 5, "≥", under="PEFT"),
    Goal("loading 200 adapters: time, PEFT ÷ ours", "speed_loading", {"adapters": 200}, "time", 50, "≥", **PEFT_OURS),
    Goal(
        "10,000 registered adapters", "speed_loading", {"adapters": 10_000}, "resident", 50e6, under=None,
        shown="< 50 MB",
    ),
    Goal("our server, 64 prompts: tokens/s, ours ÷ PEFT", "serving", SERVED, "speed", 5, "≥", under="PEFT"),
    Goal("vLLM with prompts: tokens/s ÷ without", "serving_vllm", {"device": "cpu"}, "speed", 0.95, "≥"),
    Goal("vLLM with prompts: first token ÷ without", "serving_vllm", {"device": "cpu"}, "first", 1.10),
    Goal("server under load: wrong answers", "serving_load", {}, "wrong", 0, under=None, shown="0"),
    Goal("server under load: requests without an answer", "serving_load", {}, "failed", 0, under=None, shown="0"),
    Goal("server under load: cache not given back", "serving_load", {}, "held", 0, under=None, shown="0"),
    Goal("server under load: growth of memory", "serving_load", {"case": "load"}, "growth", 20e6, under=None,
         shown="≤ 20 MB"),
    Goal("GPU, training step: time ÷ bare", "speed_growth", {**GPU, "p": 100, "T": 512}, "time", 1.10),
    Goal("GPU, decode step ÷ bare", "speed_generate", {**GPU, "p": 4096, "B": 64}, "decode", 1.15),
)  # fmt: skip


def goals_of(name: str, setting: Mapping[str, Any]) -> list[Goal]:
    """The goals of one group of one table."""
    return [goal for goal in GOALS if goal.table == name and goal.applies(setting)]


def groups(name: str, folder: Path) -> list[dict[str, Any]]:
    """The recorded groups of a table."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def words(setting: Mapping[str, Any]) -> str:
    """A group in words, such as `gpt2, float32, cpu, prompt tuning, p = 100, T = 128, B = 8`."""
    return ", ".join(str(v) if isinstance(v, str) else f"{k} = {v:,}" for k, v in setting.items() if v is not False)


def _lines(folder: Path) -> Iterator[tuple[str, ...]]:
    for goal in GOALS:
        found = [group for group in groups(goal.table, folder) if goal.applies(group["setting"])]
        if not found:
            yield goal.says, "", goal.text, "–", "not measured"
        for group in found:
            measured, met = goal.measured(group["arms"]), goal.met(group["arms"])
            shown = "–" if measured is None else _shown(goal, measured)
            setting = words(
                {k: v for k, v in group["setting"].items() if goal.where.get(k) != v or k in ("p", "B", "T")}
            )
            yield goal.says, setting, goal.text, shown, {True: "yes", False: "**no**", None: "not measured"}[met]


def _shown(goal: Goal, measured: Ratio) -> str:
    units = {"resident": "MB", "growth": "MB", "kv_beyond": "bytes", "wrong": "", "failed": "", "held": ""}
    if goal.under is not None:
        return str(measured)
    unit = units[goal.quantity]
    return f"{measured.value / 1e6:.1f} MB" if unit == "MB" else f"{measured.value:,.0f} {unit}".strip()


def scoreboard(folder: Path = RESULTS) -> str:
    """All goals as a markdown table: one row per goal and group."""
    return table(("goal", "case", "bound", "measured", "met"), _lines(folder))


if __name__ == "__main__":
    print(scoreboard())
