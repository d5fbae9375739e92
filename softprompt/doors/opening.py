"""What attention layers see while the attention door is open for a call: the prefix, its rows and what masks add."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import local
from typing import Any

import torch
from torch import Tensor, nn

from softprompt.attention import Group, groups_of
from softprompt.doors.lengths import own_lengths
from softprompt.errors import ConfigError
from softprompt.prompt import KV, spread

_KEPT = 4  # masks of one call: one for full attention, one for windows


@dataclass
class Recording:
    """Keys and values as each attention layer used them, in the order the layers ran.

    `sharing` are layers that use those of an earlier one, by that one; they have none of their own.
    """

    modules: list[nn.Module] = field(default_factory=list)
    sharing: dict[nn.Module, nn.Module] = field(default_factory=dict)
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)

    def add(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> None:
        for other, (known, _) in zip(self.modules, self.layers, strict=True):
            if known is key:
                self.sharing[module] = other
                return
        self.modules.append(module)
        self.layers.append((key, value))
        self.windows.append(window)
        self.queries.append(query.shape[2])


@dataclass
class Opening:
    """One use of the door.

    `pairs` has the prefixes of each attention layer that gets any: one, or one for each time that a model runs it, in
    turn (`runs` counts). `positions` are the true positions of the current queries, `[B|1, T]`, none of them greater
    than `last` where that is known; `seen` is how many tokens an encoder-decoder's cache holds.
    """

    prefix: KV | None
    pairs: dict[nn.Module, list[tuple[Tensor, Tensor]]]
    tables: dict[nn.Module, Any]
    recording: Recording | None = None
    positions: Tensor | None = None
    last: int | None = None
    seen: Any = 0
    generating: bool = False
    sharing: bool = False
    runs: dict[nn.Module, int] = field(default_factory=dict)
    _groups: dict[tuple[int, torch.device], tuple[Group, ...]] = field(default_factory=dict)
    _lengths: dict[tuple[int, torch.device], Tensor | None] = field(default_factory=dict)
    _masks: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _far: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict)

    def begin(self, positions: Tensor | None = None, last: int | None = None) -> None:
        """A call of the model begins, its queries at `positions`."""
        self.positions, self.last = positions, last
        self._masks.clear()
        self._far.clear()

    @property
    def longest(self) -> int:
        """How many tokens the longest prompt puts before a row's own."""
        return self.prefix.length if self.prefix is not None and self.prefix.layers else 0

    def lengths(self, batch: int, device: torch.device) -> Tensor | None:
        """How many virtual tokens each row has, `[B]`; None where prompts do not differ in it."""
        if self.prefix is None or self.prefix.lengths is None:
            return None
        if (batch, device) not in self._lengths:
            self._lengths[batch, device] = own_lengths(self.prefix, batch, device)
        return self._lengths[batch, device]

    def shift(self, batch: int, device: torch.device) -> int | Tensor:
        """By how much the positions of real tokens are moved: one number, or `[B, 1]` where prompts differ in it."""
        own = self.lengths(batch, device) if self.longest else None
        return self.longest if own is None else own[:, None]

    def pair(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """The prefix of a layer that runs now."""
        pairs = self.pairs.get(module)
        if pairs is None:
            return None
        run = self.runs.get(module, 0)
        self.runs[module] = run + 1
        return pairs[run % len(pairs)]

    def groups(self, batch: int, device: torch.device) -> tuple[Group, ...]:
        """Which of `batch` rows share which prompt. A GPU is waited for once, and not in every step or layer."""
        known = self._groups.get((batch, device))
        if known is None:
            assert self.prefix is not None
            rows = spread_rows(self.prefix.rows, batch)
            rows = None if rows is None else rows.tolist()
            count = len(self.prefix.pairs[0][0])
            if rows is None and count > 1:  # one prompt for each row, in order
                known = (Group(count, batch // count, self.prefix.length),)
            else:
                known = groups_of(batch, self.prefix.length, rows, self.prefix.lengths, device)
            self._groups[batch, device] = known
        return known

    def additive(self, mask: Tensor | None, like: Tensor) -> Tensor | None:
        """A mask as what is added to the scores, of the type of `like`; the lowest number hides.

        It is made once for all layers of a call. Infinity would make a query that sees nothing of its own no number.
        """
        if mask is None:
            return None
        for known, made in self._masks:
            if known is mask and made.dtype is like.dtype:
                return made
        if len(self._masks) >= _KEPT:
            self._masks.clear()
        made = added(mask, like.dtype)
        self._masks.append((mask, made))
        return made

    def far(self, window: int | None, like: Tensor) -> Tensor | None:
        """What hides prefix columns from queries `[B, h, T, k]` behind their window: `[B|1, 1, T, p]`, or None."""
        if window is None or self.positions is None or self.prefix is None or self.prefix.always_visible:
            return None
        if self.last is not None and self.last < window:
            return None
        tokens, device = like.shape[2], like.device
        known = self._far.get((window, tokens, device))
        if known is None:
            own = self.lengths(like.shape[0], device)
            seen = within(window, self.positions.to(device), tokens, self.prefix.length, own)
            known = self._far[window, tokens, device] = added(seen, like.dtype)
        return known


class _Here(local):
    """What a thread has open. (`torch.compile` can follow this, and not a `ContextVar`.)"""

    opening: Opening | None = None


_HERE = _Here()


def current() -> Opening | None:
    """The innermost opening of this thread."""
    return _HERE.opening


@contextmanager
def entered(opening: Opening) -> Iterator[None]:
    """Inside the block `opening` is the current one."""
    before = _HERE.opening
    _HERE.opening = opening
    try:
        yield
    finally:
        _HERE.opening = before


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean or additive mask as one that is added, with the lowest number for what is hidden.

    ConfigError for whole numbers, which would be added too, and hide nothing.
    """
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise ConfigError(
            f"an attention_mask of four dimensions cannot be of {mask.dtype}; give True where a token is seen, or what "
            "is added to its score."
        )
    lowest = torch.finfo(dtype).min
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)
    return mask.to(dtype).clamp(min=lowest)


def within(window: int, positions: Tensor, tokens: int, length: int, own: Tensor | None) -> Tensor:
    """Which of `length` prefix columns the last `tokens` queries at `positions` see through a window, `[B|1, 1, T, p]`.

    A prefix key at position j is visible to a query at position i while i − j < window, as any other key is. Shorter
    prompts, of their `own` lengths `[B]`, have their padding in front, so their first token, at position 0, stands in a
    later column.
    """
    columns = torch.arange(length, device=positions.device)[None, None]
    if own is not None:
        columns = columns - (length - own)[:, None, None]
    return (positions[:, -tokens:, None] - columns < window)[:, None]


def spread_rows(rows: Tensor | None, batch: int) -> Tensor | None:
    """Which prompt each of `batch` rows has, where generation may have made several rows of each."""
    return None if rows is None else spread(rows, torch.arange(len(rows), device=rows.device), batch)
