"""What the model runs: the texts of rows that begin, in pieces if they are long, and one token of all that go on."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from softprompt.batch import check_slots
from softprompt.call import Call
from softprompt.elsewhere import at_hand
from softprompt.facts import Facts
from softprompt.injection.contract import Way
from softprompt.prompt import KV, Embeddings
from softprompt.running import Run
from softprompt.serve.prompt_pool import PromptPool
from softprompt.serve.row_cache import RowCache
from softprompt.serve.rows import Row

PIECE = 1024  # tokens of texts, padding included, that are read between two tokens of the others


@final
class Beginning:
    """Rows whose texts are read. Those with vectors inside come one at a time, whole; see `alone`."""

    def __init__(self, model: "Model", rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self._model = model
        self._cache = DynamicCache()  # of all tokens, also where a layer sees a window only: its rows may be joined
        self._read = 0

    @property
    def lengths(self) -> list[int]:
        """How many tokens of each row are in the cache at the end."""
        return [row.tokens for row in self.rows]

    @property
    def cache(self) -> Cache:
        return self._cache

    def step(self) -> Tensor | None:
        """Read one piece more; at the end the scores `[rows, V]` of what comes next."""
        if alone(self.rows[0]):
            return self._with_vectors(self.rows[0])
        width, device = max(self.lengths), self._model.device
        ids = torch.zeros(len(self.rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(self.rows):
            ids[number, width - len(row.ids) :] = torch.tensor(row.ids)
            mask[number, width - len(row.ids) :] = 1
        begin, end = self._read, min(self._read + max(PIECE // len(self.rows), 1), width)
        prompts = self._model.pool.of([row.key for row in self.rows])
        scores = self._model.call(ids[:, begin:end].to(device), mask[:, :end].to(device), self._cache, prompts)
        self._read = end
        return scores if end == width else None

    def _with_vectors(self, row: Row) -> Tensor:
        """A row whose prompt stands between its tokens, as offline generation begins with it."""
        assert row.found is not None and isinstance(row.found.prompt, Embeddings)
        model, slots = self._model, None
        if row.ask.slots:
            more = len(row.ids) - len(row.ask.slots)  # what it has generated already
            slots = torch.tensor([[*row.ask.slots, *[-1] * more]], device=model.device)
        check_slots(row.found.placement, slots)
        run = Run(model.way, model.facts, row.found.prompt, row.found.placement, slots)
        ids = torch.tensor([row.ids], device=model.device)
        placed, _ = run.placed(Call(ids=ids, mask=torch.ones_like(ids)), run.vectors, "left")
        return model.scores(None, placed.but(cache=self._cache))  # (the last column may be a virtual token's)


@final
class Model:
    """A base model and the rows that go on. For a single thread."""

    def __init__(self, way: Way, facts: Facts, device: torch.device) -> None:
        self.way, self.facts, self.device = way, facts, device
        self.pool = PromptPool()
        self.rows: list[Row] = []
        self._cache = RowCache()

    @property
    def tokens(self) -> int:
        """How many tokens rows and prompts hold."""
        return self._cache.tokens + self.pool.tokens

    def call(self, ids: Tensor, mask: Tensor, cache: Cache, prompts: KV | None) -> Tensor:
        """The scores `[B, V]` behind the last column of `ids` `[B, T]`; `mask` `[B, T + what is cached]`."""
        return self.scores(prompts, Call(ids=ids, mask=mask, cache=cache))

    def scores(self, prompts: KV | None, call: Call) -> Tensor:
        """Of a call that fills a cache the scores `[B, V]` behind the last column, and no others where that can be."""
        kept: dict[str, Any] = {"logits_to_keep": 1} if self.way.keeps_logits else {}
        with torch.no_grad(), at_hand(self.way.base):
            return self.way.call(prompts, call.plus(use_cache=True, return_dict=True, **kept)).logits[:, -1]

    def join(self, beginning: Beginning) -> None:
        """Rows that have been read go on, behind the others; before anything is added to them."""
        self._cache.join(beginning.cache, beginning.lengths)
        self.rows += beginning.rows

    def leave(self, row: Row) -> None:
        place = self.rows.index(row)
        self._cache.leave(place)
        self.rows[place] = self.rows[-1]
        self.rows.pop()

    def step(self) -> Tensor:
        """The scores `[rows, V]` behind the last token of each."""
        cache, mask = self._cache.step()
        ids = torch.tensor([row.ids[-1:] for row in self.rows], device=self.device)
        scores = self.call(ids, mask, cache, self.pool.of([row.key for row in self.rows]))
        self._cache.stepped()
        return scores


def alone(row: Row) -> bool:
    """Whether a row's text has to be read by itself: a prompt's vectors stand inside it."""
    return row.found is not None and isinstance(row.found.prompt, Embeddings)
