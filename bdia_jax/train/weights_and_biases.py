"""Weights & Biases, where it is asked for: a copy of the metrics; no run depends on it."""

from __future__ import annotations

import json
import logging
import pathlib
import secrets
from typing import Any

from bdia_jax.files import write_json

log = logging.getLogger("bdia_jax")

WANDB = "wandb.json"
"""The file in a run's folder with the name that its copy has there."""


def check_installed(project: str | None) -> None:
    """An ``ImportError`` if a project is named, and the package is missing."""
    if project is None:
        return
    try:
        import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"wandb = {project!r} needs the package wandb: pip install wandb, or leave the setting "
            f"out ({error})"
        ) from error


class Project:
    """A run in a project. What goes wrong there is told once, and stops nothing."""

    def __init__(self, name: str, folder: pathlib.Path, settings: dict[str, Any]):
        """Begins the run, or goes on with the one that the folder names.

        Without a network or an account, what is told is kept in ``folder/wandb``, for ``wandb
        sync``.
        """
        import wandb  # pyright: ignore[reportMissingImports]

        given: dict[str, Any] = {
            "project": name,
            "dir": str(folder),
            "name": folder.absolute().name,
            "id": _identity(folder, name),
            "resume": "allow",
            "config": settings,
        }
        self._run = None
        try:
            try:
                self._run = wandb.init(**given)
            except Exception as error:
                log.warning(
                    "Weights & Biases cannot be reached (%s): its copy of the metrics is kept in "
                    "%s, to be sent by: wandb sync",
                    error,
                    folder / "wandb",
                )
                self._run = wandb.init(**given, mode="offline")
        except Exception as error:
            log.warning("nothing is told to Weights & Biases: %s", error)

    def write(self, values: dict[str, float], step: int) -> None:
        """Sends some values."""
        self._try(lambda run: run.log(values, step=step))

    def close(self) -> None:
        """Waits until all is sent."""
        self._try(lambda run: run.finish())
        self._run = None

    def _try(self, act) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:
            self._run = None
            log.warning("nothing more is told to Weights & Biases: %s", error)


def _identity(folder: pathlib.Path, project: str) -> str:
    """The same for all continuations of a run, as long as it stays in one project."""
    path = folder / WANDB
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["project"] == project:
                return found["id"]
        except (KeyError, TypeError, ValueError) as error:
            log.warning("%s can't be read, so the run begins anew there: %s", path, error)
    identity = secrets.token_hex(8)
    write_json(path, {"project": project, "id": identity})
    return identity
