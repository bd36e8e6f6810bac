"""How a run is a command: its settings from words and files, its messages, its errors."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro
from tqdm import tqdm

from bdia_jax import command_line
from bdia_jax.train import settings_file, weights_and_biases
from bdia_jax.train.settings import TrainSettings

CONFIG = "--config"
ABOUT_CONFIG = (
    f"{CONFIG} FILE.yaml (of any run: its settings.yaml) gives defaults, which the rest of the "
    "command line overrides."
)


def run(main: Callable[[Any], Any], settings: type, description: str | None, *, told: int) -> None:
    """Runs ``main`` with the settings of the command line, and of the file after ``--config``.

    A run in the folder ``out`` keeps the settings there, as settings.yaml. What the user can mend
    is told in a line. Ctrl-C leaves with status 130, without a traceback.

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
        given = read(settings, sys.argv[1:], description)
        if isinstance(out := getattr(given, "out", None), pathlib.Path):
            given = dataclasses.replace(given, out=out.expanduser())
        _check_wandb(given)
        with _kept(given):
            main(given)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt as stopped:
        print(stopped or "interrupted", file=sys.stderr)
        sys.exit(130)


def read(settings: type, arguments: Sequence[str], description: str | None = None) -> Any:
    """The settings that a command line gives."""
    path, rest = config_of(arguments)
    default = {}
    if path is not None:
        default["default"] = settings_file.read_defaults(path, settings, tyro.MISSING)
    about = f"{(description or '').rstrip()}\n\n{ABOUT_CONFIG}"
    return command_line.parse(settings, rest, about, **default)


def config_of(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file after ``--config``, if there is one, and the other arguments."""
    paths, rest, left = [], [], iter(arguments)
    for argument in left:
        if argument == CONFIG:
            paths.append(next(left, ""))
        elif argument.startswith(f"{CONFIG}="):
            paths.append(argument.removeprefix(f"{CONFIG}="))
        else:
            rest.append(argument)
    if paths and (len(paths) > 1 or not paths[0] or paths[0].startswith("--")):
        raise ValueError(f"{CONFIG} must be given once, with a file; got {' '.join(paths) or '-'}")
    return (paths[0] if paths else None), rest


@contextlib.contextmanager
def _kept(given: Any) -> Iterator[None]:
    """Has a run in the folder ``out`` keep the settings."""
    out = getattr(given, "out", None)
    if not isinstance(out, pathlib.Path):
        yield
        return
    again = f"The same run: {command_line.program()} {CONFIG} THIS_FILE --out ANOTHER_FOLDER"
    with settings_file.kept_in(out, given, again):
        yield


def _check_wandb(given: Any) -> None:
    """An error now, rather than when the data and the model are there."""
    for value in vars(given).values():
        if isinstance(value, TrainSettings):
            weights_and_biases.check_installed(value.wandb)


class _Terminal(logging.Handler):
    """Writes messages above a progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
