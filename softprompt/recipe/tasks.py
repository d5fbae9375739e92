"""Several named tasks in one recipe: ``tasks: {name: {train: …, eval: …, template: …}}``, and what goes with them."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softprompt.errors import ConfigError
from softprompt.recipe import Recipe, checked, did_you_mean


@dataclass(frozen=True)
class TaskData:
    """The data of one task among several; each field means what it means in a recipe."""

    train: str
    eval: str | None = None
    template: str | None = None
    input_column: str | None = None
    target_column: str | None = None
    train_limit: int | None = None
    only: str | None = None


def task_data(recipe: Recipe) -> dict[str, TaskData]:
    """Every task of a recipe by its name, in the recipe's order. ``ConfigError`` for what a task cannot have."""
    return {name: _task_data(name, values) for name, values in recipe.tasks.items()}


def of_task(recipe: Recipe, name: str) -> Recipe:
    """The recipe of several tasks as it stands for one of them."""
    settings = {"tasks": {}, "teachers": None, "teacher": {}, **vars(task_data(recipe)[name])}
    return recipe.replace(**settings)


def _task_data(name: str, values: Any) -> TaskData:
    if not name or not name.isprintable() or "/" in name or name.startswith("."):
        raise ConfigError(f"tasks: the name {name!r} cannot name a folder; use letters, digits, '-' and '_'")
    if not isinstance(values, Mapping):
        raise ConfigError(f"tasks: {name} is {values!r}; it must be a mapping such as 'train: FILE'")
    hints = typing.get_type_hints(TaskData)
    for key in values:
        if key not in hints:
            raise ConfigError(f"tasks: {name} has an unknown setting {key!r}{did_you_mean(str(key), hints)}")
    if not values.get("train"):
        raise ConfigError(f"tasks: {name} names no training data; give it with `train: FILE`")
    return TaskData(**{key: checked(f"tasks: {name}: {key}", value, hints[key]) for key, value in values.items()})


def check_tasks(recipe: Recipe) -> None:
    """``ConfigError`` where the settings for several tasks contradict each other or the rest of the recipe."""
    task_data(recipe)
    if len(recipe.tasks) == 1:
        raise ConfigError(f"tasks holds only {next(iter(recipe.tasks))}; give at least two, or `train` for one task")
    for name in ("train", "eval", "template", "input_column", "target_column", "train_limit", "only", "source"):
        if recipe.tasks and getattr(recipe, name):
            raise ConfigError(f"both tasks and {name} are set; give {name} to each task, or train a single task")
    if recipe.tasks and recipe.task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise ConfigError(f"several tasks have no common classes; leave task: {recipe.task} out, write labels as words")
    if not recipe.tasks and (recipe.teachers or recipe.teacher):
        raise ConfigError("teachers are for several tasks; give `tasks`, or leave teachers and teacher out")
    if recipe.teachers and recipe.teacher:
        raise ConfigError(f"teachers are there already, in {recipe.teachers}; leave `teacher` out, or train new ones")
    if recipe.source and recipe.init not in (None, "random"):
        raise ConfigError(f"both source and init: {recipe.init} say where the prompt starts; give one of them")
    if recipe.source_task and not recipe.source:
        raise ConfigError(f"source_task is {recipe.source_task!r} but source is not set; give the folder to start from")


def teacher_recipe(recipe: Recipe, name: str, out: str) -> Recipe:
    """The ordinary run of one prompt that task ``name`` is taught by (2303.02861, section 3.2, step 1).

    It has the recipe's own settings where these are not the multitask method's own, and those of ``teacher``.
    """
    data = recipe.tasks[name]
    kept = ("model", "num_virtual_tokens", "batch_size", "eval_limit", "max_length", "eval_batch_size", "seed", "dtype")
    kept += ("device", "init", "init_text", "init_from", "init_candidates", "base_dropout", "group_by_length", "task")
    kept += ("max_new_tokens",)
    common = {key: getattr(recipe, key) for key in kept}
    settings = {"method": "prompt_tuning", "samples": 0, **common, **recipe.teacher, **data, "out": out}
    for either, other in (("steps", "epochs"), ("epochs", "steps")):
        if either not in recipe.teacher and other not in recipe.teacher:
            settings[either] = getattr(recipe, either)
    return Recipe.from_dict({key: value for key, value in settings.items() if value is not None}, where="teacher")
