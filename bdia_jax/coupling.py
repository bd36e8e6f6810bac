"""Two-stream reversible networks (RevNet, Rev-ViT): the baseline that changes the architecture.

A block couples two streams, each updated by a function of the other, and is taken back in floats:

    y1 = x1 + f(x2)                 x2 = y2 - g(y1)
    y2 = x2 + g(y1)                 x1 = y1 - f(x2)

Nothing is kept but the last pair. What is taken back differs from what was there by rounding
errors, which grow from block to block; gradients are those of the reconstructed states.

Sources: Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network", NeurIPS 2017; Mangalam et
al., "Reversible Vision Transformers", CVPR 2022.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from bdia_jax.adjoints import Direct, Online

Pair = tuple[Float[Array, "batch *shape"], Float[Array, "batch *shape"]]
Half = Callable[[PyTree[Array], Array, Key[Array, ""] | None], Array]


def coupled_scan(
    f: Half,
    g: Half,
    stacked_params: PyTree[Array],
    state: Pair,
    *,
    key: Key[Array, ""] | None = None,
    adjoint: Online | Direct = Online(),  # noqa: B008  (frozen)
) -> Pair:
    """Runs a pair of streams through a stack of coupled blocks.

    Args:
      f, g: ``f(params_k, x2, key)`` and ``g(params_k, y1, key)`` return the updates of the first
        and of the second stream. They must not close over traced values.
      stacked_params: a pytree of floating-point arrays with a leading block axis.
      state: ``(x1, x2)``, of equal shape and dtype; float32 is what the inverse needs.
      key: PRNG key, or None if ``f`` and ``g`` draw nothing.
      adjoint: ``Online()``: every block is taken back in the backward pass, which keeps nothing
        that grows with depth; ``Direct()``: plain automatic differentiation.

    Returns:
      The pair after the last block.
    """
    if adjoint not in (Online(), Direct()):
        raise TypeError(f"adjoint must be Online() or Direct(); got {adjoint!r}")
    keys = _keys(key, len(jax.tree.leaves(stacked_params)[0]))
    run = _online if isinstance(adjoint, Online) else _forward
    return run(f, g, stacked_params, state, keys)


def reconstruction_errors(
    f: Half,
    g: Half,
    stacked_params: PyTree[Array],
    state: Pair,
    *,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "blocks"]:
    """Largest absolute error of the input of each block, as the backward pass takes it back.

    Everything is taken back from the last pair alone, so that errors accumulate as they do in
    training. Arguments as in :func:`coupled_scan`.
    """
    keys = _keys(key, len(jax.tree.leaves(stacked_params)[0]))

    def up(pair, inputs):
        return _step(f, g, pair, *inputs), pair

    def down(pair, inputs):
        params, keys, true = inputs
        # With the derivative, as in the backward pass: that is the arithmetic which counts.
        pair = _step_back(f, g, pair, jax.tree.map(jnp.ones_like, pair), params, keys)[0]
        return pair, functools.reduce(
            jnp.maximum, (jnp.max(jnp.abs(a - b)) for a, b in zip(pair, true))
        )

    last, states = lax.scan(up, state, (stacked_params, keys))
    return lax.scan(down, last, (stacked_params, keys, states), reverse=True)[1]


def _keys(key, blocks):
    """Two keys per block."""
    return None if key is None else jax.random.split(key, (blocks, 2))


def _halves(keys):
    return (None, None) if keys is None else (keys[0], keys[1])


def _step(f, g, pair, params, keys):
    (x1, x2), (f_key, g_key) = pair, _halves(keys)
    y1 = x1 + f(params, x2, f_key).astype(x1.dtype)
    return y1, x2 + g(params, y1, g_key).astype(x2.dtype)


def _step_back(f, g, pair, cotangents, params, keys):
    """The pair before a block, its cotangents, and those of the parameters."""
    (y1, y2), (a1, a2), (f_key, g_key) = pair, cotangents, _halves(keys)
    h, vjp = jax.vjp(lambda params, y1: g(params, y1, g_key).astype(y1.dtype), params, y1)
    x2 = y2 - h
    d_params_g, d_y1 = vjp(a2)
    a1 += d_y1
    # Without a barrier both halves' intermediate values would be alive at the same time.
    x2, a1, y1, a2 = lax.optimization_barrier((x2, a1, y1, a2))
    h, vjp = jax.vjp(lambda params, x2: f(params, x2, f_key).astype(x2.dtype), params, x2)
    x1 = y1 - h
    d_params_f, d_x2 = vjp(a1)
    return (x1, x2), (a1, a2 + d_x2), jax.tree.map(jnp.add, d_params_f, d_params_g)


def _forward(f, g, stacked_params, state, keys) -> Pair:
    return lax.scan(
        lambda pair, inputs: (_step(f, g, pair, *inputs), None), state, (stacked_params, keys)
    )[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _online(f, g, stacked_params, state, keys) -> Pair:
    return _forward(f, g, stacked_params, state, keys)


def _online_forward(f, g, stacked_params, state, keys):
    last = _forward(f, g, stacked_params, state, keys)
    return last, (stacked_params, last, keys)


def _online_backward(f, g, saved, cotangents):
    stacked_params, last, keys = saved

    def down(carry, inputs):
        pair, cotangents, d_params = _step_back(f, g, *carry, *inputs)
        return (pair, cotangents), d_params

    (_, cotangents), d_params = lax.scan(
        down, (last, cotangents), (stacked_params, keys), reverse=True
    )
    return d_params, cotangents, None


_online.defvjp(_online_forward, _online_backward)
