"""Mixtures of experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from bdia_jax.grid import accumulator
from bdia_jax.nn.blocks import Activation, activated


class Experts(nnx.Module):
    """Gated feed-forward networks, of which a router picks ``per_token`` for each position.

    ``Σ_e p_e down_e(act(gate_e(x)) * up_e(x))`` over the largest of ``p = softmax(x router)``; if
    ``normalized``, divided by their sum. (Jiang et al., "Mixtral of Experts", 2024.) No position is
    dropped, and none waits for another: the update of a position depends on that position alone.

    Positions are sorted by expert, for ``jax.lax.ragged_dot``. Where a backend does not have that,
    XLA has every expert compute every position.
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
        order = jnp.argsort(chosen.reshape(-1))
        experts = jnp.arange(self.router.shape[-1])
        sizes = jnp.sum(chosen.reshape(-1, 1) == experts, axis=0, dtype=jnp.int32)

        def product(y, matrices):
            return lax.ragged_dot(y, matrices[...].astype(self.dtype), sizes)

        taken = rows[order // self.per_token]
        y = activated(self.activation, product(taken, self.gate), product(taken, self.up))
        y = product(y, self.down) * shares.reshape(-1, 1)[order]
        back = jnp.argsort(order)
        return jnp.sum(y[back].reshape(*chosen.shape, -1), axis=1).reshape(x.shape)

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
