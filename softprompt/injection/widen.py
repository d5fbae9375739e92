"""What an attention layer computes with, made wider by a prefix in front: keys and values, mask, position bias."""

from typing import Any

import torch
from torch import Tensor

from softprompt import transformers_api as api
from softprompt.injection.scope import added
from softprompt.prompt import spread


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
    return api.relative_bias(table, bias.shape[2], length, seen + length, bias.device).to(bias)


def widen(
    mask: Tensor | None, query: Tensor, key: Tensor, length: int, seen: Tensor | None, causal: bool
) -> Tensor | None:
    """The mask `[B|1, h|1, q, t]` with `length` columns in front for the prefix, additive; None where none is needed.

    `seen` `[B|1, 1, q|1, p]` says which columns of the prefix a query sees (None: all).
    """
    rows, columns = query.shape[2], key.shape[2]
    if mask is None and causal:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None and seen is None:
        return None
    mask = torch.ones(1, 1, rows, columns, dtype=torch.bool, device=query.device) if mask is None else mask
    seen = torch.ones(1, 1, rows, length, dtype=torch.bool, device=query.device) if seen is None else seen
    mask, seen = (each if each.dtype is not torch.bool else added(each, query.dtype) for each in (mask, seen))
    shape = (max(mask.shape[0], seen.shape[0]), mask.shape[1], rows)
    return torch.cat([seen.to(mask).expand(*shape, -1), mask.expand(*shape, -1)], dim=-1)
