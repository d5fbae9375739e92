"""The engine on transformers: one thread that runs a base model for all requests at once, one token each per step.

It has a batch of its own, whose rows join and leave between steps, and not transformers' continuous batching
(`transformers.generation.continuous_batching`, 5.23), since that

- draws the tokens of all requests together, from one generator, and all of them greedily or none
  (`model_runner.ModelRunner._sample`), so that a seed means nothing and one request's temperature changes another;
- knows temperature, top-k and top-p per request and no more (`cb_logits_processors.CLASSIC_TO_CB_PROCESSORS_MAP`):
  no penalties, no least number of tokens, no likeliest alternatives;
- makes positions itself, from 0 (`input_outputs.ContinuousBatchingIOs.prepare_batch_tensors`), and tells attention
  neither which request a token is of nor anything that a caller could add (`get_model_kwargs`), so neither true
  positions nor per-row prompts reach a layer;
- shares blocks between requests by their token ids (`cache.PagedAttentionCache`), whatever prompt stands before them;
- takes token ids only, so prompts inside the rows have no way in, and with sdpa and eager attention lets every token
  look at (and then masks) the tokens of all requests.
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, final

import torch
from transformers import PreTrainedModel

from softprompt.base_model import find_way
from softprompt.elsewhere import word_table
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.facts import Facts
from softprompt.serve.engine import Ask, EngineError, Piece
from softprompt.serve.options import ServeOptions
from softprompt.serve.prompt_pool import PromptFinder
from softprompt.serve.rows import Row
from softprompt.serve.sampling import check_sampling
from softprompt.serve.schedule import Schedule, finished
from softprompt.serve.steps import Model

ENDLESS = 4096
"""`max_length` of a model whose positions have no end."""

AGAIN = 1.0
"""Seconds between two looks at a model that has failed."""

Sent = list[tuple["asyncio.Queue[Piece | Exception]", Piece | Exception]]


@final
class TransformersEngine:
    """The `Engine` over a causal language model of attention alone, which it freezes and alone calls from then on.

    Greedy answers are those of `model.generate` for the request alone, up to the rounding of floating point (but for
    penalties that only the model's own `generation_config` asks for). `timeout`: seconds for an answer, waiting
    included. `prompt_bytes`: of prompts that are kept in memory, beside those in use.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        max_batch: int = 64,
        max_cache_tokens: int | None = None,
        timeout: float = float("inf"),
        prompt_bytes: int = 2 << 30,
    ) -> None:
        base = base.eval().requires_grad_(False)
        self.way, self.facts = find_way(base)
        if not self.facts.causal or not self.facts.foldable or base.get_output_embeddings() is None:
            raise UnsupportedError(
                f"{type(base).__name__} cannot be served, since it is no causal language model of attention alone; "
                "serve a family such as gpt2, llama, mistral, qwen or gemma."
            )
        self.base, self.tokenizer, self.timeout = base, tokenizer, timeout
        self.max_length = _max_length(self.facts, max_length)
        self.vocabulary = word_table(base).shape[0]
        self.max_cache_tokens = max_cache_tokens or _what_fits(self.facts, base, max_batch * self.max_length)
        model = Model(self.way, self.facts, word_table(base).device)
        finder = PromptFinder(self.way, self.facts, prompt_bytes)
        self._schedule = Schedule(model, finder, max_batch, self.max_cache_tokens)
        self._ends = _ends(base, tokenizer)
        self._here = threading.Condition()  # of what follows
        self._new: list[Row] = []
        self._asked = 0
        self._stopping = False
        self._sent: Sent = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, options: ServeOptions) -> "TransformersEngine":
        """The engine that options ask for, its model loaded. Raises SoftPromptError."""
        from softprompt.loading import load_base, load_tokenizer

        tokenizer = load_tokenizer(options.base)
        dtype = _dtype(options.base) if options.dtype == "auto" else options.dtype
        base = load_base(options.base, tokenizer, dtype=dtype, device=options.device or "auto")
        return cls(
            base,
            tokenizer,
            max_length=options.max_length,
            max_batch=options.max_batch,
            max_cache_tokens=options.max_cache_tokens,
            timeout=options.timeout,
        )

    # ---- what the API calls --------------------------------------------------------------------------------------

    async def start(self) -> None:
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run, name="softprompt-engine", daemon=True)
            self._thread.start()

    async def stop(self) -> None:
        """Refuse new requests, and end those under way with an EngineError."""
        with self._here:
            self._stopping = True
            self._here.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    async def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """See `Engine.generate`."""
        self._check(ask)
        queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        row = self._add(ask, queue)
        try:
            while True:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if finished(item):
                    return
        finally:
            row.cancelled = True
            with self._here:
                self._here.notify()

    def health(self) -> str | None:
        if self._thread is None or not self._thread.is_alive() or self._stopping:
            return "the engine is not running"
        return self._schedule.broken

    def counts(self) -> dict[str, int]:
        schedule = self._schedule
        return {
            "running": schedule.running,
            "waiting": len(schedule.waiting) + len(self._new),
            "cache_tokens": schedule.model.tokens,
            "cache_tokens_limit": self.max_cache_tokens,
        }

    def _check(self, ask: Ask) -> None:
        """Raise ConfigError for what can never run."""
        check_sampling(ask.sampling, self.vocabulary)
        if not ask.token_ids:
            raise ConfigError("the text is empty; give at least one token.")
        wrong = next((each for each in ask.token_ids if not 0 <= each < self.vocabulary), None)
        if wrong is not None:
            raise ConfigError(f"there is no token {wrong}; the ids of this model go from 0 to {self.vocabulary - 1}.")
        if ask.slots and len(ask.slots) != len(ask.token_ids):
            raise ConfigError(f"{len(ask.slots)} slots and {len(ask.token_ids)} tokens; give one slot for each token.")
        virtual = 0 if ask.version is None or ask.slots else ask.version.length
        total = virtual + len(ask.token_ids) + ask.sampling.max_tokens
        most = min(self.max_length, self.max_cache_tokens - 1)
        if total > most:
            raise ConfigError(
                f"{virtual} virtual tokens, {len(ask.token_ids)} of text and max_tokens={ask.sampling.max_tokens} are "
                f"{total}, but there is room for {most}; shorten the text or lower max_tokens."
            )

    def _add(self, ask: Ask, queue: "asyncio.Queue[Piece | Exception]") -> Row:
        with self._here:
            if self._stopping or self._thread is None or not self._thread.is_alive():
                raise EngineError("the server is not running any more; ask again when it is.")
            self._asked += 1
            row = Row(
                ask,
                self._asked,
                self._ends,
                self.tokenizer,
                lambda item: self._sent.append((queue, item)),
                monotonic() + self.timeout,
            )
            self._new.append(row)
            self._here.notify()
            return row

    # ---- the engine's own thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        error: Exception = EngineError("the server stops; ask again when it is back.")
        try:
            while self._take_in():
                self._schedule.step()
                self._deliver()
        except Exception as bug:
            error = EngineError(f"the engine failed with {type(bug).__name__} ({bug}); restart the server.")
            raise
        finally:
            with self._here:
                self._stopping = True
                new, self._new = self._new, []
            for row in new:
                self._schedule.add(row)
            self._schedule.end(error)
            self._deliver()

    def _take_in(self) -> bool:
        """Wait for something to do, not for long where something is broken; False when it is time to stop."""
        with self._here:
            while not self._new and self._schedule.idle and not self._stopping:
                if not self._here.wait(None if self._schedule.broken is None else AGAIN):
                    break
            new, self._new = self._new, []
            for row in new:
                self._schedule.add(row)
            return not self._stopping

    def _deliver(self) -> None:
        """Hand over what a step has sent, all at once: waking the other thread costs more than a token."""
        sent, self._sent = self._sent, []
        if sent and self._loop is not None:
            with suppress(RuntimeError):  # it has been closed, and nobody waits any more
                self._loop.call_soon_threadsafe(_put, sent)


def _put(sent: Sent) -> None:
    for queue, item in sent:
        queue.put_nowait(item)


def _max_length(facts: Facts, wanted: int | None) -> int:
    if wanted is not None and facts.context is not None and wanted > facts.context:
        raise ConfigError(f"max_length={wanted} is more than the {facts.context} tokens that this model takes.")
    return wanted or facts.context or ENDLESS


def _ends(base: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer, as `generate` knows them."""
    config = base.generation_config
    ends = config.eos_token_id if config is not None else None
    ends = tokenizer.eos_token_id if ends is None else ends
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)


def _what_fits(facts: Facts, base: PreTrainedModel, most: int) -> int:
    """How many tokens of keys and values a part of the memory holds: 30 % of what a GPU has free, or 1/8 of the CPU's.

    The cache has up to a quarter more room than that, one layer is there twice while it grows, and steps need some.
    """
    own = word_table(base)
    size = sum(each.heads * (each.key_size + each.value_size) for each in facts.layers) * own.element_size()
    if own.device.type == "cuda":
        memory = int(0.3 * torch.cuda.mem_get_info(own.device)[0])
    else:
        memory = _memory() // 8
    return max(1, min(most, memory // max(size, 1)))


def _memory() -> int:
    """Bytes of memory that this process may have, in a container too."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no such file, or "max"
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def _dtype(base: str) -> str:
    """The number format that a model's config names, float32 where it names none that is known here."""
    from transformers import AutoConfig

    from softprompt.loading import resolve_model
    from softprompt.recipe import DTYPES

    found = str(AutoConfig.from_pretrained(resolve_model(base)).dtype).removeprefix("torch.")
    return found if found in DTYPES else "float32"
