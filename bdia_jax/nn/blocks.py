"""Residual blocks. Each maps ``x`` to its update ``h(x)``; the stack adds it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bdia_jax.nn.dropout import Dropout


class FeedForward(nnx.Module):
    """Linear, GELU, linear, with dropout after both."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        dropout: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.up = nnx.Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(hidden, width, dtype=dtype, rngs=rngs)
        self.dropout = Dropout(dropout, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Applied to every position alike."""
        return self.dropout(self.down(self.dropout(jax.nn.gelu(self.up(x)))))


class TransformerBlock(nnx.Module):
    """The pre-norm transformer block: ``h(x) = a + ffn(norm(x + a))``, ``a = attn(norm(x))``."""

    def __init__(
        self,
        width: int,
        attention: Callable[..., nnx.Module],
        *,
        hidden: int,
        dropout: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """``attention`` is called with ``rngs=`` and builds the attention module."""
        self.attention_norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.attention = attention(rngs=rngs)
        self.ffn_norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.ffn = FeedForward(width, hidden, dropout=dropout, dtype=dtype, rngs=rngs)
        self.dropout = Dropout(dropout, rngs=rngs)

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        """The update ``h(x)``."""
        a = self.attend(x)
        return a + self.feed_forward(x + a)

    def attend(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        """The first half: ``attn(norm(x))``."""
        return self.dropout(self.attention(self.attention_norm(x)))

    def feed_forward(
        self, x: Float[Array, "batch length width"]
    ) -> Float[Array, "batch length width"]:
        """The second half: ``ffn(norm(x))``."""
        return self.ffn(self.ffn_norm(x))
