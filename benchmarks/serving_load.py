"""Does a server under load give every request the answer that its prompt gives alone, whatever happens around it?

    python benchmarks/serving_load.py

Requests arrive at random times (Poisson) over HTTP, half of them streams, each for one of 64 prompts or for none. Every
answer is compared with the one that `generate` gives offline for that prompt and text alone. In turn: nothing happens
but clients that leave; the server is killed and started again; files of prompts are replaced while they are served, by
garbage, by half a file, by another model's prompt, by a broken configuration and by a good new version.

Where vLLM is installed it is the engine, else transformers is.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from measure import Arm, Makers, Result
from serving_prompts import EMBEDDED, save_base, save_prompts, texts
from serving_server import START, Memory, softprompt_server
from serving_traffic import Call, Outcome, Question, arrivals, calls, drive, offline, telling, verdict
from shapes import build, wrap
from speed import Bench, Column, Group, Options, Table, main

ENGINE = "vllm" if find_spec("vllm") else "transformers"
HELD = {"transformers": "softprompt_cache_tokens", "vllm": "vllm:kv_cache_usage_perc"}
LENGTHS = (5, 20, 12, 33)  # virtual tokens
NEW = 24
MOST_WORDINGS = 40
LOAD = 0.7  # of what the server can do
LEAVING = 0.05  # of all requests
WATCH = 0.2  # seconds
BROKEN = 4  # prompts whose files are replaced by what cannot be used
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

COLUMNS = (
    Column("answered", "answered", "", under=None),
    Column("wrong", "wrong", "", under=None),
    Column("failed", "failed", "", under=None),
    Column("made again", "again", "", under=None),
    Column("left", "left", "", under=None),
    Column("requests/s", "rate", "/s", under=None),
    Column("tokens/s", "speed", "/s", under=None),
    Column("first token", "first", "ms", under=None),
    Column("99 %", "first_99", "ms", under=None),
    Column("memory", "resident", "MB", under=None),
    Column("its growth", "growth", "MB", under=None),
    Column("cache not given back", "held", "", under=None),
    Column("prompts refused", "refused", "", under=None),
)
NOTE = (
    "Wrong: answers that differ in a character, in their number of tokens or in their end from the one that the "
    "prompt gives alone, offline (float32, greedy). Failed: no answer. Made again: tries beyond the first, of "
    "requests that were cut off or turned away. Left: streams whose client closes after the first piece. Requests "
    "arrive at 0.7 of the rate at which the server answered one per prompt at once. First token: of streams, from "
    "the arrival; median and 99th percentile. Memory: resident pages of the server; growth: the median of the last "
    "fifth of the time less that of the second. Cache not given back: tokens (vLLM: share of the cache) held when "
    "all is over, beyond those at the start. Prompts refused: names of which the server says that their files are "
    "broken, of four that are."
)


def groups(options: Options) -> Iterator[Group]:
    for case, requests, wordings in (("load", 1000, 4), ("killed", 300, 2), ("replaced", 400, 2)):
        prompts, count = (16, requests // 10) if options.quick else (64, requests)
        yield load_group(options, case, prompts, count, 2 if options.quick else wordings)


def load_group(options: Options, case: str, prompts: int, requests: int, wordings: int) -> Group:
    shape = options.model or EMBEDDED
    stages: list[Stage] = []

    def arms(bench: Bench) -> Makers:
        folder = Path(tempfile.mkdtemp())
        stages.append(stage := Stage(bench.base(shape, "float32"), shape, prompts, wordings, folder))
        return {"ours": lambda: Arm(lambda: CASES[case](stage, requests), dict)}  # every run starts a server

    def after(bench: Bench, found: dict[str, Result]) -> None:
        stages.pop().close()

    setting = {"engine": ENGINE, "model": shape, "device": options.device, "case": case}
    return Group(setting | {"prompts": prompts, "requests": requests}, arms, after, quick=True, rounds=1)


class Stage:
    """A base model, prompts in a folder, questions with their answers, and a server for all of that.

    There are as many texts as `wordings` says, and more until every prompt has an answer that is its own.
    """

    def __init__(self, base: Any, shape: str, prompts: int, wordings: int, folder: Path, new: int = NEW) -> None:
        from softprompt.embedded import PATH
        from softprompt.loading import load_tokenizer

        self.folder, self.prompts = folder, folder / "prompts"
        self.base, self.new = base, new
        where = PATH if shape == EMBEDDED else save_base(base, self.folder / "base")
        save_prompts(base, self.prompts, prompts, LENGTHS)
        self.spare = self.folder / "spare"  # what files are replaced by
        save_prompts(base, self.spare / "good", prompts, LENGTHS)
        shutil.copytree(self.spare / "good" / "p5", self.spare / "new")  # of another kind and length than p4
        save_prompts(build("tiny-llama", "float32", "cpu"), self.spare / "other", 1, [4], ["prompt tuning"])
        self.tokenizer = load_tokenizer(str(where))
        self.wordings, self.questions = [], []
        self.model = self._loaded(prompts)
        names = [None, *(f"p{number}" for number in range(prompts))]
        silent = {name or "base" for name in names}
        for text in texts(self.tokenizer, MOST_WORDINGS, 3, 12):
            if len(self.wordings) >= wordings and not silent:
                break
            self.wordings.append(text)
            self.questions += telling(offline(self.model, self.tokenizer, names, [text], new))
            silent -= {question.model for question in self.questions}
        if silent:
            raise RuntimeError(f"no answer of {', '.join(sorted(silent))} is its own")
        flags = ("--dtype", "float32", "--watch-seconds", str(WATCH))
        self.server: Any = softprompt_server(where, self.prompts, self.folder, ENGINE, flags)

    def _loaded(self, prompts: int) -> Any:
        import softprompt

        model = wrap(softprompt, self.base, "prefix", 1).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number in range(prompts):
                model.load_adapter(self.prompts / f"p{number}", adapter_name=f"p{number}")
        return model

    def close(self) -> None:
        self.server.kill()
        shutil.rmtree(self.folder)

    def of(self, name: str) -> list[Question]:
        return [question for question in self.questions if question.model == name]

    def one_each(self) -> list[Call]:
        """A request for every name, as long as they get."""
        first = {question.model: question for question in reversed(self.questions)}
        return [Call(question, self.new) for question in first.values()]

    def warm_up(self) -> float:
        """Have every prompt used; then the requests that the server answers per second, one for each at once."""
        seconds = 0.0
        for _ in range(2):
            begun = time.perf_counter()
            check(asyncio.run(drive(self.server.address, self.one_each(), [0.0] * len(self.one_each()))))
            seconds = time.perf_counter() - begun
        return len(self.one_each()) / seconds

    def idle(self) -> float:
        """How much of its cache the server holds when nothing runs."""
        end = time.monotonic() + 30
        while self._running() and time.monotonic() < end:
            time.sleep(0.1)
        return self.server.metrics()[HELD[ENGINE]]

    def refused(self, expected: int) -> int:
        """Of how many prompts the server says that their files are broken; it gets some time to notice."""
        end = time.monotonic() + 10
        while True:
            found = sum(bool(row["error"]) for row in self.server.get("/v1/prompts").json()["data"])
            if found == expected or time.monotonic() > end:
                return found
            time.sleep(WATCH)

    def _running(self) -> float:
        found = self.server.metrics()
        names = ("softprompt_running", "softprompt_waiting", "vllm:num_requests_running", "vllm:num_requests_waiting")
        return sum(found.get(name, 0.0) for name in names)


def check(outcomes: Sequence[Outcome]) -> None:
    found = verdict(outcomes)
    if found["wrong"] or found["failed"]:
        raise RuntimeError(f"before anything happened {found['wrong']} answers were wrong and {found['failed']} failed")


# ---- the cases -------------------------------------------------------------------------------------------------------


def load(stage: Stage, requests: int) -> dict[str, float]:
    """Nothing happens, but some clients leave."""
    stage.server.start()
    rate = LOAD * stage.warm_up()
    held = stage.idle()
    with Memory(stage.server) as memory:
        found = traffic(stage, requests, rate, leaving=LEAVING)
    return found | memory.found() | {"held": stage.idle() - held}


def killed(stage: Stage, requests: int) -> dict[str, float]:
    """A third of the way the server is killed and started again; clients try again until it is back."""
    stage.server.start()
    rate = LOAD * stage.warm_up()
    held = stage.idle()

    def kill() -> None:
        stage.server.kill()
        stage.server.start(wait=False)

    found = traffic(stage, requests, rate, patience=START, happens=[(1 / 3, kill)])
    return found | {"held": stage.idle() - held}


def replaced(stage: Stage, requests: int) -> dict[str, float]:
    """Files of five prompts are replaced: four by what cannot be used, which nobody must notice, one by a new version.

    While that one is replaced either answer is right, afterwards only the new one.
    """
    stage.server.start()
    rate = LOAD * stage.warm_up()
    held, refused = stage.idle(), []
    happens = [(0.1 * (turn + 1), lambda fault=fault: fault(stage)) for turn, fault in enumerate(FAULTS)]
    happens += [(0.6, lambda: refused.append(stage.refused(BROKEN))), (0.7, lambda: mend(stage))]
    before, new = stage.of("p4"), renewed(stage)
    both = [Question(q.model, q.text, q.tokens, (*q.answers, *of_new(new, q.text))) for q in before]
    others = [question for question in stage.questions if question.model != "p4"]
    stage.questions = others + both
    found = traffic(stage, requests, rate, happens=happens)
    still = stage.refused(0)
    stage.questions = others + new
    after = verdict(asyncio.run(drive(stage.server.address, stage.one_each(), [0.0] * len(stage.one_each()))))
    found["wrong"] += after["wrong"] + still
    found["failed"] += after["failed"]
    stage.questions = others + before
    copy(stage.spare / "good" / "p4", stage.prompts / "p4")
    return found | {"held": stage.idle() - held, "refused": refused[0]}


def renewed(stage: Stage) -> list[Question]:
    """The questions of p4 with the answers of the version that replaces it."""
    if "new" not in stage.model.peft_config:
        stage.model.load_adapter(stage.spare / "new", adapter_name="new")
    found = offline(stage.model, stage.tokenizer, ["new"], stage.wordings, stage.new)
    return [Question("p4", question.text, question.tokens, question.answers) for question in found]


def of_new(new: Sequence[Question], text: str) -> Iterator[tuple[str, ...]]:
    for question in new:
        if question.text == text:
            yield from question.answers


def garbage(stage: Stage) -> None:
    (stage.prompts / "p0" / WEIGHTS).write_bytes(b"garbage" * 1000)


def half(stage: Stage) -> None:
    path = stage.prompts / "p1" / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_another_model(stage: Stage) -> None:
    copy(stage.spare / "other" / "p0", stage.prompts / "p2")


def broken_config(stage: Stage) -> None:
    (stage.prompts / "p3" / CONFIG).write_text('{"peft_type": "PREFIX_')


def good_one(stage: Stage) -> None:
    copy(stage.spare / "new", stage.prompts / "p4")


def mend(stage: Stage) -> None:
    for number in range(4):
        copy(stage.spare / "good" / f"p{number}", stage.prompts / f"p{number}")


def copy(source: Path, target: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(source / name, target / name)


FAULTS = (garbage, half, of_another_model, broken_config, good_one)
CASES: dict[str, Callable[[Stage, int], dict[str, float]]] = {"load": load, "killed": killed, "replaced": replaced}


# ---- traffic ---------------------------------------------------------------------------------------------------------


def traffic(
    stage: Stage,
    requests: int,
    rate: float,
    patience: float = 0.0,
    leaving: float = 0.0,
    happens: Sequence[tuple[float, Callable[[], None]]] = (),
) -> dict[str, float]:
    """So many requests at a rate, and what happens meanwhile: at shares of the time, one after the other."""
    when = arrivals(requests, rate)

    async def both() -> list[Outcome]:
        events = asyncio.create_task(_events([(share * when[-1], event) for share, event in happens]))
        outcomes = await drive(stage.server.address, calls(stage.questions, requests, leaving=leaving), when, patience)
        await events
        return outcomes

    begun = time.perf_counter()
    outcomes = asyncio.run(both())
    seconds = time.perf_counter() - begun
    found = verdict(outcomes)
    return {**found, "time": seconds, "speed": found["tokens"] / seconds, "rate": rate}


async def _events(events: Sequence[tuple[float, Callable[[], None]]]) -> None:
    begun = time.perf_counter()
    for at, event in events:
        await asyncio.sleep(max(0.0, begun + at - time.perf_counter()))
        await asyncio.to_thread(event)


TABLE = Table("serving_load", __doc__ or "", groups, COLUMNS, NOTE)


def run(arguments: Sequence[str] | None = None) -> None:
    main(TABLE, arguments)


if __name__ == "__main__":
    run()
