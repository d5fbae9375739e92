"""True positions: a token's place among the real tokens of its row, whatever the padding and wherever the cache is."""

from typing import Any

import torch
from torch import Tensor

from softprompt import transformers_api as api


def true_positions(inputs: Tensor, mask: Any, cache: Any) -> Tensor:
    """Positions `[B|1, T]` of `inputs` (`[B, T]` or `[B, T, d]`), counted from 0 at each row's first real token.

    With a 2-D mask `[B, cached + T]` they are counted from it; without one, from the length of the cache. Padding gets
    the position of its left neighbour, or 0.
    """
    length = inputs.shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(-1) - 1).clamp_(min=0)[:, -length:]
    start = api.seen_tokens(cache)
    return torch.arange(length, device=inputs.device)[None] + start
