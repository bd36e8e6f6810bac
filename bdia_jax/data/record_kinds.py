"""Kinds of records: the fields of each, and what a record of a kind must hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bdia_jax.data.json_text import json_object, unlike

MESSAGES, TEXT, PAIR = ("messages", "tools"), ("text",), ("prompt", "completion")
INSTRUCTION = ("instruction", "input", "output")
"""Fields of the kinds of records that are learned. Of instructions: as of Stanford's Alpaca."""
KINDS = (MESSAGES, PAIR, INSTRUCTION, TEXT)
OPTIONAL = ("input", "tools")
"""Fields of these that a record may lack."""
UNREAD = {
    "system": 'as a message, {{"role": "system", "content": "..."}}, in {shape}',
    "history": "as messages before the others, in {shape}",
    "chat_template_kwargs": "into the model's chat_template.jinja, whose first line may be "
    "{{% set enable_thinking = false %}}",
}
"""Fields that others have, which would be missed if they were left out; and how to write them."""
_NOTHING = ("", "[]", "{}", "null")
"""Texts of a table in which nothing stands."""


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


def wanted(fields: tuple[str, ...], given: Iterable[str]) -> str:
    """The fields of a kind, for a message; of every kind, if none is given that says which."""
    kinds = KINDS if fields == PAIR and not {*PAIR} & {*given} else (fields,)
    named = (" and ".join(f for f in kind if f not in OPTIONAL) for kind in kinds)
    return ", or ".join(named)


def tidied(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a Parquet file, whose messages have None for every key that others have."""
    return {k: _without_none(v) if k == MESSAGES[0] else v for k, v in row.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [*map(_without_none, value)] if isinstance(value, list) else value


def messages_of(value: Any, name: str, where: str) -> tuple[Any, Any]:
    """The messages of a record, as they are in the file, and its tools; None if it has none.

    Args:
      value: of the record.
      name: of the file, for messages.
      where: where in the file the record is, for messages.

    Raises:
      ValueError: for a record without messages, with tools that are no list, or with fields that
        would be left out.
    """
    if not isinstance(value, dict) or "messages" not in value:
        raise unlike(name, where, shape_of(MESSAGES), f"got {repr(value)[:80]}")
    refuse_unread(f"{name}, {where}", MESSAGES, value)
    tools = value.get("tools")
    if isinstance(tools, str):
        # As sets in Parquet have them, whose objects all have the same keys.
        tools = json_object(tools, name, where, '{"tools": [...]}') if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{name}, {where}: tools must be a list; got {repr(tools)[:80]}")
    return value["messages"], tools or None


def texts_of(value: Any, name: str, where: str, fields: tuple[str, ...]) -> tuple[str, ...]:
    """The texts of a record, in the order of ``fields``; empty where an optional one is missing.

    Args:
      value: of the record.
      name: of the file, for messages.
      where: where in the file the record is, for messages.
      fields: names of the texts.

    Raises:
      ValueError: for a record without one of them, one that is no text, a text that is not
        Unicode, or a pair or an instruction with fields that would be left out.
    """
    got, shape = repr(value)[:80], shape_of(fields)
    if fields == PAIR and isinstance(value, dict) and not {*PAIR} & {*value}:
        raise ValueError(f"{name}, {where}: a record must have {wanted(fields, value)}; got {got}")
    if not isinstance(value, dict):
        raise unlike(name, where, shape, f"got {got}")
    if missing := [f for f in fields if f not in value and f not in OPTIONAL]:
        raise unlike(name, where, shape, f"{' and '.join(missing)} is missing; got {got}")
    refuse_unread(f"{name}, {where}", fields, value)
    values = tuple(
        (value.get(field) or "") if field in OPTIONAL else value[field] for field in fields
    )
    for field, each in zip(fields, values):
        if isinstance(each, list) and fields == PAIR:
            raise ValueError(
                f"{name}, {where}: {field} is a list: write a conversation as one list, "
                f"{shape_of(MESSAGES)}; got {repr(each)[:80]}"
            )
        if not isinstance(each, str):
            raise unlike(name, where, shape, f"{field} is no text; got {repr(each)[:80]}")
        try:
            each.encode()
        except UnicodeEncodeError as error:
            half, before = each[error.start], each[: error.start][-20:]
            raise ValueError(
                f"{name}, {where}: {field} has a lone surrogate, \\u{ord(half):04x}, which is half "
                f"of a character, after {before!r}"
            ) from None
    return values


def refuse_unread(name: str, fields: tuple[str, ...], given: Mapping[str, Any]) -> None:
    """A ``ValueError`` for fields of a record that would be left out, if something is in them.

    Args:
      name: of the file, and where in it the record is.
      fields: of the record's kind.
      given: all fields of the record.
    """
    if fields not in (MESSAGES, PAIR, INSTRUCTION):
        return
    for field, how in UNREAD.items():
        if _says_something(given.get(field)):
            write = how.format(shape=shape_of(MESSAGES))
            raise ValueError(
                f"{name}: {field} would be left out: write it {write}; got "
                f"{repr(given[field])[:80]}"
            )


def _says_something(value: Any) -> bool:
    """Whether a field is more than a place for it: rows of Parquet have every field of others."""
    if isinstance(value, str):
        return value.strip() not in _NOTHING
    return bool(_without_none(value))


def shape_of(fields: tuple[str, ...]) -> str:
    """What an object in JSON with these fields looks like, for messages."""
    if fields == MESSAGES:
        return '{"messages": [{"role": "...", "content": "..."}, ...]}'
    return "{" + ", ".join(f'"{field}": "..."' for field in fields) + "}"
