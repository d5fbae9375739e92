"""Training rows that are read while training: a window of rows at a time, mixed, handed out, and never read again.

`datasets` mixes a stream through a buffer that is lost when a run is resumed: other rows follow than would have
followed. Here the order is a function of the seed, and a place in it is a few numbers: where the window starts, which
window of which epoch it is, and how many of its rows are through. Resuming reads that one window again.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, final

import torch

from softprompt.data.rows import Row
from softprompt.data.shards import Pass, Place, Shards, shared_out
from softprompt.errors import ConfigError, DataError
from softprompt.train.batches import Batches, epoch_batches
from softprompt.train.distributed import Team


@final
@dataclass(frozen=True)
class Stream:
    """What is streamed: shards of rows, and how rows become examples and those what the model is trained on.

    `examples` is asked once for each row when it is read, and may give several; `encode` only for what is used.
    `length` is an example's, in any unit. `only` keeps the rows where a column has a value. `identity` changes when
    the data do.
    """

    shards: Shards
    examples: Callable[[Row], list[Any]]
    encode: Callable[[Sequence[Any]], Sequence[Any]]
    length: Callable[[Any], int]
    only: str | None = None
    identity: str = ""


@final
class Streamed(Batches):
    """This process's rows of each step of a stream. Nobody knows how many steps a pass has.

    Passes follow each other without a gap, and a batch may hold the end of one and the start of the next: in each pass
    every row comes exactly once. Rows are mixed within windows, shards among each other.

    Where shards and batch can be shared out evenly among W processes, each process reads the shards of its own share,
    and those of the next share in its next pass. In one pass of all processes every row comes exactly once, in W passes
    it comes once to each process; a process whose share is shorter begins its next one while others are at theirs.
    Otherwise each process reads every row and takes every W-th of a batch: the steps are those of a single process.
    """

    per_epoch = None

    def __init__(self, stream: Stream, batch_size: int, window: int, seed: int, by_length: bool, team: Team) -> None:
        """`batch_size` is that of all processes together; a window has at most `window` rows of the source.

        `by_length` puts examples of similar length into one batch, as far as they are in one window.
        """
        self.stream = stream
        self.seed = seed
        self.by_length = by_length
        self.team = team
        self._sizes = (batch_size, window)
        self._step = 0
        self._share_out(batch_size % team.size == 0 and stream.only is None)  # what is left of a share may be little
        self._begin(epoch=0)

    def rows(self, step: int) -> list[Any]:
        if step != self._step:
            raise RuntimeError(f"a stream is read in order: step {step} was asked for, and {self._step} is next")
        self._step += 1
        examples = self._take(self.batch_size)
        own = self.team.share(examples) if self.shares is None else examples
        return list(self.stream.encode(own)) if own else []

    def state(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "epoch": self._epoch,
            "window": self._window,
            "start": self._start,
            "taken": self._taken,
            "digest": self._digest,
            "processes": self.team.size if self.shares else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state of this process or, if each row was read by every process, to that of any.

        ConfigError if another number of processes shared out the shards, DataError if the window has other rows now.
        """
        if state["processes"] not in (None, self.team.size):
            raise ConfigError(
                f"{state['processes']} processes have read this run's data, each its own files, and {self.team.size} "
                "cannot go on from there; resume with as many processes as before"
            )
        self._share_out(state["processes"] is not None)
        self._step = state["step"]
        self._begin(state["epoch"], state["window"], state["start"])
        if state["window"] < 0:
            return
        self._fill()
        if self._digest != state["digest"]:
            raise DataError(
                f"{self.stream.shards.name} gives other rows than when the run was saved; restore the data, or start a "
                "new run"
            )
        self._taken = state["taken"]

    def _share_out(self, apart: bool) -> None:
        """Whether shards are shared out among the processes, if they can be, or the rows of each batch."""
        batch_size, window = self._sizes
        self.shares = shared_out(self.stream.shards.sizes, self.team.size) if apart else None
        self.batch_size = batch_size if self.shares is None else batch_size // self.team.size
        self.window = window - window % self.batch_size or window  # whole batches, so that alike ones stay together

    def _begin(self, epoch: int, window: int = -1, place: Place = None) -> None:
        """Open a pass, at a window's start."""
        self._epoch, self._window, self._start, self._digest = epoch, window, place, 0
        self._examples: list[Any] = []
        self._taken = 0  # of the window's examples
        shards = range(len(self.stream.shards.sizes))
        share = shards if self.shares is None else self.shares[(self.team.rank + epoch) % self.team.size]
        generator = torch.Generator().manual_seed(self._seed("shards", epoch))
        order = torch.randperm(len(share), generator=generator).tolist()
        self._pass = Pass(self.stream.shards, [share[number] for number in order], place, self.stream.only)

    def _take(self, count: int) -> list[Any]:
        """The next examples of the stream, from as many windows and passes as it takes."""
        found: list[Any] = []
        while len(found) < count:
            if self._taken == len(self._examples):
                self._next_window()
            part = self._examples[self._taken : self._taken + count - len(found)]
            self._taken += len(part)
            found += part
        return found

    def _next_window(self) -> None:
        """Fill the next window that has rows: of this pass or of one of the next, which read the other shares."""
        for _ in range(1 + len(self.shares or [0])):
            self._window += 1
            self._fill()
            if self._examples:
                return
            self._begin(self._epoch + 1)
        raise DataError(no_rows(self.stream.shards, self.stream.only))

    def _fill(self) -> None:
        """Read a window from where the pass stands, and mix it; no examples are left when the pass is through."""
        self._examples, self._taken = [], 0  # the old ones go before new ones come
        self._start, self._digest = self._pass.place(), 0
        for row in islice(self._pass, self.window):
            self._digest = zlib.crc32(repr(row.values).encode("utf-8", "backslashreplace"), self._digest)
            self._examples += self.stream.examples(row)
        lengths = [self.stream.length(example) for example in self._examples]
        seed = self._seed("window", self._epoch, self._window)
        batches = epoch_batches(lengths, self.batch_size, seed, 0, self.by_length)
        self._examples = [self._examples[number] for batch in batches for number in batch]

    def _seed(self, *what: str | int) -> int:
        """A number that looks random and follows from the run's seed and `what`."""
        return int.from_bytes(hashlib.sha256(repr((self.seed, *what)).encode()).digest()[:7], "big")


def no_rows(shards: Shards, only: str | None) -> str:
    what = "holds no rows" if only is None else f"holds no row with {only}"
    return f"{shards.name} {what}, so there is nothing to train on; check the data"
