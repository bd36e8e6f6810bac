"""Where experiments put what they measured: one JSON file per experiment and device."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import platform
import re
from typing import Any

import jax

from bdia_jax.train import metrics

FOLDER = pathlib.Path(__file__).resolve().parent / "results"


def device_slug() -> str:
    """The kind of the first device, as a part of a file name."""
    kind = jax.devices()[0].device_kind
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def write(experiment: str, settings: Any, found: dict[str, Any], folder: pathlib.Path | None):
    """Writes ``found``, what it was run on and with which settings; returns the file's path."""
    path = (folder or FOLDER) / f"{experiment}-{device_slug()}.json"
    asked = {name: value for name, value in dataclasses.asdict(settings).items() if name != "out"}
    metrics.write_json(path, machine() | {"settings": asked} | found)
    return path


def machine() -> dict[str, Any]:
    """What something is run on."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
