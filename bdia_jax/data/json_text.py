"""JSON in files, by line or as a whole: an error says where it is, and what is allowed there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def json_lines(text: str, name: str, shape: str) -> Iterator[tuple[str, Any]]:
    """The value of every line that is not blank, and where it is, such as ``"line 3"``.

    Args:
      text: the contents of the file.
      name: of the file, for messages.
      shape: what a line must hold, for messages.

    Raises:
      ValueError: for a line that is no JSON.
    """
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
    """A line without white space around it, and without a byte-order mark before it."""
    # Files that were put together may each have begun with a byte-order mark.
    return line.strip().removeprefix("\ufeff")


def json_object(line: str, name: str, where: str, shape: str, *, is_last: bool = False) -> Any:
    """The value of a line in JSON.

    Args:
      line: with nothing but the value in it.
      name: of the file, for messages.
      where: where in the file the line is, for messages.
      shape: what it must hold, for messages.
      is_last: whether the file ends in this line, which may then be cut off.

    Raises:
      ValueError: for a line that is no JSON.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        cut = "; the file ends in this line: is it cut off?" if is_last else ""
        raise unlike(name, where, shape, f"{_reason(error)}{cut}; got {line[:80]!r}") from None


def json_document(text: str, name: str, shape: str) -> Iterator[tuple[str, Any]]:
    """The values of a list, or the only one, and where they are, such as ``"record 3"``.

    A text that is no JSON as a whole is read by line, unless it begins as a list.

    Args:
      text: the contents of the file.
      name: of the file, for messages.
      shape: what a record must be, for messages.

    Raises:
      ValueError: for a list that is no JSON, or else for a line that is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise ValueError(
                f"{name} must be a list of objects in JSON, or an object per line; "
                f"{_reason(error, lines=True)}"
            ) from None
        yield from json_lines(text, name, shape)
        return
    for number, each in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"record {number}", each


def unlike(name: str, where: str, shape: str, why: str) -> ValueError:
    """The error for a line or a record that is not of the shape that it must have."""
    unit = where.partition(" ")[0]
    return ValueError(f"{name}, {where}: each {unit} must be {shape}; {why}")


def _reason(error: Exception, lines: bool = False) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if lines else ""
        return f"no JSON ({error.msg}: {line}column {error.colno})"
    return "no JSON that can be read (nested too deeply, or a number too long)"
