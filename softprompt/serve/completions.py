"""POST /v1/completions: a text goes on."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request
from starlette.responses import Response

from softprompt.serve.answers import Answers, Service, Wanted
from softprompt.serve.engine import TokenLogprob
from softprompt.serve.errors import json_response
from softprompt.serve.limits import until_gone
from softprompt.serve.logs import record_of
from softprompt.serve.protocol import CompletionRequest
from softprompt.serve.sse import DONE, event, event_stream

LEAST = -9999.0  # OpenAI's number for minus infinity, which JSON has none for
DEFAULT_TOKENS = 16  # OpenAI's


async def complete(body: CompletionRequest, request: Request) -> Response:
    """Complete texts, or lists of token ids."""
    service: Service = request.app.state.service
    record = record_of(request.scope)
    record.stream = bool(body.stream)
    service.check(body.model, len(body.prompt) * (body.n or 1))
    max_tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    wanted = Wanted(body.model, body.prompt, body.sampling(max_tokens, body.logprobs), body.n or 1)
    answers = Answers(service, record, f"cmpl-{uuid.uuid4().hex}", wanted)
    echoes = await _echoes(service, body)
    if body.stream:
        return await event_stream(request, _events(answers, body, echoes))
    return json_response(await until_gone(request.receive, _whole(answers, body, echoes)))


async def _echoes(service: Service, body: CompletionRequest) -> list[str]:
    """For every answer the text that is to stand in front of it."""
    if not body.echo:
        return [""] * (len(body.prompt) * (body.n or 1))
    texts = [text if isinstance(text, str) else await service.text.text(text) for text in body.prompt]
    return [text for text in texts for _ in range(body.n or 1)]


async def _whole(answers: Answers, body: CompletionRequest, echoes: Sequence[str]) -> dict[str, Any]:
    choices = [
        {
            "index": number,
            "text": echoes[number] + answer.text,
            "logprobs": None if body.logprobs is None else logprobs(answer.logprobs, len(echoes[number])),
            "finish_reason": answer.finish_reason,
        }
        for number, answer in enumerate(await answers.whole())
    ]
    return {**_head(answers, body, int(time.time())), "choices": choices, "usage": answers.usage()}


async def _events(answers: Answers, body: CompletionRequest, echoes: Sequence[str]) -> AsyncGenerator[str, None]:
    """Chunks of the answers, `index` saying of which; the first of each has the text it follows, if that is wanted."""
    created = int(time.time())
    usage: dict[str, Any] = {"usage": None} if body.usage_in_stream else {}
    lengths: dict[int, int] = {}  # characters of each answer so far, for `text_offset`
    async with aclosing(answers.pieces()) as pieces:
        async for number, piece in pieces:
            head = _head(answers, body, created) | usage
            if number not in lengths:
                lengths[number] = len(echoes[number])
                piece_text = echoes[number] + piece.text
            else:
                piece_text = piece.text
            scores = None if body.logprobs is None else logprobs(piece.logprobs, lengths[number])
            lengths[number] += sum(len(token.text) for token in piece.logprobs)
            choice = {"index": number, "text": piece_text, "logprobs": scores, "finish_reason": piece.finish_reason}
            yield event({**head, "choices": [choice]})
    if body.usage_in_stream:
        yield event({**_head(answers, body, created), "choices": [], "usage": answers.usage()})
    yield DONE


def _head(answers: Answers, body: CompletionRequest, created: int) -> dict[str, Any]:
    return {
        "id": answers.request_id,
        "object": "text_completion",
        "created": created,
        "model": body.model,
        "system_fingerprint": answers.fingerprint,
    }


def logprobs(tokens: Sequence[TokenLogprob], start: int) -> dict[str, Any]:
    """OpenAI's table for completions, the first token at character `start` of the choice's text."""
    offsets = []
    for token in tokens:
        offsets.append(start)
        start += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [_top(token) for token in tokens],
        "text_offset": offsets,
    }


def _top(token: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens by their text, the chosen one among them; of those that look alike the likeliest."""
    found: dict[str, float] = {}
    for _, text, score in token.top:
        found.setdefault(text, finite(score))
    found.setdefault(token.text, finite(token.logprob))
    return found


def finite(score: float) -> float:
    return max(score, LEAST)
