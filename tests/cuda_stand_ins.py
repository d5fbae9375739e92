"""What torch's CUDA kernels compute, by its formula, and what they ask of their arguments.

The conditions are those of torch's sources (attention.cu, attention_backward.cu, kernel_backward.h, flash_api.cpp).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = query.float() @ key.float().mT * scale
    scores = scores if bias is None else scores + bias.float()
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf) if causal else scores


def _share(given: tuple[Tensor, ...], scores: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, ...]:
    grad, query, key, value, output = (each.float() for each in given)
    weights = (scores - lse[..., None]).exp()
    of_scores = weights * (grad @ value.mT - (grad * output).sum(-1, keepdim=True)) * scale
    return of_scores @ key, of_scores.mT @ query, weights.mT @ grad


def _by_rows(values: Tensor) -> Tensor:
    """In memory as the kernels write it: `[B, T, h, k]`."""
    return values.transpose(1, 2).contiguous().transpose(1, 2)


def flash(query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool, *, scale: float) -> Any:
    assert query.dtype in (torch.bfloat16, torch.float16) and not dropout
    assert query.shape[1] % key.shape[1] == 0 and query.shape[3] % 8 == 0 and query.shape[3] <= 256
    assert all(each.stride(-1) == 1 for each in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    scores = _scores(query, key, None, causal, scale)
    return _by_rows((scores.softmax(-1) @ value.float()).to(query)), scores.logsumexp(-1), None, None


def flash_backward(*given: Any, scale: float) -> Any:
    grad, query, key, value, output, lse, no_rows, no_columns, rows, columns, dropout, causal, seed, offset = given
    assert (rows, columns, dropout) == (query.shape[2], key.shape[2], 0.0) and no_rows is None is no_columns
    assert lse.is_contiguous() and lse.dtype is torch.float32 and lse.shape == query.shape[:3]
    assert grad.shape == output.shape == query.shape and query.shape[3] % 8 == 0
    assert (seed.shape, offset.shape, seed.dtype, offset.dtype) == ((2,), (), torch.uint64, torch.uint64)
    groups = query.shape[1] // key.shape[1]
    wide = [each.repeat_interleave(groups, 1) for each in (key, value)]
    scores = _scores(query, wide[0], None, causal, scale)
    of_query, *rest = _share((grad, query, *wide, output), scores, lse, scale)
    of_key, of_value = (each.unflatten(1, (-1, groups)).sum(2) for each in rest)
    return tuple(_by_rows(each.to(query.dtype)) for each in (of_query, of_key, of_value))


def _check_efficient(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> None:
    assert query.shape[1] == key.shape[1] == value.shape[1]
    for each in (query, key, value):
        assert each.stride(-1) == 1 and not any(each.stride(axis) % 8 for axis in range(3) if each.shape[axis] > 1)
    if bias is not None:
        assert bias.dtype is query.dtype and bias.shape == (*query.shape[:3], key.shape[2]) and bias.stride(3) == 1
        assert not any(bias.stride(axis) % 16 for axis in range(3) if bias.shape[axis] > 1)
        assert bias.min() * 1.4427 > -torch.finfo(torch.float32).max


def efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    wanted: bool,
    dropout: float,
    causal: bool,
    *,
    scale: float,
) -> Any:
    _check_efficient(query, key, value, bias)
    assert wanted and not dropout
    scores = _scores(query, key, bias, causal, scale)
    lse = pad(scores.logsumexp(-1), (0, -query.shape[2] % 32), value=torch.inf)
    return _by_rows((scores.softmax(-1) @ value.float()).to(query)), lse, None, None


def efficient_backward(*given: Any, scale: float) -> Any:
    grad, query, key, value, bias, output, lse, seed, offset, dropout, mask, causal = given
    _check_efficient(query, key, value, bias)
    assert mask == [True, True, True, False] and not dropout and seed.dtype is offset.dtype is torch.int64
    assert output.transpose(1, 2).is_contiguous() and grad.shape == output.shape == query.shape
    assert lse.dtype is torch.float32 and lse.shape == (*query.shape[:2], 32 * math.ceil(query.shape[2] / 32))
    assert lse.is_contiguous() and bool((lse[..., query.shape[2] :] == torch.inf).all())
    scores = _scores(query, key, bias, causal, scale)
    grads = _share((grad, query, key, value, output), scores, lse[..., : query.shape[2]], scale)
    return *(_by_rows(each.to(query.dtype)) for each in grads), None
