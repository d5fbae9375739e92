"""Whether a kernel computes what the plain formula does on a device: tried once, on random numbers, before it is used.

What a kernel expects of memory and shapes, and what its log-sum-exp means, is not promised by torch from one version
or machine to the next; a wrong answer would not be seen in a loss.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from softprompt.attention.groups import Group

Attention = Callable[[tuple[Tensor, ...], Group, Tensor | None, Tensor | None, bool], Tensor]
"""Of (query, key, value, prefix key, prefix value), the prefix's rows, both parts' biases, and whether causal."""

_TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of the error's norm by the true one's; float32's is for devices that multiply in TensorFloat-32."""
_BATCH, _HEADS, _QUERIES, _TOKENS, _LENGTH = 3, 2, 4, 37, 19


class PlainAttentionWarning(RuntimeWarning):
    """Attention over a shared prompt takes the plain, slower way."""


def agrees(fast: Attention, plain: Attention, device: torch.device, dtype: torch.dtype, size: int, bias: bool) -> bool:
    """Whether `fast` gives the outputs and gradients of `plain` for heads of `size`; a warning says why not."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            errors = [_error(fast, plain, device, dtype, size, bias, tokens) for tokens in (_TOKENS, 1)]
    except torch.OutOfMemoryError:
        raise  # which says nothing about the kernel
    except RuntimeError as failure:
        problem = str(failure).splitlines()[0]
    else:
        if all(error <= _TOLERANCE[dtype] for error in errors):
            return True
        problem = f"its results differ by {max(errors):.1e} of their size"
    warnings.warn(
        f"torch's fused attention on {device} cannot be used for {dtype} with heads of {size}"
        f"{' and a mask' if bias else ''} ({problem}); a plain formula, slower but correct, takes its place.",
        PlainAttentionWarning,
        stacklevel=2,
    )
    return False


def _error(
    fast: Attention,
    plain: Attention,
    device: torch.device,
    dtype: torch.dtype,
    size: int,
    bias: bool,
    tokens: int,
) -> float:
    """The greatest relative error of output and gradients, for `tokens` queries of a GQA batch."""
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers are left alone

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32).to(device, dtype)

    own = (_BATCH, _HEADS, _TOKENS, size)
    shapes = [(_BATCH, _QUERIES, tokens, size), own, own, *[(1, _HEADS, _LENGTH, size)] * 2]
    states, weights = [draw(*shape) for shape in shapes], draw(_BATCH, _QUERIES, tokens, size)
    biases = [draw(_BATCH, 1, tokens, width) if bias else None for width in (_TOKENS, _LENGTH)]
    found = []
    for attention, kind in ((fast, dtype), (plain, torch.float32)):
        parts = tuple(each.detach().to(kind).requires_grad_() for each in states)
        extra = [each if each is None else each.to(kind) for each in biases]
        output = attention(parts, Group(1, _BATCH, _LENGTH), extra[0], extra[1], tokens > 1 and not bias)
        grads = torch.autograd.grad((output * weights.to(kind)).sum(), parts)
        found.append([each.detach().double() for each in (output, *grads)])
    return float(torch.stack([(got - true).norm() / true.norm() for got, true in zip(*found, strict=True)]).max())
