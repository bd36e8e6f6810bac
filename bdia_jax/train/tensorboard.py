"""TensorBoard: a copy of the metrics; no run depends on it."""

from __future__ import annotations

import logging
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger("bdia_jax")


class Board:
    """A file of events. What goes wrong with it is told once, and stops nothing.

    A ``SummaryWriter`` lags by two minutes, and has a queue whose lock a second Ctrl-C may leave
    held, so that the process never ends.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        """Hides what earlier files of ``folder`` say of steps from ``step`` on."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        # Its classes are made when it is imported.
        module: Any = event_pb2
        self._event: Callable[..., Any] = module.Event
        self._file = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The name has whole seconds, in which another process may have written, too.
            self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        except OSError as error:
            self._give_up(error)
        self._add(step, session_log={"status": "START"})

    def write(self, values: dict[str, float], step: int) -> None:
        """Adds some values, and brings them to the disk."""
        named = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._add(step, summary={"value": named})

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._give_up(error)
        self._file = None

    def _add(self, step: int, **said: Any) -> None:
        if self._file is None:
            return
        try:
            self._file.write_event(self._event(step=step, wall_time=time.time(), **said))
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._file = None
        log.warning("nothing more is written for TensorBoard: %s", error)
