"""The routes that show, load and unload prompts."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from library_kit import BASE, lent, table_of
from store_kit import CONFIG, WEIGHTS, table, write

from softprompt.checkpoint import save_adapter
from softprompt.serve.admin import MAX_BODY, admin_router
from softprompt.serve.library import PromptLibrary

KEY = "sk-admin-é"
ADMIN = {"Authorization": f"Bearer {KEY}".encode()}


@pytest.fixture
def library(tmp_path: Path) -> PromptLibrary:
    write(tmp_path / "prompts" / "a", 1)
    write(tmp_path / "prompts" / "b" / "c", 2)
    (write(tmp_path / "prompts" / "bad", 2) / WEIGHTS).write_bytes(b"")
    library = PromptLibrary(tmp_path / "prompts", lent(), tmp_path / "objects", sole=True)
    library.scan()
    return library


def client_of(library: PromptLibrary, key: str | None = KEY, **more: Any) -> TestClient:
    app = FastAPI()
    app.include_router(admin_router(library, key, **more))
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def client(library: PromptLibrary) -> Iterator[TestClient]:
    with client_of(library) as client:
        yield client


def check_error(response: Any, status: int) -> str:
    """The message of an error in OpenAI's shape."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) <= 2000
    return error["message"]


def test_the_prompts_are_listed(client: TestClient, library: PromptLibrary, tmp_path: Path) -> None:
    listed = client.get("/v1/prompts").json()
    assert listed == {"object": "list", "data": library.listing()}
    assert [(row["name"], row["state"]) for row in listed["data"]] == [
        ("a", "served"), ("b/c", "served"), ("bad", "refused")
    ]  # fmt: skip
    assert "damaged" in listed["data"][2]["error"]
    assert str(tmp_path) not in client.get("/v1/prompts").text


def test_load_and_unload(client: TestClient, library: PromptLibrary, tmp_path: Path) -> None:
    write(tmp_path / "prompts" / "b" / "c", 5)
    answer = client.post("/v1/prompts/load", json={"name": "b/c"}, headers=ADMIN)
    assert answer.status_code == 200
    version = library.get("b/c")
    assert torch.equal(table_of(version), table(5))
    assert answer.json() == {
        "object": "prompt.loaded", "name": "b/c",
        "prompts": [{"name": "b/c", "digest": version.digest, "length": 4, "method": "prompt_tuning"}],
    }  # fmt: skip
    answer = client.post("/v1/prompts/unload", json={"name": "b/c"}, headers=ADMIN)
    assert (answer.status_code, answer.json()) == (200, {"object": "prompt.unloaded", "name": "b/c"})
    assert library.names() == ["a"]
    assert "no adapter 'b/c' is served" in check_error(
        client.post("/v1/prompts/unload", json={"name": "b/c"}, headers=ADMIN), 404
    )


def test_nearest_words(client: TestClient, library: PromptLibrary) -> None:
    for name in ("a", "b/c"):
        answer = client.get(f"/v1/prompts/{name}/nearest").json()
        assert (answer["object"], answer["name"]) == ("prompt.nearest", name)
        assert answer["tokens"] == [[list(pair) for pair in words] for words in library.nearest(name)]
    for name in ("bad", "nothing", "%2e%2e/%2e%2e/etc/passwd", "%00", "x" * 60_000, "%ff", "%ed%a0%80"):
        assert "there is no prompt" in check_error(client.get(f"/v1/prompts/{name}/nearest"), 404)


WRONG = [
    {}, {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "},
    {"Authorization": KEY[:-1]}, {"Authorization": "Bearer sk-admin-e"}, {"Authorization": b"Bearer \xff"},
    {"Authorization": f"Basic {KEY}".encode()}, {"Authorization": f"Bearer {KEY}{KEY}".encode()},
]  # fmt: skip


@pytest.mark.parametrize("headers", WRONG, ids=str)
@pytest.mark.parametrize("route", ["load", "unload"])
def test_only_the_admin_key_changes_anything(
    client: TestClient, library: PromptLibrary, route: str, headers: dict[str, Any]
) -> None:
    before = library.listing()
    for content in (b'{"name": "a"}', b"{", b"x" * (2 * MAX_BODY)):  # the body is not even looked at
        assert "admin key" in check_error(client.post(f"/v1/prompts/{route}", content=content, headers=headers), 403)
    assert library.listing() == before


@pytest.mark.parametrize("key", [None, ""])
def test_without_an_admin_key_nobody_changes_anything(library: PromptLibrary, key: str | None) -> None:
    with client_of(library, key) as client:
        for given in ("", "None", KEY):
            headers = {"Authorization": f"Bearer {given}".encode()}
            answer = client.post("/v1/prompts/unload", json={"name": "a"}, headers=headers)
            assert "has no admin key" in check_error(answer, 403)
    assert "a" in library.names()


BODIES = [
    b"", b"{", b"[]", b"null", b'"a"', b"{}", b'{"name": 1}', b'{"name": ""}', b'{"name": ["a"]}', b'{"name": null}',
    b'{"name": "a", "force": true}', b"\xff\xfe", b"[" * 60_000, b'{"name": "a"', b"NaN",
]  # fmt: skip


@pytest.mark.parametrize("content", BODIES, ids=lambda body: repr(body[:20]))
@pytest.mark.parametrize("route", ["load", "unload"])
def test_bodies_that_cannot_be(client: TestClient, library: PromptLibrary, route: str, content: bytes) -> None:
    check_error(client.post(f"/v1/prompts/{route}", content=content, headers=ADMIN), 422)
    assert library.names() == ["a", "b/c"]


NAMES = ["../../etc/passwd", "/etc/passwd", "a\0", "..", ".", "x" * 60_000, "\ud800", "a/", "b", "ä", "a:0", "a\n"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:12]))
@pytest.mark.parametrize("route", ["load", "unload"])
def test_names_that_lead_nowhere(client: TestClient, library: PromptLibrary, route: str, name: str) -> None:
    body = json.dumps({"name": name}).encode()
    check_error(client.post(f"/v1/prompts/{route}", content=body, headers=ADMIN), 404)
    assert library.names() == ["a", "b/c"]


def test_what_cannot_be_served_says_why(client: TestClient, library: PromptLibrary, tmp_path: Path) -> None:
    assert "damaged" in check_error(client.post("/v1/prompts/load", json={"name": "bad"}, headers=ADMIN), 422)
    before = library.get("a")
    shutil.rmtree(tmp_path / "prompts" / "a")
    save_adapter(
        tmp_path / "prompts" / "a", replace(CONFIG, token_dim=16), {"prompt_embeddings": table(0)[:, :16].clone()}
    )
    answer = client.post("/v1/prompts/load", json={"name": "a"}, headers=ADMIN)
    assert "made for another base model" in check_error(answer, 422)
    assert library.get("a") is before
    write(tmp_path / "prompts" / BASE, 1)
    assert "base model" in check_error(client.post("/v1/prompts/load", json={"name": BASE}, headers=ADMIN), 409)
    check_error(client.post("/v1/prompts/load", content=b" " * (MAX_BODY + 1), headers=ADMIN), 413)


def test_no_room_is_told_apart(client: TestClient, library: PromptLibrary, tmp_path: Path) -> None:
    config = replace(CONFIG, num_virtual_tokens=150)
    save_adapter(tmp_path / "prompts" / "big", config, {"prompt_embeddings": torch.ones(150, 32)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
    try:
        answer = client.post("/v1/prompts/load", json={"name": "big"}, headers=ADMIN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in check_error(answer, 507)
    assert client.post("/v1/prompts/load", json={"name": "big"}, headers=ADMIN).status_code == 200
    assert "big" in library.names()


def test_a_request_sees_its_own_prompts_only(library: PromptLibrary) -> None:
    def may_see(request: Request, name: str) -> bool:
        return request.headers.get("who") == name

    with client_of(library, may_see=may_see) as client:
        assert client.get("/v1/prompts").json()["data"] == []
        assert [row["name"] for row in client.get("/v1/prompts", headers={"who": "a"}).json()["data"]] == ["a"]
        assert client.get("/v1/prompts/a/nearest", headers={"who": "a"}).status_code == 200
        hidden = check_error(client.get("/v1/prompts/a/nearest", headers={"who": "b/c"}), 404)
        missing = check_error(client.get("/v1/prompts/z/nearest", headers={"who": "z"}), 404)
        assert hidden.replace("'a'", "'z'") == missing


def test_unforeseen_errors_tell_nothing(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: PromptLibrary, name: str) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(PromptLibrary, "unload", fails)
    answer = client.post("/v1/prompts/unload", json={"name": "a"}, headers=ADMIN)
    assert "secret" not in check_error(answer, 500)


def test_the_document_describes_them(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/v1/prompts", "/v1/prompts/load", "/v1/prompts/unload", "/v1/prompts/{name}/nearest"}
    load = paths["/v1/prompts/load"]["post"]
    assert load["requestBody"]["content"]["application/json"]["schema"]["required"] == ["name"]
    assert set(load["responses"]) == {"200", "403", "404", "409", "413", "422", "507"}
