"""A result: rows, one JSON object a line; the first line says what made them.

The first line has the commit, whether the measured files were as in it (``clean``), a hash of their
code (:mod:`measure.sources`), date, device, versions, command and settings. Commands write into
runs/results, if not told to write into experiments/results, which is what pages show.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from bdia_jax import files
from measure import sources

COMMITTED = sources.ROOT / "experiments" / "results"
"""What pages show."""
FOLDER = pathlib.Path("runs/results")
"""Where commands write, if not told otherwise."""
STARTED = time.monotonic()


class Result(NamedTuple):
    """What a file holds."""

    about: dict[str, Any]
    rows: list[dict[str, Any]]


def write(
    name: str,
    rows: list[dict[str, Any]],
    depends: Iterable[str],
    *,
    settings: Any = None,
    out: pathlib.Path | None = None,
    device: str | None = None,
    note: str | None = None,
) -> pathlib.Path:
    """Writes a result; the file's path, NAME-DEVICE.jsonl.

    Args:
      name: of the table.
      rows: of JSON's types.
      depends: patterns of the files whose code decides the rows.
      settings: a dataclass.
      out: folder; None for :data:`FOLDER`.
      device: what the rows are about, if not the device that is there.
      note: what a page says under the table.
    """
    depends = [*depends]
    about = {"result": name} | made(depends) | {"depends": depends}
    if device is not None:
        about["compiled for"] = device
    if note is not None:
        about["note"] = note
    if settings is not None:
        about["settings"] = plain(settings, "out", "work")
    about["seconds"] = round(time.monotonic() - STARTED)
    path = path_of(name, out, device)
    files.write_text(path, "".join(json.dumps(line) + "\n" for line in [about, *rows]))
    return path


def path_of(name: str, out: pathlib.Path | None = None, device: str | None = None) -> pathlib.Path:
    """The file of a result; arguments as above."""
    kind = re.sub(r"[^a-z0-9]+", "-", (device or jax.devices()[0].device_kind).lower()).strip("-")
    return (out or FOLDER) / f"{name}-{kind}.jsonl"


def read(path: pathlib.Path) -> Result:
    """What :func:`write` wrote."""
    about, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return Result(about, rows)


def made(depends: Iterable[str]) -> dict[str, Any]:
    """When, where, from which code and by which command something is measured."""
    depends = [*depends]
    commit, clean = sources.commit(depends)
    return {
        "commit": commit,
        "clean": clean,
        "code": sources.digest(depends),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "command": command(),
    }


def command() -> str:
    """The command that runs, as from the repository; of files elsewhere, their names."""

    def told(word: str) -> str:
        path = pathlib.Path(word)
        if not path.is_absolute():
            return word
        inside = path.is_relative_to(sources.ROOT)
        return str(path.relative_to(sources.ROOT)) if inside else path.name

    script = pathlib.Path(sys.argv[0])
    script = script.resolve() if script.exists() else script
    return shlex.join(["python", *map(told, [str(script), *sys.argv[1:]])])


def plain(value: Any, *without: str) -> Any:
    """A dataclass, or what holds some, as it comes back from JSON; of files, their names.

    ``without`` some of its fields.
    """
    given = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    if without:
        given = {name: inner for name, inner in given.items() if name not in without}
    return json.loads(json.dumps(given, default=lambda path: getattr(path, "name", str(path))))


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, its columns aligned; a bar in a cell, as of |γ|, is no end of it."""
    header, *lines = ([re.sub(r"(?<!\\)\|", r"\\|", c) for c in line] for line in [header, *lines])
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def row(cells):
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([row(header), row(["-" * w for w in widths]), *map(row, lines)])


def as_they_are(rows: list[dict[str, Any]]) -> str:
    """A column per field."""
    names = [*dict.fromkeys(name for row in rows for name in row)]

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    return markdown(names, [[cell(row.get(name)) for name in names] for row in rows])


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    text = f"{np.mean(values):.{digits}f}"
    return text + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")
