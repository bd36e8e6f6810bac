"""Files of texts in blocks, each of which can be read without those before it."""

from __future__ import annotations

import csv
import io
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from bdia_jax.data.chats import check_messages
from bdia_jax.data.example_files import refuse_empty
from bdia_jax.data.json_text import bare, json_object
from bdia_jax.data.reading import decode_part, holds_records
from bdia_jax.data.record_kinds import (
    MESSAGES,
    TEXT,
    UNREAD,
    kind_of,
    messages_of,
    texts_of,
    tidied,
)
from bdia_jax.data.records import refuse_conversations
from bdia_jax.data.tables import SEPARATORS, table

PASSAGE = 2**16
"""Bytes of plain text that a block has at least, but the last of a file."""

OBJECT = "an object in JSON"

Values = tuple[Any, ...]
"""Of the fields of a record."""


class Block(NamedTuple):
    """Where a block is."""

    start: int
    """Its first byte, or its number where blocks are numbered."""
    stop: int
    """The byte behind it."""
    records: int


class Blocks(Protocol):
    """A file in blocks."""

    path: pathlib.Path
    fields: tuple[str, ...]
    """The fields of its records; those of a plain text are its passages."""
    is_text: bool
    """Whether it is plain text."""

    def cut(self, sha) -> Iterator[Block]:
        """All blocks, in order: reads the file from its start to its end, and checks every record.

        Args:
          sha: a hash of ``hashlib``, which is given all bytes.

        Raises:
          ValueError: for what :func:`bdia_jax.data.read_examples` refuses, too.
        """
        ...

    def read(self, start: int, stop: int) -> list[Values]:
        """The records of a block."""
        ...


def blocks_of(path: pathlib.Path) -> Blocks:
    """A file as blocks: JSON lines and tables by records, Parquet by row groups, text by passages.

    Raises:
      FileNotFoundError, PermissionError: if it cannot be opened.
      ValueError: for a document in JSON, which is read whole or not at all, and for a file that
        holds neither records nor plain text.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise ValueError(
            f"{path}: a .json file is read whole: to read it as the run goes, save it as JSON "
            "lines (.jsonl) or Parquet"
        )
    if not holds_records(path):
        return Passages(path)
    if suffix == ".parquet":
        return RowGroups(path)
    return Rows(path) if suffix in SEPARATORS else JsonLines(path)


def check(name: str, where: str, fields: tuple[str, ...], values: Values) -> None:
    """A ``ValueError`` for a record that cannot be learned, whatever the tokenizer."""
    if fields != MESSAGES:
        refuse_empty(name, where, fields, values)
        return
    try:
        check_messages(values[0])
    except ValueError as error:
        raise ValueError(f"{name}, {where}: {error}") from None


def values_of(value: Any, name: str, where: str, fields: tuple[str, ...]) -> Values:
    """The fields of a record that is an object."""
    if fields == MESSAGES:
        return messages_of(value, name, where)
    return texts_of(value, name, where, fields)


def read_between(path: pathlib.Path, start: int, stop: int) -> bytes:
    """Some bytes of a file."""
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(stop - start)


class JsonLines:
    """An object per line; a block is a line."""

    is_text = False

    def __init__(self, path: pathlib.Path):
        self.path, self.name = path, str(path)
        self.fields: tuple[str, ...] = ()
        with open(path, "rb") as file:
            lines = (self._line(raw, number) for number, raw in enumerate(file, 1))
            number, line = next(((n, line) for n, line in enumerate(lines, 1) if line), (0, ""))
        if not line:
            raise ValueError(f"{path} is empty")
        value = json_object(line, self.name, f"line {number}", OBJECT)
        self.fields = kind_of(value if isinstance(value, dict) else ())

    def cut(self, sha) -> Iterator[Block]:
        stop = 0
        with open(self.path, "rb") as file:
            for number, raw in enumerate(file, 1):
                sha.update(raw)
                start, stop = stop, stop + len(raw)
                if line := self._line(raw, number):
                    where, is_last = f"line {number}", not raw.endswith(b"\n")
                    value = json_object(line, self.name, where, OBJECT, is_last=is_last)
                    values = values_of(value, self.name, where, self.fields)
                    check(self.name, where, self.fields, values)
                    yield Block(start, stop, 1)

    def read(self, start: int, stop: int) -> list[Values]:
        where = f"byte {start}"
        line = self._line(read_between(self.path, start, stop), 1)
        value = json_object(line, self.name, where, OBJECT)
        return [values_of(value, self.name, where, self.fields)]

    def _line(self, raw: bytes, number: int) -> str:
        """What stands in a line; nothing, if it is blank."""
        return bare(decode_part(raw, self.name, number))


class Rows:
    """A table of separated values; a block is a row, which may have more than a line."""

    is_text = False

    def __init__(self, path: pathlib.Path):
        self.path, self.name = path, str(path)
        self.separator = SEPARATORS[path.suffix.lower()]
        self.header, self.behind_header = "", 0
        with open(path, "rb") as file:
            for raw in file:
                self.header = decode_part(raw, self.name)
                self.behind_header += len(raw)
                if self.header.strip():
                    break
        if not self.header.strip():
            raise ValueError(f"{path} is empty")
        (columns,) = csv.reader([self.header], delimiter=self.separator)
        self.fields = kind_of(column.strip() for column in columns)
        if self.fields == MESSAGES:
            refuse_conversations(self.name)

    def cut(self, sha) -> Iterator[Block]:
        stop = 0

        def lines(file) -> Iterator[str]:
            nonlocal stop
            for number, raw in enumerate(file, 1):
                sha.update(raw)
                stop += len(raw)
                yield decode_part(raw, self.name, number)

        with open(self.path, "rb") as file:
            start = self.behind_header
            for where, values in table(lines(file), self.name, self.fields, self.separator):
                check(self.name, where, self.fields, values)
                yield Block(start, stop, 1)
                start = stop

    def read(self, start: int, stop: int) -> list[Values]:
        text = io.StringIO(decode_part(read_between(self.path, start, stop), self.name), newline="")
        lines = itertools.chain([self.header], text)
        return [values for _, values in table(lines, self.name, self.fields, self.separator)]


class RowGroups:
    """A Parquet file; a block is a row group, as large as the writer of the file made them."""

    is_text = False

    def __init__(self, path: pathlib.Path):
        self.path, self.name = path, str(path)
        self.columns = self._file().schema_arrow.names
        self.fields = kind_of(self.columns)

    def cut(self, sha) -> Iterator[Block]:
        with open(self.path, "rb") as file:
            for piece in iter(lambda: file.read(2**20), b""):
                sha.update(piece)
        file, number = self._file(), 0
        for group in range(file.num_row_groups):
            records = 0
            for values in self._rows(file, group, number):
                number, records = number + 1, records + 1
                check(self.name, f"record {number}", self.fields, values)
            if records:
                yield Block(group, group + 1, records)

    def read(self, start: int, stop: int) -> list[Values]:
        return [*self._rows(self._file(), start, 0)]

    def _file(self):
        import pyarrow
        from pyarrow import parquet

        try:
            return parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{self.name} is no Parquet file that can be read: {error}") from None

    def _rows(self, file, group: int, number: int) -> Iterator[Values]:
        import pyarrow

        # Those that are refused where something stands in them, too.
        columns = [field for field in (*self.fields, *UNREAD) if field in self.columns]
        try:
            for batch in file.iter_batches(1024, row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    where = f"record {number}"
                    yield values_of(tidied(row), self.name, where, self.fields)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{self.name} is no Parquet file that can be read: {error}") from None


class Passages:
    """A plain text; a block is some 64 KiB of it, up to the start of a line."""

    fields, is_text = TEXT, True

    def __init__(self, path: pathlib.Path):
        self.path, self.name = path, str(path)
        self.size = path.stat().st_size

    def cut(self, sha) -> Iterator[Block]:
        start = stop = 0
        blank = True
        with open(self.path, "rb") as file:
            for number, raw in enumerate(file, 1):
                sha.update(raw)
                if decode_part(raw, self.name, number).strip():
                    if not blank and stop - start >= PASSAGE:
                        yield Block(start, stop, 1)
                        start = stop
                    blank = False
                stop += len(raw)
        if blank:
            raise ValueError(f"{self.name} is empty")
        yield Block(start, stop, 1)

    def read(self, start: int, stop: int) -> list[Values]:
        text = decode_part(read_between(self.path, start, stop), self.name)
        return [(text.replace("\r\n", "\n").replace("\r", "\n"),)]
