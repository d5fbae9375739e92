"""What does a training step take, in time and memory, by one, two and four processes?

    python benchmarks/scaling.py                   writes benchmarks/results/scaling.md
    python benchmarks/scaling.py --sizes 1,2       fewer processes
    python benchmarks/scaling.py --table           measures nothing, writes the table

`softprompt train` with the same batch of every step for all, shared out among the processes (`torchrun` starts the same
ones), with the base model whole in each and sharded over them (`shard: true`). The processes share this machine's
cores and memory, so what the table shows is what many processes cost, not what many machines gain: with C cores a step
can be no faster than with C processes of one thread. Each size is run `--rounds` times in turn.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import resource
import socket
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Records, machine, table
from shapes import build

from softprompt.loading import load_tokenizer
from softprompt.recipe import EMBEDDED, Recipe

METHODS = ("prefix_tuning", "p_tuning")
TOKENS, BATCH, LENGTH = 20, 16, 96
WARM = 2  # steps that are not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="1,2,4", help="numbers of processes, separated by commas")
    parser.add_argument("--shape", default="gpt2-512", help="the base model; see SHAPES in shapes.py")
    parser.add_argument("--steps", type=int, default=8, help="steps of each run that are counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table")
    asked = parser.parse_args()
    records = Records(RESULTS / "scaling.json")
    if not asked.table:
        with tempfile.TemporaryDirectory() as folder:
            _measure(asked, records, Path(folder))
    text = _table(records)
    (RESULTS / "scaling.md").write_text(text, encoding="utf-8")
    print(text)


def _measure(asked: argparse.Namespace, records: Records, place: Path) -> None:
    model = build(asked.shape, "float32", "cpu")
    model.save_pretrained(place / "base")
    load_tokenizer(EMBEDDED).save_pretrained(place / "base")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    del model
    rows = [{"text": f"{n} " + "the cat sat on the mat and ate " * 9, "answer": "a fish " * 4} for n in range(256)]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = [int(number) for number in asked.sizes.split(",")]
    cases = [(method, count, shard) for method in METHODS for count in sizes for shard in (False, True)]
    cases = [(method, count, shard) for method, count, shard in cases if count > 1 or not shard]
    for turn in range(asked.rounds):
        for method, count, shard in cases:
            key = {"shape": asked.shape, "method": method, "processes": count, "shard": shard, "round": turn}
            found = _run(place, method, count, shard, asked.steps, f"{method}{count}{shard}{turn}")
            records.put(key, {**found, "base_bytes": size, "machine": machine("cpu")})


def _run(place: Path, method: str, count: int, shard: bool, steps: int, name: str) -> dict[str, Any]:
    """One run by so many processes: the median step, the largest memory and what is sent, each of one process."""
    recipe = Recipe(
        model=str(place / "base"), train=str(place / "train.jsonl"), template="{text} => {answer}", method=method,
        num_virtual_tokens=TOKENS, batch_size=BATCH, steps=WARM + steps, max_length=LENGTH, save_steps=0, samples=0,
        init="random", device="cpu", shard=shard, out=str(place / name),
    )  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    members = [context.Process(target=_member, args=(n, count, port, recipe, told)) for n in range(count)]
    for member in members:
        member.start()
    found: list[dict[str, Any]] = []
    while len(found) < count:
        if any(member.exitcode for member in members):
            raise SystemExit("a process has failed; its error stands above")
        with suppress(queue.Empty):
            found.append(told.get(timeout=1))
    for member in members:
        member.join()
    return {
        "seconds": statistics.median(found[0]["seconds"]),
        "memory": max(each["memory"] for each in found),
        "sent": found[0]["trained"] * 4,
    }


def _member(rank: int, size: int, port: int, recipe: Recipe, told: Any) -> None:
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()})
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    from softprompt.train import train

    before, ends = _memory(), []
    result = train(recipe, on_step=lambda row: ends.append(time.perf_counter()))
    seconds = [end - begun for begun, end in zip(ends[WARM:], ends[WARM + 1 :], strict=False)]
    told.put({"seconds": seconds, "memory": _memory() - before, "trained": result.trainable_parameters})


def _memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _table(records: Records) -> str:
    lines, groups = [], {}
    for row in records.rows:
        groups.setdefault((row["shape"], row["method"], row["processes"], row["shard"]), []).append(row)
    for (shape, method, count, shard), rows in groups.items():
        alone = {row["round"]: row["seconds"] for row in groups[(shape, method, 1, False)]}
        ratios = [row["seconds"] / alone[row["round"]] for row in rows if row["round"] in alone]
        lines.append([
            f"`{method}`", str(count), "sharded" if shard else "whole",
            f"{statistics.median(row['seconds'] for row in rows) * 1e3:,.0f} ms",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
            f"{max(row['memory'] for row in rows) / 1e6:,.0f} MB", f"{rows[0]['sent'] / 1e3:,.0f} kB",
        ])  # fmt: skip
    header = ["method", "processes", "base model", "step", "÷ one process", "memory of one", "sent per step"]
    last = records.rows[-1]
    base = f"{last['base_bytes'] / 1e6:,.0f} MB"
    return (
        f"{table(header, lines)}\nThe base model (`{last['shape']}`) has {base} in float32; "
        f"{BATCH} rows of about 90 tokens a step over all processes, {TOKENS} virtual tokens. Step: median; ÷: median "
        "and range of the ratios of single rounds. Memory: the largest resident memory, less that before anything is "
        "loaded. Sent: gradients, handed to one all-reduce; a sharded base also gathers its layers. "
        f"{last['machine']}.\n"
    )


if __name__ == "__main__":
    main()
