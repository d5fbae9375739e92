"""The data of a run that streams: the training rows as they come, their first ones to start from, the held-out ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.data import Example, encode_labels, expand, load_examples, load_labelled
from softprompt.data.examples import example_reader, label_names_of, label_reader
from softprompt.data.rows import Row
from softprompt.data.shards import Pass, Shards, open_shards
from softprompt.errors import DataError
from softprompt.recipe import Recipe
from softprompt.train.run_data import LabelSource, RunData, Source, TextSource, as_text, encode_texts, row_length
from softprompt.train.stream import Stream, no_rows

FIRST = 1_000  # rows that are read beforehand and kept: prompts start from them, and the run is known by them


@final
@dataclass
class StreamSource(Source):
    """Shards, how their rows become examples, and what is read beforehand: held-out data and the `FIRST` rows."""

    shards: Shards
    read: Callable[[Row], list[Any]]
    beforehand: TextSource | LabelSource
    identity: str

    @classmethod
    def open(cls, recipe: Recipe) -> StreamSource:
        """Open the training data of a recipe and read what has to be known before training."""
        shards = open_shards(recipe.train)
        rows = list(islice(_pass(shards, recipe), FIRST))
        if not rows:
            raise DataError(no_rows(shards, recipe.only))
        known_by = repr((shards.identity(), [row.values for row in rows]))
        identity = hashlib.sha256(known_by.encode("utf-8", "backslashreplace"))
        read, beforehand = _labels(recipe, shards, rows) if recipe.task == "SEQ_CLS" else _texts(recipe, rows)
        found = cls(shards, read, beforehand, identity.hexdigest())
        found.label_names = beforehand.label_names
        return found

    def texts(self) -> list[str]:
        return self.beforehand.texts()

    def examples(self) -> list[Example]:
        return self.beforehand.examples()

    def encode(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int, base: PreTrainedModel
    ) -> RunData:
        """The first rows are encoded at once: a prompt may start from them, and one that does not fit is told early."""
        data = self.beforehand.encode(recipe, tokenizer, context, base)
        if isinstance(self.beforehand, LabelSource):
            encode = partial(encode_labels, tokenizer=tokenizer, max_length=row_length(recipe, context))
        else:
            encode = partial(encode_texts, recipe=recipe, tokenizer=tokenizer, context=context, base=base)
        return replace(data, stream=Stream(self.shards, self.read, encode, _length, recipe.only, self.identity))


def _pass(shards: Shards, recipe: Recipe) -> Pass:
    return Pass(shards, range(len(shards.sizes)), only=recipe.only)


def _texts(recipe: Recipe, rows: list[Row]) -> tuple[Callable[[Row], list[Any]], TextSource]:
    columns = (recipe.template, recipe.input_column, recipe.target_column)
    one = example_reader(rows[0], *columns)

    def read(row: Row) -> list[Any]:
        return expand([one(row)])

    held_out = load_examples(recipe.eval, *columns, split="validation", only=recipe.only) if recipe.eval else []
    return read, TextSource([example for row in rows for example in read(row)], held_out)


def _labels(recipe: Recipe, shards: Shards, rows: list[Row]) -> tuple[Callable[[Row], list[Any]], LabelSource]:
    """The classes are those of the first window, which is read for that; any other is an error when it comes."""
    columns, count = (recipe.input_column, recipe.target_column), max(FIRST, recipe.shuffle_window)
    names = label_names_of(islice(_pass(shards, recipe), count), recipe.target_column)
    seen = f"the classes of a stream are those of its first {count} rows"
    remedy = "mix the rows of the data, or give a greater shuffle_window"
    if len(names) == 1:
        raise DataError(f"{shards.name}: {seen}, which are all labelled {names[0]!r}; {remedy}")
    one = label_reader(rows[0], names, *columns, remedy=f": {seen}; {remedy}")
    if not recipe.eval:
        return _alone(one), LabelSource([one(row) for row in rows], [], names)
    held_out, _ = load_labelled(recipe.eval, *columns, split="validation", label_names=names, only=recipe.only)
    return _alone(one), LabelSource([one(row) for row in rows], held_out, names)


def _alone(read: Callable[[Row], Any]) -> Callable[[Row], list[Any]]:
    """A row is one example."""
    return lambda row: [read(row)]


def _length(example: Any) -> int:
    """Characters, since tokens are not known before a row is used."""
    return len(as_text(example)) if isinstance(example, Example) else len(example.text)
