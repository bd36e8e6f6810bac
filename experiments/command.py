"""How an experiment is a command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import tyro
from tqdm import tqdm


def run(main: Callable[[Any], Any], settings: type, description: str, *, told: int) -> None:
    """Runs ``main`` with the settings of the command line.

    What the user can mend is told in a line. Ctrl-C leaves with status 130, without a traceback.

    Args:
      main: takes the settings.
      settings: a dataclass.
      description: for --help.
      told: the level from which messages are shown on the terminal, such as ``logging.INFO``.
    """
    # Instead of the handler that orbax's logger may have installed when it was imported.
    logging.basicConfig(
        format="%(message)s", level=logging.WARNING, handlers=[_Terminal(told)], force=True
    )
    # Orbax tells much by it.
    logging.getLogger("absl").setLevel(logging.WARNING)
    logging.getLogger("bdia_jax").setLevel(logging.INFO)
    try:
        main(tyro.cli(settings, description=description))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt as stopped:
        print(stopped or "interrupted", file=sys.stderr)
        sys.exit(130)


class _Terminal(logging.Handler):
    """Writes messages above a progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
