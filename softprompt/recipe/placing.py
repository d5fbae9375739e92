"""Where a recipe puts the base model: its layers on several devices, in memory and on disk, or in many processes."""

from __future__ import annotations

import json

from softprompt.errors import ConfigError
from softprompt.recipe import Recipe

NAMED_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")

Places = dict[str, int | str]
"""The parts of a model by the start of their names, and where each is: a device, its number, `cpu` or `disk`."""


def device_map_of(recipe: Recipe) -> str | Places | None:
    """What ``device_map`` means. ``ConfigError`` for what is neither one of the known words nor a mapping."""
    if recipe.device_map is None or recipe.device_map in NAMED_MAPS:
        return recipe.device_map
    example = 'a mapping such as {"model.embed_tokens": "cpu", "model.layers": "disk"}'
    return _mapping("device_map", recipe.device_map, f"one of {', '.join(NAMED_MAPS)}, or {example}")


def max_memory_of(recipe: Recipe) -> dict[int | str, int | str] | None:
    """What ``max_memory`` means: bytes, or a text like 20GiB, for each device; GPUs by their number."""
    if recipe.max_memory is None:
        return None
    found = _mapping("max_memory", recipe.max_memory, 'a mapping such as {"0": "20GiB", "cpu": "60GiB"}')
    return {int(name) if name.isdigit() else name: size for name, size in found.items()}


def _mapping(name: str, text: str, wanted: str) -> Places:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    plain = isinstance(found, dict) and all(type(value) in (int, str) for value in found.values())
    if not found or not plain:
        raise ConfigError(f"{name} is {text!r}; it must be {wanted}")
    return found


def check_placing(recipe: Recipe) -> None:
    """``ConfigError`` for placements that contradict each other, or that cannot be read."""
    if device_map_of(recipe) is None:
        for name in ("offload_folder", "max_memory"):
            if getattr(recipe, name) is not None:
                raise ConfigError(f"{name} is set without device_map, which it is for; add device_map: auto")
    elif recipe.device != "auto":
        raise ConfigError(f"both device_map and device ({recipe.device}) say where the model is; leave device out")
    max_memory_of(recipe)
    spread = "shard" if recipe.shard else "device_map" if recipe.device_map is not None else None
    if spread and recipe.base_learning_rate is not None:
        raise ConfigError(f"{spread} is for a frozen base model, but base_learning_rate is set; leave one of them out")
    if recipe.shard_size is not None and not recipe.shard:
        raise ConfigError("shard_size is set without shard, which it is for; add shard: true")
    if recipe.shard and recipe.device_map is not None:
        raise ConfigError("both shard and device_map are set; one spreads the base over processes, the other does not")
