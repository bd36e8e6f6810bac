"""States of a batch: what is asked of them sample by sample."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from bdia_jax import grid


def per_sample(values: Array, like: Array) -> Array:
    """``values`` of shape [batch], shaped to broadcast against ``like``, [batch, ...]."""
    return lax.broadcast_in_dim(values, (like.shape[0],) + (1,) * (like.ndim - 1), (0,))


def checksum(n: Int32[Array, "batch *shape"]) -> UInt32[Array, "batch"]:
    """A hash of each sample's integers, by value and position: the sum of one word per element.

    The word is a bijective function of the element, so that a change of one element always
    shows. Changes of several may cancel, with a chance of at most 2^-28; then the next block below
    is reconstructed from them, and is compared in turn.
    """
    word = n.astype(jnp.uint32)
    for axis in range(1, n.ndim):
        # The position enters axis by axis: a flat index would reshape, and a reshape may gather.
        position = lax.broadcasted_iota(jnp.uint32, n.shape, axis)
        word += position * jnp.uint32(0x9E3779B1 * 31**axis % 2**32)
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return jnp.sum(word ^ (word >> 16), axis=tuple(range(1, n.ndim)), dtype=jnp.uint32)


def nan_unless(good: Bool[Array, "batch"], x: Float[Array, "batch *shape"]) -> Array:
    """``x``, and NaN in the samples that are not good.

    A sum, because over explicit mesh axes a selection wants the condition sharded like ``x``.
    """
    return x + per_sample(jnp.where(good, 0, jnp.nan).astype(x.dtype), x)


def in_range(y: Array, n: Array) -> Bool[Array, "batch"]:
    """Per sample, whether a value before rounding and a state are finite and within the limit."""
    return everywhere(grid.in_range(y) & (jnp.abs(n) < grid.LIMIT))


def everywhere(condition: Bool[Array, "batch *shape"]) -> Bool[Array, "batch"]:
    """Per sample, whether the condition holds everywhere."""
    return jnp.all(condition, axis=tuple(range(1, condition.ndim)))
