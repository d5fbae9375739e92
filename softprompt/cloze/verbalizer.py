"""Verbalizers: which words stand for which label, and how the scores of words become the scores of labels.

A label has one or several words, a word one or several tokens. A word's score is the log-probability of its tokens,
their sum (the probability of the whole word) or their mean; a label's is the logarithm of the mean probability of its
words, so that a label with more words has no advantage. Sources: Schick and Schütze 2021, 2009.07118, section 3 (PET
with multiple masks); Liu et al. 2021, 2103.10385, section 4 (P-tuning's cloze tasks, one word per label).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from softprompt.errors import ConfigError, DataError
from softprompt.template.encode import adds_space, text_ids


@final
@dataclass(frozen=True)
class Verbalizer:
    """Labels with their words, in the order of the classes.

    `closed`: every row's label is one of them. Otherwise the labels are candidates, and a row whose answer is none of
    them is simply one that the model cannot get right.
    """

    words: Mapping[str, tuple[str, ...]]
    closed: bool = True

    def __post_init__(self) -> None:
        if len(self.words) < 2:
            found = ", ".join(self.words) or "none"
            raise ConfigError(f"a verbalizer needs at least two labels to choose from; it has {found}")
        for label, words in self.words.items():
            if not words or not all(word.strip() for word in words):
                raise ConfigError(f"the verbalizer has no word for the label {label!r}; give it at least one")
            if len(set(words)) < len(words):
                raise ConfigError(f"the verbalizer names a word of the label {label!r} twice; drop one")

    @classmethod
    def parse(cls, value: Mapping[Any, Any] | str) -> "Verbalizer":
        """From `{label: word}`, `{label: [word, …]}` or, as on the command line, `"label=word|word,label=word"`."""
        given = _split(value) if isinstance(value, str) else value
        return cls({label_text(label): _words_of(label, words) for label, words in given.items()})

    @classmethod
    def candidates(cls, words: Iterable[str]) -> "Verbalizer":
        """Every word is a label of its own, as in LAMA."""
        return cls({word: (word,) for word in dict.fromkeys(words)}, closed=False)

    @property
    def labels(self) -> list[str]:
        return list(self.words)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.words)}

    def index(self, label: str, where: str) -> int:
        """The number of a label; −1 for what is none of the candidates. DataError for an unknown class."""
        number = self._numbers.get(label, -1)
        if number < 0 and self.closed:
            raise DataError(f"{where}: the label {label!r} is not in the verbalizer, which has {', '.join(self.words)}")
        return number

    def to_dict(self) -> dict[str, Any]:
        return {"closed": self.closed, "words": {label: list(words) for label, words in self.words.items()}}

    @classmethod
    def from_dict(cls, value: Any) -> "Verbalizer":
        """What `to_dict` gave; ConfigError for anything else."""
        if not isinstance(value, dict) or not isinstance(value.get("words"), dict):
            raise ConfigError('a saved verbalizer holds {"closed": …, "words": {label: [word, …]}}; this one does not')
        return cls({str(k): _words_of(k, v) for k, v in value["words"].items()}, bool(value.get("closed", True)))

    def table(self, tokenizer: Any, after_blank: bool = True) -> "WordTable":
        """The words as this tokenizer has them. ConfigError for a word it does not know or cannot tell from another."""
        spaced = after_blank and not adds_space(tokenizer)
        pairs = [(label, word) for label, words in self.words.items() for word in words]
        ids = [tuple(found) for found in text_ids(tokenizer, [f" {word}" if spaced else word for _, word in pairs])]
        owner: dict[tuple[int, ...], str] = {}
        for (label, word), found in zip(pairs, ids, strict=True):
            if not found or tokenizer.unk_token_id in found:
                raise ConfigError(f"the tokenizer does not know the word {word!r} of the label {label!r}; take another")
            if owner.setdefault(found, f"{word!r} of {label!r}") != f"{word!r} of {label!r}":
                raise ConfigError(f"the tokenizer cannot tell {word!r} of {label!r} from {owner[found]}; take another")
        numbers = {label: number for number, label in enumerate(self.words)}
        return WordTable(tuple(ids), tuple(numbers[label] for label, _ in pairs))


@final
@dataclass(frozen=True)
class WordTable:
    """The W words of a verbalizer: token ids, and the number of the label that each belongs to."""

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest word."""
        return max(map(len, self.ids))

    def of_label(self, label: int) -> list[int]:
        """The numbers of a label's words."""
        return [number for number, owner in enumerate(self.labels) if owner == label]

    def label_scores(self, words: Tensor) -> Tensor:
        """Log-scores of all words `[B, W]` → of all labels `[B, labels]`: the logarithm of the mean probability."""
        count = max(self.labels) + 1
        if len(self.ids) == count:
            return words
        groups = [self.of_label(label) for label in range(count)]
        width = max(map(len, groups))
        index = torch.tensor([group + [0] * (width - len(group)) for group in groups], device=words.device)
        there = torch.tensor([[place < len(group) for place in range(width)] for group in groups], device=words.device)
        sizes = torch.tensor([math.log(len(group)) for group in groups], device=words.device)
        return words[:, index].masked_fill(~there, -math.inf).logsumexp(dim=-1) - sizes


def label_text(value: Any) -> str:
    """A label as text: YAML's and JSON's true is "true", numbers are themselves."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _words_of(label: Any, words: Any) -> tuple[str, ...]:
    given: Sequence[Any] = words if isinstance(words, list | tuple) else [words]
    for word in given:
        if isinstance(word, bool):
            raise ConfigError(
                f"the verbalizer's word for {label!r} is {word!r}, as YAML reads yes, no, true and false; write it in "
                "quotes"
            )
        if not isinstance(word, str | int | float):
            raise ConfigError(f"the verbalizer's word for {label!r} is {word!r}; it must be text or a list of texts")
    return tuple(str(word) for word in given)


def _split(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for part in text.split(","):
        label, separator, words = (piece.strip() for piece in part.partition("="))
        if not separator or not label:
            raise ConfigError(f'the verbalizer {text!r} is not of the form "label=word,label=word|other word"')
        if label in found:
            raise ConfigError(f"the verbalizer {text!r} has the label {label!r} twice; put its words together with |")
        found[label] = [word.strip() for word in words.split("|")]
    return found
