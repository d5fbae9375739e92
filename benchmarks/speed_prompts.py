"""How fast is a batch in which every row has a prompt of its own?

    python benchmarks/speed_prompts.py

64 rows with 64 different prompts: ours in one call of `generate` with `adapter_names`, PEFT, which has one prompt per
call, in 64 calls, and the bare model on the batch of 64 rows without any prompt.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Arm, Makers, wait
from shapes import batch_of, wrap
from speed import Bench, Column, Group, Options, Table, main
from torch import Tensor

COLUMNS = (
    Column("tokens/s", "speed", "/s", under=None),
    Column("whole run ÷ bare", "time", "ms"),
    Column("peak memory ÷ bare", "peak", "MB"),
)
NOTE = (
    "Greedy generation; `prompts` different prompts of p virtual tokens for B rows of T tokens, `new` new tokens each. "
    "The row of bare is what it takes, the others are divided by it: median of the ratios of single rounds, and their "
    "range. Random weights."
)


def groups(options: Options) -> Iterator[Group]:
    """Every row another prompt, with vectors and with keys and values; then four prompts shared by the rows."""
    yield prompts_group(options, "prompt tuning", 64, quick=True)
    yield prompts_group(options, "prefix", 64)
    yield prompts_group(options, "prefix", 4)


def prompts_group(options: Options, method: str, prompts: int, quick: bool = False) -> Group:
    shape, dtype = options.shape
    prompt, length, rows, new, prompts = (options.size(size) for size in (20, 32, 64, 16, prompts))

    def arms(bench: Bench) -> Makers:
        import peft

        import softprompt

        base = bench.base(shape, dtype)
        batch = batch_of(base, rows, length)
        del batch["labels"]
        names = [f"prompt{row % prompts}" for row in range(rows)]
        return {
            "bare": lambda: _arm(batch, new, lambda options: base.generate(**batch, **options)),
            "ours": lambda: _ours(many(softprompt, base, method, prompt, prompts), batch, names, new),
            "PEFT": lambda: _one_by_one(many(peft, base, method, prompt, prompts), batch, names, new),
        }

    setting = {"model": shape, "dtype": dtype, "device": options.device, "method": method, "prompts": prompts}
    return Group(setting | {"p": prompt, "T": length, "B": rows, "new": new}, arms, quick=quick, rounds=3)


def many(library: Any, base: Any, method: str, length: int, count: int) -> Any:
    """A model with `count` different prompts, saved and loaded."""
    import softprompt

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = wrap(softprompt, base, method, length)
        model: Any = None
        for number in range(count):
            with torch.no_grad():
                for parameter in made.prompt_encoder.parameters():
                    torch.nn.init.normal_(parameter, std=0.02)
            place = Path(folder) / str(number)
            made.save_pretrained(place)
            name = f"prompt{number}"
            if model is None:
                model = library.PeftModel.from_pretrained(base, place, adapter_name=name)
            else:
                model.load_adapter(place, adapter_name=name)
    return model.eval()


def _arm(batch: dict[str, Tensor], new: int, generate: Callable[[dict[str, Any]], Any], warm_up: bool = True) -> Arm:
    options, device = {"max_new_tokens": new, "do_sample": False}, str(batch["input_ids"].device)

    def run() -> dict[str, float]:
        begun = time.perf_counter()
        with torch.no_grad():
            generate(options)
        wait(device)
        seconds = time.perf_counter() - begun
        return {"time": seconds, "speed": new * batch["input_ids"].shape[0] / seconds}

    return Arm(run, None if warm_up else dict)


def _ours(model: Any, batch: dict[str, Tensor], names: list[str], new: int) -> Arm:
    return _arm(batch, new, lambda options: model.generate(**batch, adapter_names=names, **options))


def _one_by_one(model: Any, batch: dict[str, Tensor], names: list[str], new: int) -> Arm:
    """One call per prompt, with all of its rows."""

    def generate(options: dict[str, Any]) -> None:
        for name in dict.fromkeys(names):
            rows = [place for place, other in enumerate(names) if other == name]
            model.set_adapter(name)
            model.generate(**{key: value[rows] for key, value in batch.items()}, **options)

    return _arm(batch, new, generate, warm_up=False)


TABLE = Table("speed_prompts", __doc__ or "", groups, COLUMNS, NOTE)


def run(arguments: Sequence[str] | None = None) -> None:
    main(TABLE, arguments)


if __name__ == "__main__":
    run()
