"""How does the cost of a training step grow with the batch, the prompt and the rows?

    python benchmarks/speed_growth.py                     one of B, p, T varied at a time; two models, two types
    python benchmarks/speed_growth.py --only 'gpt2 float32'
    python benchmarks/speed_growth.py --device cuda       a 1B Llama shape in bfloat16: p 100, 1,000, 4,096, B 1 … 128

Prompt tuning, which stands for all methods that learn embeddings; what is measured is that of speed_step.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from speed import Group, Options, Table, main
from speed_step import COLUMNS, NOTE, step_group

# p, T, B: from the middle outwards. The first three are also measured for the other model and number format.
SIZES = ((100, 128, 8), (100, 128, 1), (1000, 128, 8))
MORE = ((100, 128, 4), (100, 128, 16), (100, 128, 64), (10, 128, 8), (4096, 128, 8), (100, 32, 8), (100, 512, 8))
ON_GPU = tuple((prompt, 512, rows) for prompt in (100, 1000, 4096) for rows in (1, 8, 32, 64, 128))


def groups(options: Options) -> Iterator[Group]:
    """The grid of a GPU, or the sweeps of a processor."""
    shape, dtype = options.shape
    if options.cuda:
        for prompt, length, rows in ON_GPU:
            quick = rows == 8
            yield step_group(options, shape, dtype, "prompt tuning", prompt, length, rows, quick=quick)
        return
    chosen = options.model is not None or options.dtype is not None
    other = "tiny-llama" if options.tiny else "llama"
    for model, kind in [(shape, dtype)] if chosen and not options.tiny else _pairs(shape, other):
        sizes = (*SIZES, *MORE) if (model, kind) == (shape, dtype) else SIZES
        for prompt, length, rows in sizes:
            quick = (prompt, length, rows) == SIZES[0]
            yield step_group(
                options, model, kind, "prompt tuning", prompt, length, rows, quick=quick, rounds=2 if quick else 1
            )
        yield step_group(options, model, kind, "prompt tuning", *SIZES[0], padded=True, rounds=1)


def _pairs(shape: str, other: str) -> list[tuple[str, str]]:
    return [(model, dtype) for dtype in ("float32", "bfloat16") for model in (shape, other)]


PADDED = " Padded: rows are half as long to as long as T, padding on the right."
TABLE = Table("speed_growth", __doc__ or "", groups, COLUMNS, NOTE.replace(", all tokens real", "") + PADDED)


def run(arguments: Sequence[str] | None = None) -> None:
    main(TABLE, arguments)


if __name__ == "__main__":
    run()
