"""API keys: who may use and see which prompts; the file that says so; the middleware in front of another app."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_kit import BASE, TEXT, Api, Prompts, complete, listening, serving, write_prompts
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from softprompt.errors import ConfigError
from softprompt.serve.access import Access, Keys

ALICE, BOB, OPERATOR, ADMIN = "sk-alice-1", "sk-bob-2", "sk-operator-3", "sk-admin-4"
KEYS = f"""
{ALICE}: ["kv", "team/*"]
{BOB}: base
{OPERATOR}: "*"
"""
PATHS = {
    "/v1/completions": {"prompt": TEXT, "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "A"}], "max_tokens": 1},
    "/v1/responses": {"input": "A", "max_output_tokens": 1},
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys.yaml"
    file.write_text(KEYS)
    return file


@pytest.fixture(scope="module")
def api(prompts: Prompts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text(KEYS)
    with serving(prompts.folder, keys=file, admin_key=ADMIN) as api:
        yield api


@pytest.mark.parametrize("path", PATHS)
def test_each_key_has_its_prompts(api: Api, path: str) -> None:
    def status(key: str | None, model: str) -> int:
        return api.post(path, {"model": model, **PATHS[path]}, key).status_code

    assert [status(ALICE, name) for name in ("kv", "team/guest", "words", BASE, "team")] == [200, 200, 404, 404, 404]
    assert [status(BOB, name) for name in (BASE, "kv")] == [200, 404]
    assert [status(OPERATOR, name) for name in (BASE, "words")] == [200, 200]
    assert [status(ADMIN, name) for name in (BASE, "words")] == [200, 200]
    for wrong in (None, "", "sk-alice", f"{ALICE}x", "*"):
        assert status(wrong, "kv") == 401
    assert api.post(path, PATHS[path], ALICE).status_code == 404  # no model means the base model's
    assert api.post(path, {"model": ["kv"], **PATHS[path]}, ALICE).status_code == 400
    assert api.post(path, key=ALICE, content=b"{").status_code == 400


def test_the_official_client(prompts: Prompts, api: Api) -> None:
    with api.client(ALICE) as client:
        assert complete(client).choices[0].text == prompts.offline("kv")
        with pytest.raises(openai.NotFoundError) as hidden:
            complete(client, "words")
        with pytest.raises(openai.NotFoundError) as missing:
            complete(client, "swords")
        assert hidden.value.message.replace("words", "swords") == missing.value.message  # they cannot be told apart
        assert [model.id for model in client.models.list().data] == ["kv", "team/guest"]
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("words")
        assert client.models.retrieve("team/guest").id == "team/guest"
    with api.client("nobody") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_what_else_a_key_opens(api: Api) -> None:
    def statuses(path: str) -> list[int]:
        return [api.get(path, key).status_code for key in (None, ALICE, OPERATOR, ADMIN)]

    assert statuses("/health") == statuses("/") == statuses("/openapi.json") == [200] * 4
    assert statuses("/metrics") == [401, 403, 200, 200]
    assert statuses("/v1/prompts") == [401, 200, 200, 200]
    assert statuses("/v1/nothing") == [401, 403, 404, 404]
    seen = {key: {row["name"] for row in api.get("/v1/prompts", key).json()["data"]} for key in (ALICE, OPERATOR)}
    assert seen == {ALICE: {"kv", "team/guest"}, OPERATOR: {"filled", "kv", "team/guest", "words"}}
    assert api.get("/v1/prompts/words/nearest", ALICE).status_code == 404
    assert api.get("/v1/prompts/words/nearest", OPERATOR).status_code == 200
    for kind in ("Basic", "Token", ""):
        headers = {"Authorization": f"{kind} {OPERATOR}".strip()}
        assert api.http.get("/v1/models", headers=headers).status_code == 401


def test_only_the_admin_loads_and_unloads(api: Api) -> None:
    for path in ("/v1/prompts/unload", "/v1/prompts/load"):
        statuses = [api.post(path, {"name": "words"}, key).status_code for key in (None, ALICE, OPERATOR, ADMIN)]
        assert statuses == [401, 403, 403, 200]


def test_the_file_is_read_again(prompts: Prompts, keys: Path) -> None:
    with serving(prompts.folder, keys=keys) as api:

        def works(key: str) -> bool:
            return api.get("/v1/models", key).status_code == 200

        assert works(ALICE) and not works("sk-carol-5")
        keys.write_text("sk-carol-5: kv\n")
        assert works("sk-carol-5") and not works(ALICE)
        keys.write_text("sk-dave-6: [kv\n")  # broken
        assert works("sk-carol-5") and not works("sk-dave-6")
        keys.unlink()
        assert works("sk-carol-5")
        other = keys.with_suffix(".new")
        other.write_text("sk-dave-6: [kv]\n")
        os.replace(other, keys)
        assert works("sk-dave-6") and not works("sk-carol-5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must map keys to names"),
        ("- sk-secret", "must map keys to names"),
        ("sk-secret: [a", "is not YAML .line 1"),
        ("12345: [a]", "key 1 in .* is not text"),
        ("ok: a\nsk-secret: {a: b}", "key 2 in .* must have a name"),
        ("sk-secret: [a, 1]", "key 1 in .* must have a name"),
        ("sk-secret: a\nsk-secret: b", "the same key more than once"),
        ("\udcff", "is not YAML"),
        (None, "cannot be read"),
    ],
)
def test_files_that_cannot_be(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "keys.yaml"
    if text is not None:
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=message) as error:
        Keys(file)
    assert "sk-secret" not in str(error.value) and "\n" not in str(error.value)


async def echoed(request: Request) -> JSONResponse:
    """Another server's route: it says what it got."""
    body = await request.body()
    return JSONResponse({"length": len(body), "digest": hashlib.sha256(body).hexdigest()})


async def listed(request: Request) -> JSONResponse:
    return JSONResponse({"object": "list", "data": [{"id": name} for name in ("kv", "words", BASE)]})


def test_in_front_of_another_app(keys: Path) -> None:
    routes = [
        Route("/v1/completions", echoed, methods=["POST"]),
        Route("/v1/load_lora_adapter", echoed, methods=["POST"]),
        Route("/v1/models", listed),
    ]
    other = Starlette(routes=routes)
    other.add_middleware(Access, keys=Keys(keys), admin_key=None, base=BASE, max_body=100_000)  # type: ignore[arg-type]
    with listening(other) as address:

        def post(content: Any, key: str, path: str = "/v1/completions") -> httpx.Response:
            return httpx.post(f"{address}{path}", content=content, headers={"Authorization": f"Bearer {key}"})

        body = json.dumps({"model": "kv", "prompt": "x" * 50_000}).encode()
        got = {"length": len(body), "digest": hashlib.sha256(body).hexdigest()}
        parts = [body[:9], body[9:20_000], body[20_000:]]
        assert post(body, ALICE).json() == post(iter(parts), ALICE).json() == got
        assert post(body, OPERATOR).json() == got
        assert post(body, BOB).status_code == 404
        assert post(b'{"prompt": "no model"}', BOB).status_code == 200  # it means the base model
        assert post(b'{"prompt": "no model", "model": null}', ALICE).status_code == 404
        assert post(b'{"model": "kv", "model": "words"}', ALICE).status_code == 404  # the last of them counts
        assert post(b'{"model": "words", "model": "kv"}', ALICE).status_code == 200
        assert post(body + b" " * 100_000, ALICE).status_code == 413
        assert post(b'{"model": "kv"}', ALICE, "/v1/load_lora_adapter").status_code == 403  # a route it does not know
        assert post(b'{"model": "kv"}', OPERATOR, "/v1/load_lora_adapter").status_code == 200
        listing = httpx.get(f"{address}/v1/models", headers={"Authorization": f"Bearer {ALICE}"}).json()
        assert listing == {"object": "list", "data": [{"id": "kv"}]}
