"""What one thread's calls of a model see while a way into it is open: the prompt, its rows, and what masks add.

A scope belongs to the thread that entered it. What it changes in a model it changes through hooks that stay where they
are (`watch`) and ask the scope of their own thread, so that threads share a model without knowing of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock, local
from typing import Any

import torch
from torch import Tensor, nn

from softprompt import transformers_api as api
from softprompt.attention import Group, groups_of
from softprompt.errors import ConfigError
from softprompt.injection.lengths import own_lengths
from softprompt.prompt import KV, spread

_KEPT = 4  # masks of one call: one for full attention, one for windows

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


@dataclass
class Recording:
    """Keys and values as each attention layer used them, in the order the layers ran.

    `sharing` are layers that use those of an earlier one, by that one; they have none of their own.
    """

    modules: list[nn.Module] = field(default_factory=list)
    sharing: dict[nn.Module, nn.Module] = field(default_factory=dict)
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)
    chunks: list[int | None] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)

    def add(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> None:
        for other, (known, _) in zip(self.modules, self.layers, strict=True):
            if known is key:
                self.sharing[module] = other
                return
        self.modules.append(module)
        self.layers.append((key, value))
        self.windows.append(window)
        self.chunks.append(api.chunk_of(module))
        self.queries.append(query.shape[2])


@dataclass
class Scope:
    """One use of a way into a model.

    `pairs` has the prefixes of each attention layer that gets any: one, or one for each time that a model runs it, in
    turn (`runs` counts). `positions` are the true positions of the current queries, `[B|1, T]`, none of them greater
    than `last` where that is known; `seen` is how many tokens the cache holds, where layers count by that. `before`
    and `after` are what happens at a module's calls, as torch's hooks with keyword arguments; `cache` is the cache
    way's stand-in. `apart` are the modules that no `outer` scope acts at.
    """

    prefix: KV | None = None
    pairs: dict[nn.Module, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    tables: dict[nn.Module, Any] = field(default_factory=dict)
    recording: Recording | None = None
    positions: Tensor | None = None
    last: int | None = None
    seen: Any = 0
    generating: bool = False
    sharing: bool = False
    runs: dict[nn.Module, int] = field(default_factory=dict)
    before: dict[nn.Module, list[Before]] = field(default_factory=dict)
    after: dict[nn.Module, list[After]] = field(default_factory=dict)
    checkpointed: Callable[..., Any] | None = None
    cache: Any = None
    outer: Scope | None = None
    apart: frozenset[nn.Module] = frozenset()
    _groups: dict[tuple[int, torch.device], tuple[Group, ...]] = field(default_factory=dict)
    _lengths: dict[tuple[int, torch.device], Tensor | None] = field(default_factory=dict)
    _masks: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _far: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def at(self, module: nn.Module, before: Before | None = None, after: After | None = None) -> None:
        """Have something happen before or after a module runs in this scope."""
        watch(module)
        if before is not None:
            self.before.setdefault(module, []).append(before)
        if after is not None:
            self.after.setdefault(module, []).append(after)

    def begin(self, positions: Tensor | None = None, last: int | None = None) -> None:
        """A call of the model begins, its queries at `positions`."""
        self.positions, self.last = positions, last
        self._masks.clear()
        self._far.clear()

    def see(self, seen: Any) -> None:
        """A cache holds so many tokens. (A static one counts in place.)"""
        self.seen = seen.clone() if isinstance(seen, Tensor) else seen

    @property
    def longest(self) -> int:
        """How many tokens the longest prompt puts before a row's own."""
        return self.prefix.length if self.prefix is not None and self.prefix.layers else 0

    def lengths(self, batch: int, device: torch.device) -> Tensor | None:
        """How many virtual tokens each row has, `[B]`; None where prompts do not differ in it."""
        if self.prefix is None or self.prefix.lengths is None:
            return None
        prefix = self.prefix
        return _kept(self._lengths, (batch, device), lambda: own_lengths(prefix, batch, device))

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
        return _kept(self._groups, (batch, device), lambda: self._grouped(batch, device))

    def _grouped(self, batch: int, device: torch.device) -> tuple[Group, ...]:
        assert self.prefix is not None
        rows = spread_rows(self.prefix.rows, batch)
        rows = None if rows is None else rows.tolist()
        count = len(self.prefix.pairs[0][0])
        if rows is None and count > 1:  # one prompt for each row, in order
            return (Group(count, batch // count, self.prefix.length),)
        return groups_of(batch, self.prefix.length, rows, self.prefix.lengths, device)

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

    def far(self, window: int | None, chunk: int | None, like: Tensor) -> Tensor | None:
        """What hides prefix columns from queries `[B, h, T, k]` that see so far: `[B|1, 1, T, p]`, or None."""
        if not self._limits(window, chunk):
            return None
        key = (window, chunk, like.shape[2], like.device)
        return _kept(self._far, key, lambda: added(self._within(window, chunk, like), like.dtype))

    def hidden(self, window: int | None, chunk: int | None, like: Tensor) -> Tensor | None:
        """Which prefix columns queries `[B, h, T, k]` see, `[B|1, 1, T|1, p]`: those in reach of a row's own prompt."""
        assert self.prefix is not None
        own, length = self.lengths(like.shape[0], like.device), self.prefix.length
        reach = self._within(window, chunk, like) if self._limits(window, chunk) else None
        if own is None:
            return reach
        real = torch.arange(length, device=like.device) >= (length - own)[:, None, None, None]
        return real if reach is None else reach & real

    def _limits(self, window: int | None, chunk: int | None) -> bool:
        """Whether a window or chunks can hide anything of the prefix from the current queries."""
        size = chunk if window is None else window
        if size is None or self.positions is None or self.prefix is None or self.prefix.always_visible:
            return False
        return self.last is None or self.last >= size

    def _within(self, window: int | None, chunk: int | None, like: Tensor) -> Tensor:
        assert self.positions is not None and self.prefix is not None
        own = self.lengths(like.shape[0], like.device)
        return within(window, chunk, self.positions.to(like.device), like.shape[2], self.prefix.length, own)


def _kept(known: dict[Any, Any], key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What is `known` by a key, made on first use; while a size is a symbol, as in `torch.export`, nothing is known."""
    if any(isinstance(part, torch.SymInt) for part in key):
        return make()
    if key not in known:
        known[key] = make()
    return known[key]


class _Here(local):
    """What a thread has open. (`torch.compile` can follow this, and not a `ContextVar`.)"""

    scope: Scope | None = None


_HERE = _Here()
_WATCHING = Lock()
_WATCHED = "_softprompt_watched"
"""The mark of modules that have our hooks; a copy has both."""


def current() -> Scope | None:
    """The innermost scope of this thread."""
    return _HERE.scope


@contextmanager
def entered(scope: Scope) -> Iterator[None]:
    """Inside the block `scope` is the current one."""
    before = _HERE.scope
    scope.outer = before
    _HERE.scope = scope
    try:
        yield
    finally:
        _HERE.scope = before


@contextmanager
def apart(base: nn.Module) -> Iterator[None]:
    """Inside the block nothing that is open now acts on `base`: a call may come from within another one, as from a
    logits processor."""
    if _HERE.scope is None:
        yield
        return
    with entered(Scope(apart=frozenset(base.modules()))):
        yield


def watch(module: nn.Module) -> None:
    """Let scopes act at a module's calls, from now on. The hooks stay: one that is taken away is missed by a thread
    that is on its way to it."""
    if module.__dict__.get(_WATCHED) and _hooked(module):
        return
    with _WATCHING:
        if not _hooked(module):
            module.register_forward_hook(_after, with_kwargs=True)
            module.register_forward_pre_hook(_before, with_kwargs=True)
        module.__dict__[_WATCHED] = True  # last: until then another thread waits


def _hooked(module: nn.Module) -> bool:
    return _before in module._forward_pre_hooks.values() and _after in module._forward_hooks.values()


def _acting(module: nn.Module, side: str) -> Iterable[Any]:
    """What the scopes of this thread do at a module; an assistant that drafts may be open around the main model."""
    scope, module = _HERE.scope, api.itself(module)
    while scope is not None:
        found = getattr(scope, side).get(module)
        if found is not None:
            return found
        scope = None if module in scope.apart else scope.outer
    return ()


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """(torch has a hook without keyword arguments for an instant, while another thread registers it.)"""
    if _HERE.scope is None or kwargs is None:
        return None
    for act in _acting(module, "before"):
        changed = act(module, args, kwargs)
        if changed is not None:
            args, kwargs = changed
    return args, kwargs


def _after(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Any:
    if _HERE.scope is None or output is None:
        return output
    for act in _acting(module, "after"):
        output = act(module, args, kwargs, output)
    return output


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


def within(
    window: int | None, chunk: int | None, positions: Tensor, tokens: int, length: int, own: Tensor | None
) -> Tensor:
    """Which of `length` prefix columns the last `tokens` queries at `positions` see, `[B|1, 1, T, p]`.

    A prefix key at position j is visible to a query at position i while i − j < window, as any other key is, or while
    both are in the same chunk. Shorter prompts, of their `own` lengths `[B]`, have their padding in front, so their
    first token, at position 0, stands in a later column.
    """
    columns = torch.arange(length, device=positions.device)[None, None]
    if own is not None:
        columns = columns - (length - own)[:, None, None]
    queries = positions[:, -tokens:, None]
    if window is not None:
        return (queries - columns < window)[:, None]
    assert chunk is not None
    return (queries.div(chunk, rounding_mode="floor") == columns.clamp(min=0).div(chunk, rounding_mode="floor"))[
        :, None
    ]


def spread_rows(rows: Tensor | None, batch: int) -> Tensor | None:
    """Which prompt each of `batch` rows has, where generation may have made several rows of each."""
    return None if rows is None else spread(rows, torch.arange(len(rows), device=rows.device), batch)
