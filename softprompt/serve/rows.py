"""One answer under way: what it was asked, what it has said so far, and what it becomes with one more token."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from softprompt.prompt import KV
from softprompt.serve.detokenize import Detokenizer, StopStrings, texts_of
from softprompt.serve.engine import Ask, FinishReason, Piece, TokenLogprob
from softprompt.serve.prompt_pool import Found
from softprompt.serve.sampling import Choice, Sampler


@dataclass(eq=False)
class Row:
    """`number`: rows are answered in this order. `deadline`: on `time.monotonic`'s clock.

    `send` takes its pieces, and the error that ends it; the thread that reads them may set `cancelled`.
    """

    ask: Ask
    number: int
    ends: tuple[int, ...]
    tokenizer: Any
    send: Callable[[Piece | Exception], None]
    deadline: float = float("inf")
    cancelled: bool = False
    found: Found | None = None
    ids: list[int] = field(init=False)
    sampler: Sampler = field(init=False)

    def __post_init__(self) -> None:
        sampling = self.ask.sampling
        self.ids = list(self.ask.token_ids)
        self.sampler = Sampler(sampling, self.ends)
        self._text = Detokenizer(self.tokenizer, self.ids)
        self._stops = StopStrings(sampling.stop)

    @property
    def key(self) -> str | None:
        """Which keys and values in the pool are its prompt, if any are."""
        version = self.ask.version
        if version is None or self.found is None or not isinstance(self.found.prompt, KV):
            return None
        return version.digest

    @property
    def inner(self) -> int:
        """How many virtual tokens stand among its own in the cache: not those in place of an id."""
        if self.found is None or isinstance(self.found.prompt, KV) or self.ask.slots:
            return 0
        return self.found.length

    @property
    def tokens(self) -> int:
        """How many tokens of its own the cache has to hold before the next one is known."""
        return len(self.ids) + self.inner

    def take(self, choice: Choice) -> Piece:
        """One more token."""
        sampling, token = self.ask.sampling, choice.token
        logprobs = () if choice.logprob is None else (self._logprob(choice),)
        self.ids.append(token)
        ended = token in self.ends and not sampling.ignore_eos
        text = "" if ended else self._text.push(token)
        if self.sampler.chosen > sampling.min_tokens:
            text = self._stops.push(text)
        reason: FinishReason | None = None
        if ended or self._stops.found:
            reason = "stop"
        elif self.sampler.chosen >= sampling.max_tokens:
            reason = "length"
        if reason is not None and not self._stops.found:
            rest = self._stops.push(self._text.finish())  # which may still be one
            reason = "stop" if self._stops.found else reason
            text += rest + self._stops.finish()
        return Piece(text, (token,), logprobs, reason)

    def time_out(self) -> Piece:
        """Its last piece when its time is over."""
        return Piece(self._stops.push(self._text.finish()) + self._stops.finish(), finish_reason="timeout")

    def _logprob(self, choice: Choice) -> TokenLogprob:
        assert choice.logprob is not None
        text, *texts = texts_of(self.tokenizer, [choice.token, *(token for token, _ in choice.top)], self.ids[-1])
        top = tuple((token, each, value) for (token, value), each in zip(choice.top, texts, strict=True))
        return TokenLogprob(choice.token, text, choice.logprob, top)
