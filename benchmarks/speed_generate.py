"""What does a prompt cost in generation: the first token, every further one, the whole, and the keys and values held?

    python benchmarks/speed_generate.py
    python benchmarks/speed_generate.py --only 'p=1000 T=32 B=32'
    python benchmarks/speed_generate.py --device cuda     a 1B Llama shape in bfloat16: p 100, 1,000, 4,096, B 1 … 128

All times come from one call of `generate` (greedy) whose tokens are clocked as they come; the prompts were saved and
loaded before, as after training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from measure import Arm, Makers, Result
from shapes import NotRun, batch_of, frozen, generate_arm, prefix_bytes
from speed import Bench, Column, Group, Options, Table, main

COLUMNS = (
    Column("prefill ÷ bare", "prefill", "ms"),
    Column("its FLOPs ÷ bare", "prefill_flops", "GFLOP"),
    Column("decode step ÷ bare", "decode", "ms"),
    Column("whole run ÷ bare", "whole", "ms"),
    Column("KV held", "kv", "MB", under=None),
    Column("tokens/s", "speed", "/s", under=None),
)
NOTE = (
    "The rows of bare are what it takes, the others are divided by it: median of the ratios of single rounds, and "
    "their range. Prefill: from the call of `generate` to the first token; decode step: the median of all further "
    "tokens; p virtual tokens, B rows of T tokens. KV held: distinct storages of keys and values alive at the last "
    "token. Random weights."
)
# method, p, T, B, new tokens
CASES = (
    ("prompt tuning", 1000, 32, 8, 32),
    ("prefix", 1000, 32, 8, 32),
    ("prompt tuning", 1000, 32, 32, 16),
    ("prefix", 1000, 32, 32, 16),
    ("prompt tuning", 100, 128, 8, 32),
    ("prompt tuning", 20, 32, 1, 64),
    ("prefix", 20, 32, 1, 64),
)
ON_GPU = tuple(("prefix", prompt, 512, rows, 32) for prompt in (100, 1000, 4096) for rows in (1, 8, 32, 64, 128))


def groups(options: Options) -> Iterator[Group]:
    """One group per method and size."""
    for method, prompt, length, rows, new in ON_GPU if options.cuda else CASES:
        sizes = [options.size(size) for size in (prompt, length, rows, new)]
        yield generate_group(options, *options.shape, method, *sizes, quick=prompt != 1000 or rows == 8, rounds=3)


def generate_group(
    options: Options,
    shape: str,
    dtype: str,
    method: str,
    prompt: int,
    length: int,
    rows: int,
    new: int,
    quick: bool = False,
    rounds: int | None = None,
) -> Group:
    """One call of `generate` of bare, ours and PEFT."""

    def arms(bench: Bench) -> Makers:
        import peft

        import softprompt

        base = bench.base(shape, dtype)
        batch = batch_of(base, rows, length)
        limit = None if method == "prefix" else options.too_long(rows * (prompt + length))

        def of(library: Any) -> Arm:
            if library is peft and limit is not None:
                raise NotRun(limit)
            return generate_arm(base, lambda: frozen(library, base, method, prompt), batch, new)

        return {
            "bare": lambda: generate_arm(base, lambda: base, batch, new),
            "ours": lambda: of(softprompt),
            "PEFT": lambda: of(peft),
        }

    def after(bench: Bench, found: dict[str, Result]) -> None:
        """What ours holds more than the bare model's cache and one prefix, which should be nothing."""
        if "kv" in found["bare"] and "kv" in found["ours"]:
            one = prefix_bytes(bench.base(shape, dtype), prompt)
            found["ours"]["kv_beyond"] = found["ours"]["kv"] - found["bare"]["kv"] - one

    setting = {"model": shape, "dtype": dtype, "device": options.device, "method": method}
    return Group(setting | {"p": prompt, "T": length, "B": rows, "new": new}, arms, after, quick, rounds)


TABLE = Table("speed_generate", __doc__ or "", groups, COLUMNS, NOTE)


def run(arguments: Sequence[str] | None = None) -> None:
    main(TABLE, arguments)


if __name__ == "__main__":
    run()
