"""What a request is told when it cannot be answered, as OpenAI says it: `{"error": {message, type, param, code}}`."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from softprompt.errors import SoftPromptError
from softprompt.serve.changes import UnknownPromptError
from softprompt.serve.engine import EngineError

LOGGER = logging.getLogger("softprompt.serve")
GONE = 499  # what servers write into their logs for a client that left; nobody reads it from the wire
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients ask again after 5xx unless this says that it is no use


class RequestError(SoftPromptError):
    """A request that gets no answer, with the HTTP status that says so. `param`: the field that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients read."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class ClientGone(SoftPromptError):
    """The client left before its answer was there."""


def shown(text: str, most: int = 100) -> str:
    """The text as a message may hold it: not a megabyte of it."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def unknown_model(name: str) -> RequestError:
    """One answer for names that are not there and names that a key may not use: nobody can find out which it is."""
    message = f"The model {shown(name)!r} does not exist, or this API key may not use it; GET /v1/models lists those."
    return RequestError(404, message, param="model", code="model_not_found")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII, so that half a surrogate pair, which a request can contain, can be said back."""
    content = json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    return Response(content, status, headers=headers, media_type="application/json")


def error_response(error: RequestError) -> Response:
    return json_response(error.body(), error.status, error.headers)


def request_error(error: Exception) -> RequestError:
    """What the client is told of any exception. What nobody foresaw goes to the log, and the client learns no more."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, UnknownPromptError):
        return RequestError(404, shown(str(error), 400), param="model", code="model_not_found")
    if isinstance(error, EngineError):
        LOGGER.error("an answer failed: %s", error)
        return RequestError(503, shown(str(error), 1000), code="engine_error")
    if isinstance(error, SoftPromptError):
        return RequestError(400, shown(str(error), 1000))
    LOGGER.error("internal error", exc_info=error)
    return RequestError(500, "The server failed to answer this request; its log says why.", code="internal_error")


def validation_error(errors: Sequence[Mapping[str, Any]]) -> RequestError:
    """The first thing that is wrong with a body, by the name of its field."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    field = first.get("ctx", {}).get("field")
    if first["type"] == "json_invalid":
        return RequestError(400, f"The body is not JSON: {first['ctx']['error']}.", code="invalid_json")
    if not place and field is None:
        return RequestError(400, "The body must be a JSON object, sent as application/json.", code="invalid_body")
    param = shown(".".join(place) or field)
    if first["type"] == "extra_forbidden":
        return RequestError(400, f"There is no field {param!r} here.", param=param, code="unknown_field")
    return RequestError(400, f"{param}: {first['msg']}", param=param, code="invalid_value")


def add_handlers(app: FastAPI) -> None:
    """Make every error of `app` look like OpenAI's."""

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(validation_error(error.errors()))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(RequestError(error.status_code, shown(str(error.detail), 400), headers=error.headers))

    async def ours(request: Request, error: Exception) -> Response:
        return error_response(request_error(error))

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=GONE)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(SoftPromptError, ours)
    app.add_exception_handler(ClientGone, gone)
