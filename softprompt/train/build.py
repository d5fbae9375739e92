"""From a recipe to a model with a prompt on it that is ready to train."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt import initialize_from_text
from softprompt.config import PromptConfig
from softprompt.errors import ConfigError
from softprompt.methods import METHODS
from softprompt.model import SoftPromptModel, get_peft_model
from softprompt.recipe import Recipe, did_you_mean, options_for
from softprompt.train.run_data import starting_text, vocabulary_text

_RECIPE_SETS = ("num_virtual_tokens", "task_type", "peft_type", "inference_mode", "base_model_name_or_path")


def prompt_config(recipe: Recipe) -> PromptConfig:
    """The method's config. ``ConfigError`` for an unknown method or an option the method does not have."""
    if recipe.method not in METHODS:
        raise ConfigError(f"there is no method {recipe.method!r}{did_you_mean(recipe.method, METHODS)}")
    config_class = METHODS[recipe.method].config_class
    options = options_for(config_class, recipe.method_options, reserved=_RECIPE_SETS)
    assert recipe.num_virtual_tokens is not None
    return config_class(task_type=recipe.task, num_virtual_tokens=recipe.num_virtual_tokens, **options)


def build_prompt(
    recipe: Recipe,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    start: bool = True,
) -> SoftPromptModel:
    """``base`` frozen, with the recipe's prompt on it, started as ``init`` says.

    ``texts`` are training examples for ``init: examples``. ``start=False`` leaves out the start, for a run whose saved
    state is about to be loaded.
    """
    torch.manual_seed(recipe.seed)
    model = get_peft_model(base, prompt_config(recipe))
    text = _start_text(recipe, tokenizer, texts) if start else None
    if text is not None:
        initialize_from_text(model, tokenizer, text)
    return model


def _start_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> str | None:
    length = recipe.num_virtual_tokens
    assert length is not None
    if recipe.init == "text":
        return recipe.init_text
    if recipe.init == "examples":
        return starting_text(texts, tokenizer, length, recipe.seed)
    if recipe.init == "vocab":
        return vocabulary_text(tokenizer, length, recipe.seed)
    return None
