"""Rows for cloze tasks: the texts of a template's fields, and the label that is to be chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.cloze.verbalizer import Verbalizer, label_text
from softprompt.data.columns import checked, column_of, is_number, scalar, short
from softprompt.data.rows import Row, read_rows
from softprompt.errors import ConfigError, DataError
from softprompt.template import Field, Slot, Template, Words

LABEL_COLUMN = "label"


@dataclass(frozen=True)
class ClozeExample:
    """The texts of the fields by name, and the label ("" where it is to be found out)."""

    fields: dict[str, str]
    label: str
    where: str = "example"


def load_cloze(
    source: str | Path,
    template: Template,
    label_column: str | None = None,
    split: str = "train",
    limit: int | None = None,
    only: str | None = None,
) -> list[ClozeExample]:
    """Examples of a file or data set; `only` keeps the rows of one kind (`"relation=P19"`).

    ConfigError where the label would stand in the text, DataError naming the row at fault.
    """
    column = label_column or LABEL_COLUMN
    if column in template.fields:
        raise ConfigError(
            f'template "{template.text}" shows the column "{column}", which is what is to be found; leave it out, or '
            "name another target_column"
        )
    return [cloze_example(row, template, column) for row in read_rows(source, split, limit, only)]


def cloze_example(row: Row, template: Template, label_column: str | None = None) -> ClozeExample:
    """One row; without a label column its label is left open."""
    fields = {name: scalar(row, name) for name in template.fields}
    label = "" if label_column is None else _label(row, label_column)
    return ClozeExample(fields, label, row.where)


def _label(row: Row, column: str) -> str:
    value: Any = column_of(row, column, "name the one that holds the label by target_column")
    if isinstance(value, bool) or is_number(value):
        return label_text(value)
    text = checked(value, row, column)
    if not text.strip():
        raise DataError(
            f'{row.where}: column "{column}" is blank ({short(value)}), so there is nothing to learn; fill it'
        )
    return text


def as_text(example: ClozeExample, template: Template, word: str = "") -> str:
    """The row as plain text: virtual tokens left out, `word` at the answer's place."""
    parts = []
    for piece in template.pieces:
        if isinstance(piece, Field):
            parts.append(example.fields[piece.name])
        elif isinstance(piece, Words):
            parts.append(piece.text)
        elif not isinstance(piece, Slot):
            parts.append(word if piece.name == "MASK" else "")
    if not template.has_mask:
        parts.append(f" {word}")
    return " ".join("".join(parts).split())


def candidates_of(name: str, train: Sequence[ClozeExample], held_out: Sequence[ClozeExample]) -> Verbalizer:
    """LAMA's candidates: the answers of the training data (`train`), of all data (`data`), or a file's lines."""
    if name in ("train", "data"):
        rows = [*train, *(held_out if name == "data" else [])]
        return Verbalizer.candidates(sorted({row.label for row in rows}))
    if Path(name).suffix.lower() != ".txt":
        raise ConfigError(f"candidates is {name!r}; it must be train, data, or a .txt file with one word per line")
    return Verbalizer.candidates(row.values["text"].strip() for row in read_rows(name))
