"""What does a real training step cost: data loading, AdamW, clipping and all? `softprompt train` beside Trainer + PEFT.

    python benchmarks/speed_train.py

Both train the same method on the same rows with the same settings, a few steps at a time, in turn: ours by
`softprompt.train.train`, which is what `softprompt train` runs, PEFT by transformers' Trainer. What counts is the time
from the end of one step to the end of the next, logging included; the first steps of a run do not count.
"""

from __future__ import annotations

import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from measure import Arm, Makers
from shapes import config_of, wrap
from speed import Bench, Column, Group, Options, Table, main

FIRST = 1  # steps of every run that do not count
COLUMNS = (
    Column("step ÷ ours", "time", "ms", under="ours"),
    Column("peak memory ÷ ours", "peak", "MB", under="ours"),
)
NOTE = (
    "The rows of ours are what it takes, PEFT's are divided by them: median of the ratios of single runs, and their "
    "range. A step with data loading, AdamW, clipping at 1, logging: the median of a run's steps without the first "
    "and the last. No evaluation, no saving, no dropout, float32. Rows are texts of the demo data joined to about T "
    "tokens, of which the last text is the target."
)


def groups(options: Options) -> Iterator[Group]:
    for method in ("prompt tuning", "prefix"):
        sizes = [options.size(size) for size in (100, 128, 8)]
        yield train_group(options, method, *sizes, quick=method == "prompt tuning")


def train_group(options: Options, method: str, prompt: int, length: int, rows: int, quick: bool) -> Group:
    shape, _ = options.shape

    def arms(bench: Bench) -> Makers:
        base = bench.base(shape, "float32")
        place = tempfile.TemporaryDirectory()
        recipe = write_run(Path(place.name), base, method, prompt, length, rows, options)
        ours = Arm(lambda: train_ours(recipe, place), dict)
        return {"ours": lambda: ours, "PEFT": lambda: Arm(peft_run(recipe, base, method, prompt), dict)}

    setting = {"model": shape, "dtype": "float32", "device": options.device, "method": method}
    return Group(setting | {"p": prompt, "T": length, "B": rows}, arms, quick=quick, rounds=2)


def write_run(folder: Path, base: Any, method: str, prompt: int, length: int, rows: int, options: Options) -> Any:
    """The model, its tokenizer and the rows as files, and the recipe that trains on them."""
    import softprompt
    from softprompt.embedded import PATH
    from softprompt.loading import load_tokenizer
    from softprompt.methods import METHODS
    from softprompt.recipe import Recipe

    tokenizer = load_tokenizer(str(PATH))
    tokenizer.save_pretrained(folder / "model")
    base.save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", tokenizer, length, 16 * rows)
    config = config_of(softprompt, method, prompt)
    name = next(name for name, kind in METHODS.items() if kind.config_class is type(config))
    return Recipe(
        train=str(folder / "train.jsonl"), out=str(folder / "runs"), model=str(folder / "model"), method=name,
        num_virtual_tokens=prompt, init="random", steps=FIRST + (3 if options.quick else 4),
        batch_size=rows, learning_rate=1e-3, optimizer="adamw", weight_decay=0.0, clip=1.0, warmup=0.0,
        schedule="constant", group_by_length=False, eval_steps=10**6, save_steps=0, samples=0, device=options.device,
    ).resolved()  # fmt: skip


def write_rows(path: Path, tokenizer: Any, length: int, count: int) -> None:
    """`count` rows of nearly `length` tokens: demo texts joined, the last of them the target."""
    from softprompt.demo_data import TRAIN

    texts = [json.loads(line)["text"] for line in Path(TRAIN).read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for row in range(count):
            taken: list[str] = []
            used, place = 2, 37 * row
            while used < length - 2:
                text = texts[place % len(texts)]
                used += len(tokenizer(" " + text, add_special_tokens=False)["input_ids"])
                taken.append(text)
                place += 1
            *start, target = taken if len(taken) > 1 else [texts[0][:4], taken[0]]
            file.write(json.dumps({"input": " ".join(start), "target": target}) + "\n")


def train_ours(recipe: Any, place: tempfile.TemporaryDirectory[str]) -> dict[str, float]:
    from rich.console import Console

    from softprompt.errors import RunInterrupted
    from softprompt.train import train

    ends: list[float] = []
    with tempfile.TemporaryDirectory(dir=place.name) as out:
        quiet = Console(file=io.StringIO())
        try:
            train(recipe.replace(out=f"{out}/run"), console=quiet, on_step=lambda _: ends.append(time.perf_counter()))
        except RunInterrupted:  # somebody stops the benchmark, which is no result
            raise KeyboardInterrupt from None
    return {"time": step_time(ends)}


def step_time(ends: Sequence[float]) -> float:
    """The median step, without the first ones and the last, which saves; `ends` may begin before the first one."""
    return statistics.median(later - one for one, later in itertools.pairwise(ends[FIRST:-1]))


def peft_run(recipe: Any, base: Any, method: str, prompt: int) -> Any:
    """A function that trains PEFT's model with transformers' Trainer, on the rows that `softprompt train` makes."""
    import peft
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from softprompt.loading import load_tokenizer
    from softprompt.train.run_data import read_source

    tokenizer = load_tokenizer(recipe.model)
    rows: Any = read_source(recipe).encode(recipe, tokenizer, 10**6, base).train
    data: Any = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    model = wrap(peft, base, method, prompt)

    def run() -> dict[str, float]:
        ends: list[float] = []

        class Ends(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(time.perf_counter())

        with tempfile.TemporaryDirectory() as out:
            settings = TrainingArguments(
                output_dir=out, max_steps=recipe.steps, per_device_train_batch_size=recipe.batch_size,
                learning_rate=recipe.learning_rate, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
                optim="adamw_torch", save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1,
                use_cpu=not recipe.device.startswith("cuda"), dataloader_pin_memory=False, remove_unused_columns=False,
            )  # fmt: skip
            collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
            trainer = Trainer(model, settings, data_collator=collator, train_dataset=data, callbacks=[Ends()])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return {"time": step_time(ends)}

    return run


TABLE = Table("speed_train", __doc__ or "", groups, COLUMNS, NOTE)


def run(arguments: Sequence[str] | None = None) -> None:
    main(TABLE, arguments)


if __name__ == "__main__":
    run()
