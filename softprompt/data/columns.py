"""The values of a row's columns, checked; an error names the row, the column and the remedy."""

from typing import Any

from softprompt.data.rows import Row
from softprompt.errors import DataError


def column_of(row: Row, name: str, remedy: str = "name one of these") -> Any:
    """The value of a column or, where that is missing, of its plural."""
    for column in (name, f"{name}s"):
        if column in row.values:
            return row.values[column]
    there = ", ".join(str(column) for column in row.values) or "none"
    raise DataError(f'{row.where} has no column "{name}"; its columns are {there}: {remedy}')


def column_remedy(row: Row) -> str:
    """For rows read by two columns: the template that would read this row."""
    there = [str(column) for column in row.values]
    example = f'"{{{there[0]}}} => {{{there[-1]}}}"' if there[1:] else '"{first} => {second}"'
    return f"name two of these, or give a template such as {example}"


def scalar(row: Row, column: str, remedy: str = "name one of these") -> str:
    """One text; a number counts as one."""
    value = column_of(row, column, remedy)
    return checked(str(value) if is_number(value) else value, row, column)


def texts_of(row: Row, column: str, remedy: str = "name one of these") -> tuple[str, ...]:
    """The references in a column: one text, or a list of at least one."""
    value = column_of(row, column, remedy)
    texts = value if isinstance(value, list | tuple) else [value]
    if not texts:
        raise DataError(f'{row.where}: column "{column}" is an empty list; give at least one reference or drop the row')
    found = tuple(checked(str(text) if is_number(text) else text, row, column) for text in texts)
    if not all(text.strip() for text in found):
        raise DataError(f'{row.where}: column "{column}" is blank, so there is nothing to learn; fill or drop the row')
    return found


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def checked(value: Any, row: Row, column: str) -> str:
    """`value`, if it is text."""
    if not isinstance(value, str):
        raise DataError(f'{row.where}: column "{column}" must be text, not {short(value)}')
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise DataError(f'{row.where}: column "{column}" has half of a surrogate pair, which is not text; mend the row')
    return value
