"""A command line made of a dataclass, by tyro."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from unittest import mock

import docstring_parser
import tyro

T = TypeVar("T")


def parse(
    settings: type[T], arguments: Sequence[str] | None, description: str | None, **options: Any
) -> T:
    """The settings that a command line gives, or ``--help``.

    Args:
      settings: a dataclass, whose fields have docstrings.
      arguments: words; None for those of the process.
      description: for ``--help``.
      **options: more of tyro's.
    """
    options = {"prog": program()} | options
    # tyro takes an indented line of a field's docstring for a paragraph of its own.
    with mock.patch.object(docstring_parser, "parse_from_object", _unwrapped):
        return tyro.cli(settings, args=arguments, description=description, **options)


def program() -> str:
    """How the program that runs is called on a command line."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is None:
        return f"python {shlex.quote(sys.argv[0])}"
    return f"python -m {module.name.removesuffix('.__main__')}"


def _unwrapped(
    of: Any, parse: Callable[[Any], docstring_parser.Docstring] = docstring_parser.parse_from_object
) -> docstring_parser.Docstring:
    """The docstrings of a class and its fields, with a line for each paragraph."""
    found = parse(of)
    for entry in found.meta:
        if entry.description is not None:
            text = inspect.cleandoc(entry.description)
            entry.description = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    return found
