"""The norm of a gradient, whatever its arrays are kept in."""

from __future__ import annotations

import jax
import optax
from jaxtyping import Array, Float, PyTree

from bdia_jax.grid import accumulator


def global_norm(tree: PyTree[Array]) -> Float[Array, ""]:
    """Of all arrays together, in float32 (float64).

    By itself optax adds up squares in the dtype of each array, and these in bfloat16 lose every
    array that is much smaller than the largest.
    """
    return optax.tree.norm(_wide(tree))


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """As optax's, by that norm."""
    inner = optax.clip_by_global_norm(most)

    def update(updates, state, params=None):
        del params
        clipped, state = inner.update(_wide(updates), state)
        return jax.tree.map(lambda c, u: c.astype(u.dtype), clipped, updates), state

    return optax.GradientTransformation(inner.init, update)


def _wide(tree: PyTree[Array]) -> PyTree[Array]:
    return jax.tree.map(lambda a: a.astype(accumulator(a.dtype)), tree)
