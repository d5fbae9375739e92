"""Which rows of a batch share which prompt, arranged so that every prompt is read once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """`count` prompts that have `sharing` rows of the batch each.

    `prompts` `[count]` and `rows` `[count·sharing]` (prompt by prompt) are their indices, None for all in order; of
    prompts that lie side by side, a slice, so that they are read where they are.
    `length` is the number of virtual tokens of the longest; `lengths` `[count]` where they differ. Shorter ones have
    their padding in front.
    """

    count: int
    sharing: int
    length: int
    prompts: Tensor | slice | None = None
    rows: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def _single(self) -> bool:
        """Whether each row has a prompt of its own; not known of a size that is a symbol, as in `torch.export`."""
        return not isinstance(self.sharing, torch.SymInt) and self.sharing == 1

    def of_prompts(self, values: Tensor) -> Tensor:
        """The group's part `[count, h, length, k]` of keys or values of all prompts `[N, h, p, k]`."""
        values = values if self.prompts is None else values[self.prompts]
        return values if values.shape[2] == self.length else values[:, :, values.shape[2] - self.length :]

    def of_rows(self, values: Tensor) -> Tensor:
        """The group's part `[count·sharing, …]` of something with one entry per row of the batch."""
        return values if self.rows is None else values[self.rows]

    def fold(self, values: Tensor, heads: int) -> Tensor:
        """`[B, hq, T, …]` → `[count, heads, sharing·(hq/heads)·T, …]`: rows and grouped queries join the query axis."""
        own = self.of_rows(values)
        queries, tokens, rest = own.shape[1], own.shape[2], own.shape[3:]
        if self._single:
            return own if queries == heads else own.reshape(self.count, heads, -1, *rest)
        parts = own.reshape(self.count, self.sharing, heads, queries // heads, tokens, *rest)
        return parts.transpose(1, 2).reshape(self.count, heads, -1, *rest)

    def unfold(self, values: Tensor, queries: int, tokens: int) -> Tensor:
        """The inverse of `fold`: `[count·sharing, hq, T, …]`."""
        heads, rest = values.shape[1], values.shape[3:]
        if self._single:
            return values if queries == heads else values.reshape(self.count, queries, tokens, *rest)
        parts = values.unflatten(2, (self.sharing, queries // heads, tokens)).transpose(1, 2)
        return parts.reshape(self.count * self.sharing, queries, tokens, *rest)

    def bias(self, own: Tensor | None, like: Tensor, per_head: int) -> Tensor | None:
        """What is added to the scores, `[count|1, h|1, sharing·per_head·T|1, length]`; None for nothing.

        `own` `[B|1, hq|1, T, p]` is what the batch has for it, `like` the queries `[B, hq, T, k]`; `per_head` is how
        many queries share a key-value head. Padding of shorter prompts is hidden.
        """
        hidden = None
        if self.lengths is not None:
            columns = torch.arange(self.length, device=like.device)
            padding = columns < self.length - self.lengths[:, None]
            hidden = torch.zeros_like(padding, dtype=like.dtype).masked_fill_(padding, torch.finfo(like.dtype).min)
            hidden = hidden[:, None, None]
        if own is None:
            return hidden
        own = own[..., own.shape[3] - self.length :]
        heads = own.shape[1]
        wide = own.expand(like.shape[0], heads * per_head if heads == 1 else heads, like.shape[2], self.length)
        folded = self.fold(wide, 1 if heads == 1 else heads // per_head)
        return folded if hidden is None else folded + hidden


def groups_of(
    batch: int, length: int, rows: Sequence[int] | None, lengths: Sequence[int] | None, device: torch.device
) -> tuple[Group, ...]:
    """The groups of a batch whose row i has prompt `rows[i]` (None: all have the one), of `lengths` (None: all full).

    Prompts with equally many rows make one group, so there are few whatever the batch; rows whose prompt is empty are
    in none.
    """
    if rows is None:
        return (Group(1, batch, length),) if length and (lengths is None or lengths[0]) else ()
    found: dict[int, list[int]] = {}
    for row, prompt in enumerate(rows):
        found.setdefault(prompt, []).append(row)
    by_size: dict[int, list[int]] = {}
    for prompt, members in found.items():
        if lengths is None or lengths[prompt]:
            by_size.setdefault(len(members), []).append(prompt)
    total = len(lengths) if lengths is not None else max(rows) + 1
    return tuple(
        _group(prompts, [row for prompt in prompts for row in found[prompt]], (batch, total, length), lengths, device)
        for prompts in map(sorted, by_size.values())
    )


def _group(
    prompts: list[int],
    rows: list[int],
    sizes: tuple[int, int, int],
    lengths: Sequence[int] | None,
    device: torch.device,
) -> Group:
    batch, total, length = sizes
    own = [length if lengths is None else lengths[prompt] for prompt in prompts]
    return Group(
        len(prompts),
        len(rows) // len(prompts),
        max(own),
        _index(prompts, total, device),
        None if rows == list(range(batch)) else torch.tensor(rows, device=device),
        None if min(own) == max(own) else torch.tensor(own, device=device),
    )


def _index(prompts: list[int], total: int, device: torch.device) -> Tensor | slice | None:
    """Where ascending `prompts` are among `total`."""
    first, behind = prompts[0], prompts[-1] + 1
    if behind - first == len(prompts):
        return None if len(prompts) == total else slice(first, behind)
    return torch.tensor(prompts, device=device)
