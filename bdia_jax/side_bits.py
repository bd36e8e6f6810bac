"""Packing of side information: a few bits per element into machine words.

Elements that share a word lie far apart on the feature axis: with W words per row, word j
holds elements j, j + W, j + 2W, … That makes packing a handful of shifts and ors of contiguous
slices (vector code without shuffles), and touches only the last axis, so that a batch or
sequence axis which is sharded over devices stays where it is.
"""

from __future__ import annotations

import functools
import operator

import jax.numpy as jnp
from jaxtyping import Array, UInt, UInt32

from bdia_jax.pinning import shards


def _word(bits: int) -> tuple[jnp.dtype, int]:
    """The word type for ``bits`` per element, and how many elements it holds."""
    if isinstance(bits, bool) or not hasattr(bits, "__index__") or not 1 <= bits <= 32:
        raise ValueError(f"bits per element must be an int in 1 … 32; got {bits!r}")
    size = 8 if 8 % bits == 0 else 32
    return jnp.dtype(f"uint{size}"), size // bits


def _check(array: Array, function: str) -> None:
    if not (hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.unsignedinteger)):
        given = getattr(array, "dtype", type(array).__name__)
        raise TypeError(f"{function} takes unsigned integers; got {given}")
    if array.ndim < 1:
        raise ValueError(f"{function} takes arrays with a feature axis; got a scalar")


def packed_width(features: int, bits: int) -> int:
    """Words per row of ``features`` elements."""
    return -(-features // _word(bits)[1])


def pack_bits(values: UInt32[Array, "... features"], bits: int) -> UInt[Array, "... words"]:
    """The low ``bits`` bits of each element, packed along the last axis.

    Args:
      values: unsigned integers below ``2**bits``.
      bits: 1 … 32. Words are uint8 for 1, 2, 4 and 8 bits, else uint32 (3 bits: ten to a word).

    Returns:
      uint8 or uint32, ``ceil(features / elements per word)`` words per row.

    Raises:
      ValueError: for features on an explicit mesh axis that cannot split these words evenly.
    """
    _check(values, "pack_bits")
    dtype, per_word = _word(bits)
    features, words = values.shape[-1], packed_width(values.shape[-1], bits)
    devices = shards(values)[-1]
    if words % devices:
        raise ValueError(
            f"{features} features, of {bits} bits each, are packed into {words} words, which "
            f"{devices} devices cannot share evenly: shard x along another axis, or have a number "
            f"of features that {per_word * devices} divides"
        )
    if per_word * words != features:
        padding = [(0, 0)] * (values.ndim - 1) + [(0, per_word * words - features)]
        values = jnp.pad(values, padding)
    # Narrowed before shifting: less to move, and bits beyond the word would be dropped anyway.
    slices = [
        values[..., i * words : (i + 1) * words].astype(dtype) << dtype.type(i * bits)
        for i in range(per_word)
    ]
    return functools.reduce(operator.or_, slices)


def unpack_bits(
    packed: UInt[Array, "... words"], bits: int, features: int
) -> UInt32[Array, "... features"]:
    """The inverse of :func:`pack_bits` for rows of ``features`` elements."""
    _check(packed, "unpack_bits")
    dtype, per_word = _word(bits)
    if packed.dtype != dtype or packed.shape[-1] != packed_width(features, bits):
        raise ValueError(
            f"{features} elements of {bits} bits are packed into {packed_width(features, bits)} "
            f"words of {dtype.name}; got {packed.shape[-1]} of {packed.dtype.name}"
        )
    mask = dtype.type(2**bits - 1)
    slices = [(packed >> dtype.type(i * bits)) & mask for i in range(per_word)]
    return jnp.concatenate(slices, axis=-1)[..., :features].astype(jnp.uint32)
