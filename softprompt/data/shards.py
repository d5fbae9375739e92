"""Data that is never in memory as a whole: rows are read one by one, and reading can go on from any place.

A source is a file (.jsonl, .txt, .csv, .tsv, each also with .gz behind it, or .parquet), a pattern that names several
such files (`data/*.jsonl`), or the name of a data set for the `datasets` library. Each file, or each shard of a data
set, can be read apart. Files are read by us and not by `datasets`, so that rows, and errors with their lines, are those
of the same file read into memory: `datasets` guesses the types of columns (the text `NA` of a CSV becomes nothing, a
date in JSON becomes a time), and goes on from a place by reading the file again up to there.
"""

import csv
import glob
import gzip
import heapq
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, final

from softprompt.data.rows import Row, csv_header, csv_row, json_object, open_named, parse_json, with_value
from softprompt.errors import DataError

PARQUET_ROWS = 256  # rows of a Parquet file that are decoded together
EVEN = 0.9  # shares are even where the smallest is at least this part of the largest

Place = Any  # plain values (numbers, texts, lists, mappings, None), so that it can be saved; None is the start


class Reader(ABC):
    """The rows of one shard, from a place on."""

    @abstractmethod
    def __iter__(self) -> Iterator[Row]: ...

    @abstractmethod
    def place(self) -> Place:
        """Where to go on after the last row that was handed out."""


class Shards(ABC):
    """Parts of one source that can be read apart. `sizes` are bytes, or 1 where the sizes are not known."""

    name: str
    sizes: list[int]

    @abstractmethod
    def open(self, number: int, place: Place = None) -> Reader:
        """Read a shard from a place on."""

    @abstractmethod
    def identity(self) -> str:
        """A text that changes when the source is another one."""


@final
class Pass:
    """An iterator over the rows of some shards, one shard after the other, from a place on."""

    def __init__(self, shards: Shards, order: Sequence[int], place: Place = None, only: str | None = None) -> None:
        """`only` keeps the rows where a column has a value (`relation=P19`)."""
        self.shards = shards
        self.order = order
        self._number, self._place = place or (0, None)
        self._reader: Reader | None = None
        self._rows = self._read() if only is None else with_value(self._read(), only)

    def __iter__(self) -> Iterator[Row]:
        return self._rows

    def __next__(self) -> Row:
        return next(self._rows)

    def place(self) -> Place:
        """Where to go on after the last row that was handed out."""
        return (self._number, self._place if self._reader is None else self._reader.place())

    def _read(self) -> Iterator[Row]:
        while self._number < len(self.order):
            self._reader = self.shards.open(self.order[self._number], self._place)
            yield from self._reader
            self._number, self._place, self._reader = self._number + 1, None, None


def shared_out(sizes: Sequence[int], processes: int) -> list[list[int]] | None:
    """The numbers of the shards that each process reads, about as many bytes for each; None if that is not possible.

    The largest are dealt out first, each to whoever has least.
    """
    if processes == 1 or len(sizes) < processes:
        return None
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [(0, process) for process in range(processes)]
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        load, process = heapq.heappop(loads)
        shares[process].append(number)
        heapq.heappush(loads, (load + max(1, sizes[number]), process))
    found = [load for load, _ in loads]
    return shares if min(found) >= EVEN * max(found) else None


def open_shards(source: str, split: str = "train") -> Shards:
    """The files that a path or a pattern names, else the data set of that name. DataError when there is none."""
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{source} is a folder; name the files in it by a pattern such as {path / '*.jsonl'}")
    if path.is_file():
        return FileShards(source, [path])
    if glob.has_magic(source):
        files = sorted(Path(name) for name in glob.glob(source, recursive=True))
        files = [file for file in files if file.is_file()]
        if not files:
            raise DataError(f"no file fits the pattern {source}; check the path")
        return FileShards(source, files)
    return NamedShards(source, split, open_named(source, split, streaming=True))


@final
class FileShards(Shards):
    """Files, each of which is a shard."""

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        self.name = name
        self.files = files
        self.sizes = [file.stat().st_size for file in files]
        for file in files:
            _format_of(file)  # a file that cannot be read is told at once

    def open(self, number: int, place: Place = None) -> Reader:
        file = self.files[number]
        return ParquetReader(file, place) if _format_of(file) == ".parquet" else TextReader(file, place)

    def identity(self) -> str:
        return repr([(file.name, size) for file, size in zip(self.files, self.sizes, strict=True)])


def _format_of(file: Path) -> str:
    """The ending that says what is in a file, without the .gz behind it."""
    packed = file.suffix.lower() == ".gz"
    ending = (Path(file.stem) if packed else file).suffix.lower()
    if ending in TEXT_FORMATS or (ending == ".parquet" and not packed):
        return ending
    known = ", ".join([*TEXT_FORMATS, *(f"{each}.gz" for each in TEXT_FORMATS), ".parquet"])
    if ending == ".json":
        raise DataError(f"{file} cannot be streamed, since .json is read as a whole; write it as .jsonl, a row a line")
    raise DataError(f"{file} cannot be streamed; give one of {known}")


@final
class TextReader(Reader):
    """A file of lines. A place is the byte (of what is unpacked) at which the next record starts, and its line."""

    def __init__(self, path: Path, place: Place = None) -> None:
        self.path = path
        self._offset, self._line = place or (0, 0)

    def place(self) -> Place:
        return (self._offset, self._line)

    def __iter__(self) -> Iterator[Row]:
        read = TEXT_FORMATS[_format_of(self.path)]
        try:
            with gzip.open(self.path) if self.path.suffix.lower() == ".gz" else self.path.open("rb") as file:
                yield from read(self, file)  # pyright: ignore[reportArgumentType]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{self.path} is not a whole gzip file ({error}); write it again") from error
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from error

    @property
    def _where(self) -> str:
        return f"{self.path} line {self._line}"

    def _lines(self, file: IO[bytes]) -> Iterator[str]:
        """The lines from the place on, which moves along."""
        file.seek(self._offset)
        for line in file:
            coding = "utf-8" if self._offset else "utf-8-sig"
            self._offset, self._line = self._offset + len(line), self._line + 1
            try:
                yield line.decode(coding)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self._where} is not UTF-8 text (its byte {error.start} is 0x{line[error.start]:02x}); convert "
                    "the file to UTF-8"
                ) from error

    def _jsonl(self, file: IO[bytes]) -> Iterator[Row]:
        for line in self._lines(file):
            if line.strip():
                yield Row(self._where, json_object(parse_json(line, self._where), self._where))

    def _txt(self, file: IO[bytes]) -> Iterator[Row]:
        for line in self._lines(file):
            if line.strip():
                yield Row(self._where, {"text": line.strip()})

    def _csv(self, file: IO[bytes], delimiter: str = ",") -> Iterator[Row]:
        """The header is read again wherever reading goes on."""
        start, self._offset, self._line = (self._offset, self._line), 0, 0
        try:
            header = csv_header(next(csv.reader(self._lines(file), delimiter=delimiter, strict=True), []), self.path)
            self._offset, self._line = max(start, (self._offset, self._line))
            for fields in csv.reader(self._lines(file), delimiter=delimiter, strict=True):
                if fields:
                    yield csv_row(fields, header, self._where)
        except csv.Error as error:
            raise DataError(f"{self._where} is not valid CSV: {error}") from error

    def _tsv(self, file: IO[bytes]) -> Iterator[Row]:
        return self._csv(file, "\t")


TEXT_FORMATS: dict[str, Callable[[TextReader, IO[bytes]], Iterator[Row]]] = {
    ".jsonl": TextReader._jsonl,
    ".csv": TextReader._csv,
    ".tsv": TextReader._tsv,
    ".txt": TextReader._txt,
}


@final
class ParquetReader(Reader):
    """A Parquet file. A place is a row group, the rows of it that are read, and the rows of the file that are."""

    def __init__(self, path: Path, place: Place = None) -> None:
        self.path = path
        self._group, self._row, self._number = place or (0, 0, 0)

    def place(self) -> Place:
        return (self._group, self._row, self._number)

    def __iter__(self) -> Iterator[Row]:
        try:
            import pyarrow as pa  # comes with `datasets`; imported here because it is slow and most files are text
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise DataError(f"reading {self.path} needs pyarrow; run: pip install datasets") from error
        try:
            with parquet.ParquetFile(self.path) as file:
                while self._group < file.num_row_groups:
                    yield from self._of_group(file)
                    self._group, self._row = self._group + 1, 0
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise DataError(f"{self.path} is not a readable Parquet file ({reason}); write it again") from error

    def _of_group(self, file: Any) -> Iterator[Row]:
        known = self._row
        for batch in file.iter_batches(PARQUET_ROWS, row_groups=[self._group]):
            rest = batch.slice(min(known, batch.num_rows))
            known -= batch.num_rows - rest.num_rows
            for values in rest.to_pylist():
                self._row, self._number = self._row + 1, self._number + 1
                yield Row(f"{self.path} row {self._number}", values)


@final
class NamedShards(Shards):
    """The shards of a data set that `datasets` streams."""

    def __init__(self, name: str, split: str, dataset: Any) -> None:
        """`dataset` is an `IterableDataset`, not shuffled."""
        self.name = name
        self.split = split
        self.dataset = dataset
        self.sizes = [1] * dataset.num_shards

    def open(self, number: int, place: Place = None) -> Reader:
        count = len(self.sizes)
        shard = self.dataset.shard(num_shards=count, index=number)  # a new object, with no place of its own yet
        where = f"{self.name} {self.split}" + (f" shard {number + 1}" if count > 1 else "")
        return NamedReader(shard, where, place)

    def identity(self) -> str:
        return repr((self.name, self.split, len(self.sizes)))


@final
class NamedReader(Reader):
    """One shard of a streamed data set. A place is the data set's own state, and the number of rows that are read."""

    def __init__(self, dataset: Any, where: str, place: Place = None) -> None:
        self.dataset = dataset
        self.where = where
        self._start, self._begun = (place[0] if place else None), (place[1] if place else 0)
        self._number = self._begun

    def place(self) -> Place:
        state = self._start if self._number == self._begun else self.dataset.state_dict()
        return None if state is None else (state, self._number)

    def __iter__(self) -> Iterator[Row]:
        if self._start is not None:
            self.dataset.load_state_dict(self._start)
        try:
            for values in self.dataset:
                self._number += 1
                yield Row(f"{self.where} row {self._number}", dict(values))
        except Exception as error:  # the network's and the formats' own kinds, all about this shard
            reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise DataError(
                f"{self.where} cannot be read after row {self._number} ({reason}); go on from there with --resume"
            ) from error
