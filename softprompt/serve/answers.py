"""The answers to one request, from the name of the prompt to the last piece: the same for all three routes."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast, final

from softprompt.serve.changes import UnknownPromptError
from softprompt.serve.engine import Ask, Engine, Piece, Sampling, TokenLogprob
from softprompt.serve.errors import RequestError, unknown_model
from softprompt.serve.filled import TextRow
from softprompt.serve.library import PromptLibrary
from softprompt.serve.limits import Gate, too_late, within
from softprompt.serve.logs import Record
from softprompt.serve.metrics import Metrics
from softprompt.serve.options import ServeOptions
from softprompt.serve.text import TextCoder
from softprompt.serve.version import Version


@dataclass(frozen=True)
class Service:
    """What a server has for its requests. `name`: what they call the base model; `started`: Unix time."""

    engine: Engine
    library: PromptLibrary
    options: ServeOptions
    name: str
    text: TextCoder
    gate: Gate
    metrics: Metrics
    started: int

    @property
    def most(self) -> int:
        """Tokens of one request: virtual ones, its text and its answer."""
        return min(self.engine.max_length, self.engine.counts()["cache_tokens_limit"] - 1)

    def check(self, model: str, answers: int) -> None:
        """RequestError: 404 for a name that nothing is served under, 400 for more answers than can be at a time."""
        with self.use(model):
            self.gate.check(answers)

    def use(self, model: str) -> AbstractContextManager[Version | None]:
        """What the name means now, which stays until the block ends; None for the base model. RequestError with 404."""
        return nullcontext(None) if model == self.name else self._prompt(model)

    @contextmanager
    def _prompt(self, model: str) -> Iterator[Version]:
        with ExitStack() as stack:
            try:
                version = stack.enter_context(self.library.use(model))
            except UnknownPromptError:
                raise unknown_model(model) from None
            yield version


@dataclass(frozen=True)
class Wanted:
    """What a request asks for. `texts`: each as a string or as token ids; `n` answers to each.

    `sampling.max_tokens` is an upper limit: an answer ends where the model's context does. `conversation`: the text was
    written by the chat template. `param`: the field of the texts, for errors.
    """

    model: str
    texts: Sequence[str] | Sequence[Sequence[int]]
    sampling: Sampling
    n: int = 1
    conversation: bool = False
    param: str = "prompt"


@dataclass
class Answer:
    """One whole answer."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


@final
class Answers:
    """The answers to one request. `pieces` may be called once; the counts are right when it has ended."""

    def __init__(self, service: Service, record: Record, request_id: str, wanted: Wanted) -> None:
        self.request_id, self.wanted = request_id, wanted
        self._service, self._record = service, record
        self.version: Version | None = None
        self.rows: list[TextRow] = []
        record.texts = list(wanted.texts) if service.options.log_prompts else None

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """(number of the answer, what came of it), answers of one text together: text · n + choice.

        RequestError: 404 for the name, 400 for texts that are too long, 429, 504. SoftPromptErrors of the engine.
        """
        service, seconds = self._service, self._service.options.timeout
        deadline = asyncio.get_running_loop().time() + seconds
        with service.gate.enter(len(self.wanted.texts) * self.wanted.n), service.use(self.wanted.model) as version:
            self._found(version)
            reading = service.text.rows(self.wanted.texts, version, self.wanted.conversation)
            self.rows = await within(deadline, reading, seconds)
            asks = self._asks()
            some = self.wanted.sampling.max_tokens > 0
            async with aclosing(_merged(service.engine, asks) if some else _nothing(asks)) as found:
                while (each := await within(deadline, anext(found, None), seconds)) is not None:
                    self._count(each[1])
                    if each[1].finish_reason == "timeout":
                        raise too_late(seconds)
                    yield each

    async def whole(self) -> list[Answer]:
        """All answers, once they are there."""
        answers = [Answer() for _ in range(len(self.wanted.texts) * self.wanted.n)]
        async with aclosing(self.pieces()) as pieces:
            async for number, piece in pieces:
                answers[number].text += piece.text
                answers[number].logprobs += piece.logprobs
                answers[number].finish_reason = piece.finish_reason
        return answers

    @property
    def fingerprint(self) -> str | None:
        """Which content of the prompt answered."""
        return self.version.digest[:16] if self.version else None

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`: real tokens; the virtual ones apart, once per text, as the real ones are."""
        prompt, completion = self._record.prompt_tokens, self._record.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"virtual_tokens": self._record.virtual_tokens},
        }

    def _found(self, version: Version | None) -> None:
        self.version = version
        self._record.model, self._record.digest = self.wanted.model, version.digest if version else None

    def _asks(self) -> list[Ask]:
        """The texts' answers, each with a seed of its own where there is one."""
        wanted, asks = self.wanted, []
        length = self.version.length if self.version else 0
        for number, row in enumerate(self.rows):
            virtual = row.virtual if row.slots else length
            self._record.prompt_tokens += row.real
            self._record.virtual_tokens += virtual
            sampling = replace(wanted.sampling, max_tokens=self._room(row.real, virtual))
            for choice in range(wanted.n):
                seed = None if wanted.sampling.seed is None else wanted.sampling.seed + choice
                name = f"{self.request_id}-{number * wanted.n + choice}"
                asks.append(Ask(name, row.ids, replace(sampling, seed=seed), self.version, row.slots))
        return asks

    def _room(self, length: int, virtual: int) -> int:
        """How many tokens an answer may have. RequestError if there is no room, or no text."""
        param, most = self.wanted.param, self._service.most
        if not length:
            raise RequestError(400, "The text has no tokens.", param=param, code="empty")
        if length + virtual >= most:
            beside = f" and {virtual} virtual tokens of the prompt" if virtual else ""
            message = f"The text has {length} tokens; with its answer{beside} it must fit into {most}."
            raise RequestError(400, message, param=param, code="context_length_exceeded")
        room = min(self.wanted.sampling.max_tokens, most - length - virtual)
        if self.wanted.sampling.min_tokens > room:
            message = f"min_tokens is {self.wanted.sampling.min_tokens}, and an answer can have {room} tokens."
            raise RequestError(400, message, param="min_tokens")
        return room

    def _count(self, piece: Piece) -> None:
        self._record.completion_tokens += len(piece.token_ids)
        if piece.token_ids:
            self._record.token()


async def _nothing(asks: Sequence[Ask]) -> AsyncGenerator[tuple[int, Piece], None]:
    """What asks for no tokens get: an end."""
    for number in range(len(asks)):
        yield number, Piece("", finish_reason="length")


async def _merged(engine: Engine, asks: Sequence[Ask]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of several asks as they come. Closing it, or an error in one of them, ends all."""
    ready: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()

    async def feed(number: int, ask: Ask) -> None:
        try:
            async with aclosing(cast(AsyncGenerator[Piece, None], engine.generate(ask))) as pieces:
                piece = None
                async for piece in pieces:
                    ready.put_nowait((number, piece))
                if piece is None or piece.finish_reason is None:
                    raise RuntimeError("the engine ended an answer without a reason")
            ready.put_nowait(None)
        except Exception as error:
            ready.put_nowait(error)

    tasks = [asyncio.create_task(feed(number, ask)) for number, ask in enumerate(asks)]
    try:
        left = len(tasks)
        while left:
            each = await ready.get()
            if isinstance(each, BaseException):
                raise each
            if each is None:
                left -= 1
            else:
                yield each
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
