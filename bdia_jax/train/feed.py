"""Batches that the host feeds: made ahead, while the device computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from bdia_jax.train.tasks import FED, Fed, Task

AHEAD = 512
"""Samples that are made ahead: twice what is packed at a time, so that a step need not wait for
it."""


class Feed:
    """What a task feeds to the steps of a run, one after the other, made ahead in a thread."""

    def __init__(self, task: Fed, size: int, position: Any = None):
        """``position``: where the next step's samples begin; None for the first."""
        self.task, self.size = task, size
        self.position = task.start() if position is None else position
        """Where the samples begin that were not taken yet; of JSON's types, saved with a state."""
        self._made: queue.Queue[Any] = queue.Queue(max(1, AHEAD // size))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._make, args=(self.position,), daemon=True)
        self._thread.start()

    def take(self) -> PyTree[np.ndarray]:
        """What the next step is fed; an error in making it is raised here."""
        made = self._made.get()
        if isinstance(made, BaseException):
            # For whoever asks again: nothing more will be made.
            self._made.put(made)
            raise made
        fed, self.position = made
        return fed

    def close(self, wait: bool = True) -> None:
        """Ends the thread, when it has made what it is making."""
        self._closed.set()
        if wait:
            self._thread.join()

    def _make(self, position: Any) -> None:
        try:
            while not self._closed.is_set():
                fed, position = self.task.feed(position, self.size)
                self._put((fed, position))
        except BaseException as error:
            self._put(error)

    def _put(self, made: Any) -> None:
        while not self._closed.is_set():
            try:
                return self._made.put(made, timeout=0.1)
            except queue.Full:
                continue


def first_batches(task: Task, key: Key[Array, ""], size: int, count: int) -> Iterator[Any]:
    """The batches of the first steps, for measurements before a run."""
    arrays = jax.device_put(task.arrays())
    make = jax.jit(lambda arrays, step: task.batch(arrays, key, step, size))
    position = task.start() if isinstance(task, Fed) else None
    for step in range(count):
        fed = {}
        if isinstance(task, Fed):
            made, position = task.feed(position, size)
            fed = {FED: jax.device_put(made)}
        yield make(arrays | fed if fed else arrays, jnp.int32(step))
