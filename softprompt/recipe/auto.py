"""`method: auto`: the method of a recipe that names none."""

from __future__ import annotations

import dataclasses

from softprompt.config import EmbeddingConfig
from softprompt.errors import ConfigError
from softprompt.recipe import Recipe
from softprompt.recipe.cloze import slots_of
from softprompt.recipe.defaults import AUTO, BEST


def method_of(recipe: Recipe) -> str:
    """The recipe's method: its own, else the best for its task (`BEST`) that can do what the recipe asks.

    That is: has the options it sets, can stand inside its template, serves several tasks. ConfigError if none can.
    """
    if recipe.method != AUTO:
        return recipe.method
    from softprompt.methods import METHODS  # here because methods import much

    names = [*BEST[recipe.task], *(name for name in METHODS if name not in BEST[recipe.task])]
    for name in names:
        if fits(recipe, name):
            return name
    known = {field.name for method in METHODS.values() for field in dataclasses.fields(method.config_class)}
    if not known.issuperset(recipe.method_options):
        return names[0]  # which refuses what no method knows, and names the closest thing it does
    options = f" with {', '.join(recipe.method_options)}" if recipe.method_options else ""
    raise ConfigError(
        f"no method{options} can do what this recipe asks; name one by method, and leave out what it lacks"
    )


def fits(recipe: Recipe, name: str) -> bool:
    """Whether a method can do what a recipe asks beyond its task."""
    from softprompt.methods import METHODS

    method = METHODS[name]
    known = {field.name for field in dataclasses.fields(method.config_class)}
    if not known.issuperset(recipe.method_options):
        return False
    if slots_of(recipe) and not issubclass(method.config_class, EmbeddingConfig):
        return False
    return bool(method.task_parameters) or not (recipe.tasks or recipe.source)
