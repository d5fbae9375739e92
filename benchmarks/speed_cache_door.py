"""What does a prompt cost on families that attend in code of their own, where the prefix goes through the cache?

    python benchmarks/speed_cache_door.py

Bloom, MPT, Falcon and GPT-J, all 512 wide and 6 layers deep, and GPT-2 of the same size, which takes its prefix through
the attention door, to compare with. The training step is that of speed_step.py, generation that of speed_generate.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from measure import Arm, Makers, Result, wait
from shapes import batch_of, frozen, generate_arm, step_arms
from speed import Bench, Column, Group, Options, Table, main

FAMILIES = ("gpt2-512", "bloom-512", "mpt-512", "falcon-512", "gptj-512")
COLUMNS = (
    Column("step: FLOPs ÷ bare", "flops", "GFLOP"),
    Column("saved tensors ÷ bare", "saved", "MB"),
    Column("time ÷ bare", "time", "ms"),
    Column("prefill ÷ bare", "prefill", "ms"),
    Column("decode step ÷ bare", "decode", "ms"),
    Column("KV held", "kv", "MB", under=None),
)
NOTE = (
    "The rows of bare are what it takes, the others are divided by it: median of the ratios of single rounds, and "
    "their range. A training step (FLOPs, saved tensors, time), and generation of 16 tokens (prefill, decode step, "
    "keys and values held) with p virtual tokens and B rows of T tokens. Random weights, no dropout."
)


def groups(options: Options) -> Iterator[Group]:
    for family in FAMILIES:
        for method in ("prompt tuning", "prefix"):
            yield family_group(options, family, method)


def family_group(options: Options, family: str, method: str) -> Group:
    prompt, length, rows, new = (options.size(size) for size in (100, 128, 8, 16))

    def arms(bench: Bench) -> Makers:
        import peft

        import softprompt

        base = bench.base(family, "float32")
        batch = batch_of(base, rows, length)
        steps = step_arms(base, method, prompt, batch)
        models = {"bare": lambda: base, "ours": lambda: frozen(softprompt, base, method, prompt)}
        models["PEFT"] = lambda: frozen(peft, base, method, prompt)
        return {
            name: lambda name=name: both(steps[name](), generate_arm(base, models[name], batch, new), options.device)
            for name in steps
        }

    setting: dict[str, Any] = {"model": family, "dtype": "float32", "device": options.device, "method": method}
    return Group(setting | {"p": prompt, "T": length, "B": rows}, arms, quick=family == "bloom-512", rounds=3)


def both(step: Arm, generation: Arm, device: str) -> Arm:
    """A training step and a generation as one arm."""

    def run() -> dict[str, float]:
        begun = time.perf_counter()
        step.run()
        wait(device)
        seconds = time.perf_counter() - begun
        return {"time": seconds, **(generation.run() or {})}

    def count() -> Result:
        counted: Result = {}
        for arm in (step, generation):
            counted |= arm.count() if arm.count is not None else {}
        return counted

    return Arm(run, count)


TABLE = Table("speed_cache_door", __doc__ or "", groups, COLUMNS, NOTE)


def run(arguments: Sequence[str] | None = None) -> None:
    main(TABLE, arguments)


if __name__ == "__main__":
    run()
