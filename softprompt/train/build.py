"""From a recipe to a model with a prompt on it that is ready to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt import initialize_from_prompt, initialize_from_text
from softprompt.checkpoint import load_config
from softprompt.cloze import answer_of
from softprompt.config import EmbeddingConfig, PromptConfig
from softprompt.data import Example
from softprompt.errors import ConfigError
from softprompt.methods import METHODS, MultitaskPromptTuningConfig
from softprompt.model import SoftPromptModel, get_peft_model
from softprompt.prompt import SoftPrompt
from softprompt.recipe import Recipe, did_you_mean, options_for
from softprompt.recipe.cloze import slots_of
from softprompt.recipe.defaults import AUTO
from softprompt.template import Answer
from softprompt.train.start import start_text, with_context

_RECIPE_SETS = ("num_virtual_tokens", "task_type", "peft_type", "inference_mode", "base_model_name_or_path", "template")

_TASK_OF_ANSWER = {
    Answer.NEXT: "CAUSAL_LM",
    Answer.SENTINEL: "SEQ_2_SEQ_LM",
    Answer.MASK: None,
}  # PEFT has no masked LM


def prompt_config(recipe: Recipe) -> PromptConfig:
    """The method's config. ``ConfigError`` for an unknown method or an option the method does not have."""
    if recipe.method not in METHODS:
        raise ConfigError(f"there is no method {recipe.method!r}{did_you_mean(recipe.method, METHODS)}")
    config_class = METHODS[recipe.method].config_class
    options = options_for(config_class, recipe.method_options, reserved=_RECIPE_SETS)
    assert recipe.num_virtual_tokens is not None
    options |= _task_options(recipe, METHODS[recipe.method]) | _template_options(recipe, config_class)
    task = None if recipe.task == "CLOZE" else recipe.task
    return config_class(task_type=task, num_virtual_tokens=recipe.num_virtual_tokens, **options)


def _task_options(recipe: Recipe, method: type[SoftPrompt]) -> dict[str, Any]:
    """What several tasks, or a start from a prompt of several, say about the config."""
    if (recipe.tasks or recipe.source) and not method.task_parameters:
        fitting = ", ".join(name for name, each in METHODS.items() if each.task_parameters)
        raise ConfigError(f"{method.name} serves one task alone; for tasks or a source use method: {fitting}")
    if recipe.tasks:
        return {"num_tasks": len(recipe.tasks), "task_names": list(recipe.tasks)}
    if recipe.source is None:
        return {}
    chosen = {"prompt_tuning_init": "AVERAGE_SOURCE_TASKS", "prompt_tuning_init_state_dict_path": recipe.source}
    if recipe.source_task is not None:
        number = source_config(recipe.source).task_number(recipe.source_task)
        chosen |= {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_task": number}
    return chosen


def _template_options(recipe: Recipe, config_class: type[PromptConfig]) -> dict[str, Any]:
    """Where the virtual tokens stand inside the template. ``ConfigError`` for a prompt that has no place there."""
    if not slots_of(recipe):
        return {}
    if not issubclass(config_class, EmbeddingConfig):
        fitting = ", ".join(name for name, each in METHODS.items() if issubclass(each.config_class, EmbeddingConfig))
        raise ConfigError(
            f"the template {recipe.template!r} has virtual tokens inside it, but a {recipe.method} prompt has no "
            f"place in the text; use method: {fitting}"
        )
    return {"placement": "template", "template": recipe.template}


def with_source(recipe: Recipe) -> Recipe:
    """The recipe with the method and sizes of the prompt it starts from, where it starts from one and does not say."""
    if recipe.init_from is not None and (recipe.num_virtual_tokens is None or recipe.method == AUTO):
        there = load_config(recipe.init_from)
        method = recipe.method if recipe.method != AUTO else method_name(there)
        recipe = recipe.replace(method=method, num_virtual_tokens=recipe.num_virtual_tokens or there.num_virtual_tokens)
    if recipe.source is None:
        return recipe
    config, options = source_config(recipe.source), recipe.method_options
    tokens = recipe.num_virtual_tokens or config.num_virtual_tokens
    return recipe.replace(num_virtual_tokens=tokens, method_options={"num_ranks": config.num_ranks, **options})


def method_name(config: PromptConfig) -> str:
    """The name of the method that a config is of."""
    return next(name for name, method in METHODS.items() if method.peft_type == config.peft_type)


def source_config(source: str) -> MultitaskPromptTuningConfig:
    """The config of a prompt of several tasks in a folder. ``ConfigError`` if it is another prompt."""
    config = load_config(source)
    if not isinstance(config, MultitaskPromptTuningConfig):
        raise ConfigError(f"source {source} is a {config.peft_type} prompt of one task; give one of several tasks")
    return config


def build_prompt(
    recipe: Recipe,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    start: bool = True,
    examples: Sequence[Example] = (),
    draw: int = 0,
) -> SoftPromptModel:
    """``base`` frozen, with the recipe's prompt on it, started as ``init`` says.

    ``texts`` are training examples for ``init: examples``, and ``examples`` the same with their answers marked, for
    methods that need to know; ``draw`` is the order in which they are taken. ``start=False`` leaves out the start, for
    a run whose saved state is about to be loaded; so does ``init_candidates``, for `choose_start`.
    """
    torch.manual_seed(recipe.seed)
    config = prompt_config(recipe)
    if recipe.task == "CLOZE":
        config = replace(config, task_type=_TASK_OF_ANSWER[answer_of(base)])
    started = with_context(config, recipe, tokenizer, examples, draw)
    model = get_peft_model(base, started)
    if not start or config.started or started is not config or (recipe.init_candidates or 1) > 1:
        return model
    text = start_text(recipe, tokenizer, texts, draw)
    if text is not None:
        initialize_from_text(model, tokenizer, text)
    if recipe.init == "prompt":
        initialize_from_prompt(model, str(recipe.init_from))
    return model
