"""One block, compiled to the same arithmetic in the forward and in the backward pass.

Taking back a step is exact only if the backward pass recomputes the block's update to the last
bit, and a compiler does not promise that: it fuses, and rounds, the same block differently when
it is compiled alone and when it is compiled with its derivative. In bfloat16 most recomputed
integers differ then, and the error doubles with every block on the way down.

Therefore both passes run the same sub-program, :func:`pinned_vjp`: the block together with the
residuals of its derivative, fenced on both sides (:func:`fence`), so that nothing is fused into it
or out of it. A compiler drops what nobody reads, and would drop the residuals in the forward pass
only; therefore both passes read one element of each (:func:`touch`), and fold it into a value that
stays alive without being changed by it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, UInt32


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which leaves of the parameters, and of the constants, a gradient is asked for."""

    params: tuple[bool, ...]
    consts: tuple[bool, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["residuals"],
    meta_fields=["rebuild", "sources", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Derivative:
    """The derivative of a block at one point: from the cotangent of ``h`` to those of the inputs.

    It is made of arrays, and may be kept.
    """

    residuals: list[Array | None]
    rebuild: jax.tree_util.PyTreeDef
    """Of the function that JAX gave."""
    sources: tuple[int | None, ...]
    """Which of the block's own parameters and constants a residual is; None: it was computed."""
    dtype: jnp.dtype
    """Of ``h``."""

    def __call__(self, d_h: Array) -> tuple[list, Array, list]:
        """Cotangents of ``(params, x, consts)``: lists of the wanted leaves."""
        return jax.tree.unflatten(self.rebuild, self.residuals)(d_h.astype(self.dtype))

    def computed(self) -> Derivative:
        """Without what the block was given, which exists anyway."""
        return self._with(lambda source, residual: residual if source is None else None)

    def given(self, params: list, consts: list) -> Derivative:
        """With that again."""
        leaves = [*params, *consts]
        return self._with(lambda source, residual: residual if source is None else leaves[source])

    def _with(self, choose) -> Derivative:
        return dataclasses.replace(self, residuals=[*map(choose, self.sources, self.residuals)])


def pinned_vjp(
    block, wanted: Wanted, params: list, x: Array, key, consts: list
) -> tuple[Array, Derivative, UInt32[Array, ""]]:
    """The update ``h = block(params, x, key, consts)`` and its derivative, pinned.

    Args:
      block: a closed function of lists of arrays.
      wanted: the leaves to differentiate by, besides ``x``.

    Returns:
      ``h``; its derivative; and a uint32 that depends on every residual, to be kept alive.
    """

    def run(some_params, x, some_consts):
        return block(
            merge(wanted.params, some_params, params),
            x,
            key,
            merge(wanted.consts, some_consts, consts),
        )

    h, vjp = jax.vjp(run, select(wanted.params, params), x, select(wanted.consts, consts))
    residuals, rebuild = jax.tree.flatten(vjp)
    places = {id(leaf): i for i, leaf in enumerate([*params, *consts])}
    sources = tuple(places.get(id(residual)) for residual in residuals)
    h, residuals = fence((h, residuals))
    # A compiler reads an element by computing it from whatever the residual is made of, where the
    # result is used: late, and all of that has to be kept until then. A sort it fuses with nothing.
    touched = lax.sort(jnp.stack([jnp.uint32(0), *map(touch, residuals)]))
    alive = jnp.sum(touched, dtype=jnp.uint32)
    alive = reduce_to(varying(x), alive, lax.psum)
    return h, Derivative(residuals, rebuild, sources, h.dtype), alive


def fence(tree):
    """A :func:`barrier`; on a single accelerator, between arrays that are laid out by rows.

    Fusion ends at a barrier, but the choice of layouts does not: as the derivative would like an
    array to be laid out, the block would make it, in the backward pass only, and on a GPU another
    kernel would then compute the product that reads the array. (With several devices there are
    barriers only: a partitioner knows nothing of such a constraint, and gathers the array.)
    """
    if _ELSEWHERE.get() or jax.device_count() > 1:
        return barrier(tree)
    leaves, structure = jax.tree.flatten(tree)
    # On a CPU it is not needed, and costs memory.
    leaves = lax.platform_dependent(*leaves, cpu=lambda *a: a, default=_by_rows)
    return barrier(structure.unflatten(leaves))


_ELSEWHERE = contextvars.ContextVar("several devices that are not there", default=False)


@contextlib.contextmanager
def several_devices():
    """What is traced within is for several devices, though there may be but one."""
    token = _ELSEWHERE.set(True)
    try:
        yield
    finally:
        _ELSEWHERE.reset(token)


def _by_rows(*arrays: Array) -> tuple[Array, ...]:
    def constrained(array):
        if array.ndim < 2 or jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return array
        return with_layout_constraint(array, Layout(major_to_minor=tuple(range(array.ndim))))

    return tuple(map(constrained, arrays))


def barrier(tree):
    """``lax.optimization_barrier``; under ``shard_map``, one per set of mesh axes.

    One barrier for all would make every array vary over all axes over which any of them does:
    replicated parameters would get the gradients of one device.
    """
    leaves, structure = jax.tree.flatten(tree)
    groups = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(varying(leaf), []).append(i)
    for group in groups.values():
        for i, leaf in zip(group, lax.optimization_barrier([leaves[i] for i in group])):
            leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


def varying(array: Array) -> frozenset[str]:
    """The mesh axes over which ``array`` is known to differ between devices (``shard_map``)."""
    aval = jax.typeof(array)
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying


def reduce_to(axes: frozenset[str], array: Array, reduction) -> Array:
    """``array``, reduced over the mesh axes over which it varies, but for ``axes``."""
    others = tuple(sorted(varying(array) - axes))
    return reduction(array, others) if others else array


def touch(residual: Array) -> UInt32[Array, ""]:
    """One element of ``residual``, read so that a compiler cannot drop the array.

    Of an array that is sharded over explicit mesh axes, one element of every shard: a slice
    that leaves no element to some device is an error there. (Flattening it first would gather
    the whole array on every device.)
    """
    if jnp.issubdtype(residual.dtype, jax.dtypes.prng_key):
        residual = jax.random.key_data(residual)
    if residual.size == 0:
        return jnp.uint32(0)
    shards = _shards(residual)
    strides = [size // n for size, n in zip(residual.shape, shards, strict=True)]
    limits = [(n - 1) * stride + 1 for n, stride in zip(shards, strides, strict=True)]
    element = lax.slice(residual, [0] * residual.ndim, limits, strides)
    if jnp.issubdtype(element.dtype, jnp.floating):
        word = jnp.dtype(f"uint{jnp.finfo(element.dtype).bits}")
        element = lax.bitcast_convert_type(element, word)
    return jnp.sum(element.astype(jnp.uint32), dtype=jnp.uint32)


def _shards(array: Array) -> list[int]:
    """Per axis, over how many devices the array is known to be split at trace time."""
    sharding = jax.typeof(array).sharding
    sizes = dict(sharding.mesh.shape)
    names = [() if a is None else a if isinstance(a, tuple) else (a,) for a in sharding.spec]
    names += [()] * (array.ndim - len(names))
    return [math.prod(sizes[name] for name in axis) for axis in names]


def select(mask: tuple[bool, ...], leaves: list) -> list:
    """The leaves that the mask keeps."""
    return [leaf for keep, leaf in zip(mask, leaves, strict=True) if keep]


def merge(mask: tuple[bool, ...], some: list, leaves: list) -> list:
    """``leaves``, with those that the mask keeps taken from ``some``."""
    some = iter(some)
    return [next(some) if keep else leaf for keep, leaf in zip(mask, leaves, strict=True)]
