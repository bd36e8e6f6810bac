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
      devices: those of the mesh; None for all that there are.

    Raises:
      ValueError: for unknown axes, sizes that are not numbers, or another number of devices.
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


def check_batch(mesh: Mesh | None, text: str | None, samples: int) -> None:
    """A ``ValueError`` if the samples of a micro-batch cannot be split over the devices."""
    if mesh is not None and samples % mesh.size:
        raise ValueError(
            f"the {mesh.size} devices of mesh {text!r} must divide a micro-batch of {samples} "
            "samples"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_shardings(mesh: Mesh, tree: PyTree) -> PyTree[NamedSharding]:
    """Splits every array over ``fsdp``, along its largest axis that divides, except the first.

    The first axis of stacked parameters counts blocks: if it were split, every block would be sent
    from device to device. Arrays with no axis that divides are replicated.
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
