"""`softprompt serve BASE --prompts DIR --engine vllm`, asked by the official client: vLLM's own API, with prompts.

One of the prompts is the keys and values of a text. The base model with that text before the question must then give
the same answers as the prompt: so whatever vLLM can do is compared with vLLM itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kit
import openai
import psutil
import pytest
import tiny
import torch

from softprompt import SoftPromptModel, get_peft_model, initialize_kv_prefix_from_text
from softprompt.serve.filled import in_template
from softprompt.template import Template

STORY = "the cat sat on the mat and the dog ran to the red house by the river while it rained"
QUESTION = " all night long the cat"
ADMIN, ALL, FEW = "admin-key-of-the-test", "key-for-all", "key-for-few"
SLOTS = "the [P*2] {text} by [P] => {answer}"


@dataclass
class Server:
    """A running server and what is behind it."""

    address: str
    base: Any
    prompts: Path
    log: Path
    process: subprocess.Popen[bytes]
    clients: dict[str, openai.OpenAI] = field(default_factory=dict)

    def client(self, key: str = ALL) -> openai.OpenAI:
        if key not in self.clients:
            self.clients[key] = openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=60)
        return self.clients[key]

    def get(self, path: str, key: str = ALL) -> str:
        return self._call(urllib.request.Request(self.address + path), key)

    def post(self, path: str, body: Any, key: str = ADMIN) -> Any:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return json.loads(self._call(urllib.request.Request(self.address + path, data, headers), key))

    def _call(self, request: urllib.request.Request, key: str) -> str:
        request.add_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """The engine's process stops; the API goes on."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        (engine,) = (each for each in below if "EngineCore" in each.name())
        engine.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            engine.send_signal(signal.SIGCONT)

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    base, prompts = kit.build("llama"), folder / "prompts"
    kit.save_base("llama", folder / "base")
    save_story(base, prompts / "story")
    for seed, (name, method) in enumerate([("prefix", "prefix_tuning"), ("team/vectors", "prompt_tuning")]):
        kit.save_prompt(base, kit.config_of(method), prompts / name, seed)
    kit.save_prompt(base, kit.config_of("multitask_prompt_tuning"), prompts / "many", 5)
    inside = kit.config_of("p_tuning", Template(SLOTS).num_virtual_tokens, template=SLOTS)
    kit.save_prompt(base, inside, prompts / "inside", 6)
    kit.save_prompt(base, kit.config_of("prompt_tuning", 5, placement="after_bos"), prompts / "behind", 7)
    keys = folder / "keys.yaml"
    keys.write_text(json.dumps({ALL: "*", FEW: ["team/*"]}))
    with started(folder, keys) as running:
        yield running


@contextlib.contextmanager
def started(folder: Path, keys: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "softprompt.cli",
        "serve",
        str(folder / "base"),
        "--prompts",
        str(folder / "prompts"),
    ]
    command += ["--engine", "vllm", "--port", str(port), "--dtype", "float32", "--max-length", str(kit.CONTEXT)]
    command += ["--keys", str(keys), "--watch-seconds", "0.5", "--", "--enforce-eager", "--block-size", "32"]
    command += ["--kv-cache-memory-bytes", str(32 << 20), "--enable-prompt-embeds", "--enable-prompt-tokens-details"]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    environment |= {"SOFTPROMPT_ADMIN_KEY": ADMIN, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    server = Server(f"http://127.0.0.1:{port}", kit.build("llama"), folder / "prompts", log, process)
    try:
        _wait(server, process)
        yield server
    finally:
        for client in server.clients.values():
            client.close()
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1800):
        assert process.poll() is None, server.log.read_text()[-4000:]
        with contextlib.suppress(OSError):
            server.get("/health")
            return
        time.sleep(0.5)
    raise AssertionError(server.log.read_text()[-4000:])


def save_story(base: Any, folder: Path) -> None:
    tokenizer = tiny.tokenizer()
    count = len(tokenizer(STORY)["input_ids"])
    model = get_peft_model(base, kit.config_of("prefix_tuning", count))
    initialize_kv_prefix_from_text(model, tokenizer, text=STORY, use_chat_template=False)
    model.save_pretrained(folder)


def expected(server: Server, name: str, text: str, count: int, **options: Any) -> list[int]:
    """The tokens that transformers answers."""
    model = SoftPromptModel.from_pretrained(server.base, server.prompts / name)
    return kit.greedy(model, tiny.tokenizer()(text)["input_ids"], count, **options).ids


def expected_inside(server: Server, text: str, count: int) -> list[int]:
    model = SoftPromptModel.from_pretrained(server.base, server.prompts / "inside")
    row = in_template(SLOTS, text, tiny.tokenizer())
    return kit.greedy(model, list(row.ids), count, slots=torch.tensor([row.slots])).ids


def tokens(choice: Any) -> list[int]:
    """What vLLM adds on request: the model's words are no valid text, and so no measure."""
    return choice.model_extra["token_ids"]


EXACT: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
SEVERAL: dict[str, Any] = {"n": 3, "temperature": 1, "extra_body": {**EXACT["extra_body"], "top_k": 1}}


def test_names(server: Server) -> None:
    models = {model.id: model for model in server.client().models.list()}
    assert set(models) == {"base", "story", "prefix", "team/vectors", "many:0", "many:1", "inside", "behind"}
    assert {model.id for model in server.client(FEW).models.list()} == {"team/vectors"}
    assert str(server.prompts) not in server.get("/v1/models")


@pytest.mark.parametrize("name", ["prefix", "team/vectors"])
def test_completions(server: Server, name: str) -> None:
    response = server.client().completions.with_raw_response.create(model=name, prompt=QUESTION, max_tokens=12, **EXACT)
    answer = response.parse()
    assert tokens(answer.choices[0]) == expected(server, name, QUESTION, 12)
    real = len(tiny.tokenizer()(QUESTION)["input_ids"])
    assert answer.usage is not None and answer.usage.prompt_tokens == real
    assert answer.usage.total_tokens == real + 12
    length = {"prefix": kit.LENGTHS["prefix_tuning"], "team/vectors": kit.LENGTHS["prompt_tuning"]}[name]
    assert response.headers["x-softprompt-virtual-tokens"] == str(length)
    assert f'softprompt_virtual_tokens_total{{model="{name}"}}' in server.get("/metrics")
    pieces = server.client().completions.create(model=name, prompt=QUESTION, max_tokens=12, stream=True, **EXACT)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == answer.choices[0].text


def test_several_texts_in_one_request(server: Server) -> None:
    """Each is answered by itself, and the header adds up their virtual tokens."""
    asked, create = [QUESTION, "red", " the river by the red house"], server.client().completions.with_raw_response
    for name, length in [("prefix", kit.LENGTHS["prefix_tuning"]), ("inside", 3)]:
        response = create.create(model=name, prompt=asked, max_tokens=8, **EXACT)
        assert response.headers["x-softprompt-virtual-tokens"] == str(3 * length)
        wanted = [
            expected_inside(server, text, 8) if name == "inside" else expected(server, name, text, 8) for text in asked
        ]
        assert [tokens(choice) for choice in response.parse().choices] == wanted


def test_one_task_of_several(server: Server) -> None:
    found = [
        server.client().completions.create(model=f"many:{task}", prompt=QUESTION, max_tokens=12, **EXACT)
        for task in (0, 1)
    ]
    for task, answer in enumerate(found):
        tasks = {"task_ids": torch.tensor([task])}
        assert tokens(answer.choices[0]) == expected(server, "many", QUESTION, 12, **tasks)
    assert found[0].choices[0].text != found[1].choices[0].text


def test_chat_and_responses(server: Server) -> None:
    messages: Any = [{"role": "user", "content": "the cat sat"}]
    text = tiny.tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for name in ("prefix", "team/vectors"):
        answer = server.client().chat.completions.create(model=name, messages=messages, max_tokens=10, **EXACT)
        assert tokens(answer.choices[0]) == expected(server, name, text, 10)
        wanted = answer.choices[0].message.content
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(tiny.tokenizer()(text)["input_ids"])
        pieces = server.client().chat.completions.create(
            model=name, messages=messages, max_tokens=10, stream=True, **EXACT
        )
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == wanted
        response = server.client().responses.create(
            model=name, input=messages, max_output_tokens=10, temperature=0, extra_body={"ignore_eos": True}
        )
        assert response.output_text == wanted
        assert response.usage is not None and response.usage.input_tokens == answer.usage.prompt_tokens
        events = server.client().responses.create(
            model=name,
            input=messages,
            max_output_tokens=10,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        *_, last = seen = list(events)
        assert "".join(event.delta for event in seen if event.type == "response.output_text.delta") == wanted
        assert last.type == "response.completed" and last.response.usage == response.usage


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.9, "seed": 3, "top_p": 0.9},
    "several": {"temperature": 0.9, "seed": 4, "n": 3},
    "beams": {"temperature": 0, "n": 3, "extra_body": {"use_beam_search": True}},
    "penalties": {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    "stopped": {"temperature": 0, "stop": ["e"]},
    "logprobs": {"temperature": 0, "logprobs": 5},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_made_of_a_text_is_that_text(server: Server, way: str) -> None:
    options = {"max_tokens": 12, **WAYS[way]}
    options["extra_body"] = {"ignore_eos": True, **options.get("extra_body", {})}
    tokenizer = tiny.tokenizer()
    story, question = tokenizer(STORY)["input_ids"], tokenizer(QUESTION)["input_ids"]
    whole = server.client().completions.create(model="base", prompt=story + question, **options)
    short = server.client().completions.create(model="story", prompt=question, **options)
    assert [choice.text for choice in short.choices] == [choice.text for choice in whole.choices]
    assert [choice.finish_reason for choice in short.choices] == [choice.finish_reason for choice in whole.choices]
    if way == "logprobs":
        one, other = short.choices[0].logprobs, whole.choices[0].logprobs
        assert one is not None and other is not None
        assert one.tokens == other.tokens
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-4)


def test_echo_and_its_logprobs_leave_virtual_tokens_out(server: Server) -> None:
    """The first token of the text has none, as the first of any text; cached blocks have none to give either."""
    tokenizer = tiny.tokenizer()
    story, question = tokenizer(STORY)["input_ids"], tokenizer(QUESTION)["input_ids"]
    for _ in range(2):
        options: Any = {"max_tokens": 4, "logprobs": 3, "echo": True, "temperature": 0}
        options["extra_body"] = {"ignore_eos": True, "return_tokens_as_token_ids": True}
        whole = server.client().completions.create(model="base", prompt=story + question, **options).choices[0]
        short = server.client().completions.create(model="story", prompt=question, **options).choices[0]
        assert short.text == whole.text.removeprefix(STORY) and short.text.startswith(QUESTION)
        mine, theirs = short.logprobs, whole.logprobs
        assert mine is not None and theirs is not None
        assert len(mine.tokens) == len(question) + 4
        assert mine.token_logprobs[0] is None
        rest = len(question) + 3
        assert mine.tokens[-rest:] == theirs.tokens[-rest:]
        assert mine.token_logprobs[1:] == pytest.approx(theirs.token_logprobs[-rest:], abs=1e-4)
        assert [set(place) for place in mine.top_logprobs[1:]] == [set(place) for place in theirs.top_logprobs[-rest:]]


def test_virtual_tokens_inside_the_text(server: Server) -> None:
    """P-tuning's template is filled with the text, and its vectors stand where it says."""
    slots = in_template(SLOTS, "red house", tiny.tokenizer()).slots
    assert sum(slot >= 0 for slot in slots) == 3 and slots[0] < 0
    for options in ({}, SEVERAL, {"extra_body": {**EXACT["extra_body"], "add_special_tokens": False}}):
        answer = server.client().completions.create(
            model="inside", prompt="red house", max_tokens=10, **EXACT | options
        )
        assert [tokens(choice) for choice in answer.choices] == [
            expected_inside(server, "red house", 10)
        ] * options.get("n", 1)
        assert answer.usage is not None and answer.usage.prompt_tokens == sum(slot < 0 for slot in slots)


def test_virtual_tokens_behind_the_first_token(server: Server) -> None:
    for options in ({}, SEVERAL):
        answer = server.client().completions.create(model="behind", prompt=QUESTION, max_tokens=10, **EXACT | options)
        count = options.get("n", 1)
        assert [tokens(choice) for choice in answer.choices] == [expected(server, "behind", QUESTION, 10)] * count
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(tiny.tokenizer()(QUESTION)["input_ids"])


def test_a_template_takes_a_whole_text_and_nothing_else(server: Server) -> None:
    """What was cut, token ids, and conversations, which are no field of a template."""
    client, messages = server.client(), [{"role": "user", "content": "cat"}]
    for call in (
        lambda: client.completions.create(model="inside", prompt=QUESTION, extra_body={"truncate_prompt_tokens": 2}),
        lambda: client.completions.create(model="inside", prompt=[5, 6, 7]),
        lambda: client.chat.completions.create(model="inside", messages=messages),
        lambda: client.chat.completions.create(model="inside", messages=messages, extra_body={"echo": True}),
        lambda: client.responses.create(model="inside", input=messages),
    ):
        with pytest.raises(openai.BadRequestError, match="send it to /v1/completions"):
            call()


@pytest.mark.parametrize("name", ["inside", "behind"])
def test_no_beams_where_virtual_tokens_stand_inside(server: Server, name: str) -> None:
    body = {"use_beam_search": True}
    with pytest.raises(openai.BadRequestError, match="without use_beam_search"):
        server.client().completions.create(model=name, prompt=QUESTION, n=2, max_tokens=5, extra_body=body)
    with pytest.raises(openai.BadRequestError, match="without use_beam_search"):
        server.client().chat.completions.create(
            model=name, messages=[{"role": "user", "content": "cat"}], n=2, max_tokens=5, extra_body=body
        )


def test_beams_end_where_the_room_ends_and_count_once(server: Server) -> None:
    length, body = kit.LENGTHS["prefix_tuning"], {"use_beam_search": True, "ignore_eos": True}
    long = kit.texts(1, (kit.CONTEXT - length - 5,))[0]
    before = server.metric('softprompt_virtual_tokens_total{model="prefix"}')
    for text, count in ((long, 5), (long[:20], 12)):
        response = server.client().completions.with_raw_response.create(
            model="prefix", prompt=text, n=2, max_tokens=12, temperature=0, extra_body=body
        )
        assert response.headers["x-softprompt-virtual-tokens"] == str(length)
        usage = response.parse().usage
        assert usage is not None and usage.completion_tokens == 2 * count
    assert server.metric('softprompt_virtual_tokens_total{model="prefix"}') - before == 2 * length
    with pytest.raises(openai.BadRequestError, match="no room for an answer"):
        server.client().completions.create(model="prefix", prompt=long + long[:5], n=2, extra_body=body)


HOSTILE: list[dict[str, Any]] = [
    {"kv_transfer_params": {"softprompt": "f" * 64, "softprompt_length": 3}},
    {"kv_transfer_params": {"softprompt": "../../etc/passwd"}},
    {"kv_transfer_params": {"softprompt_length": 10**12}},
    {"vllm_xargs": {"kv_transfer_params": "softprompt"}},
    {"vllm_xargs": {"kv_transfer_params": ["softprompt", "softprompt_length"]}},
    {"cache_salt": "softprompt@" + "f" * 64},
]


@pytest.mark.parametrize("name", ["base", "prefix"])
@pytest.mark.parametrize("body", HOSTILE)
def test_requests_that_say_what_only_the_server_says_are_refused(server: Server, name: str, body: Any) -> None:
    for call in (
        lambda: server.client().completions.create(model=name, prompt=QUESTION, extra_body=body),
        lambda: server.client().completions.create(model=name, prompt=QUESTION, stream=True, extra_body=body),
        lambda: server.client().chat.completions.create(
            model=name, messages=[{"role": "user", "content": "cat"}], extra_body=body
        ),
    ):
        with pytest.raises(openai.BadRequestError):
            call()


@pytest.mark.parametrize("name", ["../prefix", "prefix/", "nothing", "\0", "x" * 1_000_000, "many", "sha256:1"])
def test_names_that_are_none(server: Server, name: str) -> None:
    with pytest.raises(openai.NotFoundError):
        server.client().completions.create(model=name, prompt=QUESTION)


def test_what_does_not_fit(server: Server) -> None:
    """A text that alone would fit; an answer that is cut where the room ends."""
    long = kit.texts(1, (kit.CONTEXT - 30,))[0]
    with pytest.raises(openai.BadRequestError, match="virtual"):
        server.client().completions.create(model="prefix", prompt=long, max_tokens=1)
    long = long[: kit.CONTEXT - kit.LENGTHS["prefix_tuning"] - 5]
    answer = server.client().completions.create(model="prefix", prompt=long, max_tokens=20, **EXACT)
    assert answer.usage is not None and answer.usage.completion_tokens == 5
    with pytest.raises(openai.BadRequestError):
        server.client().completions.create(model="prefix", prompt=[], max_tokens=1)


def test_keys(server: Server) -> None:
    with pytest.raises(openai.NotFoundError):
        server.client(FEW).completions.create(model="prefix", prompt=QUESTION)
    with pytest.raises(openai.AuthenticationError):
        server.client("nobody").completions.create(model="prefix", prompt=QUESTION)
    assert server.client(FEW).completions.create(model="team/vectors", prompt=QUESTION, max_tokens=1).choices


def test_prompts_come_change_and_go(server: Server) -> None:
    """By the route for it, and by watching the folder."""
    client, folder = server.client(), server.prompts / "new"
    ask: Any = {"model": "new", "prompt": QUESTION, "max_tokens": 12, **EXACT}
    config = kit.config_of("prefix_tuning", 20)
    kit.save_prompt(server.base, config, folder, seed=20)
    server.post("/v1/prompts/load", {"name": "new"})
    first = tokens(client.completions.create(**ask).choices[0])
    assert first == expected(server, "new", QUESTION, 12)
    kit.save_prompt(server.base, config, folder, seed=21)
    server.post("/v1/prompts/load", {"name": "new"})
    second = tokens(client.completions.create(**ask).choices[0])
    assert second == expected(server, "new", QUESTION, 12) != first
    server.post("/v1/prompts/unload", {"name": "new"})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**ask)
    kit.save_prompt(server.base, config, folder, seed=22)
    for _ in range(100):
        with contextlib.suppress(openai.NotFoundError):
            client.completions.create(**ask)
            break
        time.sleep(0.2)
    third = tokens(client.completions.create(**ask).choices[0])
    assert third == expected(server, "new", QUESTION, 12)
    (folder / "adapter_model.safetensors").write_bytes(b"garbage")
    time.sleep(2)
    assert tokens(client.completions.create(**ask).choices[0]) == third
    listed = {each["name"]: each for each in json.loads(server.get("/v1/prompts"))["data"]}
    assert listed["new"]["error"]
    with pytest.raises(urllib.error.HTTPError, match="403") as refused:
        server.post("/v1/prompts/unload", {"name": "new"}, ALL)
    refused.value.close()


@pytest.mark.parametrize("kind", ["front", "after_bos"])
def test_streams_go_on_with_the_version_they_began_with(server: Server, kind: str) -> None:
    """One that has begun and one that waits, while the prompt is replaced, and while it is unloaded."""
    config, name, client = kit.config_of("prompt_tuning", 30, placement=kind), f"stream-{kind}", server.client()
    ask: Any = {"model": name, "prompt": QUESTION, "max_tokens": 150, "stream": True, **EXACT}
    kit.save_prompt(server.base, config, server.prompts / name, seed=30)
    server.post("/v1/prompts/load", {"name": name})
    found, wanted = [], []
    for act in ("load", "unload"):
        wanted.append(expected(server, name, QUESTION, 150))
        ended = server.metric("vllm:request_success_total")
        begun = client.completions.create(**ask)
        first = next(iter(begun))
        with server.standing_still():
            waiting = client.completions.create(**ask)
            if act == "load":
                kit.save_prompt(server.base, config, server.prompts / name, seed=31)
            server.post(f"/v1/prompts/{act}", {"name": name})
            assert server.metric("vllm:request_success_total") == ended
        for stream in ([first, *begun], waiting):
            found.append([token for piece in stream if piece.choices for token in tokens(piece.choices[0])])
    assert found == [wanted[0]] * 2 + [wanted[1]] * 2
    assert wanted[0] != wanted[1]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**ask)


def test_a_client_that_leaves_frees_its_blocks(server: Server) -> None:
    stream = server.client().completions.create(model="prefix", prompt=QUESTION, max_tokens=200, stream=True, **EXACT)
    next(iter(stream))
    stream.close()
    for _ in range(50):
        if server.metric("vllm:num_requests_running") == 0:
            break
        time.sleep(0.1)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_the_page_is_there(server: Server) -> None:
    assert "<html" in server.get("/")
