"""Dropout that costs half the random numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Key


class Dropout(nnx.Dropout):
    """As ``flax.nnx.Dropout``, with 16 random bits per element in place of 32.

    Random numbers are what dropout costs: JAX's default generator works with two words for each
    of 32 bits, whole arrays at a time, for every mask of a block; in a backward pass that
    recomputes the block they are a good part of its time, and of the memory at its peak. The
    rate is rounded to a multiple of 2^-16, and what is kept is scaled accordingly.

    Without ``rngs`` a key is given in the call. There are no ``broadcast_dims``.
    """

    def __init__(self, *args: Any, **options: Any):
        """Arguments are those of ``flax.nnx.Dropout``.

        Raises:
          ValueError: for ``broadcast_dims``.
        """
        super().__init__(*args, **options)
        if self.broadcast_dims:
            raise ValueError(
                "broadcast_dims must be empty: every element has a random number of its own; got "
                f"{self.broadcast_dims}"
            )

    @property
    def drops(self) -> bool:
        """Whether it drops anything: in training mode, with a rate above 0."""
        return self.rate > 0 and not self.deterministic

    def __call__(
        self, x: Float[Array, "*shape"], *, rngs: Key[Array, ""] | nnx.RngStream | None = None
    ) -> Float[Array, "*shape"]:
        """``x`` with elements dropped in training mode, otherwise ``x``."""
        if not self.drops:
            return x
        stream = self.rngs if rngs is None else rngs
        if stream is None:
            raise ValueError(
                "dropout draws random numbers in training mode, and needs a PRNG key: call the "
                "model with key=..., or after model.eval(); got key=None"
            )
        return dropped(x, self.rate, stream if isinstance(stream, jax.Array) else stream())


def dropped(
    x: Float[Array, "*shape"], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "*shape"]:
    """``x`` with elements dropped with probability ``rate``, and the others scaled up for it."""
    if rate == 0:
        return x
    if key is None:
        raise ValueError(f"dropout={rate} draws random numbers, and needs a key; got None")
    keep, probability = keep_mask(key, rate, x)
    return jnp.where(keep, x / probability, 0).astype(x.dtype)


def keep_mask(
    key: Key[Array, ""], rate: float, x: Float[Array, "*shape"]
) -> tuple[Bool[Array, "*shape"], float]:
    """Which elements of an array like ``x`` are kept; and the probability of that.

    Args:
      key: PRNG key.
      rate: probability of dropping, in [0, 1); rounded to a multiple of 2^-16.
      x: gives the shape and the sharding; its values are not read.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must lie in [0, 1); got {rate}")
    *leading, last = x.shape or (1,)
    sharding = jax.typeof(x).sharding
    words = jax.random.bits(key, (*leading, -(-last // 2)), jnp.uint32, out_sharding=sharding)
    dropped = min(round(rate * 2**16), 2**16 - 1)
    # Neighbours share a word: where the last axis is sharded, they stay on one device.
    halves = [words & jnp.uint32(0xFFFF), words >> 16]
    keep = jnp.stack([half >= dropped for half in halves], axis=-1)
    keep = lax.collapse(keep, keep.ndim - 2)[..., :last]
    return keep.reshape(x.shape), 1 - dropped / 2**16
