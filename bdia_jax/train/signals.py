"""Ctrl-C and SIGTERM: a run that is asked to stop saves first."""

from __future__ import annotations

import os
import signal
import threading

EXIT_TERMINATED = 143
"""Exit status after SIGTERM (128 + 15): the state was saved, and the run can be resumed.

For one process; several would have to agree on the step.
"""


class Stop:
    """Whether the run is asked to stop; while it is entered, a first signal only sets it."""

    def __init__(self):
        self._signal: int | None = None

    def __bool__(self) -> bool:
        return self._signal is not None

    def leave(self, step: int) -> None:
        """Leaves as the signal asks, if there was one.

        Raises:
          SystemExit: with :data:`EXIT_TERMINATED`, after SIGTERM.
          KeyboardInterrupt: after Ctrl-C.
        """
        if self._signal == signal.SIGTERM:
            raise SystemExit(EXIT_TERMINATED)
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt(f"stopped at step {step}, which is saved: resume to go on")

    def __enter__(self) -> Stop:
        # Handlers can be set in the main thread only; elsewhere signals have their usual effect.
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if self:
            _say(f"{name} again: leaving at once")
            self._restore()
            signal.raise_signal(number)
            return
        self._signal = number
        _say(f"{name}: saving, then leaving (again: leaving at once)")

    def __exit__(self, *_) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}


def _say(text: str) -> None:
    """To standard error, past Python's files and logs, on a line of its own below a bar.

    A signal may come while one of these is being written, which cannot be written to again then:
    the line would be lost.
    """
    try:
        os.write(2, f"\n{text}\n".encode())
    except OSError:
        # Nobody reads it.
        return
