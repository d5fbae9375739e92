"""What an attention layer computes with, made wider by a prefix in front: keys and values, mask, position bias."""

from typing import Any

import torch
from torch import Tensor

from softprompt.doors.opening import added, within
from softprompt.prompt import KV, spread


def in_front(prefix: Tensor, own: Tensor, rows: Tensor | None) -> Tensor:
    """`[N, h, p, k]` before `[B, h, t, k]`, in the latter's type and place."""
    return torch.cat([spread(prefix.to(own), rows, own.shape[0]), own], dim=2)


def before_bias(bias: Tensor, length: int, table: Any, seen: Any) -> Tensor:
    """The prefix's columns `[1, h, q, p]` of T5's relative position bias `[1, h, q, t]`: they stand at −p…−1.

    `table` is the module that has the positions' table, None for cross-attention, which has no positions; `seen` is
    how many tokens stand before the first query.
    """
    if table is None:
        return bias.new_zeros(*bias.shape[:3], length)
    return table.compute_bias(bias.shape[2], length, device=bias.device, past_seen_tokens=seen + length).to(bias)


def widen(
    mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    prefix: KV,
    window: int | None,
    causal: bool,
    positions: Tensor | None,
    own: Tensor | None = None,
) -> Tensor | None:
    """The mask `[B|1, h|1, q, t]` with columns in front for the prefix, additive; None where none is needed.

    `own` `[B]` are the lengths of rows' prompts where they differ.
    """
    rows, columns, length = query.shape[2], key.shape[2], prefix.length
    seen: Tensor | None = None
    if window is not None and positions is not None and not prefix.always_visible:
        seen = within(window, positions, rows, length, own)
    if own is not None:
        real = torch.arange(length, device=query.device) >= (length - own)[:, None, None, None]
        seen = real if seen is None else seen & real
    if mask is None and causal:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None and seen is None:
        return None
    mask = torch.ones(1, 1, rows, columns, dtype=torch.bool, device=query.device) if mask is None else mask
    seen = torch.ones(1, 1, rows, length, dtype=torch.bool, device=query.device) if seen is None else seen
    mask, seen = (each if each.dtype is not torch.bool else added(each, query.dtype) for each in (mask, seen))
    shape = (max(mask.shape[0], seen.shape[0]), mask.shape[1], rows)
    return torch.cat([seen.to(mask).expand(*shape, -1), mask.expand(*shape, -1)], dim=-1)
