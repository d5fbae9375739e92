"""The server's demo, as a user starts it, asked by OpenAI's client."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import OpenAI

from softprompt.cli.prompted import open_prompted
from softprompt.embedded import PATH
from softprompt.evaluate import generate_texts
from softprompt.serve.demo import DEMO_PROMPTS


@dataclass(frozen=True)
class Demo:
    """A running demo: its folder, and what it printed until it served."""

    out: Path
    printed: list[str]
    port: int


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    out = tmp_path_factory.mktemp("serve-demo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "softprompt.serve.demo", "--out", str(out), "--steps", "2", "--port", str(port)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "500"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        assert run.stdout is not None
        printed: list[str] = []
        for line in run.stdout:
            printed.append(line)
            if "startup complete" in line:
                break
        try:
            assert run.poll() is None, "".join(printed)
            yield Demo(out, printed, port)
        finally:
            run.send_signal(signal.SIGINT)
            run.communicate(timeout=60)
        assert run.returncode in (0, 130)


@pytest.mark.slow
def test_each_prompt_has_a_curl_line_that_answers_as_the_prompt_does(demo: Demo) -> None:
    client = OpenAI(base_url=f"http://127.0.0.1:{demo.port}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["base", *sorted(prompt.name for prompt in DEMO_PROMPTS)]
    lines = [line for line in demo.printed if line.startswith("curl ")]
    assert len(lines) == len(DEMO_PROMPTS)
    for prompt, line in zip(DEMO_PROMPTS, lines, strict=True):
        words = shlex.split(line)
        assert words[1] == f"http://127.0.0.1:{demo.port}/v1/completions"
        asked = json.loads(words[words.index("-d") + 1])
        assert asked["model"] == prompt.name
        answer = client.completions.create(**asked)
        opened = open_prompted(demo.out / "prompts" / prompt.name, str(PATH), device="cpu")
        texts = generate_texts(opened.model, opened.tokenizer, [asked["prompt"]], asked["max_tokens"])
        assert answer.choices[0].text.strip() == texts[0]
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0


@pytest.mark.slow
def test_the_page_is_there(demo: Demo) -> None:
    import httpx

    found = httpx.get(f"http://127.0.0.1:{demo.port}/")
    assert found.status_code == 200
    assert "text/html" in found.headers["content-type"]
