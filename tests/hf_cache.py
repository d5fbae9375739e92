"""A cache as an argument of a model and in its output, by whichever name this version of transformers has for it.

From 5.24 on both are called `cache`; before, `past_key_values`, and `cache_params` where a model keeps a state instead.
"""

import inspect
from typing import Any

NAMES = ("cache", "past_key_values", "cache_params")  # the newest first: the older ones are deprecated where it exists


def given(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that gives `model` (a base model, a part of one, or a prompted one) this cache."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    accepted = inspect.signature(base.forward).parameters
    return {next(name for name in NAMES if name in accepted): cache}


def of(output: Any) -> Any:
    """The cache in a model's or in `generate`'s output; KeyError where there is none."""
    return output[next((name for name in NAMES if name in output), "cache")]
