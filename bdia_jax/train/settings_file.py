"""The settings of a command as a YAML file, which starts the same command.

Settings are dataclasses of numbers, texts, paths, tuples, dicts, choices (``Literal``), ``None``,
and other such dataclasses. YAML has no tuples and paths: they are written as lists and texts, and
come back as what the fields are declared to be.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
import enum
import pathlib
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar, Union

import yaml

from bdia_jax.files import write_text

NAME = "settings.yaml"
T = TypeVar("T")


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def to_yaml(settings: Any) -> str:
    """The settings, a dataclass, as YAML; in the order of their fields."""
    return yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True, width=100)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {_plain(key): _plain(of_key) for key, of_key in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(f"settings are numbers, texts, paths and the like; got {value!r}")


_kept: contextvars.ContextVar[tuple[pathlib.Path, str] | None] = contextvars.ContextVar(
    "kept", default=None
)


@contextlib.contextmanager
def kept_in(folder: pathlib.Path, settings: Any, first_line: str) -> Iterator[None]:
    """A run that is made in this very folder keeps these settings there, as settings.yaml."""
    text = f"# {first_line}\n{to_yaml(settings)}"
    token = _kept.set((pathlib.Path(folder).expanduser().resolve(), text))
    try:
        yield
    finally:
        _kept.reset(token)


def write_kept(folder: pathlib.Path) -> None:
    """Writes what :func:`kept_in` was given for a folder, if anything."""
    kept = _kept.get()
    if kept is not None and kept[0] == folder.resolve():
        write_text(folder / NAME, kept[1])


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def read_settings(path: str | pathlib.Path, kind: type[T]) -> T:
    """The settings in a file that :func:`to_yaml` made; what is left out has its default.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a file that is not YAML, keys that are no settings, values of another kind,
        settings that are missing, and settings that do not fit together.
    """

    def made(of: type, values: dict[str, Any]) -> Any:
        if missing := [name for name, value in values.items() if value is dataclasses.MISSING]:
            raise ValueError(f"{path} must have {', '.join(missing)}")
        return of(**values)

    return _Reader(pathlib.Path(path), made, dataclasses.MISSING).read(kind)


def read_defaults(path: str | pathlib.Path, kind: type[T], missing: Any) -> T:
    """As :func:`read_settings`, to be completed: nothing is checked that others could mend.

    Args:
      path: of the file.
      kind: a dataclass; what comes back is one without ``__init__`` having been called.
      missing: the value of what has no default, and is not in the file.
    """

    def made(of: type, values: dict[str, Any]) -> Any:
        found = object.__new__(of)
        for name, value in values.items():
            object.__setattr__(found, name, value)
        return found

    return _Reader(pathlib.Path(path), made, missing).read(kind)


class _EachOnce(yaml.SafeLoader):
    """Refuses a key that is given twice, of which the last would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[0]!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


@dataclasses.dataclass
class _Reader:
    path: pathlib.Path
    make: Callable[[type, dict[str, Any]], Any]
    """Makes a dataclass of the values of its fields."""
    missing: Any

    def read(self, kind: type[T]) -> T:
        path = self.path.expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {self.path} with settings")
        try:
            found = yaml.load(path.read_text(encoding="utf-8"), _EachOnce)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} is not YAML: {error}") from error
        return self.record(kind, {} if found is None else found, None, "")

    def record(self, kind: Any, found: Any, base: Any, name: str) -> Any:
        """A dataclass; ``base`` has what is not in the file, or is None."""
        fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
        if not isinstance(found, dict):
            raise self.wrong(name, f"settings ({', '.join(fields)})", found)
        for key in found:
            if key not in fields:
                raise self.unknown(str(key), [*fields], name)
        hints = typing.get_type_hints(kind)
        values = {}
        for key, field in fields.items():
            default = self.default(field) if base is None else getattr(base, key)
            if key in found:
                within = f"{name}.{key}".lstrip(".")
                values[key] = self.value(hints[key], found[key], default, within)
            else:
                values[key] = default
        return self.make(kind, values)

    def default(self, field: dataclasses.Field) -> Any:
        if field.default is not dataclasses.MISSING:
            return field.default
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
        return self.missing

    def value(self, hint: Any, found: Any, default: Any, name: str) -> Any:
        """What a value of YAML stands for, where ``hint`` is declared."""
        kind, inner = typing.get_origin(hint), typing.get_args(hint)
        if kind in (Union, types.UnionType):
            return self.one_of(inner, found, default, name)
        if kind is typing.Annotated:
            return self.value(inner[0], found, default, name)
        if dataclasses.is_dataclass(hint):
            base = default if isinstance(default, typing.cast(type, hint)) else None
            return self.record(hint, found, base, name)
        if kind is tuple or kind is list:
            return self.several(kind, inner, found, name)
        if kind is dict and isinstance(found, dict):
            return {
                self.value(inner[0], key, None, f"{name}.{key}"): self.value(
                    inner[1], value, None, f"{name}.{key}"
                )
                for key, value in found.items()
            }
        fits, value = _simple(hint, found)
        if not fits:
            raise self.wrong(name, allowed(hint), found)
        return value

    def one_of(self, hints: tuple[Any, ...], found: Any, default: Any, name: str) -> Any:
        records = [hint for hint in hints if dataclasses.is_dataclass(hint)]
        if len(records) == 1 and isinstance(found, dict):
            # What is wrong within it is told better there.
            return self.value(records[0], found, default, name)
        # A text can be a number (1e-3, to YAML) or a choice; it is most likely what it says.
        for hint in sorted(hints, key=lambda hint: hint is str or hint is pathlib.Path):
            with contextlib.suppress(ValueError):
                return self.value(hint, found, default, name)
        raise self.wrong(name, ", or ".join(map(allowed, hints)), found)

    def several(self, kind: type, inner: tuple[Any, ...], found: Any, name: str) -> Any:
        if not isinstance(found, list):
            raise self.wrong(name, allowed(kind[inner]), found)  # pyright: ignore
        hints = inner[:1] * len(found) if kind is list or inner[1:] == (...,) else inner
        if len(hints) != len(found):
            raise self.wrong(name, f"a list of {len(hints)}", found)
        return kind(
            self.value(hint, item, None, f"{name}[{i}]")
            for i, (hint, item) in enumerate(zip(hints, found, strict=True))
        )

    def wrong(self, name: str, right: str, found: Any) -> ValueError:
        what = f"{name} must be" if name else "the file must have"
        return ValueError(f"{self.path}: {what} {right}; got {found!r}")

    def unknown(self, key: str, fields: list[str], name: str) -> ValueError:
        near = difflib.get_close_matches(key.replace("-", "_"), fields, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        return ValueError(
            f"{self.path}: there is no setting {f'{name}.{key}'.lstrip('.')}{meant}; there are "
            f"{', '.join(fields)}"
        )


def _simple(hint: Any, found: Any) -> tuple[bool, Any]:
    """Whether a value is of a type without parts, and the value."""
    if hint is Any:
        return True, found
    if hint is None or hint is type(None):
        return found is None, None
    if typing.get_origin(hint) is Literal:
        # True is no 1 here.
        same = [v for v in typing.get_args(hint) if v == found and type(v) is type(found)]
        return bool(same), found
    if hint is float:
        if isinstance(found, str):
            # YAML takes 1e-3 for a text: it wants 1.0e-3.
            with contextlib.suppress(ValueError):
                return True, float(found)
            return False, None
        number = isinstance(found, int | float) and not isinstance(found, bool)
        return number, float(found) if number else None
    if isinstance(hint, type) and issubclass(hint, pathlib.PurePath):
        return isinstance(found, str), hint(found) if isinstance(found, str) else None
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        named = isinstance(found, str) and found in hint.__members__
        return named, hint[found] if named else None
    return type(found) is hint, found


def allowed(hint: Any) -> str:
    """What a value may be, in words."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (Union, types.UnionType):
        return ", or ".join(map(allowed, inner))
    if kind is typing.Annotated:
        return allowed(inner[0])
    if kind is Literal:
        return " or ".join(map(str, inner))
    if kind in (tuple, list):
        return f"a list, each {allowed(inner[0])}" if inner else "a list"
    if kind is dict or dataclasses.is_dataclass(hint):
        return "names with values"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " or ".join(hint.__members__)
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text (in quotes, if it looks like a number)",
        pathlib.Path: "a path",
        type(None): "null",
    }
    return words.get(hint, str(hint))
