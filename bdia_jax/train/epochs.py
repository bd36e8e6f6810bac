"""Epochs as steps: the data say how many a pass takes."""

from __future__ import annotations

import dataclasses
import logging

from bdia_jax.train.settings import TrainSettings
from bdia_jax.train.tasks import Fed, Task

log = logging.getLogger("bdia_jax")


def steps_per_epoch(task: Task, batch_size: int) -> float:
    """Steps of a pass over the training data.

    Of data on the device, a whole number: a pass leaves out what is left over, other samples each
    time (:func:`bdia_jax.data.batches.batch_indices`). What the host feeds is left out nowhere.

    Raises:
      ValueError: for a task whose batches are drawn at random, so that there is no pass.
    """
    if isinstance(task, Fed):
        return task.epoch() / batch_size
    if task.samples is None:
        raise ValueError(
            f"the {task.unit} of {task.name} are drawn at random, so that there are no epochs: "
            "give steps instead"
        )
    return task.samples // batch_size


def in_steps(settings: TrainSettings, task: Task) -> TrainSettings:
    """The settings with steps instead of epochs, which is told; as they are, if they have none.

    Raises:
      ValueError: as :func:`steps_per_epoch`.
    """
    if settings.epochs is None:
        return settings
    each = steps_per_epoch(task, settings.batch_size)
    steps = max(1, round(settings.epochs * each))
    log.info(
        "an epoch is %s steps of %d %s; epochs = %g are %s steps",
        f"{each:,.1f}".removesuffix(".0"),
        settings.batch_size,
        task.unit,
        settings.epochs,
        f"{steps:,}",
    )
    return dataclasses.replace(settings, steps=steps, epochs=None)
