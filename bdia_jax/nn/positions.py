"""Positions in a sequence: tables, rotations of pairs of features, sines and cosines."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bdia_jax.grid import accumulator

Angles = tuple[Float[Array, "batch length pair"], Float[Array, "batch length pair"]]
"""Cosines and sines by which pairs of features are rotated."""


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How Llama 3.1 stretches rotary positions beyond the length it was first trained at."""

    factor: float = 8.0
    """Low frequencies are divided by it."""
    low_freq_factor: float = 1.0
    """What turns less often than this over the original length is a low frequency."""
    high_freq_factor: float = 4.0
    """What turns more often than this is left as it is; between, a mixture."""
    original_length: int = 8192
    """Positions in the first training."""


def rotary_angles(
    positions: Int[Array, "batch length"],
    head_dim: int,
    *,
    theta: float = 10_000.0,
    scaling: RotaryScaling | None = None,
) -> Angles:
    """Angles that grow with the position (Su et al., "RoFormer", 2021).

    Args:
      positions: of the tokens in their texts.
      head_dim: features per head, of which i and i + head_dim/2 are a pair.
      theta: base of the wavelengths.
      scaling: for contexts longer than those of the first training.
    """
    pairs = head_dim // 2
    frequency = theta ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    if (s := scaling) is not None:
        turns = s.original_length * frequency / (2 * math.pi)
        share = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        share = jnp.clip(share, 0, 1)
        frequency = share * frequency + (1 - share) * frequency / s.factor
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "batch length head dim"], angles: Angles
) -> Float[Array, "batch length head dim"]:
    """Rotates the pairs of features i and i + dim/2; in float32 (float64)."""
    wide = accumulator(x.dtype)
    cos, sin = (a[:, :, None].astype(wide) for a in angles)
    a, b = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def sinusoids(
    positions: Int[Array, "batch length"], width: int
) -> Float[Array, "batch length width"]:
    """Sines, then cosines, of wavelengths from 2π to 10,000 · 2π (Vaswani et al. 2017)."""
    frequency = 10_000.0 ** (-jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def lookup(
    table: Float[Array, "rows width"], indices: Int[Array, "*shape"]
) -> Float[Array, "*shape width"]:
    """Rows of a table. One that does not exist is NaN, rather than the first or the last."""
    return table.at[indices].get(mode="fill", fill_value=jnp.nan)
