"""Where a run's prompt starts: the best of several draws of training examples by the loss before training.

What is compared (`init_candidates: N`): N draws, random words, and the prompt as its method draws it, each by the loss
of the frozen model with that start on a few batches of training examples. Those rows are in no candidate, because a
prompt that holds a row predicts it. Cost: N + 2 forward passes over `SCORED` batches, as much as 2·(N + 2) steps or so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from softprompt.config import PromptConfig
from softprompt.data import Example, encode_all
from softprompt.errors import ConfigError
from softprompt.initialize import initialize_from_text
from softprompt.model import SoftPromptModel
from softprompt.recipe import Recipe
from softprompt.start import Started, best_of, drawn, examples_text, starts_of, virtual_tokens, vocabulary_text
from softprompt.train.objective import Objective, quietly
from softprompt.train.run_data import RunData, Source
from softprompt.train.run_folder import RunFolder

START = "start.json"
SCORED = 4  # batches of training examples that starts are compared on
SOME = 64  # training examples that a method may look at before it starts
MISFIT = 0.01  # what is worth a word


def scored_examples(recipe: Recipe, count: int) -> list[int]:
    """The numbers of the training examples that starts are compared on: none where there is no choice."""
    if (recipe.init_candidates or 1) == 1:
        return []
    assert recipe.batch_size is not None  # the recipe is resolved
    return drawn(count, recipe.seed, draw=-1)[: max(1, min(SCORED * recipe.batch_size, count // 2))]


def example_order(recipe: Recipe, count: int, draw: int = 0) -> list[int]:
    """The numbers of the training examples in the order of one draw, without those that starts are compared on."""
    aside = set(scored_examples(recipe, count)) if count > 1 else set()
    return [number for number in drawn(count, recipe.seed, draw) if number not in aside]


def start_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], draw: int = 0) -> str | None:
    """The text that the recipe's prompt starts from, or None where it starts from none."""
    length = recipe.num_virtual_tokens
    assert length is not None
    if recipe.init == "text":
        return recipe.init_text
    if recipe.init == "examples":
        chosen = [texts[number] for number in example_order(recipe, len(texts), draw)]
        return examples_text(chosen, tokenizer, length, recipe.init_text)
    return vocabulary_text(tokenizer, length, recipe.seed) if recipe.init == "vocab" else None


def with_context(
    config: PromptConfig,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    draw: int = 0,
) -> PromptConfig:
    """The config with what its method takes from training examples; the config itself for most methods."""
    if recipe.init != "examples" or recipe.task != "CAUSAL_LM":
        return config
    chosen = [examples[number] for number in example_order(recipe, len(examples), draw)[:SOME]]
    rows = [(row.input_ids, row.labels) for row in encode_all(chosen, tokenizer, max_length=10**6) if row.slots is None]
    words: Any = tokenizer(f"{recipe.init_text}\n")["input_ids"] if recipe.init_text else []
    return config.with_examples(rows, words)


def kept_draw(folder: RunFolder, state: Mapping[str, Any] | None) -> int:
    """The draw that a run to be resumed has chosen, 0 where it had no choice or has nothing to go on from."""
    if state is None or not (folder.path / START).is_file():
        return 0
    return int(folder.read_json(START)["draw"])


def choose_start(
    recipe: Recipe,
    model: SoftPromptModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    data: RunData,
    objective: Objective,
    console: Console,
) -> dict[str, Any] | None:
    """Leave the prompt at the best of its candidates; what `start.json` holds, or None where there is no choice."""
    from softprompt.train.build import prompt_config  # here because that module builds on this one

    draws = recipe.init_candidates or 1
    if draws == 1:
        return None
    rows = [data.train[number] for number in scored_examples(recipe, len(data.train))]

    def loss() -> float:
        with quietly(model):
            return objective.evaluate(model, rows, recipe.eval_batch_size)["loss"]

    plain, examples = prompt_config(recipe), source.examples()
    if plain.started:
        raise ConfigError(f"init_candidates={draws}, but method_options give the prompt its context; give one of them")
    contexts = [with_context(plain, recipe, tokenizer, examples, draw) for draw in range(draws)]
    if contexts[0] is not plain:
        started = _best_context(model, contexts, loss)
    else:
        texts = [start_text(recipe, tokenizer, source.texts(), draw) or "" for draw in range(draws)]
        words = vocabulary_text(tokenizer, virtual_tokens(model.encoder()), recipe.seed)
        begin = partial(initialize_from_text, model, tokenizer)
        started = best_of(model.encoder(), starts_of(texts, words, begin), loss)
    tell(started, console)
    place = list(started.losses).index(started.start)
    return {"start": started.start, "draw": place if place < draws else 0, "losses": dict(started.losses)}


def _best_context(model: SoftPromptModel, contexts: Sequence[PromptConfig], loss: Callable[[], float]) -> Started:
    """Leave the model with the best of several prompts that their configs start, the first of equals."""
    losses: dict[str, float] = {}
    for number, context in enumerate(contexts):
        _replace_prompt(model, context)
        losses[f"examples, draw {number}"] = loss()
    best = min(losses, key=lambda name: losses[name])
    _replace_prompt(model, contexts[list(losses).index(best)])
    return Started(best, losses)


def _replace_prompt(model: SoftPromptModel, config: PromptConfig) -> None:
    """Another prompt under the name of the active one."""
    name, other = model.active_adapter, "another"
    model.add_adapter(other, config)
    model.set_adapter(other)
    model.delete_adapter(name)
    model.add_adapter(name, config)
    model.set_adapter(name)
    model.delete_adapter(other)


def tell(started: Started, console: Console) -> None:
    """What was compared, and whether the prompt could be started so."""
    if started.losses:
        losses = ", ".join(f"{name} {value:.3f}" for name, value in started.losses.items())
        console.print(f"start: {started.start}, the best by loss on training rows ({losses})", highlight=False)
    if started.misfit > MISFIT:
        console.print(
            f"the prompt's encoder comes within {started.misfit:.0%} of its start; a wider encoder_hidden_size fits it",
            highlight=False,
        )
