"""Attention over a row's own keys and a prefix shared by rows: a fast way, and the plain formula it is equal to."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import dropout as drop

from softprompt.attention import cpu, cuda
from softprompt.attention.groups import Group
from softprompt.attention.trust import agrees


@dataclass(frozen=True)
class Prefix:
    """A prefix of one layer: `key` `[N, h, p, k]`, `value` `[N, h, p, v]`, and which rows have which (`groups`).

    `bias` `[B|1, hq|1, T, p]` is added to the scores: a relative position's, or the lowest number where a query is too
    far away.
    """

    key: Tensor
    value: Tensor
    groups: tuple[Group, ...]
    bias: Tensor | None = None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax([q·Pᵀ, q·Kᵀ]·scale + bias)·[Pᵥ, V], `[B, hq, T, v]`.

    `query` `[B, hq, T, k]`, `key` `[B, h, t, k]` and `value` `[B, h, t, v]` are the rows' own; `bias`
    `[B|1, hq|1, T, t]` is added to their scores, and `causal` (T = t) hides later keys. `scale` is 1/√k unless given.
    """
    kernel = _kernel(query, value, prefix, bias, dropout)
    if kernel is None:
        return plain(query, key, value, prefix, bias, causal, scale, dropout)
    states = query, key, value, prefix.key, prefix.value
    if torch.is_grad_enabled() and any(each.requires_grad for each in states):
        return cast(Tensor, _Shared.apply(*states, prefix, bias, causal, scale, kernel))
    return _both(states, prefix, bias, causal, scale, kernel, wanted=False)[0]


def _kernel(query: Tensor, value: Tensor, prefix: Prefix, bias: Tensor | None, dropout: float) -> ModuleType | None:
    """The fast kernel that can do this; none knows dropout, values of another size, or a gradient of the bias."""
    if dropout or query.shape[-1] != value.shape[-1]:
        return None
    if torch.compiler.is_exporting():  # to what may know no kernel of torch's
        return None
    if any(each is not None and each.requires_grad for each in (bias, prefix.bias)):
        return None
    if query.device.type == "cuda" and query.dtype in cuda.TYPES:
        biased = bias is not None or prefix.bias is not None or any(each.lengths is not None for each in prefix.groups)
        return cuda if _trusted(str(query.device), query.dtype, query.shape[-1], biased) else None
    return cpu if query.device.type == "cpu" and query.dtype in cpu.TYPES else None


_TRUSTED: dict[tuple[str, torch.dtype, int, bool], bool] = {}


@torch.compiler.assume_constant_result  # the trial takes place while torch.compile looks on, and not in its graph
def _trusted(device: str, dtype: torch.dtype, size: int, biased: bool) -> bool:
    """Whether CUDA's kernels have given what `plain` gives, for heads of this size, without and (`biased`) with biases.

    They are not tried while a CUDA graph is captured, which would break; a first call outside of it settles it.
    """
    kinds = [(device, dtype, size, bias) for bias in ((False, True) if biased else (False,))]
    if any(kind not in _TRUSTED for kind in kinds) and torch.cuda.is_current_stream_capturing():
        return False
    for kind in kinds:
        if kind not in _TRUSTED:
            _TRUSTED[kind] = agrees(_fast, _plain, torch.device(device), dtype, size, kind[3])
    return all(_TRUSTED[kind] for kind in kinds)


def _fast(states: tuple[Tensor, ...], group: Group, bias: Tensor | None, before: Tensor | None, causal: bool) -> Tensor:
    prefix = Prefix(states[3], states[4], (group,), before)
    return cast(Tensor, _Shared.apply(*states, prefix, bias, causal, None, cuda))


def _plain(
    states: tuple[Tensor, ...], group: Group, bias: Tensor | None, before: Tensor | None, causal: bool
) -> Tensor:
    query, key, value, prefix_key, prefix_value = states
    return plain(query, key, value, Prefix(prefix_key, prefix_value, (group,), before), bias, causal)


class _Shared(torch.autograd.Function):
    """Two runs of a kernel, merged by log-sum-exp.

    With s the log-sum-exp of all scores and o the merged output, the gradient of a score is
    exp(score − s)·(∂o·value − ∂o·o): each part's backward pass, given the merged s and o, makes its own share.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        prefix: Prefix,
        bias: Tensor | None,
        causal: bool,
        scale: float | None,
        kernel: ModuleType,
    ) -> Tensor:
        states = query, key, value, prefix_key, prefix_value
        output, lse = _both(states, prefix, bias, causal, scale, kernel, wanted=True)
        ctx.save_for_backward(*states, output, lse)
        ctx.rest = prefix.groups, prefix.bias, bias, causal, scale, kernel
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, prefix_key, prefix_value, output, lse = ctx.saved_tensors
        groups, prefix_bias, bias, causal, scale, kernel = ctx.rest
        own: tuple[Tensor | None, ...] = (None, None, None)
        if any(ctx.needs_input_grad[:3]):
            own = kernel.backward(grad, query, key, value, output, lse, bias, causal, scale)
        of_key = of_value = None
        for group in groups:
            heads = prefix_key.shape[1]
            of_query, *parts = kernel.backward(
                group.fold(grad, heads),
                group.fold(query, heads),
                group.of_prompts(prefix_key),
                group.of_prompts(prefix_value),
                group.fold(output, heads),
                group.fold(lse, heads),
                group.bias(prefix_bias, query, query.shape[1] // heads),
                False,
                scale,
            )
            of_key, of_value = (
                _gathered(total, part, like, group)
                for total, part, like in zip((of_key, of_value), parts, (prefix_key, prefix_value), strict=True)
            )
            if own[0] is not None:
                _add_rows(own[0], group.unfold(of_query, query.shape[1], query.shape[2]), group)
        return *own, of_key, of_value, None, None, None, None, None


def _both(
    states: tuple[Tensor, ...],
    prefix: Prefix,
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
    kernel: ModuleType,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    """The merged output and, where it is `wanted`, the log-sum-exp of all scores."""
    query, key, value, prefix_key, prefix_value = states
    heads = prefix_key.shape[1]
    output, lse = kernel.forward(query, key, value, bias, causal, scale)
    for group in prefix.groups:
        keys, values = group.of_prompts(prefix_key), group.of_prompts(prefix_value)
        hidden = group.bias(prefix.bias, query, query.shape[1] // heads)
        part = kernel.forward(group.fold(query, heads), keys, values, hidden, False, scale)
        output, lse = _merged((output, lse), part, group, wanted)
    return output, lse


def _merged(
    of_own: tuple[Tensor, Tensor], of_prefix: tuple[Tensor, Tensor], group: Group, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the keys of both, in float32; `of_own` may be written to."""
    output, lse = of_own
    part, part_lse = (group.unfold(each, output.shape[1], output.shape[2]) for each in of_prefix)
    own, own_lse = group.of_rows(output), group.of_rows(lse)
    weight = (part_lse - own_lse).sigmoid_().unsqueeze(-1)
    if output.dtype in (torch.bfloat16, torch.float16):
        both = own.float().lerp_(part.float(), weight).to(output.dtype)
    else:
        both = own.lerp_(part, weight)
    both_lse = torch.logaddexp(own_lse, part_lse) if wanted else own_lse
    if group.rows is None:
        return both, both_lse
    return output.index_copy_(0, group.rows, both), lse.index_copy_(0, group.rows, both_lse)


def _gathered(total: Tensor | None, part: Tensor, like: Tensor, group: Group) -> Tensor:
    """A group's gradient of the prefix, put where its prompts stand among all, `[N, h, p, k]`."""
    if group.prompts is None and group.length == like.shape[2]:
        return part
    total = torch.zeros_like(like) if total is None else total
    at = slice(like.shape[2] - group.length, None)
    if group.prompts is None:
        total[:, :, at] = part
    else:
        total[group.prompts, :, at] = part
    return total


def _add_rows(total: Tensor, part: Tensor, group: Group) -> None:
    if group.rows is None:
        total.add_(part)
    else:
        total.index_add_(0, group.rows, part)


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The same as `attend` by the formula, for any device, with dropout and every gradient."""
    scaled = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    queries, tokens, shared = query.shape[1], query.shape[2], queries_per_head(query, key)
    own = scaled @ repeated(key, shared).transpose(-1, -2)
    own = own if bias is None else own + bias
    lowest = torch.finfo(query.dtype).min
    if causal:
        later = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        own = own.masked_fill(later, lowest)
    wide = max((group.length for group in prefix.groups), default=0)
    before = own.new_full((*own.shape[:3], wide), lowest)
    for group in prefix.groups:
        scores = group.fold(scaled, prefix.key.shape[1]) @ group.of_prompts(prefix.key).transpose(-1, -2)
        extra = group.bias(prefix.bias, query, queries // prefix.key.shape[1])
        scores = group.unfold(scores if extra is None else scores + extra, queries, tokens)
        before = _put(before, scores, group, wide - group.length)
    weights = torch.cat([before, own], dim=-1).float() if query.dtype != torch.float64 else torch.cat([before, own], -1)
    weights = drop(weights.softmax(dim=-1).to(query.dtype), dropout)
    output = weights[..., wide:] @ repeated(value, shared)
    for group in prefix.groups:
        own_weights = group.fold(weights[..., wide - group.length : wide], prefix.key.shape[1])
        part = group.unfold(own_weights @ group.of_prompts(prefix.value), queries, tokens)
        output = output + part if group.rows is None else output.index_add(0, group.rows, part)
    return output


def _put(all_scores: Tensor, scores: Tensor, group: Group, begin: int) -> Tensor:
    """The scores of a group's rows in their places among those of all."""
    if group.rows is None and not begin:
        return scores
    hidden = scores.new_full((*scores.shape[:3], begin), torch.finfo(scores.dtype).min)
    wide = torch.cat([hidden, scores], dim=-1)
    return wide if group.rows is None else all_scores.index_copy(0, group.rows, wide)


def queries_per_head(query: Tensor, key: Tensor) -> int:
    """How many query heads share a key-value head."""
    return query.shape[1] // key.shape[1]


def repeated(values: Tensor, times: int) -> Tensor:
    """`[B, h, t, k]` → `[B, h·times, t, k]`."""
    return values if times == 1 else values.repeat_interleave(times, dim=1)
