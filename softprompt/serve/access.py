"""API keys: which prompts each of them may use. A middleware that works in front of any server with OpenAI's API.

The file maps keys to names of models, the base model's own among them, where `*` stands for any characters:

    sk-alice-5f0c…: ["support/*", "base"]
    sk-operator-91b2…: "*"

It is read again whenever it changes; while it is broken or gone, the keys that were read before stay good.
"""

import hashlib
import hmac
import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, final

import yaml
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softprompt.errors import ConfigError
from softprompt.serve.errors import LOGGER, ClientGone, RequestError, error_response, unknown_model
from softprompt.serve.limits import read_body, replayed
from softprompt.serve.logs import KEY

GRANT = "softprompt.grant"
MODELS, PROMPTS = "/v1/models", "/v1/prompts"
NAMED_IN_BODY = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
OPEN = ("/", "/health", "/openapi.json")
PAGE = "/page/"


@dataclass(frozen=True)
class Grant:
    """What the holder of a key may use: names that match one of `patterns`. `key`: eight hex digits, for the log."""

    patterns: tuple[str, ...]
    key: str = ""

    def allows(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    @property
    def everything(self) -> bool:
        return "*" in self.patterns


def may_see(request: Request, name: str) -> bool:
    """Whether the request's key may know of, and use, a model of this name; always where no keys are asked for."""
    grant: Grant | None = request.scope.get(GRANT)
    return grant is None or grant.allows(name)


@final
class Keys:
    """The keys of a file. ConfigError if it cannot be read when the server starts."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stamp, self._grants = _stamp(file), _read(file)

    def grant(self, given: str) -> Grant | None:
        """What this key may use; None for a key that is not there. Takes the same time for every key."""
        self._look()
        digest, found = _digest(given), None
        for each, grant in self._grants.items():
            if hmac.compare_digest(digest, each):
                found = grant
        return found

    def _look(self) -> None:
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._grants = _read(self._file)
        except ConfigError as error:
            LOGGER.error("the API keys stay as they were: %s", error)
        else:
            LOGGER.info("the API keys were read again: %d", len(self._grants))


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _read(file: Path) -> dict[bytes, Grant]:
    """Messages name entries by their number: the keys themselves are secrets."""
    try:
        text = file.read_text(encoding="utf-8")
        content, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"the file of API keys {str(file)!r} cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = "" if line is None else f" (line {line + 1})"
        raise ConfigError(f"the file of API keys {str(file)!r} is not YAML{where}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"the file of API keys {str(file)!r} must map keys to names: `KEY: [NAME, …]`.")
    if len(content) < len(tree.value):  # the last of them would win
        raise ConfigError(f"the file of API keys {str(file)!r} has the same key more than once.")
    grants = {}
    for number, (key, names) in enumerate(content.items(), 1):
        names = [names] if isinstance(names, str) else names
        if not isinstance(key, str) or not key:
            raise ConfigError(f"key {number} in {str(file)!r} is not text; put it in quotes.")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"key {number} in {str(file)!r} must have a name or a list of names, `*` for any.")
        digest = _digest(key)
        grants[digest] = Grant(tuple(names), digest.hex()[:8])
    return grants


@final
class Access:
    """ASGI middleware: lets a request through if its key (`Authorization: Bearer KEY`) may do what it asks.

    A key with `*` may do everything but load and unload prompts, the holder of `admin_key` that too (the routes
    themselves see to it). Any other key may use its prompts in the routes whose body names a model, and look at them;
    all else is refused, so that a route that this module does not know opens nothing. `base`: what a body without a
    model means.
    """

    def __init__(self, app: ASGIApp, keys: Keys, admin_key: str | None, base: str, max_body: int = 1 << 26) -> None:
        self.app, self.keys, self.base, self.max_body = app, keys, base, max_body
        self._admin = _digest(admin_key) if admin_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or _open(scope):
            await self.app(scope, receive, send)
            return
        try:
            grant = self._grant(scope)
            scope[GRANT], scope[KEY] = grant, grant.key
            receive = await self._allowed(grant, scope, receive)
        except ClientGone:
            return
        except RequestError as error:
            await _refuse(error, scope, receive, send)
            return
        if _path(scope) == MODELS and scope.get("method") == "GET" and not grant.everything:
            send = _Filter(grant, send)
        await self.app(scope, receive, send)

    def _grant(self, scope: Scope) -> Grant:
        """RequestError with 401."""
        given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        kind, _, key = given.partition(" ")
        if kind.lower() == "bearer":
            key = key.strip()
            grant = self.keys.grant(key)
            if self._admin is not None and hmac.compare_digest(_digest(key), self._admin):
                return Grant(("*",), "admin")
            if grant is not None:
                return grant
        headers = {"WWW-Authenticate": "Bearer"}
        message = "This server needs an API key that it knows: `Authorization: Bearer KEY`."
        raise RequestError(401, message, code="invalid_api_key", headers=headers)

    async def _allowed(self, grant: Grant, scope: Scope, receive: Receive) -> Receive:
        """The `receive` to go on with. RequestError with 403, or 404 for a model that the key may not use."""
        path, method = _path(scope), scope.get("method", "")
        if grant.everything:
            return receive
        if method in ("GET", "HEAD") and (path in (MODELS, PROMPTS) or path.startswith(f"{PROMPTS}/")):
            return receive  # the names in there are looked at one by one, by the routes or by `_Filter`
        if method in ("GET", "HEAD") and path.startswith(f"{MODELS}/"):
            self._check(grant, path.removeprefix(f"{MODELS}/"))
            return receive
        if method == "POST" and path in NAMED_IN_BODY:
            body = await read_body(receive, self.max_body)
            self._check(grant, _model(body) or self.base)
            return replayed(body, receive)
        raise RequestError(403, "This API key may not do that.", code="permission_denied")

    @staticmethod
    def _check(grant: Grant, name: str) -> None:
        if not grant.allows(name):
            raise unknown_model(name)


def _open(scope: Scope) -> bool:
    return scope["type"] == "http" and (_path(scope) in OPEN or _path(scope).startswith(PAGE))


def _path(scope: Scope) -> str:
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _model(body: bytes) -> str | None:
    """The body's `model`, read as the server behind will read it. RequestError with 400 if that is not certain."""
    try:
        content: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(400, "The body is not JSON.", code="invalid_json") from None
    model = content.get("model") if isinstance(content, dict) else body
    if model is not None and not isinstance(model, str):
        raise RequestError(400, "The body must be a JSON object whose model is a string.", param="model")
    return model


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": str(error)})
    else:
        await error_response(error)(scope, receive, send)


class _Filter:
    """A `send` for lists of models: leaves those that the key may use. It holds the list until it is whole."""

    def __init__(self, grant: Grant, send: Send) -> None:
        self._grant, self._send = grant, send
        self._start: Message = {}
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        body = self._filtered() if self._start["status"] == 200 else bytes(self._body)
        headers = [(name, value) for name, value in self._start["headers"] if name.lower() != b"content-length"]
        await self._send({**self._start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})

    def _filtered(self) -> bytes:
        content = json.loads(self._body)
        content["data"] = [model for model in content["data"] if self._grant.allows(model["id"])]
        return json.dumps(content).encode()
