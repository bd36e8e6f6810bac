"""Positions in a sequence: tables, rotations of pairs of features, sines and cosines."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bdia_jax.grid import accumulator
from bdia_jax.nn.rotary_scaling import Scaling

Angles = tuple[Float[Array, "*kind batch length pair"], Float[Array, "*kind batch length pair"]]
"""Cosines and sines by which pairs of features are rotated; of each kind, if blocks differ."""


class Rotation(NamedTuple):
    """How a block rotates queries and keys."""

    theta: float
    """Base of the wavelengths."""
    scaling: Scaling | None = None
    """For contexts longer than those of the first training."""


def rotary_angles(
    positions: Int[Array, "batch length"],
    head_dim: int,
    *,
    theta: float = 10_000.0,
    scaling: Scaling | None = None,
    longest: int = 0,
) -> Angles:
    """Angles that grow with the position (Su et al., "RoFormer", 2021).

    Args:
      positions: of the tokens in their texts.
      head_dim: features that are rotated per head, of which i and i + head_dim/2 are a pair.
      theta: base of the wavelengths.
      scaling: for contexts longer than those of the first training.
      longest: positions of the longest sequence of the network, for ``scaling``.
    """
    pairs = head_dim // 2
    frequency = theta ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    if scaling is not None:
        frequency = scaling.frequencies(frequency, theta, longest)
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if scaling is not None and scaling.amplitude != 1:
        return cos * scaling.amplitude, sin * scaling.amplitude
    return cos, sin


def rotate(
    x: Float[Array, "batch length head dim"], angles: Angles
) -> Float[Array, "batch length head dim"]:
    """Rotates the pairs of features i and i + dim/2; in float32 (float64).

    With angles for fewer pairs, those of the first features, as if the others were not there.
    """
    if (turned := 2 * angles[0].shape[-1]) < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :turned], angles), x[..., turned:]], axis=-1)
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
