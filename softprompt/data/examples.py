"""Rows of a data file become examples: one input with its references, or one text with its class.

Three kinds of rows are understood: two columns (`input` and `target` unless told otherwise), any columns with a
template such as `"{mr} => {ref}"`, and chats (`messages`, for the tokenizer's chat template). Of a template, all that
stands before the last field is the input and the rest is the target; a field finds the plural of its name too. A column
that holds a list of texts gives several references: training uses each of them in turn (`expand`), evaluation compares
with all.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softprompt.data.columns import checked, column_of, column_remedy, scalar, short, texts_of
from softprompt.data.rows import Row, read_rows
from softprompt.errors import ConfigError, DataError
from softprompt.template import Field, Mark, Slot, Template, Words


@dataclass(frozen=True)
class Example:
    """One input with its references; `targets[0]` is the one that loss is measured on.

    `border` holds the spaces that stand between input and target; `where` says which row this was; `task` is the number
    of its task where one prompt serves several. `pieces` is the input with the virtual tokens in their places, where
    the template has any; `input` then is its text without them.
    """

    input: str
    targets: tuple[str, ...]
    messages: list[dict[str, str]] | None = None
    border: str = ""
    where: str = "example"
    task: int | None = None
    pieces: tuple[Words | Slot | Mark, ...] = ()


@dataclass(frozen=True)
class LabelledExample:
    """One text and the index of its class."""

    text: str
    label: int
    where: str = "example"


def templated(row: Row, template: Template, with_target: bool = True) -> Example:
    """A row in a template for generation; `with_target=False` leaves the target's column alone."""
    before, target, after = template.split_target()
    pieces = tuple(Words(scalar(row, piece.name)) if isinstance(piece, Field) else piece for piece in before)
    text, border = _split_border("".join(piece.text for piece in pieces if isinstance(piece, Words)))
    plain = all(isinstance(piece, Words) for piece in pieces)
    targets = tuple(value + after for value in texts_of(row, target)) if with_target else ("",)
    if plain:
        return Example(text, targets, border=border, where=row.where)
    border = border if isinstance(pieces[-1], Words) else ""
    return Example(" ".join(text.split()), targets, border=border, where=row.where, pieces=pieces)


def without_slots(example: Example) -> Example:
    """The example as the frozen model gets it, to compare with: no virtual tokens, nor the blanks before them."""
    kept: list[Words | Slot | Mark] = []
    for piece in example.pieces:
        if not isinstance(piece, Slot):
            kept.append(piece)
            continue
        while kept and isinstance(last := kept[-1], Words) and last.text.endswith(" "):
            kept[-1:] = [Words(last.text.rstrip(" "))] if last.text.strip(" ") else []
    return replace(example, pieces=tuple(kept))


def is_templated(text: str, template: Template) -> bool:
    """Whether a text begins and ends with the words that the template puts around the input.

    With virtual tokens inside, no text is complete.
    """
    before, _, _ = template.split_target()
    if template.num_virtual_tokens:
        return False
    first, last = "", ""
    for piece in before:
        if isinstance(piece, Field):
            break
        first += piece.text if isinstance(piece, Words) else ""
    for piece in reversed(before):
        if isinstance(piece, Field):
            break
        last = (piece.text if isinstance(piece, Words) else "") + last
    return bool(last.strip()) and text.lstrip().startswith(first.lstrip()) and text.rstrip().endswith(last.strip())


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
    only: str | None = None,
) -> list[Example]:
    """Examples of a .jsonl, .json, .csv, .tsv or .parquet file, or of a `datasets` name (`name[:configuration]`).

    With a template its fields decide; else `input_column` and `target_column` (by default "input" and "target"); else,
    where a row has neither but has `messages`, the chat. DataError names the row and the column at fault.
    """
    if template is not None and (input_column or target_column):
        raise ConfigError("give a template or an input and target column, not both")
    rows = read_rows(source, split, limit, only)
    read = example_reader(rows[0], template, input_column, target_column)
    return [read(row) for row in rows]


def example_reader(
    first: Row, template: str | None = None, input_column: str | None = None, target_column: str | None = None
) -> Callable[[Row], Example]:
    """How the rows of a source become examples; the first one tells whether they are chats."""
    if template is not None:
        parsed = Template(template)
        return lambda row: templated(row, parsed)
    if not input_column and not target_column and "messages" in first.values and "input" not in first.values:
        return _chat_example
    columns = input_column or "input", target_column or "target"
    return lambda row: _column_example(row, *columns)


def _column_example(row: Row, input_column: str, target_column: str) -> Example:
    text, border = _split_border(scalar(row, input_column, column_remedy(row)))
    return Example(text, texts_of(row, target_column, column_remedy(row)), border=border, where=row.where)


def input_example(row: Row, template: Template | None = None, input_column: str | None = None) -> Example:
    """The input of a row alone, to generate from; its target may be missing (then `targets` holds an empty text)."""
    if template is not None:
        return templated(row, template, with_target=False)
    if not input_column and "messages" in row.values and "input" not in row.values:
        messages = row.values["messages"]
        asked = isinstance(messages, list) and messages and messages[-1].get("role") != "assistant"
        answer = [{"role": "assistant", "content": ""}] if asked else []
        return _chat_example(Row(row.where, {"messages": messages + answer}) if asked else row)
    text, border = _split_border(scalar(row, input_column or "input", column_remedy(row)))
    return Example(text, ("",), border=border, where=row.where)


def _chat_example(row: Row) -> Example:
    messages = row.values.get("messages")
    if not isinstance(messages, list) or not messages:
        wrong = short(messages)
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
        raise DataError(f'{row.where}: each message must be a {{"role", "content"}} object, not {short(message)}')
    return {key: checked(message.get(key), row, f"messages.{key}") for key in ("role", "content")}


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
    only: str | None = None,
) -> tuple[list[LabelledExample], list[str]]:
    """Texts with classes, and the classes' names in the order of their indices.

    Labels are whole numbers from 0 or names. Names are numbered in alphabetical order, or as in `label_names` (pass
    the training set's to read a test set). The text column defaults to the only other column there is.
    """
    rows = read_rows(source, split, limit, only)
    names = list(label_names) if label_names else label_names_of(rows, label_column)
    read = label_reader(rows[0], names, text_column, label_column)
    return [read(row) for row in rows], names


def label_reader(
    first: Row,
    names: Sequence[str],
    text_column: str | None = None,
    label_column: str | None = None,
    remedy: str = "",
) -> Callable[[Row], LabelledExample]:
    """How the rows of a source become texts with classes; the first one tells which column holds the text.

    `remedy` ends the error about a label that is not in `names`.
    """
    label_column = label_column or "label"
    text_column = text_column or _only_other_column(first, label_column)
    numbers = {name: index for index, name in enumerate(names)}

    def read(row: Row) -> LabelledExample:
        value = _label_of(row, label_column)
        if value is None or str(value) not in numbers:
            raise DataError(f"{row.where}: label {short(value)} is not one of {', '.join(names)}{remedy}")
        return LabelledExample(scalar(row, text_column), numbers[str(value)], row.where)

    return read


def _label_of(row: Row, label_column: str) -> Any:
    return column_of(row, label_column, "name the one that holds the class")


def _only_other_column(row: Row, label_column: str) -> str:
    others = [column for column in row.values if column != label_column]
    known = [column for column in others if column in ("text", "sentence", "input")]
    if len(others) != 1 and len(known) != 1:
        raise DataError(f"{row.where} has the columns {', '.join(row.values)}; name the one that holds the text")
    return (known or others)[0]


def label_names_of(rows: Iterable[Row], label_column: str | None = None) -> list[str]:
    """The names of the classes of rows, which are read one by one."""
    column = label_column or "label"
    texts = set()
    for row in rows:
        value = _label_of(row, column)
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise DataError(f'{row.where}: column "{column}" must be a class number or name, not {short(value)}')
        if isinstance(value, int) and value < 0:
            raise DataError(f'{row.where}: class numbers in "{column}" start at 0, but this is {value}')
        texts.add(str(value))
    if all(text.isdecimal() for text in texts):  # CSV gives numbers as text
        return [str(number) for number in range(max(map(int, texts)) + 1)]
    return sorted(texts)
