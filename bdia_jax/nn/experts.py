"""Mixtures of experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from bdia_jax.grid import accumulator
from bdia_jax.nn.blocks import Activation, activated
from bdia_jax.pinning import alike

LARGEST_TILE = 512
"""Rows that are multiplied with an expert's matrices at a time."""

Matrices = Sequence[Array]
"""Gate and up, ``[experts, width, hidden]``, and down, ``[experts, hidden, width]``."""


class Experts(nnx.Module):
    """Gated feed-forward networks, of which a router picks ``per_token`` for each position.

    ``Σ_e p_e down_e(act(gate_e(x)) * up_e(x))`` over the largest of ``p = softmax(x router)``; if
    ``normalized``, divided by their sum. (Jiang et al., "Mixtral of Experts", 2024.) No position is
    dropped: the update of a position depends on that position alone. It has derivatives in reverse
    mode only.

    On a mesh the result is right, but every device computes the experts of all samples: call it
    under ``jax.shard_map`` there.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        per_token: int,
        *,
        normalized: bool = True,
        activation: Activation = "silu",
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        kernel_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        def matrix(*shape):
            return nnx.Param(kernel_init(rngs.params(), shape, param_dtype))

        self.router = matrix(width, experts)
        self.gate, self.up = matrix(experts, width, hidden), matrix(experts, width, hidden)
        self.down = matrix(experts, hidden, width)
        self.per_token, self.normalized = per_token, normalized
        self.activation: Activation = activation
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Applied to every position alike."""
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        shares, chosen = self.route(rows)
        slots, of_tile, tile = arrange(chosen.reshape(-1), self.router.shape[-1])
        tiles = jnp.zeros((len(of_tile) * tile, rows.shape[-1]), rows.dtype)
        tiles = tiles.at[slots].set(jnp.repeat(rows, self.per_token, 0), unique_indices=True)
        tiles, *matrices = alike(
            tiles.reshape(len(of_tile), tile, rows.shape[-1]),
            *(matrix[...].astype(self.dtype) for matrix in (self.gate, self.up, self.down)),
        )
        y: Array = by_tiles(self.activation, tiles, matrices, of_tile)
        y = y.reshape(-1, rows.shape[-1])[slots].reshape(*chosen.shape, rows.shape[-1])
        return jnp.sum(y * shares[..., None], axis=1).reshape(x.shape)

    def route(
        self, rows: Float[Array, "rows width"]
    ) -> tuple[Float[Array, "rows per_token"], Int[Array, "rows per_token"]]:
        """The shares of the experts of each row, and which they are."""
        logits = rows @ self.router[...].astype(rows.dtype)
        shares, chosen = lax.top_k(
            jax.nn.softmax(logits.astype(accumulator(logits.dtype))), self.per_token
        )
        if self.normalized:
            shares /= jnp.sum(shares, axis=-1, keepdims=True)
        return shares.astype(rows.dtype), chosen


def arrange(
    chosen: Int[Array, " rows"], experts: int
) -> tuple[Int[Array, " rows"], Int[Array, " tiles"], int]:
    """Puts rows into tiles, each for one expert, the last of each expert's not full.

    Args:
      chosen: the expert of each row.
      experts: how many there are.

    Returns:
      The place of each row, which expert each tile is for, and the rows of a tile: some half of
      what an expert has on average. There are as many tiles as are needed in the worst case.
    """
    rows = len(chosen)
    tile = 2 ** round(math.log2(max(rows / experts / 2, 1)))
    tile = min(tile, LARGEST_TILE)
    is_of = (chosen[:, None] == jnp.arange(experts)).astype(jnp.int32)
    rank = jnp.sum(jnp.cumsum(is_of, axis=0) * is_of, axis=1) - 1
    ends = jnp.cumsum(-(-jnp.sum(is_of, axis=0) // tile))
    first = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    # At most one tile of each expert is not full, and that has one row at least.
    tiles = jnp.arange((rows + min(experts, rows) * (tile - 1)) // tile)
    of_tile = jnp.sum(tiles[:, None] >= ends, axis=1)
    # Tiles that nobody needs are given to the last expert.
    return first[chosen] * tile + rank, jnp.minimum(of_tile, experts - 1), tile


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_tiles(
    activation: Activation,
    tiles: Float[Array, "tiles rows width"],
    matrices: Matrices,
    of_tile: Int[Array, " tiles"],
) -> Float[Array, "tiles rows width"]:
    """Each tile through its expert, one after the other; so is its derivative.

    No hidden layer but that of a tile ever exists. By itself, JAX would add up a gradient of all
    experts for every tile.
    """

    def step(_, tile):
        x, expert = tile
        return None, _of_one(activation, x, _pick(matrices, expert))

    return lax.scan(step, None, (tiles, of_tile))[1]


def _pick(matrices: Matrices, expert: Int[Array, ""]) -> Matrices:
    gate, up, down = (lax.dynamic_index_in_dim(m, expert, keepdims=False) for m in matrices)
    return gate, up, down


def _of_one(activation: Activation, x: Array, matrices: Matrices) -> Array:
    gate, up, down = matrices
    return activated(activation, x @ gate, x @ up) @ down


def _forward(activation, tiles, matrices, of_tile):
    return by_tiles(activation, tiles, matrices, of_tile), (tiles, matrices, of_tile)


def _backward(activation, kept, d_y):
    tiles, matrices, of_tile = kept

    def step(sums, tile):
        x, expert, d_y = tile
        _, vjp = jax.vjp(partial(_of_one, activation), x, _pick(matrices, expert))
        d_x, gradients = vjp(d_y)
        added = tuple(s.at[expert].add(g.astype(s.dtype)) for s, g in zip(sums, gradients))
        return added, d_x

    zeros = tuple(jnp.zeros(m.shape, accumulator(m.dtype)) for m in matrices)
    zeros = tuple(alike(zero, tiles)[0] for zero in zeros)
    sums, d_tiles = lax.scan(step, zeros, (tiles, of_tile, d_y))
    return d_tiles, [s.astype(m.dtype) for s, m in zip(sums, matrices)], None


by_tiles.defvjp(_forward, _backward)
