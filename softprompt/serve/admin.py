"""HTTP routes to look at the library and, with the admin key, to load and unload prompts."""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from softprompt.errors import SoftPromptError
from softprompt.serve.changes import NameTakenError, UnknownPromptError
from softprompt.serve.errors import GONE, ClientGone, RequestError, error_response, json_response, request_error
from softprompt.serve.library import PromptLibrary
from softprompt.serve.limits import read_body
from softprompt.serve.objects import StorageError
from softprompt.serve.version import Version

MAX_BODY = 1 << 16
MaySee = Callable[[Request, str], bool]

_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"]}},
}
_STATUSES = {
    403: "The admin key is missing or wrong, or this server has none.",
    404: "There is no such prompt.",
    409: "The name is taken by something else.",
    413: "The body is too long.",
    422: "The body, or the adapter it names, cannot be used; what was served before still is.",
    507: "There is no room for a copy of the adapter.",
}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["name"],
                    "additionalProperties": False,
                    "properties": {"name": {"type": "string", "minLength": 1, "description": "Path of an adapter."}},
                }
            }
        },
    }
}


def admin_router(library: PromptLibrary, admin_key: str | None, may_see: MaySee | None = None) -> APIRouter:
    """GET /v1/prompts, POST /v1/prompts/load and /unload (`{"name": …}`), GET /v1/prompts/{name}/nearest.

    `may_see` says which names a request may know of (None: all). Without an `admin_key` nobody loads or unloads.
    Errors are `{"error": {"message", "type", "param", "code"}}`.
    """
    router = APIRouter(tags=["prompts"])
    sees = may_see or (lambda request, name: True)
    one_by_one = asyncio.Lock()  # each look goes through all of the word embeddings

    @router.get("/v1/prompts", summary="The prompts, and why others are not served")
    def prompts(request: Request) -> Response:
        return json_response(
            {"object": "list", "data": [row for row in library.listing() if sees(request, row["name"])]}
        )

    @router.get(
        "/v1/prompts/{name:path}/nearest", summary="The words nearest to each virtual token", responses=_on(404, 422)
    )
    async def nearest(name: str, request: Request) -> Response:
        async def found() -> dict[str, Any]:
            if not sees(request, name):
                raise UnknownPromptError(f"there is no prompt {name[:200]!r}; GET /v1/models lists those there are.")
            async with one_by_one:
                words = await run_in_threadpool(library.nearest, name)
            return {"object": "prompt.nearest", "name": name, "tokens": words}

        return await _answer(found)

    @router.post(
        "/v1/prompts/load",
        summary="Serve an adapter as its files are now",
        openapi_extra=_BODY,
        responses=_on(*_STATUSES),
    )
    async def load(request: Request) -> Response:
        async def loaded() -> dict[str, Any]:
            name = await _name(request, admin_key)
            versions = await run_in_threadpool(library.load, name)
            return {"object": "prompt.loaded", "name": name, "prompts": [_told(version) for version in versions]}

        return await _answer(loaded)

    @router.post(
        "/v1/prompts/unload", summary="Serve an adapter no more", openapi_extra=_BODY, responses=_on(403, 404, 413, 422)
    )
    async def unload(request: Request) -> Response:
        async def unloaded() -> dict[str, Any]:
            name = await _name(request, admin_key)
            await run_in_threadpool(library.unload, name)
            return {"object": "prompt.unloaded", "name": name}

        return await _answer(unloaded)

    return router


async def _answer(work: Callable[[], Awaitable[dict[str, Any]]]) -> Response:
    """What `work` returns, or what is wrong, whatever handlers of errors the application around has."""
    try:
        return json_response(await work())
    except ClientGone:
        return Response(status_code=GONE)
    except Exception as error:  # one that nobody foresaw is logged there, and told to nobody
        return error_response(_as_request_error(error))


def _as_request_error(error: Exception) -> RequestError:
    if isinstance(error, RequestError) or not isinstance(error, SoftPromptError):
        return request_error(error)
    kinds = ((UnknownPromptError, 404, "prompt_not_found"), (NameTakenError, 409, "name_taken"),
             (StorageError, 507, "no_space"), (SoftPromptError, 422, "invalid_prompt"))  # fmt: skip
    status, code = next((status, code) for kind, status, code in kinds if isinstance(error, kind))
    return RequestError(status, str(error)[:2000], param="name", code=code)


async def _name(request: Request, admin_key: str | None) -> str:
    """The name in the body of a request that may change what is served. RequestError."""
    _check_key(request, admin_key)  # before a byte of the body is read
    body = await read_body(request.receive, MAX_BODY)
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(422, "The body is not JSON.", code="invalid_json") from None
    name = found.get("name") if isinstance(found, dict) else None
    if not isinstance(name, str) or not name or len(found) != 1:
        raise RequestError(422, 'The body must be {"name": "…"}, the path of an adapter.', param="name")
    return name


def _check_key(request: Request, admin_key: str | None) -> None:
    """RequestError with 403."""
    if not admin_key:
        raise RequestError(403, "This server has no admin key, so nobody can change its prompts; start it with one.")
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), admin_key.encode())
    if kind.lower() != "bearer" or not right:
        raise RequestError(403, "This needs the admin key: `Authorization: Bearer KEY`.", code="permission_denied")


def _told(version: Version) -> dict[str, Any]:
    return {"name": version.name, "digest": version.digest, "length": version.length, "method": version.method}


def _on(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for the OpenAPI document."""
    shape = {"application/json": {"schema": _ERROR}}
    return {status: {"description": _STATUSES[status], "content": shape} for status in statuses}
