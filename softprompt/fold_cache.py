"""Folded prompts that are kept: computed once, and again when the prompt or the base model has changed."""

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor, nn

from softprompt.fold import Folded

Stamp = list[tuple[Tensor, int, int]]


class FoldCache:
    """What frozen prompts fold to, by adapter and task, with the tensors it was made from as they were.

    A change is seen by the tensors themselves, their version and their place; writing to `.data` in place is not.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Stamp, Folded]] = {}

    def get(self, key: Hashable, made_from: Stamp) -> Folded | None:
        """What was kept under `key`, if nothing that it was made from has changed since."""
        known = self._known.get(key)
        return known[1] if known is not None and _same(known[0], made_from) else None

    def keep(self, key: Hashable, made_from: Stamp, folded: Folded) -> Folded:
        self._known[key] = made_from, folded
        return folded

    def forget(self, adapter: str) -> None:
        """Drop everything of an adapter."""
        for key in [key for key in self._known if isinstance(key, tuple) and key[0] == adapter]:
            del self._known[key]


def stamp(modules: Iterable[nn.Module]) -> Stamp:
    """All parameters of some modules, as they are now."""
    return [
        (each, 0 if each.is_inference() else each._version, each.data_ptr())
        for module in modules
        for each in module.parameters()
    ]


def _same(known: Stamp, now: Stamp) -> bool:
    return len(known) == len(now) and all(
        mine[0] is other[0] and mine[1] == other[1] and mine[2] == other[2]
        for mine, other in zip(known, now, strict=True)
    )


def frozen(modules: Iterable[nn.Module]) -> bool:
    """Whether a call now neither trains any of these modules nor draws dropout in them."""
    grad = torch.is_grad_enabled()
    return not any(
        module.training or (grad and any(p.requires_grad for p in module.parameters())) for module in modules
    )
