"""Models on a mesh before and after a run: loaded, measured and evaluated where they are trained.

A run places its arrays by itself. But a network that no device can hold alone must never be on one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from bdia_jax.train import mesh as meshes
from bdia_jax.train.settings import TrainSettings


def placed(mesh: str | None) -> Callable[[np.ndarray | Array], Array]:
    """What puts one array on the devices of a mesh, split as in training.

    For :func:`bdia_jax.interop.load`: each device is sent its own part from the host's memory.

    Args:
      mesh: as in :class:`bdia_jax.train.TrainSettings`; None for the default device.

    Raises:
      ValueError: for a mesh that is none, or of another number of devices.
    """
    if (on := meshes.parse_mesh(mesh)) is None:
        return jnp.asarray
    return lambda array: jax.device_put(array, meshes.state_shardings(on, array))


def check_mesh(settings: TrainSettings) -> None:
    """A ``ValueError`` for settings whose mesh does not fit the devices or the micro-batches."""
    samples = settings.batch_size // settings.accumulate
    meshes.check_batch(meshes.parse_mesh(settings.mesh), settings.mesh, samples)


def place_on_mesh(model: nnx.Module, mesh: str | None) -> None:
    """Puts all arrays of a model on the devices of a mesh, split as in training; in place.

    Those that are there already stay where they are.

    Args:
      model: of any kind.
      mesh: as of :func:`placed`; with None, nothing is done.

    Raises:
      ValueError: as of :func:`placed`.
    """
    if (on := meshes.parse_mesh(mesh)) is not None:
        state = nnx.state(model)
        nnx.update(model, jax.device_put(state, meshes.state_shardings(on, state)))


def mesh_of(model: nnx.Module) -> Mesh | None:
    """The mesh that a model has been placed on; None if it is on one device."""
    for leaf in jax.tree.leaves(nnx.state(model)):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == meshes.AXES:
            assert isinstance(sharding.mesh, Mesh)
            return sharding.mesh
    return None


def merged(mesh: Mesh | None, graph: nnx.GraphDef, state: nnx.State) -> Any:
    """``nnx.merge``, in a traced function, for a network that is on a mesh, as in training."""
    params, rest = nnx.split_state(state, nnx.Param, ...)
    return meshes.merged(mesh, graph, params, rest)


def split(mesh: Mesh | None, batch: PyTree[Array]) -> PyTree[Array]:
    """A batch, in a traced function: its samples over the devices, if they can be."""
    if mesh is None or any(a.ndim and a.shape[0] % mesh.size for a in jax.tree.leaves(batch)):
        return batch
    return jax.lax.with_sharding_constraint(batch, meshes.batch_sharding(mesh))
