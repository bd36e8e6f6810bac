"""Where arrays live: data parallelism and fully sharded parameters, by shardings on a mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

AXES = ("data", "fsdp")


def parse_mesh(text: str | None, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """A mesh such as ``"data=4,fsdp=2"``; None for None or an empty text.

    Batches are split over both axes, parameters and optimizer state over ``fsdp``.

    Args:
      text: axes and their sizes.
      devices: that it is of; None for all that there are.

    Raises:
      ValueError: for unknown axes, sizes that are no numbers, or not as many as there are devices.
    """
    if not text:
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name.strip() not in AXES or not size.strip().isdigit() or name.strip() in sizes:
            raise ValueError(f'mesh must look like "data=4,fsdp=2"; got {text!r}')
        sizes[name.strip()] = int(size)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    count = jax.device_count() if devices is None else len(devices)
    if math.prod(shape) != count:
        raise ValueError(f"mesh {text!r} is of {math.prod(shape)} devices; there are {count}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_shardings(mesh: Mesh, tree: PyTree) -> PyTree[NamedSharding]:
    """Of every array with two axes or more, the largest axis but the first, over ``fsdp``.

    The first axis is that of the blocks in stacked parameters: split, it would make every block
    travel. What does not divide is replicated.
    """
    shards = mesh.shape["fsdp"]

    def sharding(leaf) -> NamedSharding:
        fitting = [
            (size, axis) for axis, size in enumerate(leaf.shape) if axis and not size % shards
        ]
        if shards == 1 or not fitting:
            return replicated(mesh)
        spec = [None] * leaf.ndim
        spec[max(fitting)[1]] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, tree)
