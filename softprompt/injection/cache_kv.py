"""The cache way: the prefix reaches the layers through the cache they read, on families without AttentionInterface.

Some families attend in code of their own, but every layer hands its keys and values to the cache and attends to what it
gets back. While a scope is open, that cache is a stand-in which puts the prefix before the real tokens. The caller's
cache, and so generation, beams and static caches, hold real tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt import transformers_api as api
from softprompt.call import Call
from softprompt.errors import ConfigError, UnsupportedError
from softprompt.injection.checkpointing import recomputed, run_checkpointed
from softprompt.injection.contract import Way
from softprompt.injection.interface import BACKENDS, own_backend
from softprompt.injection.lengths import own_lengths
from softprompt.injection.positions import true_positions
from softprompt.injection.prefixed_cache import PrefixedCache, additive, left_padding, of_sequences, widen
from softprompt.injection.scope import Recording, Scope, apart, entered
from softprompt.prompt import KV


@final
class CacheWay(Way):
    """Through the cache. It stands at the model's body, which every head calls."""

    name = "cache"
    encoder_decoder = False

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__(base)
        self.body = api.own(base)
        self.takes_positions = api.takes(self.body.forward, "position_ids")
        self._reads_positions = self.takes_positions and api.takes(base.forward, "position_ids")
        self._checkpointed = [each for each in self.body.modules() if api.can_checkpoint(each)]
        self.takes_square_masks = True
        """Whether the body runs with a mask of four dimensions; some count ALiBi's positions from one of two."""

    @contextmanager
    def open(self, prefix: KV | None, generating: bool = False) -> Iterator[None]:
        scope = self._scope(prefix if prefix is not None and prefix.layers else None, generating=generating)
        if not self._reads_positions:
            scope.at(self.base, before=self._refuse_packed)
        scope.at(self.body, before=self._enter(scope), after=_leave(scope))
        recomputed(self._checkpointed)
        with entered(scope):
            yield

    @contextmanager
    def recorded(self, recording: Recording) -> Iterator[None]:
        scope = self._scope(None, recording)
        with apart(self.base), ExitStack() as stack:
            attending = self._attending(stack)
            scope.at(self.body, before=self._record(scope, attending), after=_leave(scope))
            recomputed(self._checkpointed)
            stack.enter_context(entered(scope))
            yield

    def call(self, prefix: KV | None, call: Call) -> Any:
        with self.open(prefix):
            return self.base(**call.keywords(self.base))

    def _scope(self, prefix: KV | None, recording: Recording | None = None, generating: bool = False) -> Scope:
        backend = own_backend(self.body.config)
        if backend not in BACKENDS:
            raise UnsupportedError(
                f"attention backend {backend!r} cannot take a prefix on {type(self.base).__name__}; load it with "
                "attn_implementation='sdpa' or 'eager'."
            )
        return Scope(prefix, recording=recording, generating=generating, checkpointed=self._layer_again)

    def _refuse_packed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a model that ignores positions, and so would let one sequence see another."""
        if Call.to(module, args, kwargs).packed:
            raise ConfigError(
                f"{type(self.base).__name__} takes no position_ids, so a row cannot hold several sequences; give each "
                "a row of its own."
            )

    def _attending(self, stack: ExitStack) -> Callable[[int], nn.Module]:
        """Which module fills a layer of the cache: known once probed, until then the innermost one that runs."""
        if self.modules[0]:
            return self.modules[0].__getitem__
        running: list[nn.Module] = []
        own = get_ident()  # the hooks are there for other threads' calls, too

        def begun(module: nn.Module, _: Any) -> None:
            if get_ident() == own:
                running.append(module)

        def ended(*_: Any) -> None:
            if get_ident() == own:
                running.pop()

        for module in self.body.modules():
            stack.callback(module.register_forward_pre_hook(begun).remove)
            stack.callback(module.register_forward_hook(ended).remove)
        return lambda _: running[-1]

    def _record(self, scope: Scope, attending: Callable[[int], nn.Module]) -> Callable[..., Any]:
        """Before the body: a stand-in for the cache that takes down what it is given."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            scope.cache = PrefixedCache(None, None, recording=scope.recording, attending=attending)
            call = Call.to(module, args, kwargs).but(cache=scope.cache).plus(use_cache=False, return_dict=True)
            return (), call.keywords(module)

        return hook

    def _enter(self, scope: Scope) -> Callable[..., Any]:
        """Before the body: the stand-in for the cache, and mask and positions to match."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            call = Call.to(module, args, kwargs)
            if not call.given:  # which the model refuses
                return args, kwargs
            return (), self._placed(scope, call).keywords(module)

        return hook

    def _placed(self, scope: Scope, call: Call) -> Call:
        """The call as it is while the scope is open."""
        self.check_holes(call, scope.generating)
        own, prefix, mask, rows = self._own_cache(call), scope.prefix, call.mask, call.rows
        offset = self.limits.position_offset
        if call.packed and not call.continues:
            assert call.positions is not None
            mask = of_sequences(call.positions)
        if isinstance(mask, Tensor) and mask.ndim == 4 and not self.takes_square_masks:
            raise ConfigError(
                f"{type(self.base).__name__} counts positions from the attention_mask, so it takes one of two "
                f"dimensions, not {tuple(mask.shape)}; give each sequence a row of its own, and no static cache."
            )
        length = 0 if prefix is None else prefix.length
        lengths = None if prefix is None else own_lengths(prefix, rows.shape[0], rows.device)
        columns = api.cache_columns(own, rows.shape[1])
        positions: Tensor | None = None
        if self.takes_positions:
            given = None if scope.generating and offset else call.positions  # counted from 0 there, which theirs is not
            positions = true_positions(rows, mask, own) if given is None else given - offset
            positions = positions + (length if lengths is None else lengths[:, None])
            call = call.but(positions=positions + offset)
        self.check_room(positions, length + columns)
        if prefix is None:
            return call
        if mask is None and lengths is not None:
            seen = int(api.seen_tokens(own))
            mask = torch.ones(rows.shape[0], seen + rows.shape[1], dtype=torch.long, device=rows.device)
        padding = None if mask is None else left_padding(mask)
        wanted = call.rest.get("return_dict")
        wanted = self.body.config.return_dict if wanted is None else wanted
        returned = call.cache if own is None else own
        scope.cache = PrefixedCache(own, prefix, padding, returned, as_tuple=not wanted)
        if mask is not None:
            mask = mask if own_backend(self.body.config) != "eager" else additive(mask, self.body.dtype)
            mask = widen(mask, prefix, lengths, padding)
        return call.but(cache=scope.cache, mask=mask).plus(return_dict=True)

    def _own_cache(self, call: Call) -> Any:
        """The cache that takes in this call's real tokens: the caller's, a new one, or none."""
        if self.body.training and api.checkpoints(self.body) and torch.is_grad_enabled():
            if call.continues:
                raise ConfigError(
                    "a cache cannot be used under gradient checkpointing, where transformers drops it; call "
                    "model.eval(), or pass the whole row without a cache."
                )
            return None
        use = call.rest.get("use_cache")
        use = api.uses_cache_by_default(self.body) if use is None else use
        return api.new_cache(self.body.config) if call.cache is None and use else call.cache

    def _layer_again(
        self, scope: Scope, run: Callable[..., Any], layer: partial[Any], *args: Any, **options: Any
    ) -> Any:
        """A checkpointed layer: it gets the stand-in, which transformers drops, in the backward pass too."""
        cache = scope.cache
        if cache is None:
            return run(layer, *args, **options)
        if scope.recording is not None:  # short, and its graph must be kept
            return _with_cache(layer, cache)(*args)

        def with_prefix(again: KV | None) -> Callable[..., Any]:
            return _with_cache(layer, cache if again is None else cache.of(again))

        return run_checkpointed(run, cache.prefix, with_prefix, args, options)


def _leave(scope: Scope) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return output if scope.cache is None else scope.cache.leave(output)

    return hook


def _with_cache(layer: partial[Any], cache: PrefixedCache) -> Callable[..., Any]:
    """A layer's bound call with a cache under the name it takes one by."""
    name = api.layer_cache_name(layer.keywords)
    if name is None:
        raise UnsupportedError(
            "a layer of this model takes no cache by name, so gradient checkpointing would lose the prefix; turn "
            "gradient checkpointing off."
        )
    return partial(layer.func, *layer.args, **{**layer.keywords, name: cache})


def fills_cache(base: PreTrainedModel) -> bool:
    """Whether the model's body takes a cache of keys and values alone, which the way needs."""
    return api.cache_name(api.own(base).forward) is not None and not api.keeps_state(base)
