"""The CPU's flash kernel with its log-sum-exp, and its backward pass. Grouped queries are native to both."""

import torch
from torch import Tensor

from softprompt.transformers_api import cpu_flash

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FORWARD, _BACKWARD = cpu_flash()


def forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output `[B, hq, T, k]` and log-sum-exp `[B, hq, T]` of queries over keys `[B, h, t, k]`; `bias` is additive."""
    # the kernel does not look at these, and would read what lies behind a tensor that is too small
    assert len(query) == len(key) == len(value) and key.shape[2] == value.shape[2], (
        query.shape,
        key.shape,
        value.shape,
    )
    query, key, value = _rows(query), _rows(key), _rows(value)
    return _FORWARD(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    `output` and `lse` may be those of a softmax over more keys than these: with the merged ones a part's gradients
    are its share of the whole's.
    """
    parts = (_rows(each) for each in (grad, query, key, value, output))
    return _BACKWARD(*parts, lse, 0.0, causal, attn_mask=bias, scale=scale)


def _rows(values: Tensor) -> Tensor:
    """The kernel reads the last dimension as if it were contiguous."""
    return values if values.stride(-1) == 1 else values.contiguous()
