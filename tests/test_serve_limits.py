"""Limits of the server: bodies, the queue, time; and clients that leave before their answer is there."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_kit import BASE, TEXT, Api, Prompts, complete, serving, write_prompts

from softprompt.serve.logs import RECORD, Record
from softprompt.serve.sse import EventStream

ENDLESS: dict[str, Any] = {"tokens": 900, "extra_body": {"ignore_eos": True}}
BODY = {"model": "kv", "prompt": TEXT, "max_tokens": 900, "ignore_eos": True}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def api(prompts: Prompts) -> Iterator[Api]:
    """Two answers at a time, one being made and one waiting; bodies of 2,000 bytes."""
    with serving(prompts.folder, max_batch=1, max_waiting=1, max_body=2000) as api:
        yield api


def tokens_made(api: Api) -> float:
    """Completion tokens of the prompt so far."""
    lines = api.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith('softprompt_completion_tokens_total{model="kv"}')]
    return float(found[0].split()[-1]) if found else 0


def requests_with(api: Api, status: int) -> float:
    lines = api.get("/metrics").text.splitlines()
    found = [line for line in lines if f'path="/v1/completions",status="{status}"' in line and "_total" in line]
    return sum(float(line.split()[-1]) for line in found)


def wait_for_one_more(api: Api, status: int, before: float) -> None:
    """A request is counted just after its last byte: wait until it is; fails if it never is."""
    end = time.monotonic() + 30
    while requests_with(api, status) != before + 1:
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- clients that do not read ------------------------------------------------------------------------------------


def test_a_stream_that_nobody_reads_ends() -> None:
    """The server's buffers are full, so what it sends waits; its places are free again when the time is over."""
    closed, sent = [], []

    async def events() -> AsyncGenerator[str, None]:
        try:
            while True:
                yield "data: {}\n\n"
        finally:
            closed.append(True)

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 3:
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    record = Record("/v1/completions")
    scope = {"type": "http", RECORD: record}
    asyncio.run(EventStream(events(), 0.1)(scope, receive, send))
    assert closed and len(sent) == 4 and record.error == "timeout"


# ---- bodies ------------------------------------------------------------------------------------------------------


def in_parts(size: int) -> Iterator[bytes]:
    """A body whose length nobody tells beforehand."""
    for _ in range(size // 1000):
        yield b"x" * 1000


@pytest.mark.parametrize("size", [3000, 15_000, 40_000])  # the last is not even read to its end
@pytest.mark.parametrize("whole", [True, False])
def test_a_long_body_is_refused(api: Api, size: int, whole: bool) -> None:
    content: Any = b"x" * size if whole else in_parts(size)
    answer = api.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_a_body_of_just_the_length(api: Api) -> None:
    short = f'{{"model": "kv", "prompt": "{TEXT}", "max_tokens": 1'.encode()
    fits = short + b" " * (1999 - len(short)) + b"}"
    headers = {"Content-Type": "application/json"}
    assert api.post("/v1/completions", content=fits, headers=headers).status_code == 200
    assert api.post("/v1/completions", content=fits + b" ", headers=headers).status_code == 413


# ---- the queue ---------------------------------------------------------------------------------------------------


def test_too_many_requests_are_told_when_to_come_back(prompts: Prompts, api: Api) -> None:
    with api.client(strict=False) as client, ThreadPoolExecutor(1) as pool:
        first = complete(client, **ENDLESS, stream=True)
        second = pool.submit(complete, client)  # it waits, since one is answered at a time
        while api.service.gate.inside < 2:
            assert not second.done()
        with pytest.raises(openai.RateLimitError) as error:
            complete(client, BASE)
        assert error.value.response.headers["Retry-After"] == "1" and error.value.code == "queue_full"
        assert api.get("/health").status_code == 200
        first.close()
        assert second.result(60).choices[0].text == prompts.offline("kv")
        api.idle()
        assert complete(client).choices[0].text == prompts.offline("kv")


def test_one_request_for_too_much(api: Api) -> None:
    with api.client(strict=False) as client:
        for more in ({"n": 3}, {"prompt": ["a", "b", "c"]}, {"prompt": ["a", "b"], "n": 2}):
            with pytest.raises(openai.BadRequestError, match="2 are possible"):
                complete(client, **more)
        assert len(complete(client, n=2, tokens=1).choices) == 2


# ---- time --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_answer_that_takes_too_long(prompts: Prompts) -> None:
    with serving(prompts.folder, timeout=0.7) as api, api.client(strict=False) as client:
        with pytest.raises(openai.APIStatusError) as error:
            complete(client, **ENDLESS)
        assert (error.value.status_code, error.value.code) == (504, "timeout")
        assert error.value.response.headers["x-should-retry"] == "false"
        api.idle()
        with pytest.raises(openai.APIError) as late:  # as a status, or as an event where the answer had begun
            list(complete(client, **ENDLESS, stream=True))
        assert late.value.code == "timeout"
        messages: Any = [{"role": "user", "content": "A"}]
        more: Any = {"extra_body": {"ignore_eos": True}}
        with pytest.raises(openai.APIError) as late:
            list(client.chat.completions.create(model="kv", messages=messages, stream=True, **more))
        assert late.value.code == "timeout"
        api.idle()


@pytest.mark.slow
def test_a_body_that_does_not_come(prompts: Prompts) -> None:
    never = threading.Event()

    def body() -> Iterator[bytes]:
        yield b"{"
        never.wait(1.5)
        yield b"}"

    with serving(prompts.folder, timeout=0.3) as api:
        try:
            answer = api.post("/v1/completions", content=body(), headers={"Content-Type": "application/json"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
        except httpx.TransportError:
            pass  # the server had closed the connection before the rest was sent
        wait_for_one_more(api, 408, 0)


# ---- clients that leave ------------------------------------------------------------------------------------------


def test_leaving_a_stream_ends_its_answer(api: Api) -> None:
    before, gone = tokens_made(api), requests_with(api, 499)
    with api.client(strict=False) as client:
        stream = complete(client, **ENDLESS, stream=True)
        next(stream)
        next(stream)
        stream.close()
        api.idle()
    wait_for_one_more(api, 499, gone)
    assert 2 <= tokens_made(api) - before < 900
    assert api.service.engine.counts()["cache_tokens"] == 0


def test_leaving_before_the_answer_ends_it(api: Api) -> None:
    before, gone = tokens_made(api), requests_with(api, 499)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{api.address}/v1/completions", json=BODY, timeout=0.3)
    api.idle()
    wait_for_one_more(api, 499, gone)
    assert tokens_made(api) - before < 900


def test_leaving_while_waiting_frees_the_place(prompts: Prompts, api: Api) -> None:
    with api.client(strict=False) as client:
        first = complete(client, **ENDLESS, stream=True)
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{api.address}/v1/completions", json={**BODY, "stream": True}, timeout=0.2)
            while api.service.gate.inside > 1:
                pass
        first.close()
        api.idle()
        assert complete(client).choices[0].text == prompts.offline("kv")


def test_one_wrong_choice_ends_the_others(api: Api, tmp_path: Path) -> None:
    """Of two texts the second can never run: nothing goes on for the first."""
    answer = api.post("/v1/completions", {**BODY, "prompt": [[1, 5], [1, 99999]]})
    assert answer.status_code == 400
    api.idle()


def test_a_server_that_stops_ends_its_streams(prompts: Prompts) -> None:
    with serving(prompts.folder, timeout=600) as api, api.client(strict=False) as client:
        stream = complete(client, **ENDLESS, stream=True)
        next(stream)
        api.service.engine._stopping = True  # type: ignore[attr-defined]
        with pytest.raises(openai.APIError):
            list(stream)
        assert api.get("/health").status_code == 503
        with pytest.raises(openai.InternalServerError) as error:
            complete(client)
        assert (error.value.status_code, error.value.code) == (503, "engine_error")
