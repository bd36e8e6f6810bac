"""How an experiment is a command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import tyro


def run(main: Callable[[Any], Any], settings: type, description: str, *, told: int) -> None:
    """``main`` of the settings on the command line; what the user can mend is told in a line.

    ``told`` is the level of messages that are shown, such as ``logging.INFO``.
    """
    logging.basicConfig(level=told, format="%(message)s")
    # Orbax tells much by it.
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        main(tyro.cli(settings, description=description))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
