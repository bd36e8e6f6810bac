"""Records with named fields, from JSON, JSON lines, tables of separated values, or Parquet."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import pathlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bdia_jax.data.reading import RECORDS, decode, read_bytes


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
    """Likewise: descriptions of the tools that the model may call."""


SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""Suffixes of tables, and what separates their columns."""

MESSAGES, TEXT, PAIR = ("messages", "tools"), ("text",), ("prompt", "completion")
INSTRUCTION = ("instruction", "input", "output")
"""Fields of the kinds of records that are learned. Of instructions: as of Stanford's Alpaca."""
OPTIONAL = ("input", "tools")
"""Fields of these that a record may lack."""
UNREAD = ("system", "history")
"""Fields that others give instructions, and that would be missed if they were left out."""


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
    """The same, of contents that were read already, say from an archive."""
    suffix, fields = _suffix(name), tuple(fields)
    if suffix in SEPARATORS:
        lines = io.StringIO(decode(raw, name), newline="")
        records = [*table(lines, name, fields, SEPARATORS[suffix])]
    else:
        shape = _shape(fields)
        records = [
            Record(where, texts_of(value, name, where, fields))
            for where, value in _objects(raw, name, shape)
        ]
    if not records:
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
    shape = _shape(MESSAGES)
    found = []
    for where, value in _objects(read_bytes(path), name, shape):
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


def kind_of(fields: Iterable[str]) -> tuple[str, ...]:
    """What a record with these fields is; a pair, if it has none that say so.

    Sets in Alpaca's format may have ``text``, too: the same once more, in its words.
    """
    fields = {*fields}
    if "messages" in fields:
        return MESSAGES
    if fields & {*PAIR}:
        return PAIR
    for kind in (INSTRUCTION, TEXT):
        if fields >= {*kind} - {*OPTIONAL}:
            return kind
    return PAIR


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
    return _json(text, name, shape) if suffix == ".json" else _json_lines(text, name, shape)


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


def _json_lines(text: str, name: str, shape: str) -> Iterator[tuple[str, Any]]:
    # Only "\n" ends a line: str.splitlines() would also split at characters that JSON allows in
    # texts, such as U+2028.
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        line = bare(line)
        if not line:
            continue
        where = f"line {number}"
        yield where, json_object(line, name, where, shape, is_last=number == len(lines))


def bare(line: str) -> str:
    """A line without white space around it, and without a mark before it."""
    # Files that were put together may each have begun with a byte-order mark.
    return line.strip().removeprefix("\ufeff")


def json_object(line: str, name: str, where: str, shape: str, *, is_last: bool = False) -> Any:
    """The value of a line in JSON; an error says where it stands, and what is allowed there."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        cut = "; the file ends in this line: is it cut off?" if is_last else ""
        raise _unlike(name, where, shape, f"{_reason(error)}{cut}; got {line[:80]!r}") from None


def _json(text: str, name: str, shape: str) -> Iterator[tuple[str, Any]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise ValueError(
                f"{name} must be a list of objects in JSON, or an object per line; "
                f"{_reason(error, lines=True)}"
            ) from None
        yield from _json_lines(text, name, shape)
        return
    for number, each in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"record {number}", each


def tidied(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a Parquet file, whose messages have None for every key that others have."""
    return {k: _without_none(v) if k == MESSAGES[0] else v for k, v in row.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [*map(_without_none, value)] if isinstance(value, list) else value


def messages_of(value: Any, name: str, where: str) -> tuple[Any, Any]:
    """The messages of a record, as they are in the file, and its tools; None if it has none."""
    if not isinstance(value, dict) or "messages" not in value:
        raise _unlike(name, where, _shape(MESSAGES), f"got {repr(value)[:80]}")
    tools = value.get("tools")
    if isinstance(tools, str):
        # As sets in Parquet have them, whose objects all have the same keys.
        tools = json_object(tools, name, where, '{"tools": [...]}') if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{name}, {where}: tools must be a list; got {repr(tools)[:80]}")
    return value["messages"], tools or None


def texts_of(value: Any, name: str, where: str, fields: tuple[str, ...]) -> tuple[str, ...]:
    """The texts of a record, in the order of ``fields``."""
    got, shape = repr(value)[:80], _shape(fields)
    if not isinstance(value, dict):
        raise _unlike(name, where, shape, f"got {got}")
    if missing := [f for f in fields if f not in value and f not in OPTIONAL]:
        raise _unlike(name, where, shape, f"{' and '.join(missing)} is missing; got {got}")
    refuse_unread(f"{name}, {where}", fields, (field for field in value if value[field]))
    values = tuple(
        (value.get(field) or "") if field in OPTIONAL else value[field] for field in fields
    )
    for field, each in zip(fields, values):
        if not isinstance(each, str):
            raise _unlike(name, where, shape, f"{field} is no text; got {repr(each)[:80]}")
        try:
            each.encode()
        except UnicodeEncodeError as error:
            half, before = each[error.start], each[: error.start][-20:]
            raise ValueError(
                f"{name}, {where}: {field} has a lone surrogate, \\u{ord(half):04x}, which is half "
                f"of a character, after {before!r}"
            ) from None
    return values


def refuse_unread(name: str, fields: tuple[str, ...], given: Iterable[str]) -> None:
    """A ``ValueError`` for fields of an instruction that would be left out."""
    if fields == INSTRUCTION and (unread := {*UNREAD} & {*given}):
        raise ValueError(
            f"{name}: {' and '.join(sorted(unread))} of an instruction would be left out: write it "
            f"as {_shape(MESSAGES)}"
        )


def table(
    lines: Iterable[str], name: str, fields: tuple[str, ...], separator: str
) -> Iterator[Record]:
    """Records of a table's lines, of which no more are taken than the records so far have."""
    # The line ends are the reader's to judge: they may be part of a text.
    rows = csv.reader(lines, delimiter=separator, strict=True)
    with _any_length():
        columns: list[str] | None = None
        try:
            for row in rows:
                if not row:
                    continue
                if columns is None:
                    columns = [column.strip() for column in row]
                    needed = [f for f in fields if f not in OPTIONAL or f in columns]
                    if any(columns.count(field) != 1 for field in needed):
                        raise ValueError(
                            f"{name}: the first line must name the columns, separated by "
                            f"{separator!r}, {' and '.join(needed)} once among them; got {columns}"
                        )
                    where = [columns.index(f) if f in needed else None for f in fields]
                elif len(row) != len(columns):
                    raise ValueError(
                        f"{name}, line {rows.line_num}: {len(row)} columns, where the first line "
                        f"names {len(columns)}; a text with {separator!r} or a line end in it must "
                        f"be quoted; got {repr(row)[:80]}"
                    )
                else:
                    at = f"line {rows.line_num}"
                    refuse_unread(f"{name}, {at}", fields, itertools.compress(columns, row))
                    yield Record(at, tuple("" if i is None else row[i] for i in where))
        except csv.Error as error:
            raise ValueError(
                f'{name}, line {rows.line_num}: {error}; a text with " in it must be quoted, each '
                '" in it doubled'
            ) from None


_lock, _limits = threading.Lock(), []
"""What the limit was when each that reads began; below all, what it was before."""


@contextlib.contextmanager
def _any_length() -> Iterator[None]:
    """The csv module reads texts of any length, not only of up to 131,072 characters."""
    with _lock:
        _limits.append(csv.field_size_limit(2**31 - 1))
    try:
        yield
    finally:
        # Others may read still, in threads of their own: the last one sets it back.
        with _lock:
            before = _limits.pop()
            if not _limits:
                csv.field_size_limit(before)


def _shape(fields: tuple[str, ...]) -> str:
    if fields == MESSAGES:
        return '{"messages": [{"role": "...", "content": "..."}, ...]}'
    return "{" + ", ".join(f'"{field}": "..."' for field in fields) + "}"


def _unlike(name: str, where: str, shape: str, why: str) -> ValueError:
    unit = where.partition(" ")[0]
    return ValueError(f"{name}, {where}: each {unit} must be {shape}; {why}")


def _reason(error: Exception, lines: bool = False) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if lines else ""
        return f"no JSON ({error.msg}: {line}column {error.colno})"
    return "no JSON that can be read (nested too deeply, or a number too long)"
