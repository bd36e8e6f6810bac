"""Tables of separated values: records with a text for each column."""

from __future__ import annotations

import contextlib
import csv
import threading
from collections.abc import Iterable, Iterator

from bdia_jax.data.record_kinds import OPTIONAL, refuse_unread, wanted

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""Suffixes of tables, and what separates their columns."""


def table(
    lines: Iterable[str], name: str, fields: tuple[str, ...], separator: str
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Records of a table's lines, of which no more are taken than the records so far have.

    Args:
      lines: of the file, the first with the names of the columns.
      name: of the file, for messages.
      fields: names of the columns that are taken.
      separator: what stands between two columns.

    Yields:
      Where in the file a record is, such as ``"line 3"``, and its texts in the order of
      ``fields``; empty where an optional one is missing.

    Raises:
      ValueError: for a first line without these names; for a record of another number of columns,
        with a quote that is not doubled, or with fields that would be left out.
    """
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
                        some = wanted(fields, columns)
                        raise ValueError(
                            f"{name}: the first line must name the columns, separated by "
                            f"{separator!r}, {some} once among them; got {columns}"
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
                    refuse_unread(f"{name}, {at}", fields, dict(zip(columns, row)))
                    yield at, tuple("" if i is None else row[i] for i in where)
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
