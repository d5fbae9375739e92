"""Server-sent events: answers that are sent while they are made."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from softprompt.serve.errors import ClientGone, RequestError, request_error
from softprompt.serve.limits import until_gone
from softprompt.serve.logs import Record, record_of

DONE = "data: [DONE]\n\n"
GRACE = 5.0  # seconds for the last events of an answer that took all of its time
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies are not to hold events back


def event(data: dict[str, Any], kind: str | None = None) -> str:
    """One event; JSON has no line breaks of its own."""
    head = f"event: {kind}\n" if kind else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'), allow_nan=False)}\n\n"


def error_event(error: RequestError) -> str:
    """As OpenAI's completions end when they fail on the way."""
    return event(error.body())


class EventStream(StreamingResponse):
    """Sends events while the client is there, and closes their generator in any case.

    Answers end in time by themselves; a client that does not read what it is sent keeps its places `seconds`, no more.
    """

    def __init__(self, events: AsyncGenerator[str, None], seconds: float) -> None:
        super().__init__(events, headers=HEADERS, media_type="text/event-stream")
        self._events, self._seconds = events, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await until_gone(receive, self.stream_response(send))
        except ClientGone:
            record_of(scope).gone = True
        except TimeoutError:
            record_of(scope).error = "timeout"
        finally:
            await self._events.aclose()


async def event_stream(
    request: Request,
    events: AsyncGenerator[str, None],
    failed: Callable[[RequestError], str] = error_event,
) -> EventStream:
    """Waits for the first event, so that what fails before it gets an HTTP status; `failed` tells what fails later."""
    try:
        first = await until_gone(request.receive, _next(events))
    except BaseException:
        await events.aclose()
        raise
    seconds = request.app.state.service.options.timeout + GRACE
    return EventStream(_from(first, events, failed, record_of(request.scope)), seconds)


async def _next(events: AsyncGenerator[str, None]) -> str:
    return await anext(events)


async def _from(
    first: str, rest: AsyncGenerator[str, None], failed: Callable[[RequestError], str], record: Record
) -> AsyncGenerator[str, None]:
    async with aclosing(rest):
        yield first
        try:
            async for each in rest:
                yield each
        except Exception as error:
            told = request_error(error)
            record.error = told.code
            yield failed(told)
