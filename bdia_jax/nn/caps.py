"""Soft caps: of the scores of attention, and of logits."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def soft_cap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """``cap tanh(x / cap)``, which is nearly x where x is small; x itself without a cap.

    (Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size", 2024.)
    """
    return x if cap is None else cap * jnp.tanh(x / cap)
