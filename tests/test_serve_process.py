"""`softprompt serve` as a process: killed under load and started again, and asked to stop."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from api_kit import BASE, Prompts, complete, write_prompts
from openai import OpenAI

from softprompt.embedded import PATH

NAMES = (BASE, "kv", "words", "team/guest")
ENDLESS: dict[str, Any] = {"tokens": 900, "extra_body": {"ignore_eos": True}, "stream": True}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@contextmanager
def process(prompts: Prompts, port: int, *flags: str, **more: str) -> Iterator[tuple[subprocess.Popen[str], OpenAI]]:
    """A server that answers, and a client of it."""
    line = [sys.executable, "-m", "softprompt.cli", "serve", str(PATH), "--prompts", str(prompts.folder)]
    line += ["--engine", "transformers", "--name", BASE, "--port", str(port), *flags]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env={**os.environ, **more}) as server:
        assert server.stderr is not None
        try:
            for text in server.stderr:
                said = json.loads(text)  # every line of the log is JSON
                if said["message"].startswith("serving"):
                    break
            address = said["message"].split(" at ")[1]
            with OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=120) as client:
                yield server, client
        finally:
            server.kill()
            server.stderr.read()


@pytest.mark.slow
def test_killed_under_load_and_started_again(prompts: Prompts, tmp_path: Path) -> None:
    objects = tmp_path / "objects"
    expected = {name: prompts.offline(name) for name in NAMES}
    port = 0
    for _ in range(2):  # the second finds the first one's port, and the copies it left
        with process(prompts, port, "--objects", str(objects)) as (server, client), ThreadPoolExecutor(8) as pool:
            port = client.base_url.port or 0
            streams = [complete(client, name, **ENDLESS) for name in NAMES]
            answers = list(pool.map(lambda name: complete(client, name).choices[0].text, NAMES * 4))
            assert answers == [expected[name] for name in NAMES * 4]
            server.kill()
            for stream in streams:
                with pytest.raises(openai.APIConnectionError):
                    list(stream)
            assert server.wait(30) == -signal.SIGKILL
    assert not [each for each in objects.iterdir() if each.name.startswith(".")]


@pytest.mark.slow
def test_asked_to_stop(prompts: Prompts, tmp_path: Path) -> None:
    """What is under way may end, the status is 0, and nothing temporary stays."""
    with process(prompts, 0, TMPDIR=str(tmp_path)) as (server, client):
        stream = complete(client, **{**ENDLESS, "tokens": 100})
        next(stream)
        server.send_signal(signal.SIGTERM)
        assert sum(len(chunk.choices) for chunk in stream) > 50
        assert server.wait(60) == 0
        with pytest.raises(openai.APIConnectionError):
            complete(client)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_port_that_is_taken(prompts: Prompts) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        line = ["serve", str(PATH), "--prompts", str(prompts.folder), "--engine", "transformers", "--port", port]
        run = subprocess.run(
            [sys.executable, "-m", "softprompt.cli", *line], capture_output=True, text=True, check=False
        )
    assert run.returncode == 2 and f"cannot listen on 127.0.0.1:{port}" in run.stderr
    assert "Traceback" not in run.stderr
