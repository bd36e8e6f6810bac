"""TensorBoard: a copy of the metrics; no run depends on it."""

from __future__ import annotations

import logging
import os
import pathlib
import time

log = logging.getLogger("bdia_jax")


class Board:
    """A file of events. What goes wrong with it is told once, and stops nothing.

    A ``SummaryWriter`` lags by two minutes, and has a queue whose lock a second Ctrl-C may leave
    held, so that the process never ends.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        """Hides what earlier files of ``folder`` say of steps from ``step`` on."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._Event, self._Summary = event_pb2.Event, summary_pb2.Summary
        self._file = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The name has whole seconds, in which another process may have written, too.
            self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        except OSError as error:
            self._give_up(error)
        begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(self._Event(step=step, session_log=begin))

    def write(self, values: dict[str, float], step: int) -> None:
        """Adds some values, and brings them to the disk."""
        named = [self._Summary.Value(tag=name, simple_value=v) for name, v in values.items()]
        self._add(self._Event(step=step, summary=self._Summary(value=named)))

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._give_up(error)
        self._file = None

    def _add(self, event) -> None:
        if self._file is None:
            return
        event.wall_time = time.time()
        try:
            self._file.write_event(event)
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._file = None
        log.warning("nothing more is written for TensorBoard: %s", error)
