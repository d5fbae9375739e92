"""Folded prompts that are kept: a frozen prompt is folded once, and again when it or the base model has changed."""

from collections.abc import Hashable
from typing import Any, final

import torch
from torch import nn

from softprompt.fold import Folded
from softprompt.stacking import has_layers


@final
class Stamp:
    """The parameters of a module as they are now: themselves, their versions, their places."""

    def __init__(self, module: nn.Module) -> None:
        self.parts = [(each, 0 if each.is_inference() else each._version, each.data_ptr())
                      for each in module.parameters()]  # fmt: skip

    def same(self, other: "Stamp") -> bool:
        return len(self.parts) == len(other.parts) and all(
            mine[0] is theirs[0] and mine[1] == theirs[1] and mine[2] == theirs[2]
            for mine, theirs in zip(self.parts, other.parts, strict=True)
        )


@final
class FoldCache:
    """What frozen prompts fold to before one base model, by adapter and task.

    Kept are prompts of which nothing trains, before a base model of which nothing trains: torch's fused optimizers
    change parameters without a trace. Any other change in place shows, unless it is made through `.data`.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Any, Folded]] = {}
        self._base: Stamp | None = None
        self._epoch = 0

    def epoch(self, base: nn.Module) -> int | None:
        """A number that changes with the base model; None, and nothing is kept, while it trains.

        Neither is anything before PEFT's layers, which are switched on and off, scaled and merged without a trace.
        """
        if torch.compiler.is_compiling():  # nothing can be looked up there
            return self._epoch if self._known else None
        if not frozen(base) or has_layers(base):
            self.clear()
            return None
        now = Stamp(base)
        if self._base is None or not now.same(self._base):
            self._known.clear()
            self._base, self._epoch = now, self._epoch + 1
        return self._epoch

    def get(self, key: Hashable, prompt: nn.Module) -> Folded | None:
        """What was kept under `key` of this prompt, if it has not changed since."""
        known = self._known.get(key)
        if known is None or torch.compiler.is_compiling():
            return None if known is None else known[1]
        if not frozen(prompt) or not known[0].same(Stamp(prompt)):
            del self._known[key]
            return None
        return known[1]

    def keep(self, key: Hashable, prompt: nn.Module, folded: Folded) -> None:
        self._known[key] = Stamp(prompt), folded

    @property
    def kept(self) -> list[Hashable]:
        """What is kept now."""
        return list(self._known)

    def clear(self) -> None:
        self._known.clear()


def frozen(module: nn.Module) -> bool:
    """Whether a call neither trains this module nor draws dropout in it."""
    return not module.training and not any(each.requires_grad for each in module.parameters())
