"""Rows of a data file become examples: one input with its references, or one text with its class.

Three kinds of rows are understood: two columns (`input` and `target` unless told otherwise), any columns with a
template such as `"{mr} => {ref}"`, and chats (`messages`, for the tokenizer's chat template). Of a template, all that
stands before the last field is the input and the rest is the target. A column that holds a list of texts gives several
references: training uses each of them in turn (`expand`), evaluation compares with all.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softprompt.data.rows import Row, read_rows
from softprompt.errors import ConfigError, DataError


@dataclass(frozen=True)
class Example:
    """One input with its references; `targets[0]` is the one that loss is measured on.

    `border` holds the spaces that stand between input and target; `where` says which row this was; `task` is the number
    of its task where one prompt serves several.
    """

    input: str
    targets: tuple[str, ...]
    messages: list[dict[str, str]] | None = None
    border: str = ""
    where: str = "example"
    task: int | None = None


@dataclass(frozen=True)
class LabelledExample:
    """One text and the index of its class."""

    text: str
    label: int
    where: str = "example"


class Template:
    """`"{mr} => {ref}"`, taken apart: input text up to the last field, which is the target.

    A field names a column; where there is no such column its plural is tried (`{ref}` finds `refs`). ConfigError: a
    template that is malformed or names no field.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._parts = _parse_template(text)
        self.fields = tuple(field for _, field in self._parts if field is not None)
        last = max(index for index, (_, field) in enumerate(self._parts) if field is not None)
        self._before = [*self._parts[:last], (self._parts[last][0], None)]
        self._after = "".join(literal for literal, _ in self._parts[last + 1 :])

    @property
    def input_fields(self) -> tuple[str, ...]:
        return self.fields[:-1]

    def render_input(self, row: Row) -> tuple[str, str]:
        """The input text of a row, without the spaces at its end, and those spaces."""
        pieces = [literal + (_scalar(row, field) if field is not None else "") for literal, field in self._before]
        return _split_border("".join(pieces))

    def is_rendered(self, text: str) -> bool:
        """Whether a text begins and ends with the words that the template puts around the input."""
        first, last = self._before[0][0].lstrip(), self._before[-1][0].strip()
        return bool(last) and text.lstrip().startswith(first) and text.rstrip().endswith(last)

    def example(self, row: Row) -> Example:
        text, border = self.render_input(row)
        targets = tuple(value + self._after for value in _texts(row, self.fields[-1]))
        return Example(text, targets, border=border, where=row.where)


def _parse_template(text: str) -> list[tuple[str, str | None]]:
    """`(literal, field or None)` pairs; a field is a plain column name."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(
            f'template "{text}" is malformed ({error}); write fields as {{column}} and braces as {{{{'
        ) from error
    for _, field, spec, conversion in parts:
        if field is not None and (not field or spec or conversion):
            raise ConfigError(f'template "{text}" has a field that is not a plain {{column}}; use the columns\' names')
    if all(field is None for _, field, _, _ in parts):
        raise ConfigError(f'template "{text}" names no column; write for example "{{input}} => {{target}}"')
    return [(literal, field) for literal, field, _, _ in parts]


def _split_border(text: str) -> tuple[str, str]:
    bare = text.rstrip(" ")
    return bare, text[len(bare) :]


def load_examples(
    source: str | Path,
    template: str | None = None,
    input_column: str | None = None,
    target_column: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> list[Example]:
    """Examples of a .jsonl, .json, .csv, .tsv or .parquet file, or of a `datasets` name (`name[:configuration]`).

    With a template its fields decide; else `input_column` and `target_column` (by default "input" and "target"); else,
    where a row has neither but has `messages`, the chat. DataError names the row and the column at fault.
    """
    parsed = Template(template) if template is not None else None
    if parsed is not None and (input_column or target_column):
        raise ConfigError("give a template or an input and target column, not both")
    rows = read_rows(source, split, limit)
    if parsed is not None:
        return [parsed.example(row) for row in rows]
    if not input_column and not target_column and "messages" in rows[0].values and "input" not in rows[0].values:
        return [_chat_example(row) for row in rows]
    columns = input_column or "input", target_column or "target"
    return [_column_example(row, *columns) for row in rows]


def _column_example(row: Row, input_column: str, target_column: str) -> Example:
    text, border = _split_border(_scalar(row, input_column, _remedy(row)))
    return Example(text, _texts(row, target_column, _remedy(row)), border=border, where=row.where)


def input_example(row: Row, template: Template | None = None, input_column: str | None = None) -> Example:
    """The input of a row alone, to generate from; its target may be missing (then `targets` holds an empty text)."""
    if template is not None:
        text, border = template.render_input(row)
    elif not input_column and "messages" in row.values and "input" not in row.values:
        messages = row.values["messages"]
        asked = isinstance(messages, list) and messages and messages[-1].get("role") != "assistant"
        answer = [{"role": "assistant", "content": ""}] if asked else []
        return _chat_example(Row(row.where, {"messages": messages + answer}) if asked else row)
    else:
        text, border = _split_border(_scalar(row, input_column or "input", _remedy(row)))
    return Example(text, ("",), border=border, where=row.where)


def _chat_example(row: Row) -> Example:
    messages = row.values.get("messages")
    if not isinstance(messages, list) or not messages:
        wrong = _short(messages)
        raise DataError(f'{row.where}: "messages" must be a list of {{"role", "content"}} objects, not {wrong}')
    turns = [_turn(row, message) for message in messages]
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise DataError(
            f"{row.where}: the last of two or more messages must be the assistant's, since that is learnt; "
            f"the roles here are {', '.join(turn['role'] for turn in turns)}"
        )
    return Example("", (turns[-1]["content"],), messages=turns, where=row.where)


def _turn(row: Row, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise DataError(f'{row.where}: each message must be a {{"role", "content"}} object, not {_short(message)}')
    return {key: _checked(message.get(key), row, f"messages.{key}") for key in ("role", "content")}


def _column(row: Row, name: str, remedy: str = "name one of these") -> Any:
    """The value of a column or, where that is missing, of its plural."""
    for column in (name, f"{name}s"):
        if column in row.values:
            return row.values[column]
    there = ", ".join(str(column) for column in row.values) or "none"
    raise DataError(f'{row.where} has no column "{name}"; its columns are {there}: {remedy}')


def _remedy(row: Row) -> str:
    """For rows read by two columns: the template that would read this row."""
    there = [str(column) for column in row.values]
    example = f'"{{{there[0]}}} => {{{there[-1]}}}"' if there[1:] else '"{first} => {second}"'
    return f"name two of these, or give a template such as {example}"


def _scalar(row: Row, column: str, remedy: str = "name one of these") -> str:
    value = _column(row, column, remedy)
    return _checked(str(value) if _is_number(value) else value, row, column)


def _texts(row: Row, column: str, remedy: str = "name one of these") -> tuple[str, ...]:
    """The references in a column: one text, or a list of at least one."""
    value = _column(row, column, remedy)
    texts = value if isinstance(value, list | tuple) else [value]
    if not texts:
        raise DataError(f'{row.where}: column "{column}" is an empty list; give at least one reference or drop the row')
    checked = tuple(_checked(str(text) if _is_number(text) else text, row, column) for text in texts)
    if not all(text.strip() for text in checked):
        raise DataError(f'{row.where}: column "{column}" is blank, so there is nothing to learn; fill or drop the row')
    return checked


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _checked(value: Any, row: Row, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f'{row.where}: column "{column}" must be text, not {_short(value)}')
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise DataError(f'{row.where}: column "{column}" has half of a surrogate pair, which is not text; mend the row')
    return value


def expand(examples: Sequence[Example]) -> list[Example]:
    """One example per (input, target) pair, in order: what training runs over."""
    return [replace(example, targets=(target,)) for example in examples for target in example.targets]


def load_labelled(
    source: str | Path,
    text_column: str | None = None,
    label_column: str | None = None,
    split: str = "train",
    limit: int | None = None,
    label_names: Sequence[str] | None = None,
) -> tuple[list[LabelledExample], list[str]]:
    """Texts with classes, and the classes' names in the order of their indices.

    Labels are whole numbers from 0 or names. Names are numbered in alphabetical order, or as in `label_names` (pass
    the training set's to read a test set). The text column defaults to the only other column there is.
    """
    rows = read_rows(source, split, limit)
    label_column = label_column or "label"
    values = [_column(row, label_column, "name the one that holds the class") for row in rows]
    text_column = text_column or _only_other_column(rows[0], label_column)
    names = list(label_names) if label_names else _label_names(rows, values, label_column)
    numbers = {name: index for index, name in enumerate(names)}
    labelled = []
    for row, value in zip(rows, values, strict=True):
        if str(value) not in numbers:
            raise DataError(f"{row.where}: label {_short(value)} is not one of {', '.join(names)}")
        labelled.append(LabelledExample(_scalar(row, text_column), numbers[str(value)], row.where))
    return labelled, names


def _only_other_column(row: Row, label_column: str) -> str:
    others = [column for column in row.values if column != label_column]
    known = [column for column in others if column in ("text", "sentence", "input")]
    if len(others) != 1 and len(known) != 1:
        raise DataError(f"{row.where} has the columns {', '.join(row.values)}; name the one that holds the text")
    return (known or others)[0]


def _label_names(rows: Sequence[Row], values: Sequence[Any], column: str) -> list[str]:
    for row, value in zip(rows, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise DataError(f'{row.where}: column "{column}" must be a class number or name, not {_short(value)}')
        if isinstance(value, int) and value < 0:
            raise DataError(f'{row.where}: class numbers in "{column}" start at 0, but this is {value}')
    texts = {str(value) for value in values}
    if all(text.isdecimal() for text in texts):  # CSV gives numbers as text
        return [str(number) for number in range(max(map(int, texts)) + 1)]
    return sorted(texts)
