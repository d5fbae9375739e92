"""What a template is made of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Field:
    """The text of a column."""

    name: str


@dataclass(frozen=True)
class Slot:
    """A virtual token, by its index in the prompt."""

    index: int


@dataclass(frozen=True)
class Mark:
    """A token of the tokenizer's own, by its name in templates; `MASK` is the answer."""

    name: str


Piece = Words | Field | Slot | Mark
