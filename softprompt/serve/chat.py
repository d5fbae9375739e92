"""POST /v1/chat/completions: a conversation goes on, written down by the tokenizer's chat template."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request
from starlette.responses import Response

from softprompt.serve.answers import Answers, Service, Wanted
from softprompt.serve.completions import finite
from softprompt.serve.engine import TokenLogprob
from softprompt.serve.errors import json_response
from softprompt.serve.limits import until_gone
from softprompt.serve.logs import record_of
from softprompt.serve.protocol import ChatRequest, InputItem, Message
from softprompt.serve.sse import DONE, event, event_stream

UNKNOWN = "\ufffd"  # how a token is shown that is only a part of a character


async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer the last message of a conversation."""
    service: Service = request.app.state.service
    record = record_of(request.scope)
    record.stream = bool(body.stream)
    service.check(body.model, body.n or 1)
    text = await service.text.conversation(spoken(body.messages), "messages")
    most = body.max_completion_tokens or body.max_tokens or service.most
    sampling = body.sampling(most, (body.top_logprobs or 0) if body.logprobs else None)
    wanted = Wanted(body.model, [text], sampling, body.n or 1, conversation=True, param="messages")
    answers = Answers(service, record, f"chatcmpl-{uuid.uuid4().hex}", wanted)
    if body.stream:
        return await event_stream(request, _events(answers, body))
    return json_response(await until_gone(request.receive, _whole(answers, body)))


def spoken(messages: Sequence[Message] | Sequence[InputItem]) -> list[dict[str, str]]:
    """As chat templates read them; they know no developers, whom OpenAI's newer models have in place of the system."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        for message in messages
    ]


async def _whole(answers: Answers, body: ChatRequest) -> dict[str, Any]:
    choices = [
        {
            "index": number,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": _scores(answer.logprobs, body),
            "finish_reason": answer.finish_reason,
        }
        for number, answer in enumerate(await answers.whole())
    ]
    head = _head(answers, body, "chat.completion", int(time.time()))
    return {**head, "choices": choices, "usage": answers.usage()}


async def _events(answers: Answers, body: ChatRequest) -> AsyncGenerator[str, None]:
    """Chunks of the answers, `index` saying of which; the first of each says who speaks."""
    created, begun = int(time.time()), set[int]()
    usage: dict[str, Any] = {"usage": None} if body.usage_in_stream else {}
    async with aclosing(answers.pieces()) as pieces:
        async for number, piece in pieces:
            head = _head(answers, body, "chat.completion.chunk", created) | usage
            delta = {"content": piece.text} if number in begun else {"role": "assistant", "content": piece.text}
            begun.add(number)
            scores = _scores(piece.logprobs, body)
            choice = {"index": number, "delta": delta, "logprobs": scores, "finish_reason": piece.finish_reason}
            yield event({**head, "choices": [choice]})
    if body.usage_in_stream:
        head = _head(answers, body, "chat.completion.chunk", created)
        yield event({**head, "choices": [], "usage": answers.usage()})
    yield DONE


def _head(answers: Answers, body: ChatRequest, kind: str, created: int) -> dict[str, Any]:
    return {
        "id": answers.request_id,
        "object": kind,
        "created": created,
        "model": body.model,
        "system_fingerprint": answers.fingerprint,
    }


def _scores(tokens: Sequence[TokenLogprob], body: ChatRequest) -> dict[str, Any] | None:
    return {"content": token_scores(tokens), "refusal": None} if body.logprobs else None


def token_scores(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """OpenAI's list for conversations and responses."""
    return [
        {
            **_score(token.text, token.logprob),
            "top_logprobs": [_score(text, logprob) for _, text, logprob in token.top],
        }
        for token in tokens
    ]


def _score(text: str, logprob: float) -> dict[str, Any]:
    """No bytes are given for a part of a character: they are not known here."""
    return {"token": text, "logprob": finite(logprob), "bytes": [] if UNKNOWN in text else list(text.encode())}
