"""Residual blocks. Each maps ``x`` to its update ``h(x)``; the stack adds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bdia_jax.nn.chunks import by_chunks
from bdia_jax.nn.configs import DecoderConfig
from bdia_jax.nn.dropout import Dropout
from bdia_jax.nn.settings import DTYPES


class LayerNorm(nnx.LayerNorm):
    """As ``flax.nnx.LayerNorm``; the derivative keeps the argument, not a copy of it in float32."""

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Over the last axis."""
        return jax.checkpoint(super().__call__)(x)


class RMSNorm(nnx.RMSNorm):
    """As ``flax.nnx.RMSNorm``, likewise."""

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Over the last axis."""
        return jax.checkpoint(super().__call__)(x)


class FeedForward(nnx.Module):
    """Linear, GELU, linear, with dropout after both; or gated, ``down(silu(gate(x)) * up(x))``.

    (SwiGLU: Shazeer, "GLU Variants Improve Transformer", 2020.)
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        kernel_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        def linear(inputs, outputs):
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init or nnx.initializers.lecun_normal(),
                rngs=rngs,
            )

        self.up = linear(width, hidden)
        self.gate = linear(width, hidden) if gated else None
        self.down = linear(hidden, width)
        self.dropout = Dropout(dropout, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Applied to every position alike."""
        y = _gelu(self.up(x)) if self.gate is None else _swiglu(self.gate(x), self.up(x))
        return self.dropout(self.down(self.dropout(y)))


# Their derivatives keep the arguments only, rather than four arrays of the hidden layer's size;
# what is computed again is a part of what writing and reading those would cost.
_gelu = jax.checkpoint(jax.nn.gelu)
_swiglu = jax.checkpoint(lambda gate, y: jax.nn.silu(gate) * y)


def make_norm(config: DecoderConfig, width: int, rngs: nnx.Rngs) -> nnx.Module:
    """Layer or root-mean-square normalization, as configured."""
    kind = LayerNorm if config.norm == "layer" else RMSNorm
    return kind(
        width,
        epsilon=config.norm_epsilon,
        dtype=DTYPES[config.dtype],
        param_dtype=DTYPES[config.param_dtype],
        rngs=rngs,
    )


def make_feed_forward(c: DecoderConfig, rngs: nnx.Rngs) -> FeedForward:
    """The feed-forward network of a block, as configured."""
    return FeedForward(
        c.width,
        c.hidden or 4 * c.width,
        gated=c.feed_forward == "swiglu",
        bias=c.ffn_bias,
        dtype=DTYPES[c.dtype],
        param_dtype=DTYPES[c.param_dtype],
        kernel_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )


def feed_forward(
    block: Any, x: Float[Array, "batch length width"]
) -> Float[Array, "batch length width"]:
    """``ffn(norm(x))`` of a block; a chunk of positions at a time, if it says so."""
    return by_chunks(lambda x: block.ffn(block.ffn_norm(x)), x, block.ffn_chunk)


class Block(nnx.Module):
    """A residual block of several parts, one after the other.

    A part is a method that is called as the block is, with ``x`` and the constants of the stack,
    and returns its update. A stack takes them for one step, or each for a step of its own: the
    standard network is the same.
    """

    PARTS: ClassVar[tuple[str, ...]]
    """Names of the methods."""

    def __call__(self, x: Float[Array, "batch *shape"], *consts) -> Float[Array, "batch *shape"]:
        """The update ``h(x)`` of all parts."""
        first, *others = (getattr(self, part) for part in self.PARTS)
        h = first(x, *consts)
        for part in others:
            h = h + part(x + h, *consts)
        return h


class TransformerBlock(Block):
    """The pre-norm transformer block: ``h(x) = a + ffn(norm(x + a))``, ``a = attn(norm(x))``."""

    PARTS = ("attend", "feed_forward")

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
        self.attention_norm = LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.attention = attention(rngs=rngs)
        self.ffn_norm = LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.ffn = FeedForward(width, hidden, dropout=dropout, dtype=dtype, rngs=rngs)
        self.dropout = Dropout(dropout, rngs=rngs)

    def attend(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        """``attn(norm(x))``."""
        return self.dropout(self.attention(self.attention_norm(x)))

    def feed_forward(
        self, x: Float[Array, "batch length width"]
    ) -> Float[Array, "batch length width"]:
        """``ffn(norm(x))``."""
        return self.ffn(self.ffn_norm(x))
