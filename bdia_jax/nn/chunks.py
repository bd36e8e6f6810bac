"""Sequences cut into chunks, for what is computed a chunk at a time to spare memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from bdia_jax.gradients import is_zero, perturbed
from bdia_jax.grid import accumulator
from bdia_jax.nn.placement import Placement
from bdia_jax.pinning import alike


def by_chunks(
    function: Callable[..., PyTree[Array]],
    *arrays: PyTree[Shaped[Array, "batch length *_shape"]],
    size: int | None,
) -> PyTree[Array]:
    """A ``function`` of single positions, applied to ``size`` of them at a time (None: to all).

    The derivative computes every chunk again, so that of what ``function`` needs on the way to its
    result, never more exists than that of a chunk. What it closes over gets its gradient as without
    chunks; the sum over the chunks is taken in float32 (float64). There is no forward-mode
    derivative.

    Args:
      function: of as many arrays, or pytrees of them, as are given; it returns an array or a pytree
        of arrays. The first two axes of all are batch and positions.
      *arrays: its arguments.
      size: positions of a chunk.

    Raises:
      ValueError: for a size below 1.
    """
    length = jax.tree.leaves(arrays)[0].shape[1]
    if size is not None and size < 1:
        raise ValueError(f"size, the positions of a chunk, must be 1 or more; got {size}")
    if size is None or size >= length:
        return function(*arrays)
    size = even(length, size)
    # What it closes over must be seen by the rules of the derivative, integers included.
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*_at(arrays, 0, size))
    structure_of_result = jax.tree.structure(shapes)

    def of_chunk(consts, arrays):
        closed = ClosedJaxpr(traced.jaxpr, consts)
        found = jaxpr_as_fun(closed)(*jax.tree.leaves(arrays))
        return jax.tree.unflatten(structure_of_result, found)

    return _map(of_chunk, size, traced.consts, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _map(function, size, consts, arrays):
    length = jax.tree.leaves(arrays)[0].shape[1]

    def step(results, start):
        found = function(consts, _at(arrays, start, size))
        return jax.tree.map(lambda r, f: _put(r, alike(f, r)[0], start), results, found), None

    shapes = jax.eval_shape(function, consts, _at(arrays, 0, size))
    results = jax.tree.map(lambda s: _blank(s, length, arrays, (consts, arrays)), shapes)
    return lax.scan(step, results, _starts(length, size))[0]


def _map_forward(function, size, consts, arrays):
    (consts, arrays), (of_consts, of_arrays) = perturbed((consts, arrays))
    saved = _partition(consts, of_consts), _partition(arrays, of_arrays)
    return _map(function, size, consts, arrays), saved


def _map_backward(function, size, saved, cotangents):
    (consts, fixed_consts), (arrays, fixed) = saved
    cotangents, results = jax.tree.flatten(cotangents, is_leaf=is_zero)
    if all(map(is_zero, cotangents)):
        return None, None
    # Integers have none.
    shapes = {n: c.shape for n, c in enumerate(cotangents) if c.dtype == jax.dtypes.float0}
    cotangents = {
        n: jnp.zeros(c.shape, c.dtype) if is_zero(c) else c
        for n, c in enumerate(cotangents)
        if n not in shapes
    }
    length = next(iter(cotangents.values())).shape[1]

    # The cotangent of an argument overwrites that of a result of the same kind, chunk by chunk.
    free, sources, places = dict(cotangents), [], []
    wanted, structure = jax.tree.flatten(arrays)
    for a in wanted:
        fitting = (n for n, c in free.items() if (c.shape, c.dtype) == (a.shape, a.dtype))
        sources.append(source := next(fitting, None))
        blank = source not in free
        places.append(_blank(a, length, (a, cotangents), a) if blank else free.pop(source))

    def step(carry, inputs):
        totals, places = carry
        number, start = inputs
        chunk, fixed_chunk = _at((arrays, fixed), start, size)
        read = dict(zip(sources, places)) | free
        d = {n: _at(read[n], start, size) for n in cotangents}
        # The last chunk begins before the one before it ends; what both have is done by then.
        fresh = start + jnp.arange(size) >= number * size
        d = d if length % size == 0 else {n: _where(fresh, a, 0) for n, a in d.items()}
        none = {n: np.zeros((s[0], size, *s[2:]), jax.dtypes.float0) for n, s in shapes.items()}
        d_results = [(d | none)[n] for n in range(results.num_leaves)]

        def result(consts, chunk):
            return function(_combine(consts, fixed_consts), _combine(chunk, fixed_chunk))

        _, vjp = jax.vjp(result, consts, chunk)
        d_consts, d_chunk = vjp(jax.tree.unflatten(results, d_results))
        totals = jax.tree.map(jnp.add, totals, d_consts)
        new = jax.tree.leaves(d_chunk)
        if length % size:
            new = [_where(fresh, a, _at(place, start, size)) for a, place in zip(new, places)]
        return (totals, [_put(*pair, start) for pair in zip(places, new)]), None

    totals = jax.tree.map(lambda c: jnp.zeros_like(c, accumulator(c.dtype)), consts)
    starts = _starts(length, size)
    (totals, places), _ = lax.scan(step, (totals, places), (jnp.arange(len(starts)), starts))
    d_consts = jax.tree.map(lambda total, c: total.astype(c.dtype), totals, consts)
    return d_consts, jax.tree.unflatten(structure, places)


_map.defvjp(_map_forward, _map_backward, symbolic_zeros=True)


def _starts(length: int, size: int) -> Int[Array, "count"]:
    """Where chunks of ``size`` positions begin; the last one ends with the sequence."""
    return jnp.minimum(size * jnp.arange(-(-length // size)), length - size)


def _at(arrays: PyTree[Array], start: Int[Array, ""] | int, size: int) -> PyTree[Array]:
    """A chunk of arrays."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size, axis=1), arrays)


def _put(array: Array, chunk: Array, start: Int[Array, ""]) -> Array:
    """The array with a chunk in its place."""
    return lax.dynamic_update_slice_in_dim(array, chunk, start, axis=1)


def _where(positions: Bool[Array, "size"], a: Array, b: Array | float) -> Array:
    """One or the other, by position."""
    return jnp.where(positions.reshape(1, -1, *[1] * (a.ndim - 2)), a, b)


def _blank(
    kind: Array | jax.ShapeDtypeStruct, length: int, beside: PyTree[Array], like: PyTree[Array]
) -> Array:
    """A place for the chunks of a result of this kind, which starts to exist after ``beside``.

    Compilers make one array of all zeros of a program, and keep it from the first use to the last.
    Under ``shard_map``, it varies over the mesh axes over which any of ``like`` does.
    """
    zero, _ = lax.optimization_barrier((jnp.zeros((), kind.dtype), beside))
    zeros = jnp.broadcast_to(zero, (kind.shape[0], length, *kind.shape[2:]))
    return alike(zeros, *jax.tree.leaves(like))[0]


def sum_of_chunks(
    function: Callable[[Any, Any], tuple[Float[Array, ""], PyTree[Array]]],
    shared: PyTree[Array],
    chunks: PyTree[Shaped[Array, "count ..."]],
    placement: Placement | None = None,
) -> tuple[Float[Array, ""], PyTree[Array]]:
    """The sum of ``function(shared, chunk)`` over all chunks, a chunk at a time.

    The gradient of a chunk is taken as soon as its value is known, and the backward pass only
    scales the sum: nothing is computed twice, and of what ``function`` needs on the way to its
    result, never more exists than that of a chunk. It is the gradient of the plain form.

    Args:
      function: hashable, closing over no traced array. It returns a scalar, and what else is to be
        told of a chunk, which is not differentiated.
      shared: what all chunks read.
      chunks: as :func:`cut` makes them.
      placement: where samples are; None for one device.

    Returns:
      The sum, and what was told, stacked.
    """
    leaves, structure = jax.tree.flatten((shared, chunks))
    return _sum(function, placement, *jax.tree.unflatten(structure, alike(*leaves)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(function, placement, shared, chunks):
    del placement
    values, told = lax.map(lambda chunk: function(shared, chunk), chunks)
    return jnp.sum(values), told


def _sum_forward(function, placement, shared, chunks):
    (shared, chunks), wanted = perturbed((shared, chunks))
    shared, fixed = _partition(shared, wanted[0])
    chunks = _partition(chunks, wanted[1])

    def step(d_shared, chunk):
        chunk, fixed_chunk = chunk

        def value_of(shared, chunk):
            return function(_combine(shared, fixed), _combine(chunk, fixed_chunk))

        gradient = jax.value_and_grad(value_of, argnums=(0, 1), has_aux=True)
        (value, told), (d, d_chunk) = gradient(shared, chunk)
        return jax.tree.map(jnp.add, d_shared, d), (value, told, d_chunk)

    # In float32 (float64), of which a sum of many parts loses nothing.
    start = jax.tree.map(lambda s: jnp.zeros_like(s, accumulator(s.dtype)), shared)
    d_shared, (values, told, d_chunks) = lax.scan(step, start, chunks)
    if placement is not None:
        d_shared = placement.total(d_shared)
    d_shared = jax.tree.map(lambda d, s: d.astype(s.dtype), d_shared, shared)
    return (jnp.sum(values), told), (d_shared, d_chunks)


def _sum_backward(function, placement, saved, cotangents):
    del function, placement
    d, _ = cotangents
    if is_zero(d):
        return None, None
    return jax.tree.map(lambda gradient: (gradient * d).astype(gradient.dtype), saved)


_sum.defvjp(_sum_forward, _sum_backward, symbolic_zeros=True)


def _partition(tree: PyTree, mask: PyTree[bool]) -> tuple[PyTree, PyTree]:
    """The leaves that a mask keeps, and the others; None stands where a leaf is missing."""
    kept = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, tree)
    return kept, jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, tree)


def _combine(some: PyTree, others: PyTree) -> PyTree:
    """The inverse of :func:`_partition`."""
    is_none = lambda leaf: leaf is None  # noqa: E731
    return jax.tree.map(lambda a, b: b if a is None else a, some, others, is_leaf=is_none)


def even(length: int, most: int) -> int:
    """The size of few chunks of at most ``most`` positions, as equal as there can be.

    Where a size of more than three quarters of ``most`` divides the length, it is that: nothing is
    filled up, or copied to be filled up. Otherwise of as few as there can be, the last of which is
    computed like the others: of 130 positions, 2 chunks of 128 would compute 256. A multiple of 8
    where there can be one, as matrix units want it.
    """
    if length <= most:
        return length
    for size in range(most - most % 8, 3 * most // 4, -8):
        if length % size == 0:
            return size
    size = -(-length // -(-length // most))
    return min(most, -(-size // 8) * 8)


def cut(
    a: Shaped[Array, "batch length *shape"], size: int
) -> Shaped[Array, "count batch size *shape"]:
    """Chunks of ``size`` positions, the last one filled up with zeros.

    Along the sequence, so that a batch that is sharded stays so.
    """
    batch, length, *shape = a.shape
    count = -(-length // size)
    pad = [(0, 0), (0, count * size - length)] + [(0, 0)] * len(shape)
    return jnp.moveaxis(jnp.pad(a, pad).reshape(batch, count, size, *shape), 1, 0)


def together(
    chunks: Shaped[Array, "count batch size *shape"], length: int
) -> Shaped[Array, "batch length *shape"]:
    """The inverse of :func:`cut`."""
    _, batch, _, *shape = chunks.shape
    return jnp.moveaxis(chunks, 0, 1).reshape(batch, -1, *shape)[:, :length]
