"""Modules without their random start, for those that are filled from a checkpoint at once."""

from typing import Any, final

import torch

from softprompt.transformers_api import TorchDispatchMode


@final
class Undrawn(TorchDispatchMode):
    """Inside, what would be drawn at random is zero: it makes way for a saved prompt at once.

    So loading a prompt takes nothing from the generator that generation samples by.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return args[0].zero_()
        shape = func(*args, **{**kwargs, "device": "meta"})
        return torch.zeros_like(shape, device=kwargs.get("device") or "cpu")
