"""Sequences cut into chunks, for what is computed a chunk at a time to spare memory."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Shaped


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
