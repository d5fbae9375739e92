"""Attention over a row's own keys and a shared prefix through torch's flex attention, merged by log-sum-exp.

Flex attention has gradients of its log-sum-exp, so ordinary autograd merges the two. torch has none of it on the CPU,
where the way over "flex_attention" takes the way of "sdpa".
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.attention.cuda import bounded
from softprompt.attention.groups import Group
from softprompt.attention.shared import Prefix, queries_per_head, repeated
from softprompt.transformers_api import compiled_flex


@dataclass(frozen=True)
class Options:
    """What a model asks of its attention besides: `scale` (1/√k unless given), `softcap`·tanh(score/`softcap`), the
    score `sinks` `[hq]` of a key without a value, and what transformers passes on."""

    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    training: bool = False
    kernel: dict[str, Any] | None = None


def available(device: torch.device) -> bool:
    """Whether flex attention is what this device is best served with."""
    return device.type != "cpu"


def attend(
    query: Tensor, key: Tensor, value: Tensor, prefix: Prefix, block_mask: Any, bias: Tensor | None, options: Options
) -> Tensor:
    """As `attention.attend`, `[B, hq, T, v]`; `block_mask` (a `BlockMask`) and `bias` are for the rows' own keys."""
    shared = queries_per_head(query, key)
    if query.shape[1] & (query.shape[1] - 1):  # as transformers does it for its own call
        key, value = repeated(key, shared), repeated(value, shared)
    output, lse = _attention(query, key, value, bias, block_mask, options)
    heads = prefix.key.shape[1]
    for group in prefix.groups:
        hidden = group.bias(prefix.bias, query, query.shape[1] // heads)
        keys, values = group.of_prompts(prefix.key), group.of_prompts(prefix.value)
        part = _attention(group.fold(query, heads), keys, values, hidden, None, options)
        output, lse = _merged(output, lse, part, group)
    if options.sinks is not None:
        output = output * torch.sigmoid(lse - options.sinks[:, None].to(lse))[..., None].to(output)
    return output


def _attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, block_mask: Any, options: Options
) -> tuple[Tensor, Tensor]:
    """Output and float32 log-sum-exp of one part, through the same compiled function as transformers' own calls."""
    softcap = options.softcap
    added = None if bias is None else bounded(bias).expand(*query.shape[:3], key.shape[2])

    def scored(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        return score if added is None else score + added[batch, head, row, column]

    fused, wanted = compiled_flex()
    output, more = fused(
        query,
        key,
        value,
        training=options.training,
        score_mod=None if softcap is None and added is None else scored,
        block_mask=block_mask,
        enable_gqa=query.shape[1] != key.shape[1],
        scale=options.scale,
        kernel_options=options.kernel,
        return_aux=wanted,
    )
    return output, more.lse


def _merged(output: Tensor, lse: Tensor, of_prefix: tuple[Tensor, Tensor], group: Group) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the keys of both."""
    part, part_lse = (group.unfold(each, output.shape[1], output.shape[2]) for each in of_prefix)
    own, own_lse = group.of_rows(output), group.of_rows(lse)
    weight = torch.sigmoid(part_lse - own_lse)[..., None]
    both = own.to(weight).lerp(part.to(weight), weight).to(output)
    both_lse = torch.logaddexp(own_lse, part_lse)
    if group.rows is None:
        return both, both_lse
    return output.index_copy(0, group.rows, both), lse.index_copy(0, group.rows, both_lse)
