"""Records with named fields, from JSON, JSON lines, tables of separated values, or Parquet."""

from __future__ import annotations

import csv
import io
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bdia_jax.data.json_text import json_document, json_lines
from bdia_jax.data.reading import RECORDS, decode, read_bytes
from bdia_jax.data.record_kinds import MESSAGES, messages_of, shape_of, texts_of, tidied
from bdia_jax.data.tables import SEPARATORS, table


class Record(NamedTuple):
    """The fields of a record that were asked for, and where in the file they are."""

    where: str
    """For messages: ``"line 3"``, or ``"record 3"`` of a list."""
    values: tuple[str, ...]
    """Empty where an optional field is missing."""


class Conversation(NamedTuple):
    """What a record says of a conversation, and where in the file it is."""

    where: str
    messages: Any
    """As it is in the file; :func:`bdia_jax.data.conversation` checks it."""
    tools: Any = None
    """Descriptions of the tools that the model may call, as they are in the file."""


def read_records(path: str | os.PathLike, fields: Sequence[str]) -> list[Record]:
    """Reads the records of a file, in the format that its suffix names (in upper or lower case).

    - ``.jsonl`` and ``.ndjson``: a JSON object per line; blank lines do not count.
    - ``.json``: a list of objects, or one, or an object per line.
    - ``.csv`` and ``.tsv``: a first line with the names of the columns, then a record per line,
      separated by commas or tabs; a text with a separator, a quote or a line end in it is quoted
      (RFC 4180).
    - ``.parquet``: a row per record, by pyarrow.

    Args:
      path: the file, of text in UTF-8.
      fields: names of the fields that each record must have, as texts. Others are left out.

    Raises:
      FileNotFoundError, IsADirectoryError, PermissionError: if it cannot be opened.
      ValueError: for another suffix, a record without these fields, one that is damaged or cut
        off, or a file without records.
    """
    return parse_records(read_bytes(path), str(pathlib.Path(path).expanduser()), fields)


def parse_records(raw: bytes, name: str, fields: Sequence[str]) -> list[Record]:
    """The records of a file whose contents were read already, say from an archive.

    Args:
      raw: the contents, as they would be in the file.
      name: of the file; its suffix names the format, as in :func:`read_records`.
      fields: names of the fields that each record must have, as texts. Others are left out.

    Raises:
      ValueError: as :func:`read_records`.
    """
    suffix, fields = _suffix(name), tuple(fields)
    if suffix in SEPARATORS:
        lines = io.StringIO(decode(raw, name), newline="")
        found = table(lines, name, fields, SEPARATORS[suffix])
    else:
        objects = _objects(raw, name, shape_of(fields))
        found = ((where, texts_of(value, name, where, fields)) for where, value in objects)
    if not (records := [Record(where, values) for where, values in found]):
        raise ValueError(f"{name} has no records")
    return records


def read_conversations(path: str | os.PathLike) -> list[Conversation]:
    """Conversations of a file of records that have ``messages``, and perhaps ``tools``.

    Args:
      path: as in :func:`read_records`, but for tables of separated values.

    Raises:
      FileNotFoundError, IsADirectoryError, PermissionError: if it cannot be opened.
      ValueError: for another suffix, a record without messages, one that is damaged or cut off, or
        a file without records.
    """
    name = str(pathlib.Path(path).expanduser())
    refuse_conversations(name)
    found = []
    for where, value in _objects(read_bytes(path), name, shape_of(MESSAGES)):
        found.append(Conversation(where, *messages_of(value, name, where)))
    if not found:
        raise ValueError(f"{name} has no records")
    return found


def refuse_conversations(name: str) -> None:
    """A ``ValueError`` for a table of separated values, which has no lists."""
    if (suffix := _suffix(name)) in SEPARATORS:
        allowed = ", ".join(each for each in RECORDS if each not in SEPARATORS)
        raise ValueError(f"{name}: conversations must be in {allowed}; got {suffix!r}")


def fields_of_first(path: str | os.PathLike) -> tuple[str, ...]:
    """The fields of a file's first record, by which its kind is known; none if it has no such.

    Raises:
      FileNotFoundError, IsADirectoryError, PermissionError: if it cannot be opened.
      ValueError: for no text.
    """
    name = str(pathlib.Path(path).expanduser())
    if (suffix := _suffix(name)) in SEPARATORS:
        text = decode(read_bytes(path), name)
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=SEPARATORS[suffix])
        try:
            return tuple(column.strip() for column in next(rows, []))
        except csv.Error:
            # The reader of records says what is wrong.
            return ()
    try:
        _, value = next(_objects(read_bytes(path), name, ""), ("", None))
    except ValueError:
        return ()
    return tuple(value) if isinstance(value, dict) else ()


def _suffix(name: str) -> str:
    suffix = pathlib.Path(name).suffix.lower()
    if suffix not in RECORDS:
        raise ValueError(f"{name}: the suffix must be one of {', '.join(RECORDS)}; got {suffix!r}")
    return suffix


def _objects(raw: bytes, name: str, shape: str) -> Iterator[tuple[str, Any]]:
    """Values of a file without columns in its text, and where they are, such as ``"line 3"``."""
    suffix = _suffix(name)
    if suffix == ".parquet":
        return _parquet(raw, name)
    text = decode(raw, name)
    return (json_document if suffix == ".json" else json_lines)(text, name, shape)


def _parquet(raw: bytes, name: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(raw))
        rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"record {number}", tidied(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name} is no Parquet file that can be read: {error}") from None
