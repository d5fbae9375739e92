"""What a recipe says about where its prompt starts: checks."""

from __future__ import annotations

from softprompt.errors import ConfigError
from softprompt.recipe import Recipe


def check_start(recipe: Recipe) -> None:
    """``ConfigError`` where the settings of a prompt's start are incomplete or contradict each other."""
    if recipe.init == "text" and not recipe.init_text:
        raise ConfigError("init is 'text' but init_text is empty; give the text to start from")
    if recipe.init == "prompt" and not recipe.init_from:
        raise ConfigError("init is 'prompt' but init_from is empty; give the folder of the prompt to start from")
    if recipe.init_text and (recipe.init not in (None, "text", "examples") or recipe.init_from):
        other = "init_from is set too" if recipe.init_from else f"init is {recipe.init!r}"
        raise ConfigError(f"init_text is set but {other}; use init: text, or drop init_text")
    if (recipe.init_candidates or 1) > 1:
        _check_candidates(recipe)
    if recipe.init_from and recipe.init not in (None, "prompt"):
        raise ConfigError(f"init_from is set but init is {recipe.init!r}; use init: prompt, or drop init_from")


def _check_candidates(recipe: Recipe) -> None:
    chosen = f"init_candidates is {recipe.init_candidates}"
    if recipe.init not in (None, "examples") or recipe.init_from or recipe.source:
        given = "source" if recipe.source else f"init: {recipe.init or 'prompt'}"
        raise ConfigError(f"{chosen}, which are draws of training examples, but {given} is set; give one of the two")
    if recipe.task == "SEQ_CLS":
        raise ConfigError(
            f"{chosen}, but a classifier is new, and before training its loss says nothing about a prompt; leave it out"
        )
