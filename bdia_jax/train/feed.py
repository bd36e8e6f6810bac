"""Batches that the host feeds: each is made while the device computes the step before it."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from bdia_jax.train.tasks import FED, Fed, Task


class Feed:
    """What a task feeds to the steps of a run, one after the other, made one step ahead."""

    def __init__(self, task: Fed, size: int, position: Any = None):
        """``position``: where the next step's samples begin; None for the first."""
        self.task, self.size = task, size
        self.position = task.start() if position is None else position
        """Where the samples begin that were not taken yet; of JSON's types, saved with a state."""
        # One worker: batches are made one after the other, and a task is used by one thread.
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "bdia_jax-feed")
        self._next = self._begin()

    def take(self) -> PyTree[np.ndarray]:
        """What the next step is fed; an error in making it is raised here."""
        fed, self.position = self._next.result()
        self._next = self._begin()
        return fed

    def close(self) -> None:
        """Ends the thread; what it was making is not waited for."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> concurrent.futures.Future:
        return self._worker.submit(self.task.feed, self.position, self.size)


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
