"""Where arrays live: data parallelism and fully sharded parameters, by shardings on a mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from bdia_jax.nn.stacked import StackedBlocks, is_stacked

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
    shape = mesh_shape(text)
    count = jax.device_count() if devices is None else len(devices)
    if math.prod(shape) != count:
        raise ValueError(f"mesh {text!r} is of {math.prod(shape)} devices; there are {count}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_shape(text: str) -> tuple[int, int]:
    """The sizes of both axes, of a text such as ``"data=4,fsdp=2"``; 1 of one that it leaves out.

    Raises:
      ValueError: for unknown axes, or sizes that are no numbers from 1 on.
    """
    sizes: dict[str, int] = {}
    for part in str(text).split(","):
        name, _, size = part.partition("=")
        if name.strip() not in AXES or not size.strip().isdigit() or name.strip() in sizes:
            raise ValueError(f'mesh must look like "data=4,fsdp=2"; got {text!r}')
        sizes[name.strip()] = int(size)
    if not all(sizes.values()):
        raise ValueError(f"the sizes of a mesh must be 1 or more; got {text!r}")
    return sizes.get("data", 1), sizes.get("fsdp", 1)


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
    """Splits every array over ``fsdp``, along its largest axis of a size that can be split evenly.

    The first axis is never split. That of stacked parameters counts blocks: if it were split, every
    block would be sent from device to device. Arrays without such an axis are replicated.
    """
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(mesh, leaf.shape)), tree)


def _spec(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    shards = mesh.shape["fsdp"]
    fitting = [(size, axis) for axis, size in enumerate(shape) if axis and not size % shards]
    if shards == 1 or not fitting:
        return PartitionSpec()
    spec: list[str | None] = [None] * len(shape)
    spec[max(fitting)[1]] = "fsdp"
    return PartitionSpec(*spec)


def merged(mesh: Mesh | None, graph: nnx.GraphDef, params: nnx.State, *rest: nnx.State):
    """``nnx.merge``, in a traced function; on a mesh, weights are gathered where they are used.

    Those of blocks a block at a time, in each pass, and every device keeps to its samples. By
    itself a partitioner would split the stream like the weights, by its features, and send states
    and side bits from device to device.
    """
    if mesh is None:
        return nnx.merge(graph, params, *rest)
    placement = OnMesh(mesh)
    params, *others = (
        jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if is_stacked(path) else placement.gathered(leaf), tree
        )
        for tree in (params, *rest)
    )
    model = nnx.merge(graph, params, *others)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, StackedBlocks):
            module.place(placement)
    return model


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """Samples on their devices, and whole weights on all of them: the placement of a mesh."""

    mesh: Mesh

    @property
    def devices(self) -> int:
        """Over how many a batch is split."""
        return self.mesh.size

    def weights(self, tree: PyTree[Array]) -> PyTree[Array]:
        """Gathered; those of a block are split as in the stack, where an axis comes before."""
        # The derivative of a constraint is the same constraint: a block that goes over its
        # positions in chunks has totals for cotangents.
        return self.total(jax.tree.map(lambda leaf: self.gathered(leaf, (1,)), tree))

    def samples(self, x: Array) -> Array:
        """Split over all devices."""
        return lax.with_sharding_constraint(x, batch_sharding(self.mesh))

    def total(self, tree: PyTree[Array]) -> PyTree[Array]:
        """On every device. A partitioner would split a sum as what becomes of it is split.

        Devices would then add up what each pass of a loop finds, in that pass; of a sum that is
        whole, XLA sees that it need not be added up before the loop ends.
        """
        return jax.tree.map(
            lambda leaf: lax.with_sharding_constraint(leaf, replicated(self.mesh)), tree
        )

    def gathered(self, leaf: Array, before: tuple[int, ...] = ()) -> Array:
        """On every device; its cotangent is split as the leaf is.

        Args:
          leaf: a weight.
          before: axes that come before its own where it is kept.
        """
        spec = _spec(self.mesh, (*before, *leaf.shape))
        if all(axis is None for axis in spec) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return lax.with_sharding_constraint(leaf, replicated(self.mesh))
        kept = NamedSharding(self.mesh, PartitionSpec(*spec[len(before) :]))

        @jax.custom_vjp
        def gather(leaf):
            return lax.with_sharding_constraint(leaf, replicated(self.mesh))

        gather.defvjp(
            lambda leaf: (gather(leaf), None),
            lambda _, d: (lax.with_sharding_constraint(d, kept),),
        )
        return gather(leaf)
