"""γ chosen for a model and its data, before training."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from bdia_jax.gamma import GammaChoice
from bdia_jax.nn import gamma
from bdia_jax.train.feed import first_batches
from bdia_jax.train.placing import merged, mesh_of, split
from bdia_jax.train.tasks import Task


def choose_gamma(
    model: nnx.Module,
    task: Task,
    batch_size: int,
    *,
    batches: int = 2,
    seed: int = 0,
    **options: Any,
) -> GammaChoice:
    """:func:`bdia_jax.choose_gamma` by the first batches of a task.

    Args:
      model: whose stacks train by :class:`bdia_jax.BDIA`; it is left as, and where, it is.
      task: data and loss.
      batch_size: samples per batch, all in one forward pass.
      batches: how many to average over.
      seed: of batches, dropout and signs.
      **options: of :func:`bdia_jax.choose_gamma`.
    """
    data_key, model_key = jax.random.split(jax.random.key(seed))

    mesh = mesh_of(model)

    def loss(model, batch, key):
        model = merged(mesh, *nnx.split(model))
        return task.loss(model, split(mesh, batch), key).means()["loss"]

    made = first_batches(task, data_key, batch_size, batches)
    arguments = ((batch, jax.random.fold_in(model_key, i)) for i, batch in enumerate(made))
    return gamma.choose_gamma(model, loss, arguments, **options)
