"""Residual blocks. Each maps ``x`` to its update ``h(x)``; the stack adds it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bdia_jax.grid import accumulator
from bdia_jax.nn.dropout import Dropout
from bdia_jax.nn.linear import dot_general


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


class ZeroCenteredRMSNorm(nnx.Module):
    """``x / rms(x) * (1 + scale)``, in float32 (float64), whatever the scale is kept in.

    In bfloat16, 1 + scale would lose most of a small scale (Gemma's norms).
    """

    def __init__(
        self,
        width: int,
        *,
        epsilon: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        del rngs
        self.scale = nnx.Param(jnp.zeros(width, param_dtype))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Over the last axis; the derivative keeps the argument."""

        @jax.checkpoint
        def normalized(x, scale):
            wide = accumulator(x.dtype)
            x = x.astype(wide)
            square = jnp.mean(x * x, axis=-1, keepdims=True)
            x *= jax.lax.rsqrt(square + self.epsilon)
            factor = 1 + scale.astype(wide).reshape((1,) * (x.ndim - 1) + scale.shape)
            return (x * factor).astype(self.dtype)

        return normalized(x, self.scale[...])


Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]
"""The second is an approximation of the first, by tanh; the third one by the logistic function."""
_ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}
assert set(_ACTIVATIONS) == set(get_args(Activation))


class FeedForward(nnx.Module):
    """``down(act(up(x)))``, with dropout after both; or gated, ``down(act(gate(x)) * up(x))``.

    (SwiGLU and GEGLU: Shazeer, "GLU Variants Improve Transformer", 2020.)
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        gated: bool = False,
        activation: Activation | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        kernel_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        """``activation`` is gelu_tanh by default; with a gate, silu."""

        def linear(inputs, outputs):
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init or nnx.initializers.lecun_normal(),
                dot_general=dot_general,
                rngs=rngs,
            )

        self.up = linear(width, hidden)
        self.gate = linear(width, hidden) if gated else None
        self.down = linear(hidden, width)
        self.dropout = Dropout(dropout, rngs=rngs)
        self.activation: Activation = activation or ("silu" if gated else "gelu_tanh")

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Applied to every position alike."""
        gate = () if self.gate is None else (self.gate(x),)
        y = activated(self.activation, *gate, self.up(x))
        return self.dropout(self.down(self.dropout(y)))


@partial(jax.checkpoint, static_argnums=0)
def activated(activation: Activation, x: Array, gated: Array | float = 1.0) -> Array:
    """``act(x) * gated``. The derivative keeps the arguments only.

    Otherwise it would keep four arrays of the hidden layer's size; what is computed again is a part
    of what writing and reading those would cost.
    """
    return _ACTIVATIONS[activation](x) * gated


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
