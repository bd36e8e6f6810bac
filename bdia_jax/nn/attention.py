"""Multi-head self-attention."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bdia_jax.nn.dropout import Dropout


class SelfAttention(nnx.Module):
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
        inner = heads * head_dim
        self.heads, self.head_dim, self.local = heads, head_dim, local
        self.qkv = nnx.Linear(width, 3 * inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(inner, width, dtype=dtype, rngs=rngs)
        self.dropout = Dropout(dropout, rngs=rngs)
        self.log_temperature = nnx.Param(jnp.float32(math.log(head_dim**-0.5))) if local else None

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        """The attended values, projected to the width of ``x``; the softmax is in float32."""
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.head_dim)
        q, k, v = (qkv[:, :, i] for i in range(3))
        scale = jnp.exp(self.log_temperature[...]) if self.local else self.head_dim**-0.5
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
        if self.local:
            logits = jnp.where(jnp.eye(length, dtype=bool), -jnp.inf, logits)
        weights = self.dropout(jax.nn.softmax(logits).astype(v.dtype))
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.out(attended.reshape(batch, length, -1))


class LinearAttention(nnx.Module):
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
        inner = heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nnx.Linear(width, 3 * inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(inner, width, dtype=dtype, rngs=rngs)
        self.dropout = Dropout(dropout, rngs=rngs)
        self.dtype = dtype
        init = nnx.initializers.normal(length**-0.5)
        self.mix_keys, self.mix_values = (
            nnx.Param(init(rngs.params(), (length, projection))) for _ in range(2)
        )

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        """The attended mixtures, projected to the width of ``x``; the softmax is in float32."""
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.head_dim)
        q, k, v = (qkv[:, :, i] for i in range(3))
        k, v = (
            jnp.einsum("bkhd,kp->bphd", each, mix[...].astype(self.dtype))
            for each, mix in ((k, self.mix_keys), (v, self.mix_values))
        )
        logits = jnp.einsum("bqhd,bphd->bhqp", q, k, preferred_element_type=jnp.float32)
        weights = self.dropout(jax.nn.softmax(logits * self.head_dim**-0.5).astype(v.dtype))
        attended = jnp.einsum("bhqp,bphd->bqhd", weights, v)
        return self.out(attended.reshape(batch, length, -1))
