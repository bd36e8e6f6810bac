"""How fast a run is, and how long it will take: by the clock alone, the device is not asked."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

COUNTED = {"sequences": "tokens"}
"""What the weights of a batch count, by the unit of a task, where that is not the unit itself. Of
text, these are the tokens that are learned, without prompts and padding."""


class Pace:
    """The time of steps, evaluations, checkpoints and compilation left out."""

    def __init__(self, unit: str, batch_size: int, spent: float):
        """``spent``: seconds that the run took before it was resumed."""
        self.unit, self.batch_size = unit, batch_size
        self.times: list[float] = []
        """Seconds per step, from line to line."""
        self._lap: tuple[float, int] | None = None
        """When, and at which step, the time of the steps to come began; None before the first."""
        self._first: tuple[float, int] | None = None
        """The same of what the time left is told by."""
        self._began = time.monotonic() - spent

    @property
    def has_begun(self) -> bool:
        """Whether this call's first step was taken, and is not timed any more."""
        return self._first is not None

    def begin(self, step: int) -> None:
        """From now on, time is that of steps again; ``step`` is the last that was taken."""
        self._lap = time.monotonic(), step
        self._first = self._first or self._lap

    def forget(self) -> None:
        """What took time so far tells nothing about the time left: much of it was compilation."""
        self._first = self._lap

    def lap(self, step: int, weights: Sequence[float]) -> dict[str, float]:
        """Samples, and what their weights count, per second since :meth:`begin`.

        Args:
          step: the last that was taken.
          weights: of the steps' batches, the last one last; there may be more than is timed.
        """
        if self._lap is None or step <= self._lap[1]:
            return {}
        began, first = self._lap
        seconds, steps = max(time.monotonic() - began, 1e-9), step - first
        self.times.append(seconds / steps)
        found = {"per_second": self.batch_size * steps / seconds}
        if self.unit in COUNTED:
            learned = float(np.sum(weights[-steps:]))
            found[f"{COUNTED[self.unit]}_per_second"] = learned / seconds
        return found

    def left(self, step: int, end: int) -> float | None:
        """Seconds until a step, at the rate since :meth:`forget`, evaluations included."""
        if self._first is None or step <= self._first[1]:
            return None
        began, first = self._first
        return (time.monotonic() - began) / (step - first) * (end - step)

    def seconds(self) -> float:
        """Of the run, over all continuations."""
        return time.monotonic() - self._began

    def seconds_per_step(self) -> float:
        """Median; NaN if no step was timed."""
        return float(np.median(self.times)) if self.times else float("nan")
