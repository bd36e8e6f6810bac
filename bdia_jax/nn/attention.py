"""Multi-head self-attention."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bdia_jax.nn.dropout import Dropout


class MultiHead(nnx.Module):
    """Projection to queries, keys and values, and back.

    The matrix products make and take arrays in which the heads come before the positions, as
    attention wants them: splitting heads off afterwards would copy every one of them, and the
    copies are kept for the derivative.
    """

    def __init__(self, width: int, heads: int, head_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        inner = heads * head_dim
        self.heads, self.head_dim, self.dtype = heads, head_dim, dtype
        self.qkv = nnx.Linear(width, 3 * inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(inner, width, dtype=dtype, rngs=rngs)

    def split(
        self, x: Float[Array, "batch length width"]
    ) -> Iterator[Float[Array, "batch head length head_dim"]]:
        """Queries, keys and values."""
        kernel = self.qkv.kernel[...].astype(self.dtype)
        kernel = kernel.reshape(-1, 3, self.heads, self.head_dim)
        x = x.astype(self.dtype)
        return (jnp.einsum("blw,whd->bhld", x, kernel[:, i]) for i in range(3))

    def merge(
        self, x: Float[Array, "batch head length head_dim"]
    ) -> Float[Array, "batch length width"]:
        """Attended values, projected to the width of the stream."""
        kernel = self.out.kernel[...].astype(self.dtype)
        kernel = kernel.reshape(self.heads, self.head_dim, -1)
        return jnp.einsum("bhld,hdw->blw", x, kernel) + self.out.bias[...].astype(self.dtype)


class SelfAttention(MultiHead):
    """Multi-head self-attention over all positions, without a mask.

    ``local=True`` is locality self-attention (Lee, Lee, Song, "Vision Transformer for
    Small-Size Datasets", 2021): no position attends to itself, and the temperature of the
    softmax is learned, from 1/sqrt(head_dim).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        dropout: float = 0.0,
        local: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, heads, head_dim, dtype=dtype, rngs=rngs)
        self.local = local
        self.dropout = Dropout(dropout, rngs=rngs)
        self.log_temperature = nnx.Param(jnp.float32(math.log(head_dim**-0.5))) if local else None

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        """The attended values, projected to the width of ``x``; the softmax is in float32."""
        q, k, v = self.split(x)
        scale = jnp.exp(self.log_temperature[...]) if self.local else self.head_dim**-0.5
        logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
        if self.local:
            logits = jnp.where(jnp.eye(x.shape[1], dtype=bool), -jnp.inf, logits)
        weights = self.dropout(jax.nn.softmax(logits).astype(v.dtype))
        return self.merge(jnp.einsum("bhqk,bhkd->bhqd", weights, v))


class LinearAttention(MultiHead):
    """Multi-head self-attention to ``projection`` mixtures of positions, which are learned.

    Keys and values of all positions are projected along the sequence, by one matrix each that
    all heads share; cost and memory are linear in the length. (Linformer: Wang, Li, Khabsa,
    Fang, Ma, "Linformer: Self-Attention with Linear Complexity", 2020.)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        length: int,
        projection: int,
        dropout: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, heads, head_dim, dtype=dtype, rngs=rngs)
        self.dropout = Dropout(dropout, rngs=rngs)
        init = nnx.initializers.normal(length**-0.5)
        self.mix_keys, self.mix_values = (
            nnx.Param(init(rngs.params(), (length, projection))) for _ in range(2)
        )

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        """The attended mixtures, projected to the width of ``x``; the softmax is in float32."""
        q, k, v = self.split(x)
        k, v = (
            jnp.einsum("bhkd,kp->bhpd", each, mix[...].astype(self.dtype))
            for each, mix in ((k, self.mix_keys), (v, self.mix_values))
        )
        logits = jnp.einsum("bhqd,bhpd->bhqp", q, k, preferred_element_type=jnp.float32)
        weights = self.dropout(jax.nn.softmax(logits * self.head_dim**-0.5).astype(v.dtype))
        return self.merge(jnp.einsum("bhqp,bhpd->bhqd", weights, v))
