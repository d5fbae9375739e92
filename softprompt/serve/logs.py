"""Logs: one JSON object per line, one line per request, and no text of a request unless the operator wants it."""

import json
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softprompt.serve.errors import GONE, LOGGER, ClientGone, error_response, request_error, shown

RECORD = "softprompt.record"
KEY = "softprompt.key"


@dataclass
class Record:
    """What is known of a request by the time it ends. Times in seconds; `model` is empty where it does not exist."""

    path: str
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.monotonic)
    model: str = ""
    digest: str | None = None
    stream: bool = False
    prompt_tokens: int = 0
    virtual_tokens: int = 0
    completion_tokens: int = 0
    first_token: float | None = None
    gone: bool = False
    error: str | None = None
    texts: list[Any] | None = None

    def token(self) -> None:
        """A token of the answer is there."""
        if self.first_token is None:
            self.first_token = time.monotonic() - self.started


def record_of(scope: Scope) -> Record:
    """The record of the request that `Observed` has made."""
    return scope[RECORD]


class Observed:
    """ASGI middleware around everything else: gives each request an id and a record, logs and counts it at its end.

    It is also where errors that nobody foresaw end: in the log, with their traceback, and as a 500 that says nothing.
    """

    def __init__(self, app: ASGIApp, count: Callable[[Record, int, float], None]) -> None:
        self.app, self.count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = scope[RECORD] = Record(shown(scope["path"], 200))
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", record.request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except ClientGone:
            record.gone = True
        except Exception as error:
            answer = error_response(request_error(error))
            if status:  # too late to say it: the connection has to break, or half an answer looks like a whole one
                raise
            await answer(scope, receive, sending)
        finally:
            seconds, status = time.monotonic() - record.started, GONE if record.gone else status or GONE
            self.count(record, status, seconds)
            _log(scope, record, status, seconds)


def _log(scope: Scope, record: Record, status: int, seconds: float) -> None:
    values = {
        "request_id": record.request_id,
        "client": scope["client"][0] if scope.get("client") else None,
        "key": scope.get(KEY),
        "method": scope["method"],
        "path": record.path,
        "status": status,
        "seconds": round(seconds, 4),
        "model": record.model,
        "digest": record.digest,
        "stream": record.stream,
        "prompt_tokens": record.prompt_tokens,
        "virtual_tokens": record.virtual_tokens,
        "completion_tokens": record.completion_tokens,
        "first_token_seconds": None if record.first_token is None else round(record.first_token, 4),
        "error": record.error,
        "texts": record.texts,
    }
    LOGGER.info("request", extra={"values": {name: value for name, value in values.items() if value not in (None, "")}})


class JsonFormatter(logging.Formatter):
    """A line of JSON per record: `time` (UTC), `level`, `logger`, `message`, what came as `values`, and `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "values", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_settings() -> dict[str, Any]:
    """For `logging.config.dictConfig`: every line to stderr as JSON; of others than us and uvicorn, warnings only."""
    ours = {"handlers": ["stderr"], "level": "INFO", "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "softprompt.serve.logs.JsonFormatter"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}},
        "loggers": {"softprompt": ours, "uvicorn": ours},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
    }
