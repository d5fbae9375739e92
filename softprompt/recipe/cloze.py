"""What a template, a verbalizer and a tuned base model mean for a recipe: checks, and the settings that follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprompt.errors import ConfigError
from softprompt.recipe import Recipe


def check_cloze(recipe: Recipe) -> None:
    """``ConfigError`` unless a cloze task has a template and words to choose from, and no other task has words."""
    if recipe.task == "SEQ_CLS" and recipe.template:
        raise ConfigError("task SEQ_CLS reads one text column and takes no template; set input_column, or task: CLOZE")
    if recipe.only and recipe.tasks:
        raise ConfigError("only is for one task; give every task a file of its own rows")
    if recipe.task != "CLOZE":
        for name in ("verbalizer", "candidates", "word_score", "answer_loss"):
            if getattr(recipe, name):
                raise ConfigError(f"{name} is set but task is {recipe.task!r}; set task: CLOZE, or drop {name}")
        return
    if recipe.tasks or recipe.source:
        raise ConfigError("several tasks are for task: CAUSAL_LM; train one cloze task at a time")
    if not recipe.template:
        raise ConfigError('task CLOZE needs a template, such as "{premise} Question: {hypothesis} ? Answer: [MASK]"')
    if bool(recipe.verbalizer) == bool(recipe.candidates):
        found = "both are set" if recipe.verbalizer else "neither is set"
        raise ConfigError(f"task CLOZE needs a verbalizer (words for labels) or candidates (words alone); {found}")


def check_base_rate(recipe: Recipe) -> None:
    """``ConfigError`` where a base model that is tuned too does not go with the rest."""
    if recipe.base_learning_rate is None:
        return
    if recipe.task == "SEQ_CLS" or recipe.tasks or recipe.source:
        raise ConfigError("base_learning_rate is for one task, and not with a classifier (SEQ_CLS); leave it out")
    if recipe.optimizer == "muon":
        raise ConfigError("base_learning_rate is set but optimizer is 'muon', which is for prompts; use adamw")
    if recipe.dtype != "float32":
        raise ConfigError(
            f"dtype is {recipe.dtype}, but base_learning_rate tunes the base model, whose small steps are lost in it; "
            "use dtype: float32"
        )


def plain_labels(verbalizer: Mapping[Any, Any]) -> dict[str, Any]:
    """Labels as text, each with its word or list of words: YAML reads the label true as a truth value."""
    from softprompt.cloze.verbalizer import Verbalizer

    words = Verbalizer.parse(verbalizer).words
    return {label: each[0] if len(each) == 1 else list(each) for label, each in words.items()}


def template_settings(recipe: Recipe) -> dict[str, Any]:
    """What an unfilled recipe leaves to its template and its words: how to score them, the number of virtual tokens.

    Of the losses, as the authors of P-tuning train: cloze tasks on the labels, LAMA on the whole vocabulary.
    ``ConfigError`` for a malformed template, or another number of virtual tokens than it has slots.
    """
    settings: dict[str, Any] = {}
    if recipe.task == "CLOZE":
        settings["word_score"] = recipe.word_score or "sum"
        settings["answer_loss"] = recipe.answer_loss or ("labels" if recipe.verbalizer else "vocabulary")
    if recipe.base_learning_rate is not None and recipe.optimizer is None:
        settings["optimizer"] = "adamw"
    slots = slots_of(recipe)
    if slots and recipe.num_virtual_tokens not in (None, slots):
        raise ConfigError(
            f"num_virtual_tokens is {recipe.num_virtual_tokens}, but the template {recipe.template!r} has {slots} "
            "virtual tokens; leave num_virtual_tokens out"
        )
    return settings | ({"num_virtual_tokens": slots} if slots else {})


def slots_of(recipe: Recipe) -> int:
    """How many virtual tokens stand inside the recipe's template."""
    if not recipe.template:
        return 0
    from softprompt.template import Template

    return Template(recipe.template).num_virtual_tokens
