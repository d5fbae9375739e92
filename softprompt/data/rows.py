"""Rows of a data file or a named data set, each with the place it came from, so that an error can name the line.

A source is a path ending in .jsonl, .json, .csv, .tsv, .parquet or .txt (one text per line), or else the name of a
data set for the `datasets` library (`name` or `name:configuration`).
"""

import csv
import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from softprompt.errors import ConfigError, DataError


@dataclass(frozen=True)
class Row:
    """One record and where it stands, e.g. `train.jsonl line 7`."""

    where: str
    values: dict[str, Any]


def read_rows(source: str | Path, split: str = "train", limit: int | None = None, only: str | None = None) -> list[Row]:
    """All rows of a source, or those where a column has a value (`only="relation=P19"`); the first `limit` of them.

    DataError: unreadable, broken or empty source, or no row with that value.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} rows leaves nothing to read from {source}; give 1 or more")
    opened = _open(str(source), split)
    rows = list(islice(opened if only is None else with_value(opened, only), limit))
    if not rows and only is not None:
        raise DataError(f"{source} holds no row with {only}; check the column and the value")
    if not rows:
        raise DataError(f"{source} holds no rows; give a file with at least one record")
    return rows


def with_value(rows: Iterator[Row], only: str) -> Iterator[Row]:
    """The rows where a column has a value."""
    column, separator, value = only.partition("=")
    if not separator or not column:
        raise ConfigError(f"only is {only!r}; write COLUMN=VALUE, such as relation=P19")
    for row in rows:
        if column not in row.values:
            raise DataError(f'{row.where} has no column "{column}"; its columns are {", ".join(map(str, row.values))}')
        if str(row.values[column]) == value:
            yield row


def _open(source: str, split: str) -> Iterator[Row]:
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{source} is a folder; give one file in it ({_known_endings()})")
    reader = READERS.get(path.suffix.lower())
    if path.is_file():
        if reader is None:
            raise DataError(f'{source} ends in "{path.suffix}", which is no known format; use {_known_endings()}')
        return _reporting_io_errors(reader, path)
    return _read_named(source, split)


def _known_endings() -> str:
    return ", ".join(READERS)


def _did_you_mean(path: Path) -> str:
    """A hint that names the closest file in the same folder, or says that the folder itself is missing."""
    if not path.parent.is_dir():
        return f"; its folder {path.parent} does not exist either"
    names = [file.name for file in path.parent.iterdir() if file.is_file()]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else "; check the path"


def _reporting_io_errors(reader: Callable[[Path], Iterator[Row]], path: Path) -> Iterator[Row]:
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}); convert it to UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    """One JSON object per line; blank lines are skipped."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path} line {number}"
                yield Row(where, json_object(parse_json(line, where), where))


def _read_lines(path: Path) -> Iterator[Row]:
    """One text per line, in a column `text`; blank lines are skipped."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Row(f"{path} line {number}", {"text": line.strip()})


def _read_json(path: Path) -> Iterator[Row]:
    """One array of objects, or, because many files named .json are that, one object per line."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    for number, value in enumerate(parse_json(text, str(path)), start=1):
        where = f"{path} record {number}"
        yield Row(where, json_object(value, where))


def parse_json(text: str, where: str) -> Any:
    """The value that a text holds; DataError, with its place, where it is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise DataError(f"{where} is not valid JSON ({error.msg} at {place}); mend or remove it") from error
    except RecursionError as error:
        raise DataError(f"{where} is JSON nested too deeply to read; each record must be a flat object") from error


def json_object(value: Any, where: str) -> dict[str, Any]:
    """`value`, if it is a record."""
    if not isinstance(value, dict):
        raise DataError(f'{where} holds {_kind(value)}, not an object such as {{"input": "…", "target": "…"}}')
    return value


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    """The first line names the columns; every row must have as many fields as there are columns."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = csv_header(next(reader, []), path)
            for fields in reader:
                if fields:
                    yield csv_row(fields, header, f"{path} line {reader.line_num}")
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num} is not valid CSV: {error}") from error


def csv_header(fields: list[str], path: Path) -> list[str]:
    """The names of a file's columns, each of which may occur once."""
    if len(set(fields)) != len(fields):
        raise DataError(f"{path} line 1 names a column twice ({', '.join(fields)}); rename one of them")
    return fields


def csv_row(fields: list[str], header: list[str], where: str) -> Row:
    """One record, which must have as many fields as there are columns."""
    if len(fields) != len(header):
        raise DataError(
            f"{where} has {len(fields)} fields but the header names {len(header)} columns "
            f"({', '.join(header)}); quote fields that contain the delimiter"
        )
    return Row(where, dict(zip(header, fields, strict=True)))


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_csv(path, delimiter="\t")


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa  # comes with `datasets`; imported here because it is slow and most files are text
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow; run: pip install datasets") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", values)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path} is not a readable Parquet file ({reason}); write it again") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_lines,
}


def _read_named(source: str, split: str) -> Iterator[Row]:
    """A data set of the `datasets` library, from its cache or the hub."""
    for number, values in enumerate(open_named(source, split), start=1):
        yield Row(f"{source} {split} row {number}", dict(values))


def open_named(source: str, split: str, streaming: bool = False) -> Any:
    """A named data set as `datasets` opens it; DataError when `source` is no name but a file's, or does not load."""
    file = Path(source).suffix.lower() in (*READERS, ".gz")
    if file or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?", source):
        raise DataError(f"there is no file {source}{_did_you_mean(Path(source))}")
    try:
        import datasets  # heavy, and needed for named data sets only
    except ImportError as error:
        raise DataError(f"there is no file {source}, and data set names need: pip install datasets") from error
    name, _, configuration = source.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
    except Exception as error:  # datasets raises anything from ValueError to requests' own types, all about this name
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(
            f'"{source}" is neither a file here nor a data set that loads with split "{split}" '
            f"({reason}); check the spelling or give a path"
        ) from error
