"""What the API asks of an engine: token ids in, pieces of text out, one prompt per request."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from softprompt.errors import SoftPromptError
from softprompt.serve.version import Version

FinishReason = Literal["stop", "length", "timeout"]


class EngineError(SoftPromptError):
    """An answer that ended through no fault of its request: the server stops, or the model failed (no memory, say)."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; names and meanings are the OpenAI API's, `top_k`, `min_tokens`, `ignore_eos` vLLM's.

    `temperature` 0 is greedy. `top_k` 0 means no limit. `logprobs`: how many alternatives per token; None: none.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None


@dataclass(frozen=True)
class Ask:
    """One answer to be generated: a text's token ids (at least one) after a prompt (None: after no prompt).

    `slots`, for a prompt that stands in a template: which virtual token stands in place of each id, −1 for none.
    """

    request_id: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    version: Version | None = None
    slots: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenLogprob:
    """The natural log-probability of a chosen token; `top`: the likeliest ones at its place, as (id, text, logprob)."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What became known since the last piece: its texts joined are the answer, without the stop string.

    Every generated token is in one piece, the end token too; the text of a token may come pieces later, when its
    characters are whole and are not the beginning of a stop string. `finish_reason` is set in the last piece.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


class Engine(Protocol):
    """A base model that answers many requests at once.

    Closing the iterator that `generate` returns (as a disconnect does) frees its place within one step.
    """

    max_length: int
    """Of virtual tokens, text and answer together."""

    tokenizer: Any

    async def start(self) -> None: ...

    async def stop(self) -> None:
        """Refuse new requests, end those under way."""
        ...

    def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """Raises ConfigError, before the first piece, for what can never run: too long, ids outside the vocabulary.

        Later: SoftPromptError where its prompt cannot be used, EngineError.
        """
        ...

    def health(self) -> str | None:
        """None while it can answer; else what is wrong."""
        ...

    def counts(self) -> dict[str, int]:
        """For /metrics: `running`, `waiting`, `cache_tokens` (held now), `cache_tokens_limit`."""
        ...
