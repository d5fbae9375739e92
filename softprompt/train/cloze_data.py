"""A cloze task in a run: its rows in their template, and the words that stand for their labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.cloze import Cloze
from softprompt.cloze.verbalizer import Verbalizer
from softprompt.data.cloze import ClozeExample, as_text, candidates_of, load_cloze
from softprompt.errors import DataError
from softprompt.recipe import Recipe
from softprompt.template import Template
from softprompt.train.batches import spread
from softprompt.train.run_data import RunData, Source, row_length


@final
@dataclass
class ClozeSource(Source):
    """Rows whose label is chosen by its word in a template."""

    train: list[ClozeExample]
    held_out: list[ClozeExample]
    template: Template
    verbalizer: Verbalizer

    @classmethod
    def read(cls, recipe: Recipe) -> ClozeSource:
        template = Template(recipe.template or "")
        verbalizer = Verbalizer.parse(recipe.verbalizer) if recipe.verbalizer else None
        columns = (template, recipe.target_column)
        train = load_cloze(recipe.train, *columns, limit=recipe.train_limit, only=recipe.only)
        held_out = load_cloze(recipe.eval, *columns, split="validation", only=recipe.only) if recipe.eval else []
        if verbalizer is None:
            assert recipe.candidates is not None
            verbalizer = candidates_of(recipe.candidates, train, held_out)
        for example in train:
            if verbalizer.index(example.label, example.where) < 0:
                raise DataError(
                    f"{example.where}: {example.label!r} is not among the candidates; add it or drop the row"
                )
        return cls(train, held_out, template, verbalizer)

    def texts(self) -> list[str]:
        words = self.verbalizer.words
        return [as_text(example, self.template, words[example.label][0]) for example in self.train]

    def encode(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int, base: PreTrainedModel
    ) -> RunData:
        assert recipe.word_score is not None and recipe.answer_loss is not None  # the recipe is resolved
        cloze = Cloze(base, tokenizer, self.template, self.verbalizer, recipe.word_score, recipe.answer_loss)
        length = row_length(recipe, context)
        rows = self.held_out
        held_out = [rows[place] for place in spread(len(rows), recipe.eval_limit or max(1, len(rows)))]
        pool = self.held_out or self.train
        shown = [pool[place] for place in spread(len(pool), recipe.samples)]
        return RunData(cloze.encode(self.train, length), cloze.encode(held_out, length), shown, cloze=cloze)
