"""Folded prompts that are kept: a frozen prompt is folded once, and again when it or the base model has changed."""

from collections.abc import Hashable
from itertools import count
from operator import is_
from typing import final

import torch
from torch import Tensor, nn

from softprompt.elsewhere import place_of, watched
from softprompt.fold import Folded
from softprompt.stacking import has_layers

_EPOCHS = count(1)
"""Of all models, so that a store which several share never takes what one folds to for what another does."""


@final
class Stamp:
    """The parameters of a module as they are now: themselves, their versions, their places; and autocast's type.

    `trains`: a call trains the module or draws dropout in it.
    It is made in every step of decoding, so modules are walked by hand: torch's own iterators take ten times as long.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = []
        self._walk(module)
        self.trains = module.training or any(each.requires_grad for each in self.tensors)
        kind = self.tensors[0].device.type if self.tensors else "cpu"
        kind = place_of(module).type if kind == "meta" else kind
        self.tensors = watched(module, self.tensors)
        self.versions = [0 if each.is_inference() else each._version for each in self.tensors]
        self.places = [each.data_ptr() for each in self.tensors]
        self.computes = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def _walk(self, module: nn.Module) -> None:
        self.modules.append(module)
        self.tensors += [each for each in module._parameters.values() if each is not None]
        for child in module._modules.values():
            if child is not None:
                self._walk(child)

    def same(self, other: "Stamp") -> bool:
        return (
            len(self.modules) == len(other.modules)
            and len(self.tensors) == len(other.tensors)
            and self.computes is other.computes
            and self.versions == other.versions
            and self.places == other.places
            and all(map(is_, self.modules, other.modules))
            and all(map(is_, self.tensors, other.tensors))
        )


@final
class FoldCache:
    """What frozen prompts fold to before one base model, by adapter and task.

    Kept are prompts of which nothing trains, before a base model of which nothing trains: torch's fused optimizers
    change parameters without a trace. Any other change in place shows, unless it is made through `.data`.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Stamp, Folded]] = {}
        self._base: Stamp | None = None
        self._epoch = 0

    def epoch(self, base: nn.Module) -> int | None:
        """A number that changes with the base model; None, and nothing is kept, while it trains.

        Neither is anything before PEFT's layers, which are switched on and off, scaled and merged without a trace.
        """
        if torch.compiler.is_compiling():  # versions and places cannot be looked up there
            return self._epoch if self._known and frozen(base) else None
        now = Stamp(base)
        if now.trains:
            self.clear()
            return None
        if self._base is None or not now.same(self._base):
            self.clear()
            self._base = None
            if has_layers(base):
                return None
            self._base, self._epoch = now, next(_EPOCHS)
        return self._epoch

    def get(self, key: Hashable, prompt: nn.Module) -> Folded | None:
        """What was kept under `key` of this prompt, if it has not changed since."""
        known = self._known.get(key)
        if known is None:
            return None
        if torch.compiler.is_compiling():
            return known[1] if frozen(prompt) else None
        now = Stamp(prompt)
        if now.trains or not known[0].same(now):
            self._known.pop(key, None)  # unless another thread was first
            return None
        return known[1]

    def keep(self, key: Hashable, stamp: Stamp, folded: Folded) -> None:
        """Keep what a prompt folded to that had this stamp before."""
        self._known[key] = stamp, folded

    @property
    def kept(self) -> list[Hashable]:
        """What is kept now."""
        return list(self._known)

    def clear(self) -> None:
        self._known.clear()


def frozen(module: nn.Module) -> bool:
    """Whether a call neither trains this module nor draws dropout in it."""
    return not module.training and not any(each.requires_grad for each in module.parameters())
