"""Requests to a server, their answers, and whether these are the ones that the same prompt gives alone, offline.

`offline` makes questions and their answers, `calls` and `arrivals` the requests and their times, `drive` makes them,
and `verdict` counts what came of them.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import torch

CLOSE = 1e-3  # a choice between two tokens whose scores are closer than that may fall either way by rounding
AGAIN = 0.2  # seconds until a request that was turned away or cut off is made again
BUSY = (429, 502, 503)


@dataclass(frozen=True)
class Question:
    """A text for a prompt (`model`), and all that it may be answered: the answer's text after 1, 2, … tokens.

    `tokens`: of the text alone. More than one list of answers is right while the prompt is being replaced.
    """

    model: str
    text: str
    tokens: int
    answers: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Call:
    """One request. `leaves`: the client closes the connection when the first piece of the stream has come."""

    question: Question
    new: int
    stream: bool = False
    leaves: bool = False

    @property
    def body(self) -> dict[str, Any]:
        asked = {"model": self.question.model, "prompt": self.question.text, "max_tokens": self.new}
        return {**asked, "temperature": 0, "ignore_eos": True, "stream": self.stream}


@dataclass
class Outcome:
    """What came of a call; seconds from its arrival. `error`: why it has no answer, after all tries."""

    call: Call
    text: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)
    finish: str | None = None
    first: float = 0.0
    seconds: float = 0.0
    tries: int = 0
    error: str | None = None

    @property
    def wrong(self) -> bool:
        """It got an answer that is not the prompt's own; one that was not waited for must have begun like it."""
        text, right = whole(self.text), [whole(answers[self.call.new - 1]) for answers in self.call.question.answers]
        if self.error is not None:
            return False
        if self.call.leaves:
            return not any(answer.startswith(text) for answer in right)
        counted = self.usage in ({}, self._usage())
        return text not in right or self.finish != "length" or not counted

    def _usage(self) -> dict[str, int]:
        prompt, new = self.call.question.tokens, self.call.new
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def whole(text: str) -> str:
    """Without the bytes at its end that are no character yet, which servers keep back."""
    return text.rstrip("\ufffd")


# ---- offline ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def offline(
    model: Any, tokenizer: Any, names: Sequence[str | None], texts: Sequence[str], new: int, base: str = "base"
) -> list[Question]:
    """Every prompt of `model` (None: no prompt, asked for as `base`) with every text, each generated alone.

    Left out are answers that a rounding error could change; see `CLOSE`.
    """
    found = []
    for name in names:
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            answer = _alone(model, tokenizer, name, ids, new)
            if answer is not None:
                found.append(Question(name or base, text, ids.shape[1], (answer,)))
    return found


def _alone(model: Any, tokenizer: Any, name: str | None, ids: torch.Tensor, new: int) -> tuple[str, ...] | None:
    """The greedy answer's text after each token; None where it is a near thing."""
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "output_scores": True}
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
    output = model.generate(**rows, **options, adapter_names=[name or "__base__"])
    best = torch.stack([scores[0].topk(2).values for scores in output.scores])
    if float((best[:, 0] - best[:, 1]).min()) < CLOSE or len(best) < new:
        return None
    tokens = output.sequences[0, ids.shape[1] :].tolist()
    return tuple(tokenizer.decode(tokens[: end + 1], skip_special_tokens=True) for end in range(new))


def telling(questions: Sequence[Question]) -> list[Question]:
    """Those whose answer no other prompt gives to the same text: a mix-up of prompts would be seen."""
    seen = Counter((question.text, question.answers[0][-1]) for question in questions)
    return [question for question in questions if seen[question.text, question.answers[0][-1]] == 1]


# ---- traffic ---------------------------------------------------------------------------------------------------------


def calls(questions: Sequence[Question], count: int, seed: int = 0, leaving: float = 0.0) -> list[Call]:
    """Requests drawn from the questions: of all lengths, half of them streams, some of which are not waited for."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        question = draw.choice(questions)
        longest = len(question.answers[0])
        call = Call(question, draw.randint(longest // 2, longest), stream=draw.random() < 0.5)
        made.append(replace(call, leaves=call.stream and draw.random() < 2 * leaving))
    return made


def arrivals(count: int, rate: float, seed: int = 0) -> list[float]:
    """Seconds of a Poisson process with so many arrivals per second."""
    draw, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += draw.expovariate(rate)
        times.append(now)
    return times


async def drive(address: str, asked: Sequence[Call], when: Sequence[float], patience: float = 0.0) -> list[Outcome]:
    """Make each request at its time, whatever came of those before; one that is not answered is made again.

    `patience`: seconds for which a request that fails, is cut off or turned away is made again.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    begun = time.perf_counter()
    async with httpx.AsyncClient(base_url=address, timeout=120.0, limits=limits, trust_env=False) as client:

        async def one(call: Call, at: float) -> Outcome:
            await asyncio.sleep(max(0.0, begun + at - time.perf_counter()))
            return await _answered(client, call, patience)

        return list(await asyncio.gather(*map(one, asked, when)))


async def _answered(client: httpx.AsyncClient, call: Call, patience: float) -> Outcome:
    begun, tries = time.perf_counter(), 0
    while True:
        tries += 1
        outcome = Outcome(call, tries=tries)
        again = False
        try:
            await (_streamed if call.stream else _whole)(client, call, outcome, begun)
        except httpx.HTTPStatusError as error:
            outcome.error = f"status {error.response.status_code}: {error.response.text[:200]}"
            again = error.response.status_code in BUSY
        except (httpx.TransportError, CutOff) as error:
            outcome.error, again = f"{type(error).__name__}: {error}", True
        outcome.seconds = time.perf_counter() - begun
        if not again or outcome.seconds > patience:
            return outcome
        await asyncio.sleep(AGAIN)


class CutOff(Exception):
    """A stream that ended without its last line."""


async def _whole(client: httpx.AsyncClient, call: Call, outcome: Outcome, begun: float) -> None:
    answer = (await client.post("/v1/completions", json=call.body)).raise_for_status().json()
    outcome.first = time.perf_counter() - begun
    _take(outcome, answer["choices"][0])
    outcome.usage = {name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


async def _streamed(client: httpx.AsyncClient, call: Call, outcome: Outcome, begun: float) -> None:
    async with client.stream("POST", "/v1/completions", json=call.body) as answer:
        if answer.is_error:
            await answer.aread()
            answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            for choice in json.loads(data).get("choices", ()):
                outcome.first = outcome.first or time.perf_counter() - begun
                _take(outcome, choice)
            if call.leaves and outcome.text:
                return
    raise CutOff("the stream ended before its end")


def _take(outcome: Outcome, choice: Mapping[str, Any]) -> None:
    outcome.text += choice["text"]
    outcome.finish = choice.get("finish_reason") or outcome.finish


def verdict(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Counts of what came of all calls, and how long the streams took to begin."""
    done = [outcome for outcome in outcomes if outcome.error is None]
    firsts = sorted(outcome.first for outcome in done if outcome.call.stream) or [0.0]
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    for error in errors[:1]:
        print(f"# the first of {len(errors)} failures: {error}", flush=True)
    for outcome in wrong[:1]:
        print(f"# the first of {len(wrong)} wrong answers: {outcome}", flush=True)
    return {
        "answered": len(done),
        "wrong": len(wrong),
        "failed": len(errors),
        "again": sum(outcome.tries - 1 for outcome in outcomes),
        "left": sum(outcome.call.leaves for outcome in done),
        "first": firsts[len(firsts) // 2],
        "first_99": firsts[min(len(firsts) - 1, len(firsts) * 99 // 100)],
        "tokens": sum(outcome.call.new for outcome in done if not outcome.call.leaves),
    }
