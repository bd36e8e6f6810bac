"""One block, compiled to the same arithmetic in the forward and in the backward pass.

Taking back a step is exact only if the backward pass recomputes the block's update to the last
bit, and a compiler does not promise that: it fuses, and rounds, the same block differently when
it is compiled alone and when it is compiled with its derivative. In bfloat16 half of the
recomputed integers, or more, may differ then, and errors grow with every block on the way down.

Therefore both passes run the same sub-program, :func:`pinned_vjp`: the block together with the
residuals of its derivative, fenced on both sides (:func:`fence`), so that nothing is fused into it
or out of it. A compiler drops what nobody reads, and would drop the residuals in the forward pass
only; therefore both passes read one element of each (:func:`touch`), and fold it into a value that
stays alive without being changed by it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, PyTree, UInt32


def pinned_vjp(
    function: Callable[..., Array],
    params: tuple[dict[int, Array], dict[int, Array]],
    x: Array,
    key: Array | None,
    consts: tuple[dict[int, Array], dict[int, Array]],
) -> tuple[Array, Callable[[Array], tuple[PyTree, Array, PyTree]], UInt32[Array, ""]]:
    """The update ``h = function(params, x, key, consts)`` and its derivative, pinned.

    Args:
      function: a part of a block, closed.
      params, consts: leaves to differentiate by, and the others.
      x, key: what the block sees.

    Returns:
      ``h``; a function from the cotangent of h to those of ``(params, x, consts)``; and a uint32
      that depends on every residual, to be kept alive.
    """

    def run(some_params, x, some_consts):
        return function(some_params | params[1], x, key, some_consts | consts[1])

    h, vjp = jax.vjp(run, params[0], x, consts[0])
    residuals, structure = jax.tree.flatten(vjp)
    h, residuals = fence((h, residuals))
    # A compiler would compute each element late, where the result is used, from the arrays that the
    # residual is made of, and keep all of these until then. It never fuses a sort.
    touched = lax.sort(jnp.stack([jnp.uint32(0), *map(touch, residuals)]))
    alive = reduce_to(varying(x), jnp.sum(touched, dtype=jnp.uint32), lax.psum)
    vjp = structure.unflatten(residuals)
    return h, lambda d_h: vjp(d_h.astype(h.dtype)), alive


def fence(tree: PyTree[Array]) -> PyTree[Array]:
    """A :func:`barrier`; on accelerators, between arrays that are laid out by rows.

    Fusion ends at a barrier, but the choice of layouts does not. In the backward pass only, the
    block would make an array in the layout that the derivative wants, and on a GPU another kernel
    would then compute the product that reads the array.
    """
    return barrier(jax.tree.map(_by_rows, tree))


def _by_rows(array: Array) -> Array:
    if array.ndim < 2 or jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array
    return _by_rows_p.bind(array)


# An identity. What it becomes is decided where a program is lowered, because only there it is known
# which devices, and how many, the program is for. A CPU needs no layout, which would cost memory.
_by_rows_p = Primitive("laid_out_by_rows")
_by_rows_p.def_impl(lambda array: array)
_by_rows_p.def_abstract_eval(lambda array: array)
batching.defvectorized(_by_rows_p)


def _laid_out(array: Array) -> Array:
    return with_layout_constraint(array, Layout(major_to_minor=tuple(range(array.ndim))))


# A partitioner knows nothing of layouts, and would gather the array: it is told that each device
# lays out its own part.
_parts_laid_out = custom_partitioning(_laid_out)
_parts_laid_out.def_partition(
    lambda mesh, given, _: (mesh, _laid_out, given[0].sharding, (given[0].sharding,)),
    infer_sharding_from_operands=lambda mesh, given, _: given[0].sharding,
    sharding_rule="... -> ...",
)


# Where there are several, lowering is told which ones. Not JAX's public interface: without it, no
# layouts are fixed there, and the guard tells whether they had to be.
with contextlib.suppress(ImportError, AttributeError):
    from jax._src import dispatch

    dispatch.prim_requires_devices_during_lowering.add(_by_rows_p)


def _lower_by_rows(context: mlir.LoweringRuleContext, array, *, on_several: bool = True):
    axes: Any = context.module_context.axis_context
    if isinstance(axes, mlir.SPMDAxisContext):
        count, known = axes.mesh.size, True
    else:
        count, known = axes.num_devices, axes.device_assignment is not None
    if count > 1 and not (known and on_several):
        # Not known in an exported program, whose devices are those of whoever loads it.
        return [array]
    constrain = _parts_laid_out if count > 1 else _laid_out
    return mlir.lower_fun(constrain, multiple_results=False)(context, array)


mlir.register_lowering(_by_rows_p, _lower_by_rows)
# A TPU's compiler has no custom partitioning (https://github.com/jax-ml/jax/issues/38196).
mlir.register_lowering(_by_rows_p, partial(_lower_by_rows, on_several=False), platform="tpu")
mlir.register_lowering(_by_rows_p, lambda context, array: [array], platform="cpu")


def barrier(tree: PyTree[Array]) -> PyTree[Array]:
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


def alike(*arrays: Array) -> list[Array]:
    """Arrays that vary over the same mesh axes, as a primitive of JAX would have them.

    So their cotangents are summed over the axes over which an array does not vary by itself.
    """
    axes = frozenset().union(*map(varying, arrays))
    return [
        lax.pcast(a, tuple(sorted(axes - varying(a))), to="varying") if axes - varying(a) else a
        for a in arrays
    ]


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
    counts = shards(residual)
    strides = [size // n for size, n in zip(residual.shape, counts, strict=True)]
    limits = [(n - 1) * stride + 1 for n, stride in zip(counts, strides, strict=True)]
    element = lax.slice(residual, [0] * residual.ndim, limits, strides)
    if jnp.issubdtype(element.dtype, jnp.complexfloating):
        element = lax.real(element)
    if jnp.issubdtype(element.dtype, jnp.floating):
        word = jnp.dtype(f"uint{jnp.finfo(element.dtype).bits}")
        element = lax.bitcast_convert_type(element, word)
    return jnp.sum(element.astype(jnp.uint32), dtype=jnp.uint32)


def shards(array: Array) -> list[int]:
    """Per axis, over how many devices the array is known to be split at trace time."""
    sharding = jax.typeof(array).sharding
    sizes = dict(sharding.mesh.shape)
    names = [() if a is None else a if isinstance(a, tuple) else (a,) for a in sharding.spec]
    names += [()] * (array.ndim - len(names))
    return [math.prod(sizes[name] for name in axis) for axis in names]
