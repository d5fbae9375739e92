"""A saved prompt of a cloze task: its words, and what `generate` and `eval` do with it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.checkpoint import SavedAdapter
from softprompt.cloze import Cloze
from softprompt.cloze.verbalizer import Verbalizer
from softprompt.config import EmbeddingConfig
from softprompt.data.cloze import ClozeExample, cloze_example
from softprompt.data.rows import Row, read_rows
from softprompt.errors import CheckpointError, ConfigError
from softprompt.recipe import Recipe
from softprompt.template import Template
from softprompt.train.run_folder import VERBALIZER


def read_cloze(prompt: Path) -> dict[str, Any] | None:
    """What a run has written about its cloze task, or None for a prompt of another task. CheckpointError: damaged."""
    place = prompt / VERBALIZER
    if not place.is_file():
        return None
    try:
        value = json.loads(place.read_text(encoding="utf-8"))
        Verbalizer.from_dict(value)
        Template(str(value["template"]))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{place} cannot be read ({error}); copy it again from the run's folder") from None
    return value


def open_cloze(
    saved: Mapping[str, Any], base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str | None = None
) -> Cloze:
    """The cloze task of a saved prompt on its base model, in its own template or another one."""
    words = Verbalizer.from_dict(saved)
    used = Template(template or str(saved["template"]))
    return Cloze(base, tokenizer, used, words, str(saved["word_score"]), str(saved["answer_loss"]))


def template_text(saved: SavedAdapter, recipe: Recipe | None, template: str | None) -> str | None:
    """The template a prompt is used in: the flag's, else its own, else its run's.

    ConfigError for one with other virtual tokens than the prompt has inside its template.
    """
    own = saved.config.template if isinstance(saved.config, EmbeddingConfig) else None
    if template is None:
        return own or (recipe.template if recipe else None)
    slots = Template(template).num_virtual_tokens
    wanted = saved.config.num_virtual_tokens if own else 0
    if slots != wanted:
        inside = f"{wanted} virtual tokens inside its template {own!r}" if own else "no virtual tokens inside its text"
        raise ConfigError(f"the template {template!r} has {slots} virtual tokens, but this prompt has {inside}")
    return template


def cloze_inputs(cloze: Cloze, text: str | None, file: str | None) -> list[ClozeExample]:
    """One input (the template's only field, or a JSON object of all), or the rows of a file."""
    if text is not None:
        return [cloze_example(Row("the input", fields_of(text, cloze.template, cloze.template.fields)), cloze.template)]
    rows = read_rows(str(file))
    if Path(str(file)).suffix.lower() == ".txt":
        rows = [Row(row.where, fields_of(row.values["text"], cloze.template, cloze.template.fields)) for row in rows]
    return [cloze_example(row, cloze.template) for row in rows]


RAW = "; --raw takes the text as it is"


def fields_of(
    text: str, template: Template, fields: Sequence[str], where: str = "the input", remedy: str = RAW
) -> dict[str, Any]:
    """The values of the fields: the text itself where there is one, else those of a JSON object. ConfigError."""
    names = list(dict.fromkeys(fields))
    if len(names) == 1:
        return {names[0]: text}
    try:
        values = json.loads(text) if names else {}
    except (ValueError, RecursionError):  # of numbers and lists that are too long too
        values = None
    if not isinstance(values, dict):
        example = ", ".join(f'"{name}": "…"' for name in names)
        raise ConfigError(
            f"the template {template.text!r} has {len(names)} input fields, so {where} must be a JSON "
            f"object: {{{example}}}{remedy}"
        )
    return values
