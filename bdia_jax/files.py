"""Files that are there whole, or not at all; and that are where they seem to be."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes beside ``path``, then renames: there is never half a file."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """As :func:`write_json`, for text."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def leads_out(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path | None:
    """Where a symbolic link in ``folder`` leads, if that is not inside; otherwise None.

    In the cache of ``huggingface_hub``, a model's folder has links to its blobs, and these may be
    links to the blobs of all models. Those are taken to be inside.
    """
    real, home = path.resolve(), folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        model = home.parent.parent
        allowed += [model / "blobs", model.parent / "blobs"]
    return None if any(real.is_relative_to(place) for place in allowed) else real
