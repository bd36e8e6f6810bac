"""Memory, from compiled programs alone: along depth, width or tokens. Nothing is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
from flax import nnx

from bdia_jax.planning import memory
from bdia_jax.planning.ways import Way
from bdia_jax.train import step_memory
from bdia_jax.train.programs import Programs
from measure.networks import Axis, Network, Stack


def activations(network: Network | Stack, way: Way) -> int:
    """Bytes beside weights, gradients and data at the peak of loss and gradient."""
    loss, arguments = network.loss(way)
    return memory.temporaries(jax.grad(loss), *arguments)


def training_step(network: Network, way: Way) -> int:
    """Bytes of a whole training step at its peak, weights and the optimizer's state included."""
    make, task, settings = network.prepared(way)
    return step_memory(nnx.eval_shape(make), task, settings).memory.total


def of_step(programs: Programs) -> int:
    """The same, of a step that is then run: it is compiled once."""
    return memory.compiled_memory(programs.compiled_step()).total


def along(
    peak: Callable[[Network | Stack, Way], int],
    network: Network | Stack,
    way: Way,
    axis: Axis,
    values: Iterable[int],
) -> list[int | None]:
    """One of the above for each value; None where the device has not what the way needs."""
    found: list[int | None] = []
    for value in values:
        try:
            found.append(peak(network.along(axis, value), way))
        except jax.errors.JaxRuntimeError:
            found.append(None)
    return found
