"""How experiments keep what they measured: a JSON file per experiment and device; tables."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import re
from typing import Any

import jax

from bdia_jax import files

FOLDER = pathlib.Path(__file__).resolve().parent / "results"


def device_slug() -> str:
    """The kind of the first device, as a part of a file name."""
    return slug(jax.devices()[0].device_kind)


def slug(kind: str) -> str:
    """A kind of device, as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def write(
    experiment: str,
    settings: Any,
    found: dict[str, Any],
    folder: pathlib.Path | None,
    device: str | None = None,
) -> pathlib.Path:
    """Writes ``found``, what it was run on and with which settings; returns the file's path.

    The file is named after the experiment and ``device``, by default the first that is there.
    """
    path = (folder or FOLDER) / f"{experiment}-{slug(device) if device else device_slug()}.json"
    asked = dataclasses.asdict(settings)
    for name in ("out", "work"):
        asked.pop(name, None)
    # Of files, their names: where they lay says nothing to anybody else.
    asked = json.loads(json.dumps(asked, default=lambda path: path.name))
    files.write_json(path, machine() | {"settings": asked} | found)
    return path


def machine() -> dict[str, Any]:
    """What something is run on."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its columns aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells):
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])
