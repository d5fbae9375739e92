"""What an attention layer computes with, made wider by a prefix in front: keys and values, mask, position bias."""

from typing import Any

import torch
from torch import Tensor

from softprompt.prompt import spread


def in_front(prefix: Tensor, own: Tensor, rows: Tensor | None) -> Tensor:
    """`[N, h, p, k]` before `[B, h, t, k]`, in the latter's type and place."""
    return torch.cat([spread(prefix.to(own), rows, own.shape[0]), own], dim=2)


def widen_bias(bias: Tensor, length: int, table: Any, seen: Any) -> Tensor:
    """T5's relative position bias `[1, h, q, t]` with the prefix's columns, which stand at −p…−1; none where t is none.

    `table` is the module that has the positions' table, None for cross-attention, which has no positions; `seen` is
    how many tokens stand before the first query.
    """
    if table is None:
        return torch.cat([bias.new_zeros(*bias.shape[:3], length), bias], dim=-1)
    columns = table.compute_bias(bias.shape[2], length, device=bias.device, past_seen_tokens=seen + length)
    return torch.cat([columns.to(bias), bias], dim=-1)


def widen(
    mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    length: int,
    window: int | None,
    causal: bool,
    positions: Tensor | None,
    additive: bool,
) -> Tensor | None:
    """The mask `[B|1, h|1, q, t]` with `length` columns in front for the prefix; None where none is needed.

    A prefix key at position j is visible to a query at true position i while i − j < window, as any other key is.
    """
    rows, columns = query.shape[2], key.shape[2]
    if mask is None and causal and rows > 1:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()[None, None]
        if additive:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    seen: Tensor | None = None
    if window is not None and positions is not None:
        distance = positions[:, None, -rows:, None] - torch.arange(length, device=positions.device)
        seen = distance < window
    if mask is None:
        if seen is None:
            return None
        mask = torch.ones(1, 1, rows, columns, dtype=torch.bool, device=query.device)
    if seen is None:
        seen = torch.ones(1, 1, rows, length, dtype=torch.bool, device=mask.device)
    if mask.dtype is not torch.bool:
        seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill_(~seen, torch.finfo(mask.dtype).min)
    shape = (max(mask.shape[0], seen.shape[0]), mask.shape[1], rows)
    return torch.cat([seen.expand(*shape, -1), mask.expand(*shape, -1)], dim=-1)
