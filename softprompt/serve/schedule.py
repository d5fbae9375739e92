"""Who goes on, who begins, who waits: first come, first served, within a limit of rows and of tokens.

A row that waits is overtaken by nobody, so all are answered; where memory runs out while rows grow, the last to come
waits again and is read anew, with what it has said already.
"""

from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import final

import torch
from transformers import DynamicCache

from softprompt.errors import ConfigError, SoftPromptError
from softprompt.prompt import KV
from softprompt.serve.engine import EngineError, Piece
from softprompt.serve.prompt_pool import PromptFinder
from softprompt.serve.rows import Row
from softprompt.serve.sampling import choose
from softprompt.serve.steps import PIECE, Beginning, Model, alone


@final
class Schedule:
    """All rows of one model, step by step. For a single thread."""

    def __init__(self, model: Model, finder: PromptFinder, max_rows: int, max_tokens: int) -> None:
        self.model, self.finder = model, finder
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.waiting: deque[Row] = deque()
        self.beginning: Beginning | None = None
        self.broken: str | None = None

    @property
    def running(self) -> int:
        return len(self._under_way())

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, row: Row) -> None:
        self.waiting.append(row)

    def step(self) -> None:
        """One step for everybody: those that go on get one token more each.

        What goes wrong ends the rows that it happens to, with an error; `broken` says what, until the model answers
        again, which it is asked to where nobody else asks.
        """
        if self.broken is not None and self.idle:
            self._try_again()
        self._sweep()
        if self.beginning is None:
            self._admit()
        if self.beginning is not None:
            self._begin(self.beginning)
        self._make_room()
        if self.model.rows:
            try:
                self._take(list(self.model.rows), self.model.step())
                self.broken = None
            except Exception as error:  # what a model may raise is anything: its rows end, the server does not
                self._fail_all(error)

    def end(self, error: Exception) -> None:
        """End all rows with this error."""
        for row in (*self._under_way(), *self.waiting):
            row.send(error)
        self.waiting.clear()
        self._start_anew()

    # ---- beginning -----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Begin with as many of the first rows that wait as there is room for; they are read together."""
        rows: list[Row] = []
        while self.waiting and len(self.model.rows) + len(rows) < self.max_rows:
            row = self.waiting[0]
            if not self._find(row):
                self.waiting.popleft()
                continue
            if not self._go_together(rows, row):
                break
            if not self._fits([*self.model.rows, *rows, row]):
                if self.model.rows or rows:
                    break
                row.send(_too_many(self.max_tokens))
                self.waiting.popleft()
                continue
            rows.append(self.waiting.popleft())
            self._hold(row)
        if rows:
            self.beginning = Beginning(self.model, rows)

    def _find(self, row: Row) -> bool:
        """Get its prompt; False where that fails, which ends the row."""
        if row.found is not None or row.ask.version is None or row.cancelled:
            return not row.cancelled
        try:
            row.found = self.finder.find(row.ask.version)
        except SoftPromptError as error:
            row.send(error)
        except Exception as error:  # folding runs the model, which may raise anything
            row.send(_failed(error))
            self.broken = str(_failed(error))
        return row.found is not None

    def _go_together(self, rows: Sequence[Row], row: Row) -> bool:
        """Whether a row can be read with these, and go on with those under way."""
        kv = row.found.prompt if row.found is not None else None
        if isinstance(kv, KV) and not self.model.pool.goes_with(kv):
            return False
        if not rows:
            return True
        width = max(each.tokens for each in (*rows, row))
        return width * (len(rows) + 1) <= PIECE and not alone(row) and not alone(rows[0])

    def _hold(self, row: Row) -> None:
        if row.key is not None and row.found is not None and isinstance(row.found.prompt, KV):
            self.model.pool.take(row.key, row.found.prompt)

    def _let_go(self, row: Row) -> None:
        if row.key is not None:
            self.model.pool.give_back(row.key)
        row.found = None

    def _begin(self, beginning: Beginning) -> None:
        """Read on; rows whose text has been read get their first token and go on with the others."""
        try:
            scores = beginning.step()
        except Exception as error:  # as for a step of all; these rows have not yet to do with the others
            self.beginning = None
            if not isinstance(error, SoftPromptError):
                self.broken = str(_failed(error))
            for row in beginning.rows:
                self._let_go(row)
                row.send(error if isinstance(error, SoftPromptError) else _failed(error))
            return
        self.broken = None
        if scores is None:
            return
        try:
            self.model.join(beginning)
            self.beginning = None
            self._take(beginning.rows, scores)
        except Exception as error:
            self._fail_all(error)

    # ---- going on ------------------------------------------------------------------------------------------------

    def _take(self, rows: Sequence[Row], scores: torch.Tensor) -> None:
        """One token more for each of these rows, which are the model's; those that are done leave."""
        for row, choice in zip(rows, choose(scores, [row.sampler for row in rows]), strict=True):
            if choice is None:
                self._leave(row)
                row.send(_not_numbers(row))
                continue
            piece = row.take(choice)
            if piece.finish_reason is not None:
                self._leave(row)
            row.send(piece)

    def _leave(self, row: Row) -> None:
        self.model.leave(row)
        self._let_go(row)

    def _sweep(self) -> None:
        """Rows that nobody waits for any more, or whose time is over, go."""
        now = monotonic()
        gone = {row for row in (*self.model.rows, *self.waiting) if row.cancelled or row.deadline <= now}
        for row in gone:
            if row in self.model.rows:
                self._leave(row)
            else:
                self.waiting.remove(row)
            if not row.cancelled:
                row.send(row.time_out())
        beginning = self.beginning
        if beginning is not None and all(row.cancelled or row.deadline <= now for row in beginning.rows):
            self.beginning = None
            for row in beginning.rows:
                self._let_go(row)
                if not row.cancelled:
                    row.send(row.time_out())

    def _make_room(self) -> None:
        """While the next token of all does not fit, the last to come goes back to waiting, in front."""
        while len(self.model.rows) > 1 and not self._fits(self._under_way()):
            last = max(self.model.rows, key=lambda row: row.number)
            self._leave(last)
            self.waiting.appendleft(last)

    def _fits(self, rows: Sequence[Row]) -> bool:
        """Whether these rows can get a token each: in memory all are as long as the longest, their prompts too."""
        prompts = {row.key: row.found.length for row in rows if row.key is not None and row.found is not None}
        own = len(rows) * (max(row.tokens for row in rows) + 1)
        return own + len(prompts) * max(prompts.values(), default=0) <= self.max_tokens

    def _under_way(self) -> list[Row]:
        beginning = self.beginning  # (`running` is asked for by other threads)
        return list(dict.fromkeys([*self.model.rows, *(beginning.rows if beginning is not None else ())]))

    # ---- going wrong ---------------------------------------------------------------------------------------------

    def _fail_all(self, error: Exception) -> None:
        """Rows under way share what has broken; those that wait can still be answered."""
        self.broken, rows = str(_failed(error)), self._under_way()
        self._start_anew()
        for row in rows:
            row.send(_failed(error))

    def _try_again(self) -> None:
        """Whether the model reads a token by itself."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        try:
            self.model.call(token, torch.ones_like(token), DynamicCache(), None)
            self.broken = None
        except Exception as error:  # as above
            self.broken = str(_failed(error))

    def _start_anew(self) -> None:
        self.beginning = None
        self.model = Model(self.model.way, self.model.facts, self.model.device)


def _failed(error: Exception) -> EngineError:
    reason = (str(error).splitlines() or [""])[0]
    return EngineError(f"the model failed with {type(error).__name__} ({reason}); ask again, or ask for less.")


def _not_numbers(row: Row) -> EngineError:
    prompt = "" if row.ask.version is None else f" with the prompt {row.ask.version.name!r}"
    return EngineError(f"the model's scores{prompt} are not numbers, so there is no next token; train it anew.")


def _too_many(limit: int) -> ConfigError:
    return ConfigError(
        f"the request and its prompt do not fit into the {limit:,} tokens of the server's cache; raise "
        "max_cache_tokens or ask for less."
    )


def finished(item: Piece | Exception) -> bool:
    """Whether this is the last that is sent for a row."""
    return isinstance(item, Exception) or item.finish_reason is not None
