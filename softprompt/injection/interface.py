"""The attention function that layers call in place of their backend's own while a scope is open, and how they come to.

Layers ask transformers' `AttentionInterface` by the name in their config. Over each backend stands a function of ours
that adds the prefix of the current thread's scope and is the backend itself where there is none; while any thread has
a way into a model open, the names in its configs are those of ours.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from softprompt import transformers_api as api
from softprompt.attention import Prefix, attend, flex
from softprompt.errors import UnsupportedError
from softprompt.injection.scope import Scope, current
from softprompt.injection.widen import before_bias, in_front, widen

BACKENDS = ("sdpa", "eager")
_FLEX = "flex_attention"
_PREFIX = "softprompt_"

Pair = tuple[Tensor, Tensor]

# ---- which function layers call --------------------------------------------------------------------------------------

_LOCK = Lock()
_ROUTED: dict[int, list[Any]] = {}
"""Configs whose layers' attention goes through ours now: `[for how many scopes, its own backend]`. (Of configs, since a
model and its body share them.)"""


@contextmanager
def routed(configs: Sequence[PreTrainedConfig]) -> Iterator[None]:
    """Inside the block the layers that read one of these configs call our function over their backend's."""
    if torch.compiler.is_compiling():
        with _traced():
            yield
        return
    _route(configs)
    try:
        yield
    finally:
        _route_back(configs)


def _route(configs: Sequence[PreTrainedConfig]) -> None:
    """Switch the names to ours. Threads may share the model: the first in switches, the last out undoes."""
    with _LOCK:
        wrapped = [registered(api.backend_of(config)) for config in configs]  # may refuse, before anything is changed
        for config, name in zip(configs, wrapped, strict=True):
            if id(config) not in _ROUTED:
                _ROUTED[id(config)] = [0, api.backend_of(config)]
                api.set_backend(config, name)
            _ROUTED[id(config)][0] += 1


def _route_back(configs: Sequence[PreTrainedConfig]) -> None:
    with _LOCK:
        for config in configs:
            routed_now = _ROUTED[id(config)]
            routed_now[0] -= 1
            if routed_now[0] == 0:
                api.set_backend(config, routed_now[1])
                del _ROUTED[id(config)]


def own_backend(config: PreTrainedConfig) -> str:
    """The name of the backend that a model was loaded with, also while a thread has it go through ours."""
    return api.backend_of(config).removeprefix(_PREFIX)


@contextmanager
def _traced() -> Iterator[None]:
    """The same while `torch.compile` traces a call, which follows locks as little as it may write to a shared config.

    What it writes while it traces it writes again each time the compiled code has run, when another thread may have
    the way open. An attribute that was not there and is deleted again is the one thing it never writes.
    """
    if api.redirected():  # nested
        yield
        return
    api.redirect(_interface)
    try:
        yield
    finally:
        api.end_redirect()


def _interface(name: str | None, _: Callable[..., Any]) -> Callable[..., Any]:
    """In place of transformers' own look-up: our function over the backend `name`."""
    return api.registered_attention(registered(name))


def registered(name: str | None) -> str:
    """The name of our function over a backend, which is registered on first use."""
    backend = name or "eager"
    if backend.startswith(_PREFIX):
        return backend
    if backend not in (*BACKENDS, _FLEX):
        raise UnsupportedError(
            f"attention backend {backend!r} cannot take a prefix; load the model with "
            "attn_implementation='flex_attention', 'sdpa' or 'eager'."
        )
    wrapped = _PREFIX + backend
    if not api.is_registered(wrapped):
        api.register_attention(wrapped, _attention_through(backend), _mask_for(backend))
    return wrapped


# ---- what it does ----------------------------------------------------------------------------------------------------


def _served(backend: str, device: torch.device | str) -> str:
    """The backend itself; on devices where torch cannot train through flex attention, the family's own code."""
    return "eager" if backend == _FLEX and not flex.available(torch.device(device)) else backend


def _mask_for(backend: str) -> Callable[..., Any]:
    """What makes masks for a backend.

    Layers that share keys may get the last queries alone, which only a mask can tell; chunks begin where true positions
    say, behind the prefix.
    """

    def mask(*args: Any, **options: Any) -> Any:
        scope = current()
        plain = api.mask_maker(_served(backend, api.mask_device(options)))
        if scope is None:
            return plain(*args, **options)
        if scope.longest and api.chunk_in(options) is not None:
            own = scope.lengths(options["batch_size"], torch.device(api.mask_device(options)))
            options = api.whole_mask(api.shifted_mask(options, scope.longest if own is None else own))
        return plain(*args, **(api.whole_mask(options) if scope.sharing else options))

    return mask


def _attention_through(backend: str) -> Callable[..., Any]:
    """The attention function registered for one backend; same arguments and results as transformers' own."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        module, served = api.itself(module), _served(backend, query.device)
        plain = api.attention_of("eager" if served == "eager" else backend, module)
        scope, mask = current(), attention_mask  # some families pass it by this name
        if scope is None:
            return plain(module, query, key, value, mask, **kwargs)
        asked = api.Asked(module, kwargs)
        if scope.recording is not None:
            scope.recording.add(module, query, key, value, asked.window)
        if scope.positions is not None and api.tempers(module):
            query = api.tempered(module, query, scope.positions.to(query.device), scope.seen)
        pair = scope.pair(module)
        if pair is None:
            return plain(module, query, key, value, mask, **kwargs)
        if asked.batches:
            raise UnsupportedError("continuous batching cannot take a prefix; use generate() without it.")
        causal = asked.causal and query.shape[2] > 1
        if mask is None and causal and query.shape[2] < key.shape[2]:
            # A static cache's unused tail, which causal backends cut off themselves when there is no mask.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        if served == _FLEX:
            return _flexible(scope, module, (query, key, value), mask, pair, asked), None
        if backend != "eager" and asked.softcap is None and asked.sinks is None:
            return _shared(scope, module, (query, key, value), mask, pair, causal, asked), None
        return _widened(plain, scope, module, (query, key, value), mask, pair, causal, asked, kwargs)

    return attention


def _shared(
    scope: Scope,
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    pair: Pair,
    causal: bool,
    asked: api.Asked,
) -> Tensor:
    """Attention `[B, T, hq, k]` with the prefix as it is: no copy of it per row, no wider mask."""
    query, key, value = _of_one_type(*states)
    bias, causal = scope.additive(mask, query), causal and mask is None
    if asked.relative is not None:
        if causal:
            later = torch.ones(asked.relative.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
            bias, causal = later.to(query).mul_(torch.finfo(query.dtype).min), False
        bias = asked.relative if bias is None else asked.relative + bias
    bias = None if bias is None else bias.to(query.dtype)
    prefix = _prefix(scope, module, pair, query, asked)
    output = attend(query, key, value, prefix, bias, causal, asked.scale, asked.dropout)
    return output.transpose(1, 2).contiguous()


def _prefix(scope: Scope, module: nn.Module, pair: Pair, query: Tensor, asked: api.Asked) -> Prefix:
    """A layer's prefix as attention takes it: which rows have it, and what is added to its scores."""
    far = scope.far(asked.window, api.chunk_of(module), query)
    if asked.relative is not None:
        before = before_bias(asked.relative, pair[0].shape[2], scope.tables.get(module), _seen(scope, module))
        far = before if far is None else before + far
        far = far.to(query.dtype)
    return Prefix(pair[0].to(query), pair[1].to(query), scope.groups(query.shape[0], query.device), far)


def _of_one_type(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All in the type of the values, as torch's own function takes them under autocast.

    There a model that turns queries and keys by their positions does so in float32.
    """
    if query.dtype is key.dtype and key.dtype is value.dtype:
        return query, key, value
    return query.to(value.dtype), key.to(value.dtype), value


def _flexible(
    scope: Scope, module: nn.Module, states: tuple[Tensor, Tensor, Tensor], mask: Any, pair: Pair, asked: api.Asked
) -> Tensor:
    """The same through flex attention, `mask` being a `BlockMask`, additive, or None; it knows no dropout."""
    if asked.dropout:
        raise UnsupportedError(
            f"flex_attention has no dropout, and this model wants {asked.dropout}; set the attention dropout of its "
            "config to 0 or load it with attn_implementation='sdpa'."
        )
    query, key, value = _of_one_type(*states)
    additive = scope.additive(mask, query) if isinstance(mask, Tensor) else None
    bias = None if additive is None else additive[..., : key.shape[2]]
    if asked.relative is not None:
        bias = asked.relative if bias is None else asked.relative + bias
    options = flex.Options(
        training=module.training, scale=asked.scale, softcap=asked.softcap, sinks=asked.sinks, kernel=asked.kernel
    )
    prefix = _prefix(scope, module, pair, query, asked)
    block_mask = None if isinstance(mask, Tensor) else mask
    return flex.attend(query, key, value, prefix, block_mask, bias, options).transpose(1, 2).contiguous()


def _widened(
    plain: Callable[..., Any],
    scope: Scope,
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    pair: Pair,
    causal: bool,
    asked: api.Asked,
    kwargs: dict[str, Any],
) -> Any:
    """The plain way, through the family's own attention: the prefix in front of each row's keys, the mask wider."""
    (query, key, value), prefix = states, scope.prefix
    assert prefix is not None
    length = pair[0].shape[2]
    if asked.relative is not None:
        before = before_bias(asked.relative, length, scope.tables.get(module), _seen(scope, module))
        kwargs = api.with_relative(kwargs, torch.cat([before, asked.relative], dim=-1))
    mask = widen(mask, query, key, length, scope.hidden(asked.window, api.chunk_of(module), query), causal)
    key, value = in_front(pair[0], key, prefix.rows), in_front(pair[1], value, prefix.rows)
    output, weights = plain(module, query, key, value, mask, **kwargs)
    return output, weights if weights is None else weights[..., length:]


def _seen(scope: Scope, module: nn.Module) -> Any:
    """How many tokens stand before the first query: an encoder's layers have no cache."""
    return scope.seen if api.in_decoder(module) else 0
