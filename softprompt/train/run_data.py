"""The data of a run, encoded once: training and held-out rows, what the report shows, and where a prompt may start."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.cloze import Cloze, EncodedCloze
from softprompt.data import (
    Encoded,
    EncodedLabel,
    Example,
    LabelledExample,
    encode_all,
    encode_labels,
    encode_pairs,
    expand,
    load_examples,
    load_labelled,
)
from softprompt.data.cloze import ClozeExample
from softprompt.errors import ConfigError
from softprompt.facts import Facts
from softprompt.recipe import Recipe
from softprompt.recipe.cloze import slots_of
from softprompt.start import drawn, examples_text
from softprompt.train.batches import spread
from softprompt.train.stream import Stream

EVAL_PAIRS = 400  # held-out pairs scored during training unless the recipe says otherwise; `softprompt eval` takes all

T = TypeVar("T")


@dataclass(frozen=True)
class RunData:
    """``shown`` are held-out examples (training ones if there are no others) for the report's samples.

    ``task_names`` is set where there are several tasks; then every row says which it belongs to. Where ``stream`` is
    set, the training rows come from there, and ``train`` has only its first ones.
    """

    train: Sequence[Encoded] | Sequence[EncodedLabel] | Sequence[EncodedCloze]
    held_out: Sequence[Encoded] | Sequence[EncodedLabel] | Sequence[EncodedCloze]
    shown: Sequence[Example] | Sequence[LabelledExample] | Sequence[ClozeExample]
    label_names: list[str] | None = None
    task_names: list[str] | None = None
    cloze: Cloze | None = None
    stream: Stream | None = None

    @property
    def train_examples(self) -> int | None:
        """How many training rows there are; nobody knows that of a stream."""
        return len(self.train) if self.stream is None else None

    @property
    def cut(self) -> int:
        """How many training rows were too long and have been cut."""
        return sum(row.row.cut > 0 for row in self.train if isinstance(row, EncodedCloze))

    @property
    def lengths(self) -> list[int]:
        return [len(row.input_ids) for row in self.train]

    def fingerprint(self) -> str:
        """Changes when any training or held-out token does; a resumed run checks it."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(b"part")
            for row in part:
                labels = row.labels if isinstance(row, Encoded) else [row.label]
                task = (row.task,) if isinstance(row, Encoded) and row.task is not None else ()
                digest.update(repr((row.input_ids, labels, *task)).encode())
        if self.stream is not None:
            digest.update(self.stream.identity.encode())
        return digest.hexdigest()


class Source(ABC):
    """Training and held-out examples as read, before any tokenizer."""

    label_names: list[str] | None = None

    @abstractmethod
    def texts(self) -> list[str]:
        """The training examples as plain text, to start a prompt from."""

    def examples(self) -> list[Example]:
        """The training examples as inputs with targets, where they are that."""
        return []

    @abstractmethod
    def encode(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int, base: PreTrainedModel
    ) -> RunData:
        """Tokenise once. ``context`` is the length of ``base`` in tokens; the prompt takes its share of it."""


@final
@dataclass
class TextSource(Source):
    """Inputs with targets to write: one training example per reference, held-out examples with all of theirs."""

    train: list[Example]
    held_out: list[Example]

    @classmethod
    def read(cls, recipe: Recipe) -> TextSource:
        columns = (recipe.template, recipe.input_column, recipe.target_column)
        train = expand(load_examples(recipe.train, *columns, limit=recipe.train_limit, only=recipe.only))
        if not recipe.eval:
            return cls(train, [])
        return cls(train, load_examples(recipe.eval, *columns, split="validation", only=recipe.only))

    def texts(self) -> list[str]:
        return [as_text(example) for example in self.train]

    def examples(self) -> list[Example]:
        return self.train

    def encode(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int, base: PreTrainedModel
    ) -> RunData:
        pairs = _spread(expand(self.held_out), recipe.eval_limit or EVAL_PAIRS)
        shown = _spread(self.held_out or self.train, recipe.samples)
        rows = [encode_texts(part, recipe, tokenizer, context, base) for part in (self.train, pairs)]
        return RunData(rows[0], rows[1], shown)


def encode_texts(
    examples: Sequence[Example],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    base: PreTrainedModel,
) -> list[Encoded]:
    """Rows with targets to write, as this kind of model takes them; ConfigError where the recipe means another kind."""
    pairs, task = bool(base.config.is_encoder_decoder), recipe.task
    if pairs != (task == "SEQ_2_SEQ_LM"):
        kind, right = ("an encoder-decoder", "SEQ_2_SEQ_LM") if pairs else ("no encoder-decoder", "CAUSAL_LM")
        raise ConfigError(f"task is {task}, but {recipe.model} is {kind}; use task: {right}")
    length = row_length(recipe, context)
    return encode_pairs(examples, tokenizer, length, context) if pairs else encode_all(examples, tokenizer, length)


@final
@dataclass
class LabelSource(Source):
    """Texts with classes to choose; the held-out classes are numbered as the training ones."""

    train: list[LabelledExample]
    held_out: list[LabelledExample]
    label_names: list[str] | None

    @classmethod
    def read(cls, recipe: Recipe) -> LabelSource:
        columns = (recipe.input_column, recipe.target_column)
        train, names = load_labelled(recipe.train, *columns, limit=recipe.train_limit, only=recipe.only)
        held_out: list[LabelledExample] = []
        if recipe.eval:
            held_out, _ = load_labelled(recipe.eval, *columns, split="validation", label_names=names, only=recipe.only)
        return cls(train, held_out, names)

    def texts(self) -> list[str]:
        return [example.text for example in self.train]

    def encode(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int, base: PreTrainedModel
    ) -> RunData:
        length = row_length(recipe, context)
        held_out = _spread(self.held_out, recipe.eval_limit or len(self.held_out))
        shown = _spread(self.held_out or self.train, recipe.samples)
        train, scored = (encode_labels(part, tokenizer, length) for part in (self.train, held_out))
        return RunData(train, scored, shown, self.label_names)


def read_source(recipe: Recipe) -> Source:
    """Read the files of a recipe, in the form that its task needs."""
    if recipe.streaming:
        from softprompt.train.stream_data import StreamSource  # here because that module builds on this one

        return StreamSource.open(recipe)
    if recipe.tasks:
        from softprompt.train.multitask_data import TaskSource  # likewise

        return TaskSource.read(recipe)
    if recipe.task == "CLOZE":
        from softprompt.train.cloze_data import ClozeSource  # likewise

        return ClozeSource.read(recipe)
    return LabelSource.read(recipe) if recipe.task == "SEQ_CLS" else TextSource.read(recipe)


def context_length(facts: Facts, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest sequence, in tokens, that both the model and its tokenizer were made for."""
    model = facts.context - facts.position_offset if facts.context else 10**6
    return min(model, tokenizer.model_max_length)


def starting_text(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> str:
    """Training examples, one per line in an order drawn from ``seed``, as many as fill ``tokens`` tokens."""
    return examples_text([texts[number] for number in drawn(len(texts), seed)], tokenizer, tokens)


def as_text(example: Example) -> str:
    if example.messages:
        return "\n".join(turn["content"] for turn in example.messages)
    return example.input + example.border + example.targets[0]


def row_length(recipe: Recipe, context: int) -> int:
    """How many tokens a row may have: real ones, and the virtual ones that stand inside it."""
    room = context if slots_of(recipe) else context - (recipe.num_virtual_tokens or 0)
    return min(recipe.max_length or room, room)


def _spread(items: Sequence[T], limit: int) -> list[T]:
    return [items[number] for number in spread(len(items), limit)]
