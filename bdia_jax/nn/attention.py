"""Attention of all models: of images, of texts, and of one text to another."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bdia_jax.nn.blocks import make_norm
from bdia_jax.nn.chunked_attention import chunked_attention
from bdia_jax.nn.configs import DecoderConfig
from bdia_jax.nn.dropout import Dropout
from bdia_jax.nn.kernels import choose_kernel
from bdia_jax.nn.rotary import rotate
from bdia_jax.nn.settings import DTYPES


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


class Attention(nnx.Module):
    """Grouped-query attention, to the sequence itself or to another one."""

    def __init__(self, config: DecoderConfig, *, causal: bool = True, rngs: nnx.Rngs):
        c = self.config = config
        self.causal = causal
        inner, kv_inner = c.heads * c.size_of_head, c.num_kv_heads * c.size_of_head

        def linear(inputs, outputs, bias):
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=bias,
                dtype=DTYPES[c.dtype],
                param_dtype=DTYPES[c.param_dtype],
                kernel_init=nnx.initializers.normal(0.02),
                rngs=rngs,
            )

        self.q = linear(c.width, inner, c.qkv_bias)
        self.k = linear(c.width, kv_inner, c.qkv_bias)
        self.v = linear(c.width, kv_inner, c.qkv_bias)
        self.out = linear(inner, c.width, c.out_bias)
        self.q_norm = make_norm(c, c.size_of_head, rngs) if c.qk_norm else None
        self.k_norm = make_norm(c, c.size_of_head, rngs) if c.qk_norm else None
        self.dropout = Dropout(c.dropout, rngs=rngs)

    def queries(self, x, angles=None):
        """``[batch, length, head, dim]``, positions applied."""
        return self._heads(self.q(x), self.q_norm, angles)

    def keys_values(self, x, angles=None):
        """Twice ``[batch, length, kv_head, dim]``, positions applied."""
        v = self.v(x).reshape(*x.shape[:2], -1, self.config.size_of_head)
        return self._heads(self.k(x), self.k_norm, angles), v

    def _heads(self, y, norm, angles):
        y = y.reshape(*y.shape[:2], -1, self.config.size_of_head)
        y = y if norm is None else norm(y)
        return y if angles is None else rotate(y, angles)

    def __call__(self, x, angles=None, segments=None, memory=None):
        """Over the positions of ``x`` itself, or of ``memory``.

        ``memory`` is a pair: another sequence, and the segments in it.
        """
        other, other_segments = (x, segments) if memory is None else memory
        q, (k, v) = self.queries(x, angles), self.keys_values(other, angles)
        dropout = 0.0 if self.dropout.deterministic else self.dropout.rate
        attend = choose_kernel(self.config, q, k, dropout)
        attended = attend(
            q,
            k,
            v,
            causal=self.causal,
            segments=None if segments is None else (segments, other_segments),
            dropout=dropout,
            key=self.dropout.rngs() if dropout else None,
        )
        return self._out(attended)

    def look_up(self, x, keys_values, present):
        """In keys and values that are known already; ``present`` is 0 where they are padding."""
        q = self.queries(x)
        k, v = (y.astype(q.dtype) for y in keys_values)
        segments = jnp.ones(x.shape[:2], jnp.int32), present
        return self._out(chunked_attention(q, k, v, segments=segments))

    def _out(self, attended):
        return self.out(attended.reshape(*attended.shape[:2], -1))

    def extend(self, x, angles, cache, start, present):
        """As above, with the positions in a cache before those of ``x``; and the longer cache.

        ``cache`` is a pair ``[batch, slot, kv_head, dim]``, of which ``start`` slots are filled;
        ``present`` (``[batch, slot]``, 0 or 1) tells the slots that hold no padding.
        """
        q, new = self.queries(x, angles), self.keys_values(x, angles)
        k, v = cache = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, y.astype(old.dtype), start, axis=1)
            for old, y in zip(cache, new, strict=True)
        )
        attended = chunked_attention(
            q,
            k.astype(q.dtype),
            v.astype(q.dtype),
            causal=True,
            offset=start,
            segments=(jnp.ones(x.shape[:2], jnp.int32), present),
        )
        return self._out(attended), cache
