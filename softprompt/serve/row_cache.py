"""A cache whose rows join and leave while the others go on.

All rows end in the same column, as rows padded on the left do, so one step writes one column, and what counts columns
(windows, ALiBi) counts right. The columns in front of a row hold zeros: what is hidden still is multiplied by 0, which
infinities would show.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers import Cache

from softprompt.transformers_api import CacheLayerMixin

ROOM = 64  # columns, at least, that are kept free for what comes


@final
class RowCache:
    """Keys and values of `lengths` tokens per row, `[rows, h, columns, k]` per layer, in columns `begin` to `end`."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.begin = self.end = 0
        self.layers: list[_Layer] = []

    @property
    def width(self) -> int:
        return self.end - self.begin

    @property
    def tokens(self) -> int:
        """How many tokens it holds, the zeros before shorter rows included."""
        lengths = list(self.lengths)  # (other threads ask)
        return len(lengths) * max(lengths, default=0)

    def join(self, cache: Cache, lengths: Sequence[int]) -> None:
        """New rows, behind the others: those of `cache`, whose last columns hold so many tokens of each."""
        if not self.layers:
            self.layers = [_Layer(self) for _ in cache.layers]
        before, total, width = len(self.lengths), len(self.lengths) + len(lengths), max([self.width, *lengths])
        for layer, new in zip(self.layers, cache.layers, strict=True):
            if isinstance(new, CacheLayerMixin) and new.is_initialized:
                layer.prepare(new)
        rows, columns = self._room()
        if total > rows or width > self.end or self.end >= columns:
            self._resize(total, width)
        begin = self.end - width
        for layer, new in zip(self.layers, cache.layers, strict=True):
            if layer.is_initialized:
                assert isinstance(new, CacheLayerMixin)
                layer.write(new, lengths, before, begin)
        self.begin = begin
        self.lengths += lengths

    def leave(self, row: int) -> None:
        """A row goes, and the last one takes its place."""
        last = len(self.lengths) - 1
        for layer in self.layers:
            layer.move(last, row)
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self.begin = self.end - max(self.lengths, default=0)
        if not self.lengths:
            self.layers, self.begin, self.end = [], 0, 0

    def step(self) -> tuple[Cache, Tensor]:
        """The cache for one token more of each row, and the mask `[rows, width + 1]` that goes with it."""
        if self.end >= self._room()[1]:
            self._resize(len(self.lengths), self.width)
        device = next(each.device for each in self.layers if each.is_initialized)
        columns = torch.arange(self.width + 1, device=device)
        first = self.width - torch.tensor(self.lengths, device=device)
        return Cache(layers=list(self.layers)), (columns >= first[:, None]).long()

    def stepped(self) -> None:
        """The model has been called with it."""
        self.end += 1
        self.lengths = [each + 1 for each in self.lengths]
        for layer in self.layers:
            layer.written = 0

    def _room(self) -> tuple[int, int]:
        """Rows and columns of the tensors."""
        return next((each.rows, each.columns) for each in self.layers if each.is_initialized)

    def _resize(self, rows: int, width: int) -> None:
        """Tensors for so many rows, their last tokens in column `width` − 1, and room behind it."""
        rows, columns = rows + rows // 8, width + max(ROOM, width // 8)
        for layer in self.layers:
            layer.resize(rows, columns, width)
        self.begin, self.end = width - self.width, width


class _Layer(CacheLayerMixin):
    """One layer of a `RowCache`, as transformers' models use a cache."""

    is_sliding = False

    def __init__(self, owner: RowCache) -> None:
        super().__init__()
        self.owner = owner
        self.written = 0

    @property
    def rows(self) -> int:
        return 0 if self.keys is None else self.keys.shape[0]

    @property
    def columns(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def _tensors(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def prepare(self, new: CacheLayerMixin) -> None:
        """Be of the shape and type of these keys and values, with no room yet."""
        if not self.is_initialized:
            assert new.keys is not None and new.values is not None
            self.lazy_initialization(new.keys, new.values)

    def write(self, new: CacheLayerMixin, lengths: Sequence[int], first: int, begin: int) -> None:
        """Rows from `first` on; columns from `begin` to where rows began before are cleared in the others."""
        owner = self.owner
        hidden: Tensor | None = None
        for mine, theirs in zip(self._tensors(), (new.keys, new.values), strict=True):
            assert theirs is not None
            width = min(theirs.shape[2], owner.end - begin)
            theirs = theirs[:, :, theirs.shape[2] - width :]
            if hidden is None:
                own = torch.tensor(list(lengths), device=theirs.device)
                hidden = (torch.arange(width, device=theirs.device) < width - own[:, None])[:, None, :, None]
            mine[:first, :, begin : owner.begin] = 0
            rows = mine[first : first + len(lengths)]
            rows[:, :, begin : owner.end - width] = 0
            rows[:, :, owner.end - width : owner.end] = theirs.masked_fill(hidden, 0)

    def move(self, source: int, target: int) -> None:
        if self.is_initialized and source != target:
            for each in self._tensors():
                each[target, :, self.owner.begin : self.owner.end] = each[source, :, self.owner.begin : self.owner.end]

    def resize(self, rows: int, columns: int, width: int) -> None:
        if not self.is_initialized:
            return
        owner, count = self.owner, len(self.owner.lengths)

        def moved(old: Tensor) -> Tensor:
            new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
            if count:
                new[:count, :, width - owner.width : width] = old[:count, :, owner.begin : owner.end]
            return new

        keys, values = self._tensors()
        self.keys, self.values = moved(keys), moved(values)

    # ---- what transformers asks --------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            each.new_zeros(0, each.shape[1], 0, each.shape[3]) for each in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in one token of each row, `[rows, h, 1, k]`, and give all of them, views."""
        (keys, values), owner = self._tensors(), self.owner
        count, end = len(owner.lengths), owner.end
        keys[:count, :, end : end + 1], values[:count, :, end : end + 1] = key_states, value_states
        self.written = 1
        return keys[:count, :, owner.begin : end + 1], values[:count, :, owner.begin : end + 1]

    def get_seq_length(self) -> int:
        return self.owner.width + self.written

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1
