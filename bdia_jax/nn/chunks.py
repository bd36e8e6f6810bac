"""Sequences cut into chunks, for what is computed a chunk at a time to spare memory."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


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
    return together(jax.lax.map(jax.checkpoint(function), chunks), x.shape[1])


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
