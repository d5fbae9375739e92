"""How fast does our engine on transformers answer requests that have a prompt each?

    python benchmarks/serving.py
    python benchmarks/serving.py --only 'requests=64'

All requests arrive at once and go through one engine: ours with prompts, bare without any. PEFT, which has one prompt
at a time, answers one after the other: `set_adapter`, then `generate`.
"""

from __future__ import annotations

import asyncio
import functools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from counts import FORMULAS, kv_bytes
from measure import Arm, Makers, Result
from serving_prompts import EMBEDDED, save_prompts
from shapes import Clock, batch_of, head_width
from speed import Bench, Column, Group, Options, Table, main
from torch.utils.flop_counter import FlopCounterMode

COLUMNS = (
    Column("tokens/s", "speed", "/s", under=None),
    Column("whole run ÷ bare", "time", "ms"),
    Column("first token", "first", "ms", under=None),
    Column("forward passes", "passes", "", under=None),
    Column("FLOPs ÷ bare", "flops", "GFLOP"),
    Column("KV held", "kv", "MB", under=None),
    Column("same answers", "same", "", under=None),
)
NOTE = (
    "Greedy; `requests` requests over `prompts` prompts of p virtual tokens, T tokens of text and `new` new tokens "
    "each; llama-512 has 8 layers, 512 wide, with 8 heads of 64 and 2 of keys and values, random weights. The row "
    "of bare is what it takes, the others are divided by it: median of the ratios of single rounds, and their "
    "range. First token: the median of the requests, from the arrival of all. KV held: distinct storages of keys "
    "and values alive after a pass, at most, beyond those before the first request. Same answers: requests that "
    "ours answers as PEFT does."
)
# model, method, prompts, p, T, requests, new tokens
CASES = (
    ("llama-512", "prefix", 64, 20, 32, 64, 32),
    ("llama-512", "prompt tuning", 64, 20, 32, 64, 32),
    ("llama-512", "prefix", 64, 100, 32, 64, 32),
    ("llama-512", "prefix", 8, 20, 32, 8, 32),
    ("llama-512", "prefix", 1, 20, 32, 1, 32),
    (EMBEDDED, "prefix", 64, 20, 32, 256, 32),
)


def groups(options: Options) -> Iterator[Group]:
    for shape, method, *numbers in CASES:
        sizes = [options.size(number) for number in numbers]
        yield serving_group(
            options, options.model or shape, method, *sizes, quick=shape != EMBEDDED and numbers[1] < 100
        )


def serving_group(
    options: Options,
    shape: str,
    method: str,
    prompts: int,
    prompt: int,
    length: int,
    requests: int,
    new: int,
    quick: bool = False,
) -> Group:
    """The same requests with prompts, without, and one by one."""
    dtype, stages = options.dtype or "float32", []

    def arms(bench: Bench) -> Makers:
        base = bench.base(shape, dtype)
        stages.append(stage := Stage(base, method, prompts, prompt, length, requests, new))
        return {
            "bare": lambda: stage.arm("bare", stage.through_engine(prompted=False)),
            "ours": lambda: stage.arm("ours", stage.through_engine(prompted=True)),
            "PEFT": lambda: stage.arm("PEFT", stage.one_by_one(), look_every=new * max(1, requests // 4)),
        }

    def after(bench: Bench, found: dict[str, Result]) -> None:
        stage = stages.pop()
        stage.close()
        if "error" not in found["ours"] and "error" not in found["PEFT"]:
            pairs = zip(stage.answers["ours"], stage.answers["PEFT"], strict=True)
            found["ours"]["same"] = sum(one == other for one, other in pairs)

    setting = {"model": shape, "dtype": dtype, "device": options.device, "method": method, "prompts": prompts}
    sizes = {"p": prompt, "T": length, "requests": requests, "new": new}
    return Group(setting | sizes, arms, after, quick=quick, rounds=5)


Answers = list[list[int]]
Run = Callable[[], tuple[Answers, list[float]]]
"""Answers every request: the token ids, and the seconds from the arrival of all to each one's first token."""


class Stage:
    """One group's base model, its prompts in a folder, its requests, and an engine that runs until `close`."""

    def __init__(self, base: Any, method: str, prompts: int, prompt: int, length: int, requests: int, new: int) -> None:
        from softprompt.serve.version import Version

        self.base, self.new = base, new
        self.folder = tempfile.TemporaryDirectory()
        place = Path(self.folder.name)
        save_prompts(base, place, prompts, [prompt], [method])
        folders = [place / f"p{number % prompts}" for number in range(requests)]
        self.versions = [
            Version(each.name, f"{number % prompts:064x}", each, each, method, prompt)
            for number, each in enumerate(folders)
        ]
        self.texts: list[list[int]] = batch_of(base, requests, length)["input_ids"].tolist()
        self.answers: dict[str, Answers] = {}
        self.runner = asyncio.Runner()
        self._engine: Any = None

    def close(self) -> None:
        if self._engine is not None:
            self.runner.run(self._engine.stop())
        self.runner.close()
        self.folder.cleanup()

    def arm(self, name: str, answer: Run, look_every: int = 1) -> Arm:
        """What `answer` does, timed and counted; see `Passes` for `look_every`."""

        def run() -> dict[str, float]:
            begun = time.perf_counter()
            self.answers[name], firsts = answer()
            seconds = time.perf_counter() - begun
            tokens = sum(map(len, self.answers[name]))
            return {"time": seconds, "speed": tokens / seconds, "first": statistics.median(firsts)}

        def count() -> dict[str, int]:
            with Passes(self.base, look_every) as passes:
                run()
            return {"passes": passes.count, "flops": passes.flops, "kv": passes.kv}

        return Arm(run, count)

    # ---- ours and bare -------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Any:
        if self._engine is None:
            from softprompt.embedded import PATH
            from softprompt.loading import load_tokenizer
            from softprompt.serve.batching import TransformersEngine

            self._engine = TransformersEngine(self.base, load_tokenizer(str(PATH)))
            self.runner.run(self._engine.start())
        return self._engine

    def through_engine(self, prompted: bool) -> Run:
        from softprompt.serve.engine import Ask, Sampling

        engine, sampling = self.engine, Sampling(max_tokens=self.new, temperature=0.0, ignore_eos=True)
        versions = self.versions if prompted else [None] * len(self.texts)
        asks = [
            Ask(str(number), tuple(text), sampling, version)
            for number, (text, version) in enumerate(zip(self.texts, versions, strict=True))
        ]

        async def one(ask: Ask, begun: float) -> tuple[list[int], float]:
            ids, first = [], 0.0
            async for piece in engine.generate(ask):
                first = first or time.perf_counter() - begun
                ids += piece.token_ids
            return ids, first

        async def all_of_them() -> tuple[Answers, list[float]]:
            begun = time.perf_counter()
            found = await asyncio.gather(*(one(ask, begun) for ask in asks))
            return [ids for ids, _ in found], [first for _, first in found]

        return lambda: self.runner.run(all_of_them())

    # ---- PEFT ----------------------------------------------------------------------------------------------------

    def one_by_one(self) -> Run:
        model, rows = self._of_peft(), [torch.tensor([text]) for text in self.texts]

        def answer() -> tuple[Answers, list[float]]:
            begun, answers, firsts = time.perf_counter(), [], []
            for version, ids in zip(self.versions, rows, strict=True):
                model.set_adapter(version.name)
                clock = Clock(str(self.base.device))
                inputs = {"input_ids": ids.to(self.base.device), "attention_mask": torch.ones_like(ids)}
                options: dict[str, Any] = {"max_new_tokens": self.new, "do_sample": False}
                with torch.no_grad():
                    output = model.generate(**inputs, **options, stopping_criteria=[clock])
                answers.append(output[0, ids.shape[1] :].tolist())
                firsts.append(clock.times[0] - begun)
            return answers, firsts

        return answer

    def _of_peft(self) -> Any:
        import peft

        model: Any = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for each in dict.fromkeys(self.versions):
                if model is None:
                    model = peft.PeftModel.from_pretrained(self.base, each.folder, adapter_name=each.name)
                else:
                    model.load_adapter(each.folder, adapter_name=each.name)
        return model.eval()


class Passes:
    """Counts what a model runs, in whatever thread: forward passes, their FLOPs, and the most keys and values held.

    For the latter it looks after every `look_every`-th pass, which takes long; those held before do not count.
    """

    def __init__(self, base: Any, look_every: int = 1) -> None:
        self.base, self.look_every = base, look_every
        self.count = self.flops = self.kv = 0
        self._width = head_width(base)

    def __enter__(self) -> Passes:
        self._before = kv_bytes(self._width)
        forward = self.base.forward

        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
                output = forward(*args, **kwargs)
            self.count += 1
            self.flops += counter.get_total_flops()
            if self.count % self.look_every == 0:
                self.kv = max(self.kv, kv_bytes(self._width) - self._before)
            return output

        self.base.forward = counted
        return self

    def __exit__(self, *_: object) -> None:
        del self.base.forward  # the one of its class is seen again


TABLE = Table("serving", __doc__ or "", groups, COLUMNS, NOTE)


def run(arguments: Sequence[str] | None = None) -> None:
    main(TABLE, arguments)


if __name__ == "__main__":
    run()
