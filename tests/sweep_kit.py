"""For the tests of sweeps: a tiny base model, small data, and plans that take a moment."""

from __future__ import annotations

import json
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import tiny
import torch
from rich.console import Console

from softprompt.sweep import SweepOptions
from softprompt.sweep.plan import Plan
from softprompt.sweep.presence import Presence
from softprompt.sweep.study import locked, open_study, take
from softprompt.sweep.worker import work

BLOCK: dict[str, Any] = {"num_virtual_tokens": [2, 4], "learning_rate": [0.05, 0.4], "seed": [0, 1]}


def make_workplace(folder: Path) -> Path:
    """A base model and two data files."""
    tiny.build("llama").save_pretrained(folder / "llama")
    tiny.tokenizer().save_pretrained(folder / "llama")
    rows = [{"who": f"cat {n}", "said": f"cat {n} sat on the {('mat', 'river')[n % 2]}"} for n in range(24)]
    for name, part in (("train", rows), ("heldout", rows[::4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return folder


def values(workplace: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """What a recipe file would hold; None takes a setting out."""
    settings = {
        "model": str(workplace / "llama"),
        "train": str(workplace / "train.jsonl"),
        "eval": str(workplace / "heldout.jsonl"),
        "template": "{who} => {said}",
        "out": str(out),
        "method": "prompt_tuning",
        "num_virtual_tokens": 3,
        "steps": 2,
        "batch_size": 4,
        "samples": 0,
        "save_steps": 0,
        "device": "cpu",
        "sweep": BLOCK,
    }
    return {name: value for name, value in (settings | changes).items() if value is not None}


def plan(workplace: Path, out: Path, *, options: dict[str, Any] | None = None, **changes: Any) -> Plan:
    return Plan.of(values(workplace, out, **changes), SweepOptions(**(options or {})))


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "sweep.json").read_text(encoding="utf-8"))


def take_all(sweep: Plan, start: Barrier) -> None:
    """What a worker process does, with nothing to train; all begin at once."""
    study = open_study(sweep)
    with Presence(sweep.folder) as presence:
        start.wait()
        while True:
            with locked(sweep.folder):
                trial = take(sweep, study, presence)
            if trial is None:
                return
            time.sleep(0.1)  # the others' turn
            study.tell(trial, 1.0)


def work_quietly(sweep: Plan) -> None:
    """What a worker process does."""
    torch.set_num_threads(1)
    work(sweep, Console(quiet=True))
