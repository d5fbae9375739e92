"""POST /v1/responses: OpenAI's newer route, with one message as its output. Nothing is stored."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, final

from fastapi import Request
from starlette.responses import Response

from softprompt.serve.answers import Answer, Answers, Service, Wanted
from softprompt.serve.chat import spoken, token_scores
from softprompt.serve.errors import RequestError, json_response
from softprompt.serve.limits import until_gone
from softprompt.serve.logs import record_of
from softprompt.serve.protocol import ResponseRequest
from softprompt.serve.sse import event, event_stream


async def respond(body: ResponseRequest, request: Request) -> Response:
    """Answer a text or the last message of a conversation."""
    service: Service = request.app.state.service
    record = record_of(request.scope)
    record.stream = bool(body.stream)
    service.check(body.model, 1)
    messages = spoken(body.input)
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    text = await service.text.conversation(messages, "input")
    sampling = body.sampling(body.max_output_tokens or service.most, _logprobs(body))
    wanted = Wanted(body.model, [text], sampling, conversation=True, param="input")
    reply = _Reply(body, Answers(service, record, f"resp_{uuid.uuid4().hex}", wanted))
    if body.stream:
        return await event_stream(request, reply.events(), reply.failed)
    return json_response(await until_gone(request.receive, reply.whole()))


def _logprobs(body: ResponseRequest) -> int | None:
    """They are given only to those who include them, as OpenAI does."""
    return (body.top_logprobs or 0) if body.include else None


@final
class _Reply:
    """One response on its way: what is known of it, and the number of its next event."""

    def __init__(self, body: ResponseRequest, answers: Answers) -> None:
        self.body, self.answers = body, answers
        self.item_id = f"msg_{uuid.uuid4().hex}"
        self.created, self.number = time.time(), 0
        self.answer = Answer()

    async def whole(self) -> dict[str, Any]:
        (self.answer,) = await self.answers.whole()
        return self._response(self._status())

    async def events(self) -> AsyncGenerator[str, None]:
        """From `response.created` to `response.completed` or, where the limit of tokens was met, `.incomplete`."""
        answer, begun = self.answer, False
        async with aclosing(self.answers.pieces()) as pieces:
            async for _, piece in pieces:
                if not begun:
                    begun = True
                    for each in self._beginning():
                        yield each
                answer.text += piece.text
                answer.logprobs += piece.logprobs
                answer.finish_reason = piece.finish_reason
                if piece.text or piece.logprobs:
                    scores = token_scores(piece.logprobs)
                    yield self._text_event("response.output_text.delta", delta=piece.text, logprobs=scores)
        for each in self._end():
            yield each

    def failed(self, error: RequestError) -> str:
        """The last event of a response that fails on its way."""
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": str(error)}
        return self._event("response.failed", response=response)

    def _beginning(self) -> list[str]:
        running = self._response("in_progress")
        empty = {**self._message("in_progress"), "content": []}
        return [
            self._event("response.created", response=running),
            self._event("response.in_progress", response=running),
            self._event("response.output_item.added", output_index=0, item=empty),
            self._text_event("response.content_part.added", part=self._part()),
        ]

    def _end(self) -> list[str]:
        status, scores = self._status(), token_scores(self.answer.logprobs)
        return [
            self._text_event("response.output_text.done", text=self.answer.text, logprobs=scores),
            self._text_event("response.content_part.done", part=self._part()),
            self._event("response.output_item.done", output_index=0, item=self._message(status)),
            self._event(f"response.{status}", response=self._response(status)),
        ]

    def _event(self, kind: str, **fields: Any) -> str:
        number, self.number = self.number, self.number + 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)

    def _text_event(self, kind: str, **fields: Any) -> str:
        return self._event(kind, item_id=self.item_id, output_index=0, content_index=0, **fields)

    def _status(self) -> str:
        return "incomplete" if self.answer.finish_reason == "length" else "completed"

    def _part(self) -> dict[str, Any]:
        scores = token_scores(self.answer.logprobs)
        return {"type": "output_text", "text": self.answer.text, "annotations": [], "logprobs": scores}

    def _message(self, status: str) -> dict[str, Any]:
        content = [self._part()]
        return {"type": "message", "id": self.item_id, "role": "assistant", "status": status, "content": content}

    def _response(self, status: str) -> dict[str, Any]:
        """The response as a whole; its output and usage are there when it has ended."""
        body, ended = self.body, status in ("completed", "incomplete")
        return {
            "id": self.answers.request_id,
            "object": "response",
            "created_at": self.created,
            "completed_at": time.time() if ended else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [self._message(status)] if ended else [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            "user": body.user,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.answers.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0, **usage["prompt_tokens_details"]},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
