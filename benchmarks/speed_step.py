"""What does a training step cost with a prompt, beside PEFT's and beside the frozen model alone?

    python benchmarks/speed_step.py                       all methods; writes results/speed_step.json and .md
    python benchmarks/speed_step.py --only 'T=32|CPT'     these cases again
    python benchmarks/speed_step.py --device cuda         a 1B Llama shape in bfloat16, rows of 512

A step is forward with labels and backward to the prompt, without an optimiser. "bare" is the frozen model alone with
the same real tokens: forward, and backward to the embeddings of its inputs. All three share one model in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from measure import Makers
from shapes import METHODS, batch_of, step_arms
from speed import Bench, Column, Group, Options, Table, main

COLUMNS = (
    Column("FLOPs ÷ bare", "flops", "GFLOP"),
    Column("saved tensors ÷ bare", "saved", "MB"),
    Column("time ÷ bare", "time", "ms"),
    Column("peak memory ÷ bare", "peak", "MB"),
)
NOTE = (
    "The rows of bare are what it takes, the others are divided by it; time: median of the ratios of single rounds, "
    "and their range. FLOPs by torch's counter, attention as the whole rectangle of queries and keys for every kernel. "
    "Saved tensors: distinct storages that autograd keeps for the backward pass, parameters not counted. Peak memory: "
    "beyond what was in use before the step. Random weights, no dropout, all tokens real and labelled."
)


def groups(options: Options) -> Iterator[Group]:
    """Each method, then short rows."""
    length = 512 if options.cuda else 128
    for method in METHODS:
        yield step_group(options, *options.shape, method, 100, length, 8, quick=method in ("prompt tuning", "prefix"))
    yield step_group(options, *options.shape, "prompt tuning", 100, 32, 8, quick=True)


def step_group(
    options: Options,
    shape: str,
    dtype: str,
    method: str,
    prompt: int,
    length: int,
    rows: int,
    padded: bool = False,
    quick: bool = False,
    rounds: int | None = None,
) -> Group:
    """A training step of bare, ours and PEFT, with a prompt of so many virtual tokens and so many rows of a length."""
    prompt, length, rows = (options.size(size) for size in (prompt, length, rows))

    def arms(bench: Bench) -> Makers:
        base = bench.base(shape, dtype)
        tokens = rows * (length if method.startswith("prefix") else prompt + length)
        return step_arms(base, method, prompt, batch_of(base, rows, length, padded), options.too_long(tokens))

    setting = {"model": shape, "dtype": dtype, "device": options.device, "method": method}
    setting |= {"p": prompt, "T": length, "B": rows, "padded": padded}
    return Group(setting, arms, quick=quick, rounds=rounds)


TABLE = Table("speed_step", __doc__ or "", groups, COLUMNS, NOTE)


def run(arguments: Sequence[str] | None = None) -> None:
    main(TABLE, arguments)


if __name__ == "__main__":
    run()
