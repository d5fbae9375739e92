"""Which function attention layers call: their backend's own, or the door over it while the door is open.

The layers ask transformers' `AttentionInterface` by the name in their config, so the door switches the name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from softprompt.doors.attending import registered

_LOCK = Lock()
_ROUTED: "WeakKeyDictionary[PreTrainedModel, list[Any]]" = WeakKeyDictionary()
"""Base models whose attention goes through the door now: `[how many openings, [(config, its own backend)]]`."""


@contextmanager
def routed(base: PreTrainedModel, configs: Sequence[PreTrainedConfig]) -> Iterator[None]:
    """Inside the block the layers that read one of these configs call the door."""
    if torch.compiler.is_compiling():
        with _traced():
            yield
        return
    _route(base, configs)
    try:
        yield
    finally:
        _route_back(base)


def _route(base: PreTrainedModel, configs: Sequence[PreTrainedConfig]) -> None:
    """Switch the names to the door's. Threads may share the model: the first in switches, the last out undoes."""
    with _LOCK:
        before = _ROUTED.get(base)
        if before is None:
            names = [(config, config._attn_implementation) for config in configs]
            wrapped = [registered(name) for _, name in names]  # may refuse, before anything is changed
            for (config, _), name in zip(names, wrapped, strict=True):
                config._attn_implementation_internal = name
            before = [0, names]
            _ROUTED[base] = before
        before[0] += 1


def _route_back(base: PreTrainedModel) -> None:
    with _LOCK:
        before = _ROUTED[base]
        before[0] -= 1
        if before[0] == 0:
            for config, name in before[1]:
                config._attn_implementation_internal = name
            del _ROUTED[base]


@contextmanager
def _traced() -> Iterator[None]:
    """The same while `torch.compile` traces a call, which follows locks as little as it may write to a shared config.

    What it writes while it traces it writes again each time the compiled code has run, when another thread may have
    the door open. An attribute that was not there and is deleted again is the one thing it never writes.
    """
    if "get_interface" in vars(ALL_ATTENTION_FUNCTIONS):  # nested
        yield
        return
    functions: Any = ALL_ATTENTION_FUNCTIONS
    functions.get_interface = _interface
    try:
        yield
    finally:
        del functions.get_interface


def _interface(name: str | None, _: Callable[..., Any]) -> Callable[..., Any]:
    """In place of `AttentionInterface.get_interface`: the door over the backend `name`."""
    return AttentionInterface._global_mapping[registered(name)]
