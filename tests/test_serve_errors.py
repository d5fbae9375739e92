"""What the server's API refuses and how it says so; its models, metrics and logs; prompts that are replaced."""

import asyncio
import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_kit import BASE, LENGTHS, TEXT, Api, Prompts, complete, serving, write_prompts
from openai import OpenAI

from softprompt.serve.completions import logprobs
from softprompt.serve.engine import TokenLogprob
from softprompt.serve.errors import RequestError
from softprompt.serve.logs import JsonFormatter
from softprompt.serve.text import TextCoder

ANSWERING: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": TEXT},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": TEXT}]},
    "/v1/responses": {"input": TEXT},
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def api(prompts: Prompts) -> Iterator[Api]:
    with serving(prompts.folder) as api:
        yield api


@pytest.fixture(scope="module")
def client(api: Api) -> Iterator[OpenAI]:
    with api.client() as client:
        yield client


def test_the_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == [BASE, "filled", "kv", "team/guest", "words"]
    one: Any = client.models.retrieve("team/guest")
    assert (one.id, one.parent, one.prompt["virtual_tokens"]) == ("team/guest", BASE, LENGTHS["team/guest"])
    assert client.models.retrieve(BASE).id == BASE
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("path", ANSWERING)
def test_an_unknown_model(api: Api, path: str) -> None:
    for name in ("nobody", "KV", "kv/", "../kv", "", "x" * 1_000_000):
        answer = api.post(path, {"model": name, **ANSWERING[path]})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert len(answer.content) < 400


WRONG: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "misspelt": ("/v1/completions", {"temprature": 0}, "temprature"),
    "hot": ("/v1/completions", {"temperature": 2.5}, "temperature"),
    "text for a number": ("/v1/completions", {"temperature": "0"}, "temperature"),
    "true for a number": ("/v1/completions", {"max_tokens": True}, "max_tokens"),
    "no tokens": ("/v1/completions", {"max_tokens": 0}, "max_tokens"),
    "negative tokens": ("/v1/completions", {"max_tokens": -1}, "max_tokens"),
    "too many choices": ("/v1/completions", {"n": 1000}, "n"),
    "best_of": ("/v1/completions", {"best_of": 2}, "best_of"),
    "suffix": ("/v1/completions", {"suffix": "end"}, "suffix"),
    "logit_bias": ("/v1/completions", {"logit_bias": {"5": 1}}, "logit_bias"),
    "no text": ("/v1/completions", {"prompt": []}, "prompt"),
    "null": ("/v1/completions", {"prompt": None}, "prompt"),
    "mixed": ("/v1/completions", {"prompt": ["a", 1]}, "prompt"),
    "negative id": ("/v1/completions", {"prompt": [1, -1]}, "prompt"),
    "half a character": ("/v1/completions", {"prompt": "\ud800"}, "prompt"),
    "too many answers": ("/v1/completions", {"prompt": ["a"] * 9, "n": 64}, None),
    "empty stop": ("/v1/completions", {"stop": ["a", ""]}, "stop"),
    "stop that is a number": ("/v1/completions", {"stop": 3}, "stop"),
    "long stop": ("/v1/completions", {"stop": "a" * 1025}, "stop"),
    "metadata": ("/v1/completions", {"metadata": {str(each): "" for each in range(17)}}, "metadata"),
    "echo with logprobs": ("/v1/completions", {"echo": True, "logprobs": 1}, "echo"),
    "stream options": ("/v1/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
    "seed": ("/v1/completions", {"seed": 1 << 63}, "seed"),
    "more than it may": ("/v1/completions", {"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    "no messages": ("/v1/chat/completions", {"messages": []}, "messages"),
    "role": ("/v1/chat/completions", {"messages": [{"role": "king", "content": "a"}]}, "messages.0.role"),
    "image": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
              "messages.0.content"),
    "tools": ("/v1/chat/completions", {"tools": [{"type": "function"}]}, "tools"),
    "format": ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
    "top without": ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
    "prompt in a conversation": ("/v1/chat/completions", {"prompt": "a"}, "prompt"),
    "background": ("/v1/responses", {"background": True}, "background"),
    "previous": ("/v1/responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
    "item": ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}, "input.0.role"),
    "include": ("/v1/responses", {"include": ["reasoning.encrypted_content"]}, "include.0"),
    "included twice": ("/v1/responses", {"include": ["message.output_text.logprobs"] * 2}, "include"),
    "reasoning": ("/v1/responses", {"reasoning": {"effort": "high"}}, "reasoning"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(api: Api, case: str) -> None:
    path, field, param = WRONG[case]
    content = json.dumps({"model": "kv", **ANSWERING[path], **field})
    answer = api.post(path, content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
    assert error["message"] and "\n" not in error["message"]


def test_an_id_outside_the_vocabulary(client: OpenAI) -> None:
    for more in ({}, {"echo": True}):
        with pytest.raises(openai.BadRequestError, match="4096"):
            complete(client, prompt=[1, 4096], **more)


def test_fields_that_ask_for_nothing_are_let_through(prompts: Prompts, api: Api) -> None:
    harmless = {
        "best_of": 1, "suffix": None, "logit_bias": {}, "service_tier": "auto", "user": "u", "metadata": {"a": "b"},
        "store": False, "tools": [], "parallel_tool_calls": True, "n": None, "seed": None, "top_k": -1, "stop": None,
        "temperature": 0, "max_tokens": 8,
    }  # fmt: skip
    answer = api.post("/v1/completions", {"model": "kv", "prompt": TEXT, **harmless})
    assert answer.json()["choices"][0]["text"] == prompts.offline("kv")


def test_bodies_that_are_no_objects_of_json(api: Api) -> None:
    for content, kind, code in (
        ("{", "application/json", "invalid_json"),
        ("", "application/json", "invalid_body"),
        ("[]", "application/json", "invalid_body"),
        ('"text"', "application/json", "invalid_body"),
        ('{"model": "kv", "prompt": "a"}', "text/plain", "invalid_body"),
        ("\xff", "application/json", None),
        ("[" * 100_000, "application/json", None),
        (f'{{"model": "kv", "prompt": "a", "seed": {"9" * 5000}}}', "application/json", None),
    ):
        answer = api.post("/v1/completions", content=content.encode("latin-1"), headers={"Content-Type": kind})
        assert answer.status_code == 400 and set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert code is None or answer.json()["error"]["code"] == code, content[:40]


def test_errors_of_routes_look_like_all_others(api: Api) -> None:
    for answer, status in (
        (api.get("/v1/nothing"), 404),
        (api.get("/v1/completions"), 405),
        (api.post("/health"), 405),
    ):
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
        assert len(answer.headers["x-request-id"]) == 32


def test_health_and_metrics(api: Api, client: OpenAI) -> None:
    def read() -> dict[str, float]:
        lines = [line for line in api.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    assert api.get("/health").json() == {"status": "ok"}
    before = read()
    usage = complete(client, "words", tokens=5, extra_body={"ignore_eos": True}).usage
    with pytest.raises(openai.NotFoundError):
        complete(client, "nobody")
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('softprompt_requests_total{model="words",path="/v1/completions",status="200"}') == 1
    assert grown('softprompt_requests_total{model="",path="/v1/completions",status="404"}') == 1
    assert grown('softprompt_prompt_tokens_total{model="words"}') == usage.prompt_tokens
    assert grown('softprompt_virtual_tokens_total{model="words"}') == LENGTHS["words"]
    assert grown('softprompt_completion_tokens_total{model="words"}') == 5
    assert grown("softprompt_first_token_seconds_count") == 1
    assert after["softprompt_prompts"] == 4 and after["softprompt_waiting"] == 0
    assert after["softprompt_cache_tokens_limit"] > 0
    assert "nobody" not in api.get("/metrics").text


def test_a_replaced_prompt_answers_as_its_new_content(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts")
    with serving(prompts.folder) as api, api.client() as client:
        before = complete(client, "words")
        api.service.library.load("words")
        assert complete(client, "words").system_fingerprint == before.system_fingerprint  # nothing has changed
        prompts.model.prompt_encoder["words"].requires_grad_(False)
        for parameter in prompts.model.prompt_encoder["words"].parameters():
            parameter.mul_(-1)
        prompts.model.folds.clear()
        prompts.model.save_pretrained(prompts.folder, selected_adapters=["words"])
        api.service.library.scan()
        after = complete(client, "words")
        assert after.choices[0].text == prompts.offline("words") != before.choices[0].text
        assert after.system_fingerprint not in (before.system_fingerprint, None)
        api.service.library.unload("words")
        with pytest.raises(openai.NotFoundError):
            complete(client, "words")


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log(prompts: Prompts, log_prompts: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "softprompt.serve"), serving(prompts.folder, log_prompts=log_prompts) as api:
        answers = [
            api.post("/v1/completions", {"model": "kv", "prompt": "SECRET-A", "max_tokens": 2}),
            api.post(
                "/v1/chat/completions",
                {"model": "kv", "messages": [{"role": "user", "content": "SECRET-B"}], "max_tokens": 2},
            ),
            api.post("/v1/completions", {"model": "kv", "prompt": "SECRET-C", "SECRET-D": "SECRET-E", "n": "SECRET-F"}),
        ]
    records = [record for record in caplog.records if record.name == "softprompt.serve"]
    lines = [json.loads(JsonFormatter().format(record)) for record in records]
    requests = [line for line in lines if line["message"] == "request"]
    assert [line["request_id"] for line in requests] == [answer.headers["x-request-id"] for answer in answers]
    assert [line["status"] for line in requests] == [200, 200, 400]
    first = requests[0]
    assert (first["model"], first["virtual_tokens"], first["completion_tokens"]) == ("kv", LENGTHS["kv"], 2)
    assert first["first_token_seconds"] <= first["seconds"]
    text = json.dumps(lines)
    assert ("SECRET-A" in text) == ("SECRET-B" in text) == log_prompts
    assert "SECRET-C" not in text and "SECRET-E" not in text


def test_without_a_chat_template_conversations_are_refused(prompts: Prompts) -> None:
    tokenizer = copy.deepcopy(prompts.tokenizer)
    tokenizer.chat_template = None
    coder = TextCoder(tokenizer)
    with pytest.raises(RequestError, match="no chat template; use /v1/completions") as error:
        asyncio.run(coder.conversation([{"role": "user", "content": "a"}], "messages"))
    assert error.value.status == 400
    coder.close()


def test_tokens_that_look_alike_do_not_hide_the_likeliest() -> None:
    """As parts of characters do; and the chosen one is always there."""
    token = TokenLogprob(7, "x", -9.0, ((1, "\ufffd", -0.1), (2, "\ufffd", -8.0), (3, "b", -8.5)))
    (found,) = logprobs([token], 0)["top_logprobs"]
    assert found == {"\ufffd": -0.1, "b": -8.5, "x": -9.0}
