"""Grouped-query attention of language models, with caches of keys and values."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bdia_jax.nn.attention.chunked import chunked_attention
from bdia_jax.nn.attention.kernels import KernelName, attend
from bdia_jax.nn.dropout import Dropout
from bdia_jax.nn.linear import dot_general
from bdia_jax.nn.positions import Angles, rotate
from bdia_jax.nn.stacked import PerBlock

KeysValues = tuple[
    Float[Array, "batch _position kv_head dim"], Float[Array, "batch _position kv_head dim"]
]


class GroupedQueryAttention(nnx.Module):
    """Attention to the sequence itself or to another one.

    Each head of keys and values serves heads / kv_heads heads of queries. (Ainslie et al., "GQA:
    Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023.)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        causal: bool = True,
        qkv_bias: bool = False,
        out_bias: bool = False,
        make_norm: Callable[[int], nnx.Module] | None = None,
        norm_whole: bool = False,
        scale: float | None = None,
        cap: float | None = None,
        window: int | PerBlock | None = None,
        rotation: PerBlock | None = None,
        dropout: float = 0.0,
        kernel: KernelName = "auto",
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the projections.

        Args:
          width: features of the stream.
          heads, kv_heads, head_dim: numbers of heads, and features of each.
          causal: whether a position attends to itself and those before it only.
          qkv_bias, out_bias: whether the projections have biases.
          make_norm: of a number of features; makes the norms of queries and of keys.
          norm_whole: whether they are over all heads together, rather than head by head.
          scale, cap, window: as of :func:`bdia_jax.nn.attention.attend`.
          rotation: which of several kinds of angles it takes.
          dropout: probability with which a weight is dropped.
          kernel: how it is computed, of :data:`bdia_jax.nn.attention.KERNELS`; what is cached is
            always attended to in chunks.
          dtype, param_dtype: of the computation and of the parameters.
          rngs: for the initialization, and for dropout.
        """
        self.head_dim, self.causal, self.norm_whole = head_dim, causal, norm_whole
        self.scale, self.cap = scale, cap
        self.window, self.rotation = window, rotation
        self.kernel: KernelName = kernel

        def linear(inputs, outputs, bias):
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=nnx.initializers.normal(0.02),
                dot_general=dot_general,
                rngs=rngs,
            )

        self.q = linear(width, heads * head_dim, qkv_bias)
        self.k = linear(width, kv_heads * head_dim, qkv_bias)
        self.v = linear(width, kv_heads * head_dim, qkv_bias)
        self.out = linear(heads * head_dim, width, out_bias)
        sizes = (heads * head_dim, kv_heads * head_dim) if norm_whole else (head_dim, head_dim)
        self.q_norm = None if make_norm is None else make_norm(sizes[0])
        self.k_norm = None if make_norm is None else make_norm(sizes[1])
        self.dropout = Dropout(dropout, rngs=rngs)

    def queries(
        self, x: Float[Array, "batch length width"], angles: Angles | None = None
    ) -> Float[Array, "batch length head dim"]:
        """With positions applied."""
        return self._heads(self.q(x), self.q_norm, angles)

    def keys_values(
        self, x: Float[Array, "batch length width"], angles: Angles | None = None
    ) -> KeysValues:
        """With positions applied."""
        return self._heads(self.k(x), self.k_norm, angles), self._heads(self.v(x), None, None)

    def _heads(self, y, norm, angles):
        if norm is not None and self.norm_whole:
            y, norm = norm(y), None
        y = y.reshape(*y.shape[:2], -1, self.head_dim)
        y = y if norm is None else norm(y)
        return y if angles is None else rotate(y, angles)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        angles: Angles | None = None,
        segments: Int[Array, "batch length"] | None = None,
        memory: tuple[Float[Array, "batch other width"], Int[Array, "batch other"] | None]
        | None = None,
    ) -> Float[Array, "batch length width"]:
        """Over the positions of ``x`` itself, or of ``memory``.

        Args:
          x: the sequence that asks.
          angles: of rotary positions; of each kind, if blocks differ.
          segments: numbers of the texts in ``x``; there is no attention from one to another.
          memory: another sequence, and the segments in it.
        """
        other, other_segments = (x, segments) if memory is None else memory
        angles = self.angles_of_block(angles)
        keys_values = self.keys_values(other, angles)
        attended = self.attend(self.queries(x, angles), keys_values, segments, other_segments)
        return self.mixed(attended)

    def attend(
        self,
        q: Float[Array, "batch length head dim"],
        keys_values: KeysValues,
        segments: Int[Array, "batch length"] | None,
        other_segments: Int[Array, "batch other"] | None,
    ) -> Float[Array, "batch length head dim"]:
        """What the heads find, for queries, and keys and values, that are there."""
        both = None
        if segments is not None and other_segments is not None:
            both = segments, other_segments
        k, v = keys_values
        drops = self.dropout.drops
        return attend(
            q,
            k,
            v,
            kernel=self.kernel,
            causal=self.causal,
            segments=both,
            window=self._window(),
            scale=self.scale,
            cap=self.cap,
            dropout=self.dropout.rate if drops else 0.0,
            key=self.dropout.rngs() if drops and self.dropout.rngs is not None else None,
        )

    def mixed(
        self, attended: Float[Array, "batch length head dim"]
    ) -> Float[Array, "batch length width"]:
        """The update, from what the heads found."""
        return self.out(attended.reshape(*attended.shape[:2], -1))

    def extend(
        self,
        x: Float[Array, "batch length width"],
        angles: Angles | None,
        cache: KeysValues,
        start: Int[Array, ""] | int,
        present: Int[Array, "batch slot"],
    ) -> tuple[Float[Array, "batch length width"], KeysValues]:
        """As a call, with the positions in a cache before those of ``x``; and the longer cache.

        Args:
          x: more of the sequence.
          angles: of its rotary positions.
          cache: keys and values, of which ``start`` slots are filled.
          start: a number of slots.
          present: 0 for slots that hold padding, 1 for others.
        """
        angles = self.angles_of_block(angles)
        q, new = self.queries(x, angles), self.keys_values(x, angles)
        k, v = (
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
            window=self._window(),
            scale=self.scale,
            cap=self.cap,
        )
        return self.mixed(attended), (k, v)

    def look_up(
        self,
        x: Float[Array, "batch length width"],
        keys_values: KeysValues,
        present: Int[Array, "batch slot"],
    ) -> Float[Array, "batch length width"]:
        """As a call with a memory whose keys and values are known already.

        Args:
          x: the sequence that asks.
          keys_values: of the memory.
          present: 0 for what is padding there, 1 for the rest.
        """
        q = self.queries(x)
        k, v = (y.astype(q.dtype) for y in keys_values)
        segments = jnp.ones(x.shape[:2], jnp.int32), present
        attended = chunked_attention(q, k, v, segments=segments, scale=self.scale, cap=self.cap)
        return self.mixed(attended)

    def angles_of_block(self, angles: Angles | None) -> tuple[Array, Array] | None:
        """Those of this block's kind."""
        if angles is None or self.rotation is None:
            return angles
        kind = self.rotation[...]
        cos, sin = (jax.lax.dynamic_index_in_dim(a, kind, keepdims=False) for a in angles)
        return cos, sin

    def _window(self) -> Int[Array, ""] | int | None:
        return self.window[...] if isinstance(self.window, PerBlock) else self.window
