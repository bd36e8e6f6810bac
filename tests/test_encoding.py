"""Text in files is UTF-8, whatever the locale of a run is."""

import ast
import pathlib

import pytest

import bdia_jax

PACKAGE = pathlib.Path(bdia_jax.__file__).parent
NO_TEXT = ("os", "Image")
"""Modules whose ``open`` opens no text."""


def without_encoding(code):
    """Lines that open, read or write text in the encoding of the locale."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        name, first_is_path = getattr(node.func, "attr", None), False
        if isinstance(node.func, ast.Name) and node.func.id == "open":
            name, first_is_path = "open", True
        if name == "open":
            named = {k.arg: k.value for k in node.keywords}
            modes = [*node.args[first_is_path:], named.get("mode", ast.Constant("r"))]
            of = getattr(getattr(node.func, "value", None), "id", None)
            if of in NO_TEXT or "b" in getattr(modes[0], "value", ""):
                continue
        elif name not in ("read_text", "write_text"):
            # Without a dot before them, these are our own, which know the encoding.
            continue
        found.append(node.lineno)
    return found


def test_text_is_utf8():
    found = {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        for line in without_encoding(path.read_text(encoding="utf-8"))
    }
    assert not found


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("open(path)", [1]),
        ("open(path, 'w')", [1]),
        ("open(path, mode='w+')", [1]),
        ("open(path, mode)", [1]),
        ("path.open()", [1]),
        ("path.open('a')", [1]),
        ("path.read_text()", [1]),
        ("path.write_text(text)", [1]),
        ("path.read_text(encoding='utf-8')", []),
        ("open(path, 'w', encoding='utf-8')", []),
        ("open(path, 'rb')", []),
        ("path.open('ab')", []),
        ("os.open(path, os.O_RDONLY)", []),
        ("Image.open(path)", []),
        ("read_text(path)", []),
    ],
)
def test_what_is_found(code, lines):
    assert without_encoding(code) == lines
