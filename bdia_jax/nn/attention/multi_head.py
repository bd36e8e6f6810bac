"""Multi-head self-attention of vision transformers: one projection, all positions, no cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bdia_jax.nn.attention.kernels import weighted
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
        if type(self.qkv) is not nnx.Linear:
            # With low-rank updates, or quantized.
            found = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, self.head_dim)
            return (jnp.moveaxis(found[:, :, i], 1, 2) for i in range(3))
        kernel = self.qkv.kernel[...].astype(self.dtype)
        kernel = kernel.reshape(-1, 3, self.heads, self.head_dim)
        x = x.astype(self.dtype)
        return (jnp.einsum("blw,whd->bhld", x, kernel[:, i]) for i in range(3))

    def merge(
        self, x: Float[Array, "batch head length head_dim"]
    ) -> Float[Array, "batch length width"]:
        """Attended values, projected to the width of the stream."""
        if type(self.out) is not nnx.Linear:
            return self.out(jnp.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1))
        kernel = self.out.kernel[...].astype(self.dtype).reshape(self.heads, self.head_dim, -1)
        merged = jnp.einsum("bhld,hdw->blw", x, kernel)
        assert self.out.bias is not None
        return merged + self.out.bias[...].astype(self.dtype)[None, None]


class SelfAttention(MultiHead):
    """Multi-head self-attention over all positions.

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
        scale, mask = self.head_dim**-0.5, None
        if self.log_temperature is not None:
            scale, mask = jnp.exp(self.log_temperature[...]), ~jnp.eye(x.shape[1], dtype=bool)
            mask = mask[None, None]
        return self.merge(weighted(*self.split(x), scale=scale, mask=mask, drop=self.dropout))


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
        return self.merge(weighted(q, k, v, scale=self.head_dim**-0.5, drop=self.dropout))
