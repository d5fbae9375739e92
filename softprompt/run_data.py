"""The data of a run, encoded once: training and held-out rows, what the report shows, and where a prompt may start."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from softprompt.batches import spread
from softprompt.data import (
    Encoded,
    EncodedLabel,
    Example,
    LabelledExample,
    encode_all,
    encode_labels,
    expand,
    load_examples,
    load_labelled,
)
from softprompt.prompt import Geometry
from softprompt.recipe import Recipe

EVAL_PAIRS = 400  # held-out pairs scored during training unless the recipe says otherwise; `softprompt eval` takes all


@dataclass(frozen=True)
class RunData:
    """``shown`` are held-out examples (training ones if there are no others) for the report's samples."""

    train: Sequence[Encoded] | Sequence[EncodedLabel]
    held_out: Sequence[Encoded] | Sequence[EncodedLabel]
    shown: Sequence[Example] | Sequence[LabelledExample]
    label_names: list[str] | None

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
                digest.update(repr((row.input_ids, labels)).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """Training and held-out examples as read, before any tokenizer."""

    train: list[Example] | list[LabelledExample]
    held_out: list[Example] | list[LabelledExample]
    label_names: list[str] | None = None

    def texts(self) -> list[str]:
        """The training examples as plain text, input and target."""
        return [example.text if isinstance(example, LabelledExample) else _whole(example) for example in self.train]


def read_source(recipe: Recipe) -> Source:
    """Read the files of a recipe. Held-out references are all kept; training examples are one per reference."""
    if recipe.task == "SEQ_CLS":
        return _read_labelled(recipe)
    options = {"template": recipe.template, "input_column": recipe.input_column, "target_column": recipe.target_column}
    train = expand(load_examples(recipe.train, **options, limit=recipe.train_limit))
    held_out = load_examples(recipe.eval, **options, split="validation") if recipe.eval else []
    return Source(train, held_out)


def _read_labelled(recipe: Recipe) -> Source:
    columns = {"text_column": recipe.input_column, "label_column": recipe.target_column}
    train, names = load_labelled(recipe.train, **columns, limit=recipe.train_limit)
    if not recipe.eval:
        return Source(train, [], names)
    held_out, _ = load_labelled(recipe.eval, **columns, split="validation", label_names=names)
    return Source(train, held_out, names)


def encode_source(recipe: Recipe, source: Source, tokenizer: PreTrainedTokenizerBase, context: int) -> RunData:
    """Tokenise once. ``context`` is the model's length in tokens; the prompt takes its share of it."""
    room = recipe.num_virtual_tokens or 0
    length = min(recipe.max_length or context - room, context - room)
    limit = recipe.eval_limit or EVAL_PAIRS
    shown = source.held_out or source.train
    shown = [shown[number] for number in spread(len(shown), recipe.samples)]  # type: ignore[assignment]
    if recipe.task == "SEQ_CLS":
        train = encode_labels(source.train, tokenizer, length)  # type: ignore[arg-type]
        held_out = [source.held_out[number] for number in spread(len(source.held_out), recipe.eval_limit or 10**9)]
        return RunData(train, encode_labels(held_out, tokenizer, length), shown, source.label_names)
    train = encode_all(source.train, tokenizer, length)  # type: ignore[arg-type]
    pairs = expand(source.held_out)  # type: ignore[arg-type]
    held_out = encode_all([pairs[number] for number in spread(len(pairs), limit)], tokenizer, length)
    return RunData(train, held_out, shown, None)


def _whole(example: Example) -> str:
    return example.input + example.border + example.targets[0]


def starting_text(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> str:
    """Training examples, one per line in an order drawn from ``seed``, as many as fill ``tokens`` tokens."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    text, used = "", 0
    while used == 0 or len(tokenizer(text, verbose=False)["input_ids"]) <= tokens:  # type: ignore[arg-type]
        text += texts[order[used % len(order)]] + "\n"
        used += 1
    return text


def vocabulary_text(tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> str:
    """Random words of the vocabulary, at least ``tokens`` tokens of them."""
    special = set(tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(seed)
    words: list[int] = []
    while True:
        drawn = torch.randint(len(tokenizer), (2 * tokens,), generator=generator).tolist()
        words += [number for number in drawn if number not in special]
        text = str(tokenizer.decode(words))
        if len(tokenizer(text, verbose=False)["input_ids"]) > tokens:  # type: ignore[arg-type]
            return text


def context_length(geometry: Geometry, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest sequence, in tokens, that both the model and its tokenizer were made for."""
    model = geometry.context - geometry.position_offset if geometry.context else 10**6
    return min(model, tokenizer.model_max_length)
