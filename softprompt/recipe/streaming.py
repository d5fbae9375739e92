"""What a recipe says about training data that is read while training: checks."""

from __future__ import annotations

from softprompt.errors import ConfigError
from softprompt.recipe import Recipe


def check_streaming(recipe: Recipe) -> None:
    """``ConfigError`` where a stream does not go with the rest."""
    if not recipe.streaming:
        return
    if recipe.tasks or recipe.task == "CLOZE":
        what = "several tasks" if recipe.tasks else "task CLOZE"
        raise ConfigError(f"streaming is for one task of text or classes, and not for {what}; leave streaming out")
    if recipe.train_limit is not None:
        raise ConfigError(
            f"streaming reads all rows, but train_limit is {recipe.train_limit}; leave out train_limit, or streaming"
        )
    if recipe.epochs is not None:
        raise ConfigError(
            f"epochs is {recipe.epochs:g}, but how many rows a stream has is not known before it ends; give steps"
        )
