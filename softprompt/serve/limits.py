"""Limits: how long a body may be, how many may wait, how long an answer may take; and clients that leave."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softprompt.serve.errors import NO_RETRY, ClientGone, RequestError, error_response

T = TypeVar("T")
DRAINED = 8  # so many times the limit is read and thrown away, so that the client gets to read why


class Gate:
    """Counts the answers under way, and turns away what would have to wait behind too many."""

    def __init__(self, max_batch: int, max_waiting: int, waiting: Callable[[], int]) -> None:
        self.most, self.max_waiting, self._waiting = max_batch + max_waiting, max_waiting, waiting
        self.inside = 0

    def check(self, answers: int) -> None:
        """RequestError with 400 for more answers than there are places."""
        if answers > self.most:
            raise RequestError(400, f"The request asks for {answers} answers; {self.most} are possible at a time.")

    @contextmanager
    def enter(self, answers: int) -> Iterator[None]:
        """Places for the answers of a request. RequestError: 429 if too few are free, else as `check`."""
        self.check(answers)
        if self.inside + answers > self.most or self._waiting() > self.max_waiting:
            message = "Too many requests are waiting; try again in a moment."
            raise RequestError(429, message, code="queue_full", headers={"Retry-After": "1"})
        self.inside += answers
        try:
            yield
        finally:
            self.inside -= answers


async def within(deadline: float, work: Awaitable[T], seconds: float) -> T:
    """The result of `work` if it is there before `deadline` (of the event loop's clock). RequestError with 504."""
    try:
        async with asyncio.timeout_at(deadline):
            return await work
    except TimeoutError as error:
        raise too_late(seconds) from error


def too_late(seconds: float) -> RequestError:
    return RequestError(504, f"The answer took longer than {seconds:g} seconds.", code="timeout", headers=NO_RETRY)


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client leaves first: then ClientGone is raised.

    `receive` is the connection's, after the body has been read.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone("the client left.")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(receive: Receive, most: int) -> bytes:
    """The whole body. RequestError with 413 if it is longer than `most` bytes; ClientGone."""
    parts, length, more = [], 0, True
    while more and length <= DRAINED * most:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left.")
        length += len(message.get("body", b""))
        more = message.get("more_body", False)
        if length <= most:
            parts.append(message.get("body", b""))
    if length > most:
        headers = {"Connection": "close"} if more else {}
        raise RequestError(413, f"The body is longer than {most} bytes.", code="body_too_large", headers=headers)
    return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` again, then what comes after it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


class BodyLimit:
    """ASGI middleware: bodies of at most `most` bytes that are there within `seconds`."""

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self.app, self.most, self.seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.seconds):
                body = await read_body(receive, self.most)
        except TimeoutError:
            headers = {"Connection": "close"}
            error = RequestError(408, "The body did not arrive in time.", code="timeout", headers=headers)
            await error_response(error)(scope, receive, send)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
        except ClientGone:
            return
        else:
            await self.app(scope, replayed(body, receive), send)
