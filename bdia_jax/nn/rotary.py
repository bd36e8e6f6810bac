"""Rotary positions: pairs of features, rotated by angles that grow with the position."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bdia_jax.grid import accumulator
from bdia_jax.nn.configs import DecoderConfig


def rotary_angles(
    config: DecoderConfig, positions: Int[Array, "batch length"]
) -> tuple[Float[Array, "batch length pair"], Float[Array, "batch length pair"]]:
    """Cosines and sines by which pairs of features are rotated (Su et al., RoFormer, 2021)."""
    pairs = config.size_of_head // 2
    frequency = config.rope_theta ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    if (s := config.rope_scaling) is not None:
        turns = s.original_length * frequency / (2 * math.pi)
        share = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        share = jnp.clip(share, 0, 1)
        frequency = share * frequency + (1 - share) * frequency / s.factor
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "batch length head dim"],
    angles: tuple[Float[Array, "batch length pair"], Float[Array, "batch length pair"]],
) -> Float[Array, "batch length head dim"]:
    """Features i and i + dim/2 are a pair; in float32 (float64)."""
    cos, sin = (a[:, :, None] for a in angles)
    a, b = jnp.split(x.astype(accumulator(x.dtype)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
