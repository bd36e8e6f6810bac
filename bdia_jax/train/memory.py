"""What a training step and an evaluation will need, by compiling them for shapes; what they did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from bdia_jax.planning.memory import Memory, compiled_memory
from bdia_jax.train.programs import Programs
from bdia_jax.train.settings import TrainSettings
from bdia_jax.train.tasks import Task


class StepMemory(NamedTuple):
    """Bytes of a training step, per device."""

    parameters: int
    """Trained weights."""
    frozen: int
    """The rest of the model."""
    optimizer: int
    """The optimizer's state."""
    gradients: int
    """Of all weights that are not updated in the backward pass."""
    batch_shards: int
    """Into how many parts a batch is split."""
    memory: Memory
    """All of it, as compiled."""


def step_memory(
    model: nnx.Module,
    task: Task,
    settings: TrainSettings,
    optimizer: optax.GradientTransformation | None = None,
    *,
    compiler_options: dict[str, str | bool] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> StepMemory:
    """What a training step will need, by compiling it for shapes; nothing is run.

    Args:
      model: may be abstract: ``nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))``.
      task, settings, optimizer: as in :func:`bdia_jax.train.train`.
      compiler_options: for XLA.
      devices: to compile for, which need not be there (``jax.experimental.topologies``); None for
        those that are.
    """
    programs = Programs(model, task, settings, optimizer, devices)
    trees = programs.trees()
    sizes = {name: sum(map(_bytes_per_device, jax.tree.leaves(t))) for name, t in trees.items()}
    return StepMemory(
        **sizes,
        batch_shards=1 if programs.mesh is None else programs.mesh.size,
        memory=compiled_memory(programs.compiled_step(compiler_options)),
    )


def evaluation_memory(
    model: nnx.Module,
    task: Task,
    settings: TrainSettings,
    *,
    compiler_options: dict[str, str | bool] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Memory:
    """What the evaluation of a batch will need beside the optimizer's state; as above."""
    programs = Programs(model, task, settings, devices=devices)
    return compiled_memory(programs.compiled_evaluation(compiler_options))


def peak_bytes() -> int | None:
    """The most memory that a device of this process had in use so far; None if none tells."""
    peaks = []
    for device in jax.local_devices():
        try:
            stats = device.memory_stats()
        except (jax.errors.JaxRuntimeError, NotImplementedError):
            # A platform that does not count.
            continue
        if stats and "peak_bytes_in_use" in stats:
            peaks.append(int(stats["peak_bytes_in_use"]))
    return max(peaks, default=None)


def _bytes_per_device(leaf) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 0
    size = math.prod(leaf.sharding.shard_shape(leaf.shape))
    # Devices keep two numbers of 4 bits in a byte.
    whole = jnp.issubdtype(leaf.dtype, jnp.integer)
    return size * (jnp.iinfo(leaf.dtype).bits if whole else 8 * leaf.dtype.itemsize) // 8
