"""A real server under load and faults: every answer is the one that its prompt gives alone; and the benchmarks run."""

from __future__ import annotations

import importlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import peft_cells
import pytest
import tiny

from softprompt.serve import ServeOptions

PROMPTS, WORDINGS, NEW, REQUESTS = 6, 2, 8, 50


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)  # a limit would hold for all tests that follow


def load(name: str) -> Any:
    return importlib.import_module(name)


class InThread:
    """A server as `serving_server.Server` is one, in a thread of this process."""

    def __init__(self, base: Path, prompts: Path, objects: Path) -> None:
        self.kit = load("serving_server")
        port = self.kit.free_port()
        self.address = f"http://127.0.0.1:{port}"
        self.options = ServeOptions(
            str(base), prompts, engine="transformers", port=port, name="base", objects=objects, watch_seconds=0.02
        )
        self._open: ExitStack | None = None

    def start(self, wait: bool = True) -> None:
        import uvicorn

        from softprompt.serve.app import open_app

        self._open = ExitStack()
        app = self._open.enter_context(open_app(self.options))
        server = uvicorn.Server(uvicorn.Config(app, port=self.options.port, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run)
        self._open.callback(thread.join)
        self._open.callback(lambda: setattr(server, "should_exit", True))
        thread.start()
        while wait and not server.started:
            assert thread.is_alive()
            time.sleep(0.01)

    def kill(self) -> None:
        """It takes nothing new, and ends what it has begun."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def get(self, path: str) -> Any:
        return self.kit.httpx.get(self.address + path, trust_env=False).raise_for_status()

    def metrics(self) -> dict[str, float]:
        return self.kit.read_metrics(self.get("/metrics").text)

    def resident(self) -> int:
        return load("counts").status("VmRSS") or 0


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "benchmarks"))
        # as many words as the tokenizer that the stage saves with it; wider than the other model that it has prompts of
        base = tiny.build("llama", vocab_size=4096, hidden_size=48)
        assert base.generation_config is not None
        base.generation_config.eos_token_id = None
        return load("serving_load").Stage(base, "llama", PROMPTS, WORDINGS, tmp_path_factory.mktemp("load"), NEW)


@pytest.fixture
def stage(made: Any) -> Iterator[Any]:
    made.server = InThread(made.folder / "base", made.prompts, made.folder / "objects")
    yield made
    made.server.kill()


@pytest.mark.slow
def test_every_answer_under_load_is_the_offline_one(stage: Any) -> None:
    found = load("serving_load").load(stage, REQUESTS)
    assert (found["answered"], found["wrong"], found["failed"], found["held"]) == (REQUESTS, 0, 0, 0)
    assert found["left"] > 0


@pytest.mark.slow
def test_broken_files_of_prompts_harm_nobody_and_good_ones_are_served(stage: Any) -> None:
    found = load("serving_load").replaced(stage, REQUESTS)
    assert (found["answered"], found["wrong"], found["failed"], found["held"]) == (REQUESTS, 0, 0, 0)
    assert found["refused"] == load("serving_load").BROKEN


@pytest.mark.slow
def test_a_server_that_ends_under_load_and_comes_back(stage: Any) -> None:
    found = load("serving_load").killed(stage, REQUESTS)
    assert (found["answered"], found["wrong"], found["failed"], found["held"]) == (REQUESTS, 0, 0, 0)


# ---- the judge -------------------------------------------------------------------------------------------------------


def outcome(text: str, new: int = 2, **more: Any) -> Any:
    traffic = load("serving_traffic")
    question = traffic.Question("a", "x", 3, (("o", "on", "one"),))
    options = {"leaves": more.pop("leaves", False), "stream": more.pop("stream", False)}
    return traffic.Outcome(traffic.Call(question, new, **options), text, **{"finish": "length", **more})


def test_the_judge_sees_what_is_wrong() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert not outcome("on").wrong
    assert not outcome("on", usage=usage).wrong
    assert not outcome("o", leaves=True, finish=None).wrong
    assert outcome("om").wrong
    assert outcome("o").wrong
    assert outcome("one").wrong
    assert outcome("on", finish="stop").wrong
    assert outcome("on", usage={**usage, "prompt_tokens": 4}).wrong
    assert outcome("m", leaves=True).wrong
    found = load("serving_traffic").verdict([outcome("on"), outcome("om"), outcome("", error="status 500")])
    assert (found["answered"], found["wrong"], found["failed"]) == (2, 1, 1)


def test_arrivals_are_poisson() -> None:
    times = load("serving_traffic").arrivals(4000, rate=20.0, seed=1)
    gaps = [later - one for one, later in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert abs(mean - 1 / 20) < 0.005
    assert abs(sum(gap < mean for gap in gaps) / len(gaps) - 0.632) < 0.03  # 1 − 1/e of them are shorter than the mean


# ---- the benchmarks --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_passes_flops_and_keys_of_an_engine_by_hand() -> None:
    """Four requests go on together, though the first may begin before the others are there."""
    serving, speed = load("serving"), load("speed")
    options = speed.Options(model="tiny-llama", rounds=1)
    group = serving.serving_group(options, "tiny-llama", "prefix", 2, 5, 7, 4, 3)
    bench = speed.Bench(options)
    with speed.quiet():
        found = load("measure").compare(group.arms(bench), 1, "cpu")
    assert group.after is not None
    group.after(bench, found)
    assert all("error" not in arm for arm in found.values()), found
    assert found["PEFT"]["passes"] == 4 * 3
    assert 3 <= found["bare"]["passes"] <= 6
    assert 3 <= found["ours"]["passes"] <= 6
    if not peft_cells.LAGS:
        assert found["ours"]["same"] == 4
    assert found["bare"]["flops"] < found["ours"]["flops"]
    one_token = 2 * 2 * 2 * 8 * 4  # keys and values of two layers, two heads of eight, four bytes each
    assert found["bare"]["kv"] >= 4 * (7 + 3 - 1) * one_token
    assert found["PEFT"]["kv"] >= (5 + 7 + 3 - 1) * one_token


@pytest.mark.slow
@pytest.mark.full  # by default a server in this process is stopped, and test_serve_process.py kills a real one
def test_the_load_benchmark_with_a_server_of_its_own(tmp_path: Path) -> None:
    """In a process that really is killed."""
    load("serving_load").run(["--quick", "--only", "killed", "--threads", "1", "--results", str(tmp_path)])
    for row in json.loads((tmp_path / "serving_load.json").read_text()):
        found = row["arms"]["ours"]
        assert "error" not in found, found
        assert (found["wrong"], found["failed"], found["held"]) == ([0], [0], [0])
    assert (tmp_path / "serving_load.md").read_text().startswith("| case | by |")


def test_the_vllm_benchmark_says_where_it_runs(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make test-vllm"):
        load("serving_vllm").run(["--quick", "--results", str(tmp_path)])
