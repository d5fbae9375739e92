"""The attention function that is registered with transformers' `AttentionInterface` in place of a backend's own."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from softprompt.attention import Prefix, attend, flex
from softprompt.doors.opening import Opening, current
from softprompt.doors.widen import before_bias, in_front, widen
from softprompt.errors import UnsupportedError

BACKENDS = ("sdpa", "eager")
_FLEX = "flex_attention"
_PREFIX = "softprompt_"

Pair = tuple[Tensor, Tensor]


def registered(name: str | None) -> str:
    """The name of the door over a backend, which is registered on first use."""
    backend = name or "eager"
    if backend.startswith(_PREFIX):
        return backend
    if backend not in (*BACKENDS, _FLEX):
        raise UnsupportedError(
            f"attention backend {backend!r} cannot take a prefix; load the model with "
            "attn_implementation='flex_attention', 'sdpa' or 'eager'."
        )
    wrapped = _PREFIX + backend
    if wrapped not in AttentionInterface._global_mapping:
        AttentionMaskInterface.register(wrapped, _mask_for(backend))
        AttentionInterface.register(wrapped, _attention_through(backend))
    return wrapped


def _served(backend: str, device: torch.device | str) -> str:
    """The backend itself; on devices where torch cannot train through flex attention, the family's own code."""
    return "eager" if backend == _FLEX and not flex.available(torch.device(device)) else backend


def _mask_for(backend: str) -> Callable[..., Any]:
    """A backend's mask function. Layers that share keys may get the last queries alone, which only a mask can tell."""

    def mask(*args: Any, **kwargs: Any) -> Any:
        opening = current()
        plain = ALL_MASK_ATTENTION_FUNCTIONS[_served(backend, kwargs.get("device", "cpu"))]
        return plain(*args, **(kwargs | {"allow_is_causal_skip": False} if opening and opening.sharing else kwargs))

    return mask


def _attention_through(backend: str) -> Callable[..., Any]:
    """The attention function registered for one backend; same arguments and results as transformers' own."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        served = _served(backend, query.device)
        plain = _eager_of(module) if served == "eager" else ALL_ATTENTION_FUNCTIONS[backend]
        opening, mask = current(), attention_mask  # some families pass it by this name
        if opening is None:
            return plain(module, query, key, value, mask, **kwargs)
        if opening.recording is not None:
            opening.recording.add(module, query, key, value, kwargs.get("sliding_window"))
        pair = opening.pair(module)
        if pair is None:
            return plain(module, query, key, value, mask, **kwargs)
        if kwargs.get("cache") is not None:
            raise UnsupportedError("continuous batching cannot take a prefix; use generate() without it.")
        causal = kwargs.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal) and query.shape[2] > 1
        if mask is None and causal and query.shape[2] < key.shape[2]:
            # A static cache's unused tail, which causal backends cut off themselves when there is no mask.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        if served == _FLEX:
            return _flexible(opening, module, (query, key, value), mask, pair, kwargs), None
        if backend != "eager" and kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
            return _shared(opening, module, (query, key, value), mask, pair, causal, kwargs), None
        return _widened(plain, opening, module, (query, key, value), mask, pair, causal, kwargs)

    return attention


def _shared(
    opening: Opening,
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    pair: Pair,
    causal: bool,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attention `[B, T, hq, k]` with the prefix as it is: no copy of it per row, no wider mask."""
    query, key, value = _of_one_type(*states)
    relative = kwargs.get("position_bias")
    bias, causal = opening.additive(mask, query), causal and mask is None
    if relative is not None:
        if causal:
            later = torch.ones(relative.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
            bias, causal = later.to(query).mul_(torch.finfo(query.dtype).min), False
        bias = relative if bias is None else relative + bias
    bias = None if bias is None else bias.to(query.dtype)
    prefix = _prefix(opening, module, pair, query, kwargs)
    output = attend(query, key, value, prefix, bias, causal, kwargs.get("scaling"), kwargs.get("dropout", 0.0))
    return output.transpose(1, 2).contiguous()


def _prefix(opening: Opening, module: nn.Module, pair: Pair, query: Tensor, kwargs: dict[str, Any]) -> Prefix:
    """A layer's prefix as attention takes it: which rows have it, and what is added to its scores."""
    relative, far = kwargs.get("position_bias"), opening.far(kwargs.get("sliding_window"), query)
    if relative is not None:
        before = before_bias(relative, pair[0].shape[2], opening.tables.get(module), _seen(opening, module))
        far = before if far is None else before + far
        far = far.to(query.dtype)
    return Prefix(pair[0].to(query), pair[1].to(query), opening.groups(query.shape[0], query.device), far)


def _of_one_type(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All in the type of the values, as torch's own function takes them under autocast.

    There a model that turns queries and keys by their positions does so in float32.
    """
    if query.dtype is key.dtype and key.dtype is value.dtype:
        return query, key, value
    return query.to(value.dtype), key.to(value.dtype), value


def _flexible(
    opening: Opening,
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    mask: Any,
    pair: Pair,
    kwargs: dict[str, Any],
) -> Tensor:
    """The same through flex attention, `mask` being a `BlockMask`, additive, or None; it knows no dropout."""
    if kwargs.get("dropout"):
        raise UnsupportedError(
            f"flex_attention has no dropout, and this model wants {kwargs['dropout']}; set the attention dropout of "
            "its config to 0 or load it with attn_implementation='sdpa'."
        )
    (query, key, value), relative = _of_one_type(*states), kwargs.get("position_bias")
    additive = opening.additive(mask, query) if isinstance(mask, Tensor) else None
    bias = None if additive is None else additive[..., : key.shape[2]]
    if relative is not None:
        bias = relative if bias is None else relative + bias
    named = {"scale": "scaling", "softcap": "softcap", "sinks": "s_aux", "kernel": "kernel_options"}
    options = flex.Options(training=module.training, **{name: kwargs.get(other) for name, other in named.items()})
    prefix = _prefix(opening, module, pair, query, kwargs)
    block_mask = None if isinstance(mask, Tensor) else mask
    return flex.attend(query, key, value, prefix, block_mask, bias, options).transpose(1, 2).contiguous()


def _widened(
    plain: Callable[..., Any],
    opening: Opening,
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    pair: Pair,
    causal: bool,
    kwargs: dict[str, Any],
) -> Any:
    """The plain way, through the family's own attention: the prefix in front of each row's keys, the mask wider."""
    (query, key, value), prefix = states, opening.prefix
    assert prefix is not None
    length = pair[0].shape[2]
    relative = kwargs.get("position_bias")
    if relative is not None:
        before = before_bias(relative, length, opening.tables.get(module), _seen(opening, module))
        kwargs = {**kwargs, "position_bias": torch.cat([before, relative], dim=-1)}
    own = opening.lengths(query.shape[0], query.device)
    mask = widen(mask, query, key, prefix, kwargs.get("sliding_window"), causal, opening.positions, own)
    key, value = in_front(pair[0], key, prefix.rows), in_front(pair[1], value, prefix.rows)
    output, weights = plain(module, query, key, value, mask, **kwargs)
    return output, weights if weights is None else weights[..., length:]


def _seen(opening: Opening, module: nn.Module) -> Any:
    """How many tokens stand before the first query: an encoder's layers have no cache."""
    return opening.seen if getattr(module, "is_decoder", False) else 0


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The model family's own eager attention, which transformers hands over only for the name 'eager'."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedError(f"{type(module).__name__} has no eager attention; load with attn_implementation='sdpa'.")
