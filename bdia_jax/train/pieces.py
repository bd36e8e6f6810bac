"""Pieces of a run, for measurements and for loops of one's own: an evaluation, and a step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import optax
from flax import nnx

from bdia_jax.train.placing import merged, mesh_of
from bdia_jax.train.programs import Programs, means
from bdia_jax.train.settings import TrainSettings
from bdia_jax.train.step import State, StepReport
from bdia_jax.train.tasks import Task


def evaluate(
    model: nnx.Module, task: Task, *, eval_batch_size: int | None = None
) -> dict[str, float]:
    """Means of the metrics over the evaluation split, in evaluation mode; where the model is.

    Args:
      model: its parameters may be of any dtype; it comes back in training mode.
      task: data and metrics.
      eval_batch_size: samples per batch; None for what the task says.
    """
    model.eval()
    graph, state = nnx.split(model)
    model.train()
    size = min(eval_batch_size or task.eval_batch_size, task.eval_samples)
    mesh = mesh_of(model)

    @jax.jit
    def step(state, arrays, i):
        return task.evaluate(merged(mesh, graph, state), task.eval_batch(arrays, i, size))

    arrays = jax.device_put(task.arrays())
    return means(step(state, arrays, np.int32(i)) for i in range(-(-task.eval_samples // size)))


def training_step(
    model: nnx.Module,
    task: Task,
    settings: TrainSettings,
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[Callable[..., tuple[State, StepReport]], State]:
    """The step that a run repeats, compiled when it is first taken, and its first state.

    For measurements, and for loops of one's own. Of a task that is :class:`bdia_jax.train.Fed`, the
    step takes what it is fed as a second argument. A state is used up by its step; that includes
    the arrays of ``model``, which the first state is made of. Reports are on the device. Arguments
    are those of :func:`bdia_jax.train.train`.
    """
    programs = Programs(model, task, settings, optimizer)
    state = programs.first_state(model)
    programs.share_arrays(model, state)
    return programs.step, state
