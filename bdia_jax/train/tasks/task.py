"""What a task is."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Int32, Key, PyTree

from bdia_jax.nn.losses import Sums


@runtime_checkable
class Task(Protocol):
    """What is trained: data, batches, a loss and an evaluation.

    Where a property is declared here, a class may have an attribute. ``batch``, ``eval_batch``,
    ``loss`` and ``evaluate`` are traced: they must be pure functions of their arguments.
    """

    @property
    def name(self) -> str:
        """Of the data, for messages and settings."""
        ...

    @property
    def best(self) -> str:
        """The evaluation metric that the best checkpoint is chosen by.

        The one with the highest, or the lowest with a "-" before the name (``"-loss"``).
        """
        ...

    @property
    def unit(self) -> str:
        """What a sample is, in messages: ``"images"``, ``"sequences"``."""
        ...

    @property
    def samples(self) -> int | None:
        """Training samples. A batch has each at most once; None if there is no such limit."""
        ...

    @property
    def eval_samples(self) -> int:
        """Evaluation samples."""
        ...

    @property
    def eval_batch_size(self) -> int:
        """Samples per evaluation batch, unless the settings of the run say otherwise."""
        ...

    def arrays(self) -> PyTree[np.ndarray]:
        """The data, to be put on the device once, and given to the other methods."""

    def batch(
        self, arrays: PyTree[Array], key: Key[Array, ""], step: Int32[Array, ""], size: int
    ) -> PyTree[Array]:
        """The training batch of a step, every array with a leading axis of ``size`` samples.

        ``key`` is the same in every step.
        """

    def eval_batch(self, arrays: PyTree[Array], step: Int32[Array, ""], size: int) -> PyTree[Array]:
        """Evaluation samples ``step * size`` and following; those after the last have no weight."""

    def loss(self, model: Any, batch: Any, key: Key[Array, ""]) -> Sums:
        """Sums of the loss, the metrics and the weights over a training batch.

        The gradient is that of the loss divided by the weight, over all micro-batches of a step.
        """
        ...

    def evaluate(self, model: Any, batch: Any) -> Sums:
        """Sums over an evaluation batch; the model is in evaluation mode."""
        ...


def check_batch_size(task: Task, size: int) -> None:
    """A ``ValueError`` if a batch would have more samples than there are."""
    if task.samples is not None and size > task.samples:
        raise ValueError(
            f"batch_size must be at most the number of training {task.unit} in {task.name}, "
            f"{task.samples}; got {size}: set batch_size (--train.batch-size) to {task.samples} or "
            "less, or give more data"
        )


def eval_rows(step: Int32[Array, ""], size: int, samples: int) -> tuple[Array, Array]:
    """Indices of the samples of an evaluation batch, and which of them exist; for tasks."""
    rows = step * size + np.arange(size)
    return rows.clip(0, samples - 1), rows < samples
