"""Gradient checkpointing: what a layer saw in the forward pass it sees again when the backward pass recomputes it.

Recomputation comes after the scope has ended, and in another thread on a GPU. So the scope of the forward pass is
entered again around it, whenever and however checkpointing was enabled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any, final

from torch import nn

from softprompt import transformers_api as api
from softprompt.injection.scope import current
from softprompt.prompt import KV

_LOCK = Lock()


@final
class _Recompute:
    """In place of what a model recomputes its layers with, from a scope's first use on; without a scope it is that."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __call__(self, layer: Callable[..., Any], *args: Any, **options: Any) -> Any:
        scope = current()
        if scope is None or scope.checkpointed is None:
            return self.run(layer, *args, **options)
        return scope.checkpointed(scope, self.run, layer, *args, **options)


def recomputed(modules: Iterable[nn.Module]) -> None:
    """See to it that modules that have been told to recompute ask the scope. It stays so: threads share a model."""
    for module in modules:
        if not api.checkpoints(module):
            continue
        with _LOCK:
            run = api.checkpointing_function(module)
            if run is not None and not isinstance(run, _Recompute):
                api.set_checkpointing_function(module, _Recompute(run))


def run_checkpointed(
    run: Callable[..., Any],
    prefix: KV | None,
    with_prefix: Callable[[KV | None], Callable[..., Any]],
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    """Run a layer by `run`, as `with_prefix` makes it from the prefix.

    The prefix goes along as explicit arguments, so that re-entrant checkpointing gives it gradients as well.
    """
    tensors = [] if prefix is None else [part for pair in prefix.pairs for part in pair]

    def replay(*everything: Any) -> Any:
        given, parts = everything[: len(args)], iter(everything[len(args) :])
        again = None if prefix is None else prefix.map(lambda _: next(parts))
        return with_prefix(again)(*given)

    return run(replay, *args, *tensors, **options)
