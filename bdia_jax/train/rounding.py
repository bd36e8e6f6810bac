"""Trained weights of bfloat16: steps are rounded stochastically, so that small ones count.

A bfloat16 has 8 significant bits, so that a step of less than 2^-9 of a weight is lost if the sum
is rounded to the nearest. Rounded up or down by chance, with the odds that make the mean right, it
is not: E[round(w + u)] = w + u. (Gupta et al., "Deep Learning with Limited Numerical Precision",
ICML 2015. Optax and JAX have no such transformation.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32, Key, PyTree


class RoundedState(NamedTuple):
    """Steps taken, from which the noise is drawn; and the optimizer's own state, in float32."""

    count: Int32[Array, ""]
    inner: optax.OptState


def with_stochastic_rounding(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """``optimizer`` in float32, for weights of bfloat16; without any, ``optimizer`` as it is.

    Its updates are such that ``optax.apply_updates`` gives the rounded weights. The noise of a call
    depends on the step and on the gradient's norm, so that blocks that are updated one after the
    other draw different numbers.
    """

    def init(params):
        if not is_narrow(params):
            return optimizer.init(params)
        return RoundedState(jnp.int32(0), optimizer.init(_wide(params)))

    def update(updates, state, params=None):
        if not isinstance(state, RoundedState):
            return optimizer.update(updates, state, params)
        grads, wide = _wide(updates), _wide(params)
        steps, inner = optimizer.update(grads, state.inner, wide)
        seen = jax.lax.bitcast_convert_type(optax.tree.norm(grads).astype(jnp.float32), jnp.uint32)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), state.count), seen)
        leaves, structure = jax.tree.flatten(params)
        stepped = zip(leaves, *map(jax.tree.leaves, (wide, steps)), strict=True)
        new = [
            stochastic_round(w + u, jax.random.fold_in(key, i)) - w
            if p.dtype == jnp.bfloat16
            else u
            for i, (p, w, u) in enumerate(stepped)
        ]
        return structure.unflatten(new), RoundedState(
            jnp.asarray(optax.safe_increment(state.count)), inner
        )

    return optax.GradientTransformation(init, update)


def stochastic_round(x: Float32[Array, "*s"], key: Key[Array, ""]) -> Float32[Array, "*s"]:
    """One of the two bfloat16 numbers around x: the nearer it is, the likelier. Mean: x.

    A float32 is a bfloat16 with 16 more bits. What they are of 2^16 is the chance that they carry
    into the others, when as many random bits are added.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = (bits + noise) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(cut, jnp.float32), x)


def is_narrow(params: PyTree) -> bool:
    """Whether any weight is a bfloat16."""
    return any(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(params))


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), tree)
