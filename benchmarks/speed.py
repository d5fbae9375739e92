"""What every speed table shares: options, running its groups one after the other, keeping and showing the results."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Records, machine, table
from counts import limit_memory
from goals import goals_of
from measure import Makers, Result, compare, number, ratio, values
from shapes import build

UNITS = {"ms": (1e3, "ms"), "s": (1, "s"), "MB": (1e-6, "MB"), "GFLOP": (1e-9, "GFLOP"), "/s": (1, "/s"), "": (1, "")}


@dataclass(frozen=True)
class Options:
    """What a run was asked for. `model` and `dtype` are None where the table's own are meant."""

    device: str = "cpu"
    model: str | None = None
    dtype: str | None = None
    rounds: int = 5
    quick: bool = False
    most_tokens: int | None = 16_384
    threads: int = 1

    @property
    def tiny(self) -> bool:
        return (self.model or "").startswith("tiny")

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def shape(self) -> tuple[str, str]:
        """The main model and its type: on a GPU a 1B Llama in bfloat16."""
        own = ("llama-1b", "bfloat16") if self.cuda else ("gpt2", "float32")
        return self.model or own[0], self.dtype or own[1]

    def size(self, number: int) -> int:
        """A length or batch size as it is, or small enough for a tiny model."""
        return max(2, number // 16) if self.tiny and number > 1 else number

    def too_long(self, tokens: int) -> str | None:
        """Why PEFT is left out of a case, if it is."""
        if self.most_tokens is None or self.cuda or tokens <= self.most_tokens:
            return None
        return f"{tokens:,} tokens a step; more than --most-tokens {self.most_tokens:,}"


@dataclass
class Bench:
    """What groups are made with: the options, and one base model at a time."""

    options: Options
    _base: tuple[tuple[str, str], Any] | None = None

    def base(self, shape: str, dtype: str) -> Any:
        """The model of this shape; the one before it is dropped."""
        if self._base is None or self._base[0] != (shape, dtype):
            self._base = None
            gc.collect()
            self._base = (shape, dtype), build(shape, dtype, self.options.device)
        return self._base[1]


@dataclass(frozen=True)
class Group:
    """Arms that are measured side by side. `setting` says what is measured and is the group's name in the records."""

    setting: dict[str, Any]
    arms: Callable[[Bench], Makers]
    after: Callable[[Bench, dict[str, Result]], None] | None = None  # adds what follows from several arms
    quick: bool = False  # whether it is part of a quick run
    rounds: int | None = None  # at most

    @property
    def label(self) -> str:
        return " ".join(v if isinstance(v, str) else f"{k}={v}" for k, v in self.setting.items() if v is not False)


@dataclass(frozen=True)
class Column:
    """One quantity: of the arm `under` in its unit, of the others divided by that; without `under` all in its unit."""

    title: str
    quantity: str
    unit: str
    under: str | None = "bare"


@dataclass(frozen=True)
class Table:
    """One question: its groups and what is shown of them."""

    name: str
    question: str
    groups: Callable[[Options], Iterator[Group]]
    columns: Sequence[Column]
    note: str
    around: Callable[[Options], AbstractContextManager[None]] | None = None  # what is there while its groups run

    @cached_property
    def header(self) -> list[str]:
        return ["case", "by", *(column.title for column in self.columns), "goal", "met"]

    def markdown(self, records: Sequence[Mapping[str, Any]]) -> str:
        """The table of all recorded groups, and under it how and on what they were measured."""
        lines = [line for record in records for line in self._lines(record)]
        machines = "; ".join(dict.fromkeys(str(record["machine"]) for record in records))
        return f"{table(self.header, lines)}\n{self.note} {machines}.\n"

    def _lines(self, record: Mapping[str, Any]) -> Iterator[list[str]]:
        arms, case = record["arms"], shown(record["setting"])
        goals = goals_of(self.name, record["setting"])
        for name, result in arms.items():
            own = [goal for goal in goals if (goal.under if goal.over == "PEFT" else goal.over) == name]
            texts = [f"{goal.says.split(': ')[-1]} {goal.text}" for goal in own]
            verdicts = [{True: "yes", False: "**no**", None: "–"}[goal.met(arms)] for goal in own]
            cells = [_cell(column, arms, name) for column in self.columns]
            if "error" in result:
                cells = [f"not run: {result['error']}", *[""] * (len(cells) - 1)]
            yield [case, name, *cells, "<br>".join(texts), "<br>".join(verdicts)]
            case = ""


def shown(setting: Mapping[str, Any]) -> str:
    """A group in a table's first column; the device and float32 go without saying."""
    parts = []
    for name, value in setting.items():
        if isinstance(value, str):
            parts += [value] if name != "device" and value != "float32" else []
        elif value is True:
            parts.append(name)
        elif value is not False:
            parts.append(f"{name} = {value:,}")
    return ", ".join(parts)


def _cell(column: Column, arms: Mapping[str, Result], name: str) -> str:
    found = values(arms[name].get(column.quantity))
    if not found:
        return "–"
    if column.under is not None and name != column.under:
        quotient = ratio(arms, column.quantity, name, column.under)
        if quotient is not None:
            return str(quotient)
    factor, unit = UNITS[column.unit]
    value = statistics.median(found) * factor
    return f"{number(value)} {unit}" if unit else f"{value:,.0f}"


# ---- running ---------------------------------------------------------------------------------------------------------


def run(asked: Table, options: Options, records: Records, only: str | None) -> None:
    """Measure the groups that are asked for and keep each at once, in place of an older one."""
    wanted = [
        group
        for group in asked.groups(options)
        if (group.quick or not options.quick) and (not only or re.search(only, group.label))
    ]
    with asked.around(options) if asked.around and wanted else nullcontext():
        for group in wanted:
            print(f"# {asked.name}: {group.label}", flush=True)
            records.put({"setting": group.setting}, in_its_own_process(lambda group=group: _measured(group, options)))


def _measured(group: Group, options: Options) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    if not options.cuda:
        limit_memory()
    bench = Bench(options)
    begun = time.perf_counter()
    rounds = options.rounds if group.rounds is None else min(options.rounds, group.rounds)
    arms = compare(group.arms(bench), rounds, options.device)
    if group.after is not None:
        group.after(bench, arms)
    return {"seconds": round(time.perf_counter() - begun, 1), "machine": machine(options.device), "arms": arms}


def in_its_own_process(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns, done by a process of its own: what one group leaves in memory disturbs no other."""
    context = multiprocessing.get_context("fork")  # nothing has been computed here, so no thread is lost
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(work()))
    gc.freeze()  # or collecting garbage over there copies all that is here
    process.start()
    gc.unfreeze()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit(f"the process of a group ended without a result (status {process.exitcode})") from None
    finally:
        process.join()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of other libraries, which would stand between the results."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def main(asked: Table, arguments: Sequence[str] | None = None) -> None:
    """The command line of one table."""
    parser = argparse.ArgumentParser(description=asked.question)
    parser.add_argument("--quick", action="store_true", help="fewer cases, one round each: minutes instead of more")
    parser.add_argument("--only", metavar="REGEX", help="only cases whose label matches; the others stay as recorded")
    parser.add_argument("--list", action="store_true", help="print the labels of the cases and stop")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--model", help="another model; see SHAPES in shapes.py")
    parser.add_argument("--dtype", help="float32 or bfloat16")
    parser.add_argument("--rounds", type=int, help="timed rounds, at most; 0 only counts (default 5; 1 with --quick)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all cores)")
    parser.add_argument("--most-tokens", type=int, default=16_384, help="PEFT is left out of steps beyond it, on a CPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(arguments)
    rounds = given.rounds if given.rounds is not None else 1 if given.quick else 5
    options = Options(
        given.device,
        given.model,
        given.dtype,
        rounds,
        given.quick,
        given.most_tokens,
        given.threads,
    )
    if given.list:
        print("\n".join(group.label for group in asked.groups(options)))
        return
    records = Records(given.results / f"{asked.name}.json")
    if not given.table:
        with quiet():
            run(asked, options, records, given.only)
    text = asked.markdown(records.rows)
    (given.results / f"{asked.name}.md").write_text(text, encoding="utf-8")
    print(text)
