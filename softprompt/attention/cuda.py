"""CUDA's kernels with their log-sum-exp, and their backward passes.

Flash attention (grouped queries are native to it) in half precision without a bias, the memory-efficient kernel
otherwise. `attend` uses them on a device only once `trust.agrees` has seen them agree with the plain formula there.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from softprompt.transformers_api import cuda_efficient, cuda_flash

TYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCKS = 256  # about two for each processor of a large GPU
_FLASH, _FLASH_BACKWARD = cuda_flash()
_EFFICIENT, _EFFICIENT_BACKWARD = cuda_efficient()


def forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output `[B, hq, T, k]` and float32 log-sum-exp `[B, hq, T]` of queries over keys `[B, h, t, k]`.

    `bias` `[B|1, hq|1, T|1, t]` is additive.
    """
    size, scale = query.shape[-1], _scale(query, scale)
    wide, key, value = _padded(query), _padded(key), _padded(value)
    if _is_flash(query, bias):
        output, lse = _FLASH(wide, key, value, 0.0, causal, scale=scale)[:2]
        return output[..., :size], lse
    heads = key.shape[1]
    bias, causal = _bias(bias, query, key, causal)
    joined = _joined(wide, heads)
    output, lse = _EFFICIENT(joined, key, value, bias, True, 0.0, causal, scale=scale)[:2]
    output = output.reshape(wide.shape)[..., :size]
    return output, lse[..., : joined.shape[2]].reshape(query.shape[:3])  # it is longer: padded along the queries


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
    """Gradients of query, key and value; `output` and `lse` may be those of a softmax over more keys than these."""
    parts = 1 if causal or bias is not None else _parts(query, key)
    if parts == 1:
        return _backward(grad, query, key, value, output, lse, bias, causal, scale)
    grad, query, output, lse = (_cut(each, parts) for each in (grad, query, output, lse))
    key, value = (each[:, None].expand(-1, parts, -1, -1, -1).flatten(0, 1) for each in (key, value))
    of_query, *rest = _backward(grad, query, key, value, output, lse, None, False, scale)
    of_query = of_query.unflatten(0, (-1, parts)).transpose(1, 2).flatten(2, 3)
    of_key, of_value = (each.unflatten(0, (-1, parts)).sum(1, dtype=torch.float32).to(each) for each in rest)
    return of_query, of_key, of_value


def _backward(
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
    size, scale = query.shape[-1], _scale(query, scale)
    grad, wide, key, value, output = (_padded(each) for each in (grad, query, key, value, output))
    if _is_flash(query, bias):
        lengths = None, None, query.shape[2], key.shape[2]
        unused = query.new_empty(2, dtype=torch.uint64), query.new_empty((), dtype=torch.uint64)  # dropout's
        grads = _FLASH_BACKWARD(
            grad, wide, key, value, output, lse.contiguous(), *lengths, 0.0, causal, *unused, scale=scale
        )
        return tuple(each[..., :size] for each in grads)
    heads = key.shape[1]
    bias, causal = _bias(bias, query, key, causal)
    grad, joined, output = (_joined(each, heads) for each in (grad, wide, output))
    output = output.transpose(1, 2).contiguous().transpose(1, 2)  # the kernel takes its strides for granted
    lse = lse.reshape(joined.shape[:3])
    lse = pad(lse, (0, -lse.shape[2] % 32), value=torch.inf).contiguous()
    unused = query.new_empty((), dtype=torch.int64), query.new_empty((), dtype=torch.int64)
    wanted = [True, True, True, False]
    of_query, of_key, of_value, _ = _EFFICIENT_BACKWARD(
        grad, joined, key, value, bias, output, lse, *unused, 0.0, wanted, causal, scale=scale
    )
    return of_query.reshape(wide.shape)[..., :size], of_key[..., :size], of_value[..., :size]


def _parts(query: Tensor, key: Tensor) -> int:
    """Into how many parts queries are cut, where they are many more than the keys.

    The backward passes give each block of keys to one processor, which goes through all queries; of a short prefix
    there are too few blocks to keep a GPU busy.
    """
    (batch, heads, keys), queries = key.shape[:3], query.shape[2]
    if queries < 4 * keys:
        return 1
    wanted = min(_BLOCKS // (batch * heads * -(-keys // 128)), queries // 64)
    return next((parts for parts in range(wanted, 1, -1) if queries % parts == 0), 1)


def _cut(values: Tensor, parts: int) -> Tensor:
    """`[B, h, T, …]` → `[B·parts, h, T/parts, …]`."""
    return values.unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1)


def bounded(bias: Tensor) -> Tensor:
    """With what hides a key as well as the lowest number does, and is finite in base 2, which GPU kernels count in."""
    return bias.clamp(min=max(-1e30, torch.finfo(bias.dtype).min))


def _is_flash(query: Tensor, bias: Tensor | None) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return bias is None and half and query.shape[-1] <= 256 and _has_flash(str(query.device))


_HAS_FLASH: dict[str, bool] = {}


@torch.compiler.assume_constant_result
def _has_flash(device: str) -> bool:
    if device not in _HAS_FLASH:
        _HAS_FLASH[device] = torch.cuda.get_device_capability(device) >= (8, 0)
    return _HAS_FLASH[device]


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _padded(values: Tensor) -> Tensor:
    """With a contiguous last dimension of a multiple of 8, as the kernels need it."""
    missing = -values.shape[-1] % 8
    if missing:
        return pad(values, (0, missing))
    return values if values.stride(-1) == 1 else values.contiguous()


def _joined(values: Tensor, heads: int) -> Tensor:
    """`[B, hq, T, …]` → `[B, heads, (hq/heads)·T, …]`: grouped queries, unknown to this kernel, are more queries."""
    return values if values.shape[1] == heads else values.reshape(values.shape[0], heads, -1, *values.shape[3:])


def _bias(bias: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> tuple[Tensor | None, bool]:
    """The bias `[B, h, (hq/h)·T, t]` of joined queries, its rows aligned in memory, and whether causality is left."""
    (batch, queries, tokens, _), (heads, columns) = query.shape, key.shape[1:3]
    if causal and queries > heads:
        later = torch.ones(1, 1, tokens, columns, dtype=torch.bool, device=query.device).triu(1)
        hidden = torch.zeros_like(later, dtype=query.dtype).masked_fill_(later, torch.finfo(query.dtype).min)
        bias, causal = hidden if bias is None else hidden + bias, False
    if bias is None:
        return None, causal
    bias = pad(bounded(bias), (0, -columns % 16))
    if queries > heads:
        bias = bias.expand(-1, queries if bias.shape[1] > 1 else queries // heads, tokens, -1)
        bias = bias.reshape(bias.shape[0], -1, queries // heads * tokens, bias.shape[3])
    return bias.contiguous()[..., :columns].expand(batch, heads, -1 if bias.shape[2] > 1 else tokens, -1), causal
