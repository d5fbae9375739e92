"""How many virtual tokens stood before the text of a request: in a header of its answer, and in `/metrics`.

vLLM's API makes the bodies of its answers, whose `usage` counts real tokens. An answer of `/v1/responses` that streams
has begun before its request is looked at, and so it has no such header.
"""

from contextvars import ContextVar
from typing import Any, final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-softprompt-virtual-tokens"
_request: ContextVar[list[int]] = ContextVar("softprompt_virtual_tokens")


@final
class Reported:
    """ASGI middleware that adds the header."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        counted: list[int] = []
        _request.set(counted)  # tasks that the handler starts have the same list

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and counted:
                headers = [*message.get("headers", []), (HEADER, str(sum(counted)).encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, sending)


@final
class Counter:
    """The counter that `/metrics` shows, by the prompt's name. One per process."""

    def __init__(self) -> None:
        from prometheus_client import Counter as Metric

        self._metric: Any = Metric("softprompt_virtual_tokens", "Virtual tokens in front of texts.", ["model"])

    def __call__(self, name: str, virtual: int) -> None:
        self._metric.labels(name).inc(virtual)
        counted = _request.get(None)
        if counted is not None:
            counted.append(virtual)
