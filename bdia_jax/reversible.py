"""The public functions: a stack of residual blocks as one scan, or as parts of one."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from bdia_jax.adjoints import Adjoint, Checkpoint, Online
from bdia_jax.arguments import Block, prepare
from bdia_jax.checkpoint import checkpointed
from bdia_jax.direct import direct
from bdia_jax.online import online
from bdia_jax.steps import BDIA, Step


def reversible_scan(
    block: Block | tuple[Block, ...],
    stacked_params: PyTree[ArrayLike],
    x: Float[Array, "batch *shape"],
    *,
    key: Key[Array, ""] | None = None,
    consts: tuple[PyTree[ArrayLike], ...] = (),
    step: Step = BDIA(),  # noqa: B008  (frozen)
    adjoint: Adjoint = Online(),  # noqa: B008
) -> Float[Array, "batch *shape"]:
    """Runs ``x`` through a stack of residual blocks, and returns the last ``x``.

    Args:
      block: ``block(params_k, x, key_k, *consts)`` returns the update ``h_k(x)``: the standard
        network is ``x = x + block(...)``. Any pure function that preserves the shape of ``x``. It
        may close over arrays, traced ones too. Or a tuple of such functions, the parts of a block,
        such as attention and feed-forward network: each is an update and a step of its own, with
        the parameters of the block and a key of its own. A step then keeps
        for its derivative what one part needs; every part adds a step with side information.
      stacked_params: a pytree of arrays with a leading block axis of equal length; integer and
        key leaves are given to the block like any others (and get no gradient).
      x: the input of the first block, float16, bfloat16, float32 or float64. The blocks see the
        dtype of ``x``; on the grid, the state itself is int32, and the update is added in float32
        (float64).
      key: typed or raw PRNG key: gives each block a key of its own, and draws the signs of γ. None
        where neither is needed: a step that draws no signs, and blocks that ignore their key.
      consts: pytrees given to every block, differentiable, held once (a mask, an encoder's
        memory).
      step: what the network does from block to block: :class:`bdia_jax.BDIA`,
        :class:`bdia_jax.Midpoint` or :class:`bdia_jax.Euler`.
      adjoint: how that is differentiated: :class:`bdia_jax.Online`, :class:`bdia_jax.Checkpoint`
        or :class:`bdia_jax.Direct`.

    Returns:
      The output of the last block, in the shape and dtype of ``x``. On the grid, a sample in which
      a state was not finite, or left the range ±2**(30 - frac_bits), is NaN. (Within that range,
      float16 may still be infinite.)

    Raises:
      TypeError, ValueError: at trace time, for arguments that do not fit.
    """
    return reversible_scan_pair(
        block, stacked_params, (x, x), start=0, key=key, consts=consts, step=step, adjoint=adjoint
    )[1].astype(x.dtype)


def reversible_scan_pair(
    block: Block | tuple[Block, ...],
    stacked_params: PyTree[ArrayLike],
    state: tuple[Float[Array, "batch *shape"], Float[Array, "batch *shape"]],
    *,
    start: int,
    key: Key[Array, ""] | None = None,
    consts: tuple[PyTree[ArrayLike], ...] = (),
    step: Step = BDIA(),  # noqa: B008
    adjoint: Adjoint = Online(),  # noqa: B008
    compute_dtype: jnp.dtype | None = None,
) -> tuple[Float[Array, "batch *shape"], Float[Array, "batch *shape"]]:
    """:func:`reversible_scan` from state to state, so that a stack can be cut.

    ``pair = reversible_scan_pair(f, head, (x, x), start=0, ...)`` followed by
    ``reversible_scan_pair(f, tail, pair, start=blocks_in_head, ...)`` is the whole stack: with
    the same key, to the last bit (but with JAX's generator ``unsafe_rbg``, what is drawn depends
    on the number of blocks).

    Args:
      state: ``(x_{k-1}, x_k)``, of equal shape and dtype. Differentiable in both.
      start: index of the first of these blocks in the whole stack. Block 0 is an Euler step and
        ignores ``x_{-1}``.
      compute_dtype: what the blocks see; by default the dtype of the state. Where blocks compute in
        bfloat16 or float16, give it to all pieces: the first one returns a wider state.
      block, stacked_params, key, consts, step, adjoint: as in :func:`reversible_scan`.

    Returns:
      ``(x_{k-1}, x_k)`` after these blocks. On the grid in float32 (float64 for a float64 state):
      wide enough to hold its integers up to 2**24.
    """
    scan, inputs = prepare(
        block, stacked_params, state, start, key, consts, step, adjoint, compute_dtype
    )
    if isinstance(adjoint, Online):
        return online(scan)(inputs)
    if isinstance(adjoint, Checkpoint):
        return checkpointed(scan)(inputs)
    return direct(scan, inputs)
