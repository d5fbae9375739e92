"""What do prompts cost in vLLM: tokens per second and the time to the first token, with them and without?

    python benchmarks/serving_vllm.py                                        in the environment that has vLLM
    python benchmarks/serving_vllm.py --model llama-2048 --only p=1000       wider layers: a prompt weighs less

Three servers stand side by side: vLLM as it is (bare), once more (again: what two servers that are alike differ by),
and `softprompt serve --engine vllm` (ours), and get the same texts in turn. `text` is the bare server with p words in
front of every text, the same for all requests of a prompt: what a context of that length costs vLLM by itself. B
requests come at once; prompts and words have been used before.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
from measure import Arm, Makers
from serving_prompts import save_base, save_prompts
from serving_server import Server, softprompt_server, vllm_server
from shapes import build
from speed import Bench, Column, Group, Options, Table, in_its_own_process, main

PROMPTS = 16
ROOM = 2048  # tokens of a request
ROWS = 64
WORDS = 4096
WORDS_OF, FAR = 1_000_000, 10_000_000  # seeds: of words in front from here on, of texts from there on
SIZES = (20, 100, 1000)
COLUMNS = (
    Column("tokens/s ÷ bare", "speed", "/s"),
    Column("first token ÷ bare", "first", "ms"),
    Column("its CPU time ÷ bare", "work", "s"),
    Column("forward passes", "passes", "", under=None),
    Column("tokens read", "computed", "", under=None),
    Column("texts' tokens", "real", "", under=None),
)
NOTE = (
    "Greedy, over HTTP; B requests at once with T tokens of text and `new` new tokens each, of 16 prompts (prefixes) "
    "of p virtual tokens. Again: a second server as bare is, so its distance from 1 is chance. llama-512: 8 layers, "
    "512 wide, 8 heads of 64, 2 with keys and values; llama-2048: 4 layers, 2048 wide, 32 heads of 64, 8 with keys "
    "and values; random weights, `--enforce-eager`. The row of bare is what it takes, the others are divided by it: "
    "median of the ratios of single rounds, and their range. First token: median time of answers of one token. "
    "Forward passes, tokens read: the engine's steps and the tokens of texts that they computed, as vLLM counts them. "
    "Texts' tokens: `usage.prompt_tokens` of all requests."
)


@dataclass
class Stage:
    """The servers, while the groups run."""

    bare: Server
    again: Server
    ours: Server


STAGES: list[Stage] = []  # the one there is; processes of groups inherit it


def groups(options: Options) -> Iterator[Group]:
    for prompt in SIZES:
        for rows in (1, 8, 64):
            yield vllm_group(options, prompt, 128, rows, 32, quick=rows == 8)


def vllm_group(options: Options, prompt: int, length: int, rows: int, new: int, quick: bool = False) -> Group:
    def arms(bench: Bench) -> Makers:
        stage, of_prompt = STAGES[-1], [f"p{prompt}/p{row % PROMPTS}" for row in range(rows)]
        words = [draw(prompt, WORDS_OF + row % PROMPTS) for row in range(rows)]
        nothing: list[list[int]] = [[]] * rows
        new_texts = FAR + (prompt * ROWS + rows) * 10_000  # which no group before has asked about
        return {
            "bare": lambda: _arm(stage.bare, ["base"] * rows, nothing, length, new, new_texts),
            "again": lambda: _arm(stage.again, ["base"] * rows, nothing, length, new, new_texts),
            "ours": lambda: _arm(stage.ours, of_prompt, nothing, length, new, new_texts),
            "text": lambda: _arm(stage.bare, ["base"] * rows, words, length, new, new_texts),
        }

    setting = {"model": options.model or "llama-512", "dtype": options.dtype or "float32", "device": options.device}
    return Group(setting | {"p": prompt, "T": length, "B": rows, "new": new}, arms, quick=quick)


def draw(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, WORDS), k=count)


def _arm(server: Server, models: Sequence[str], before: Sequence[list[int]], length: int, new: int, first: int) -> Arm:
    """Requests with texts that nobody has seen, of seeds `first` on; the same for all arms, in the same order."""
    seeds = itertools.count(first)
    rows = len(models)

    async def ask(client: httpx.AsyncClient, row: int, count: int) -> tuple[float, dict[str, int]]:
        text = [*before[row], *draw(length, next(seeds))]
        body = {"model": models[row], "prompt": text, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        begun = time.perf_counter()
        answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
        assert answer["usage"]["completion_tokens"] == count, answer
        return time.perf_counter() - begun, answer["usage"]

    async def all_at_once(client: httpx.AsyncClient, count: int) -> tuple[float, list[tuple[float, dict[str, int]]]]:
        begun = time.perf_counter()
        found = await asyncio.gather(*(ask(client, row, count) for row in range(rows)))
        return time.perf_counter() - begun, found

    async def measured() -> dict[str, float]:
        """Some times over where there are few requests."""
        old = server.worked()
        async with _client(server) as client:
            firsts = [await all_at_once(client, 1) for _ in range(max(2, 32 // rows))]
            wholes = [await all_at_once(client, new) for _ in range(max(1, 4 // rows))]
        seconds = sum(time for time, _ in wholes)
        first = statistics.median(seconds for _, found in firsts for seconds, _ in found)
        work = server.worked() - old
        return {"time": seconds, "speed": len(wholes) * rows * new / seconds, "first": first, "work": work}

    async def counted() -> dict[str, int]:
        async with _client(server) as client:
            await all_at_once(client, 1)
            await all_at_once(client, 1)
            old = server.metrics()
            _, found = await all_at_once(client, new)
        told = {name: server.metrics()[name] - old[name] for name in COUNTERS}
        real = sum(usage["prompt_tokens"] for _, usage in found)
        return {"real": real} | {COUNTERS[name]: int(value) for name, value in told.items()}

    return Arm(lambda: asyncio.run(measured()), lambda: asyncio.run(counted()))


COUNTERS = {
    "vllm:iteration_tokens_total_count": "passes",
    "vllm:request_prefill_kv_computed_tokens_sum": "computed",
}


def _client(server: Server) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=ROWS)
    return httpx.AsyncClient(base_url=server.address, timeout=600.0, limits=limits, trust_env=False)


@contextmanager
def servers(options: Options) -> Iterator[None]:
    """All of them, started one after the other."""
    if not find_spec("vllm"):
        raise SystemExit("vLLM is not installed here; run this with the python of the environment of make test-vllm")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the servers end too
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        in_its_own_process(lambda: _prepare(options, folder))
        base, dtype = folder / "base", options.dtype or "float32"
        ours = softprompt_server(
            base, folder / "prompts", folder, "vllm",
            ("--dtype", dtype, "--max-length", str(ROOM), "--max-batch", str(ROWS)), ["--enforce-eager"],
        )  # fmt: skip
        flags = ["--dtype", dtype, "--max-model-len", str(ROOM), "--max-num-seqs", str(ROWS), "--enforce-eager"]
        bare, again = (vllm_server(base, folder, flags) for _ in range(2))
        STAGES.append(Stage(bare, again, ours))
        try:
            for server in (bare, ours, again):
                server.start()
            yield
        finally:
            STAGES.pop()
            for server in (bare, ours, again):
                server.kill()


def _prepare(options: Options, folder: Path) -> dict[str, Any]:
    """The base model and the prompts, in files. In a process that ends: threads of torch do not survive a fork."""
    base = build(options.model or "llama-512", options.dtype or "float32", "cpu")
    save_base(base, folder / "base")
    for prompt in SIZES:
        save_prompts(base, folder / "prompts" / f"p{prompt}", PROMPTS, [prompt], ["prefix"])
    return {}


TABLE = Table("serving_vllm", __doc__ or "", groups, COLUMNS, NOTE, servers)


def run(arguments: Sequence[str] | None = None) -> None:
    main(TABLE, arguments)


if __name__ == "__main__":
    run()
