"""Sequences cut into chunks, for what is computed a chunk at a time to spare memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree, Shaped

from bdia_jax.gradients import is_zero, perturbed
from bdia_jax.grid import accumulator
from bdia_jax.pinning import alike


def by_chunks(
    function: Callable[[Array], Array], x: Float[Array, "batch length width"], size: int | None
) -> Float[Array, "batch length outputs"]:
    """A ``function`` of single positions, applied to ``size`` of them at a time (None: to all).

    The derivative computes every chunk again, so that of what ``function`` needs on the way to its
    result, never more exists than that of a chunk. Gradients by what it closes over are summed over
    the chunks in their own dtype.
    """
    if size is None or size >= x.shape[1]:
        return function(x)
    chunks = cut(x, even(x.shape[1], size))
    return together(lax.map(jax.checkpoint(function), chunks), x.shape[1])


def sum_of_chunks(
    function: Callable[[Any, Any], tuple[Float[Array, ""], PyTree[Array]]],
    shared: PyTree[Array],
    chunks: PyTree[Shaped[Array, "count ..."]],
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

    Returns:
      The sum, and what was told, stacked.
    """
    leaves, structure = jax.tree.flatten((shared, chunks))
    return _sum(function, *jax.tree.unflatten(structure, alike(*leaves)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(function, shared, chunks):
    values, told = lax.map(lambda chunk: function(shared, chunk), chunks)
    return jnp.sum(values), told


def _sum_forward(function, shared, chunks):
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
    d_shared = jax.tree.map(lambda d, s: d.astype(s.dtype), d_shared, shared)
    return (jnp.sum(values), told), (d_shared, d_chunks)


def _sum_backward(function, saved, cotangents):
    del function
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
    """The size of as few chunks of at most ``most`` positions as there can be, and as equal.

    The last one is filled up, and computed like the others: of 130 positions, 2 chunks of 128 would
    compute 256. A multiple of 8 where there can be one, as matrix units want it.
    """
    if length <= most:
        return length
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
