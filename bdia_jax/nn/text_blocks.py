"""Blocks of language models."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bdia_jax.nn.attention import GroupedQueryAttention
from bdia_jax.nn.attention.grouped import KeysValues
from bdia_jax.nn.blocks import Block, FeedForward, LayerNorm, RMSNorm, ZeroCenteredRMSNorm
from bdia_jax.nn.chunks import by_chunks
from bdia_jax.nn.configs import DecoderConfig
from bdia_jax.nn.decoder_config import FEED_FORWARD
from bdia_jax.nn.dropout import Dropout
from bdia_jax.nn.experts import Experts
from bdia_jax.nn.positions import Angles
from bdia_jax.nn.settings import DTYPES
from bdia_jax.nn.stacked import PerBlock


def make_norm(config: DecoderConfig, width: int, rngs: nnx.Rngs) -> nnx.Module:
    """Layer or root-mean-square normalization, as configured."""
    rms = ZeroCenteredRMSNorm if config.zero_centered_norm else RMSNorm
    kind = LayerNorm if config.norm == "layer" else rms
    return kind(
        width,
        epsilon=config.norm_epsilon,
        dtype=DTYPES[config.dtype],
        param_dtype=DTYPES[config.param_dtype],
        rngs=rngs,
    )


def make_attention(c: DecoderConfig, *, causal: bool, rngs: nnx.Rngs) -> GroupedQueryAttention:
    """Attention, as configured; what differs from block to block is filled in by the decoder."""
    windows, rotations = set(c.windows), set(c.rotations)
    return GroupedQueryAttention(
        c.width,
        c.heads,
        c.num_kv_heads,
        c.size_of_head,
        causal=causal,
        qkv_bias=c.qkv_bias,
        out_bias=c.out_bias,
        make_norm=(
            (lambda width: make_norm(c, width, rngs)) if c.qk_norm or c.qk_norm_whole else None
        ),
        norm_whole=c.qk_norm_whole,
        scale=c.attention_scale,
        cap=c.attention_cap,
        window=PerBlock(jnp.int32(0)) if len(windows) > 1 else windows.pop(),
        rotation=PerBlock(jnp.int32(0)) if len(rotations) > 1 else None,
        dropout=c.dropout,
        kernel=c.attention,
        dtype=DTYPES[c.dtype],
        param_dtype=DTYPES[c.param_dtype],
        rngs=rngs,
    )


def make_feed_forward(c: DecoderConfig, rngs: nnx.Rngs) -> FeedForward | Experts:
    """The feed-forward network, or a mixture of them, as configured."""
    hidden = c.hidden or 4 * c.width
    activation, gated = FEED_FORWARD[c.feed_forward]
    common: dict[str, Any] = {
        "activation": activation,
        "dtype": DTYPES[c.dtype],
        "param_dtype": DTYPES[c.param_dtype],
        "kernel_init": nnx.initializers.normal(0.02),
        "rngs": rngs,
    }
    if c.experts is None:
        return FeedForward(c.width, hidden, gated=gated, bias=c.ffn_bias, **common)
    sizes = (c.width, hidden, c.experts, c.experts_per_token)
    return Experts(*sizes, normalized=c.normalized_shares, **common)


class DecoderBlock(Block):
    """``h(x) = a + ffn(norm(x + a))`` with causal ``a = attn(norm(x))`` (or, on request, not).

    As configured, what the sublayers return is normalized, too, or instead of their argument:
    ``a = norm(attn(norm(x)))``. The block is still ``x + h(x)``. A parallel one is
    ``h(x) = attn(norm(x)) + ffn(norm(x))`` (Wang and Komatsuzaki, "GPT-J-6B", 2021).
    """

    PARTS = ("attend", "feed_forward")

    def __init__(self, config: DecoderConfig, *, causal: bool = True, rngs: nnx.Rngs):
        c = config

        def norm(*places):
            return make_norm(c, c.width, rngs) if c.norm_place in places else None

        self.attention_norm = norm("before", "both")
        self.attention = make_attention(c, causal=causal, rngs=rngs)
        self.attention_update_norm = norm("after", "both")
        self.ffn_norm = norm("before", "both")
        self.ffn = make_feed_forward(c, rngs)
        self.ffn_update_norm = norm("after", "both")
        self.dropout = Dropout(c.dropout, rngs=rngs)
        self.ffn_chunk = c.ffn_chunk
        self.parallel = c.parallel

    def __call__(
        self, x: Float[Array, "batch length width"], *consts
    ) -> Float[Array, "batch length width"]:
        """The update ``h(x)``; ``consts`` are those of :meth:`attend`."""
        if self.parallel:
            return self.attend(x, *consts) + self.feed_forward(x)
        if self.ffn_chunk is None or self.dropout.drops:
            return super().__call__(x, *consts)

        # In one go over the chunks, so that a, x + a and ffn(…) are never whole arrays.
        def update(x, attended):
            a = self._attention_update(attended)
            return a + self._feed_forward_update(x + a)

        return by_chunks(update, x, self.attended(x, *consts), size=self.ffn_chunk)

    def attend(
        self,
        x: Float[Array, "batch length width"],
        angles: Angles | None = None,
        segments: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """``attn(norm(x))``."""
        return self.dropout(self._attention_update(self.attended(x, angles, segments)))

    def _attention_update(self, attended):
        return _normed(self.attention_update_norm, self.attention.mixed(attended))

    def attended(
        self,
        x: Float[Array, "batch length width"],
        angles: Angles | None = None,
        segments: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length head dim"]:
        """What the heads of attention find; arguments are those of :meth:`attend`."""

        def projected(x, angles):
            z = _normed(self.attention_norm, x)
            q = self.attention.queries(z, angles)
            # As wide as x, in most models: then the cotangent of one can overwrite the other's.
            return q.reshape(*q.shape[:2], -1), self.attention.keys_values(z, angles)

        angles = self.attention.angles_of_block(angles)
        q, keys_values = by_chunks(projected, x, angles, size=self.ffn_chunk)
        q = q.reshape(*q.shape[:2], -1, self.attention.head_dim)
        return self.attention.attend(q, keys_values, segments, segments)

    def feed_forward(
        self, x: Float[Array, "batch length width"], *_consts
    ) -> Float[Array, "batch length width"]:
        """``ffn(norm(x))``; a chunk of positions at a time, if so configured."""
        return self.dropout(by_chunks(self._feed_forward_update, x, size=self.ffn_chunk))

    def _feed_forward_update(self, x):
        return _normed(self.ffn_update_norm, self.ffn(_normed(self.ffn_norm, x)))

    def extend(
        self,
        x: Float[Array, "batch length width"],
        angles: Angles | None,
        cache: KeysValues,
        start: Int[Array, ""] | int,
        present: Int[Array, "batch slot"],
    ) -> tuple[Float[Array, "batch length width"], KeysValues]:
        """The update after what is in a cache, and the longer cache."""
        z = _normed(self.attention_norm, x)
        a, cache = self.attention.extend(z, angles, cache, start, present)
        a = _normed(self.attention_update_norm, a)
        return a + self.feed_forward(x if self.parallel else x + a), cache


def _normed(norm: nnx.Module | None, x: Array) -> Array:
    return x if norm is None else norm(x)


class CrossBlock(Block):
    """A block that looks into ``memory``, too.

    ``h(x) = a + c + ffn(norm(x + a + c))`` with causal ``a = attn(norm(x))`` and
    ``c = attn(norm(x + a), memory)``.
    """

    PARTS = ("attend", "look_up", "feed_forward")

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.attention_norm = make_norm(c, c.width, rngs)
        self.attention = make_attention(c, causal=True, rngs=rngs)
        self.cross_norm = make_norm(c, c.width, rngs)
        self.cross = make_attention(c, causal=False, rngs=rngs)
        self.ffn_norm = make_norm(c, c.width, rngs)
        self.ffn = make_feed_forward(c, rngs)
        self.dropout = Dropout(c.dropout, rngs=rngs)
        self.ffn_chunk = c.ffn_chunk

    def attend(
        self,
        x: Float[Array, "batch length width"],
        memory: Float[Array, "batch source width"],
        segments: Int[Array, "batch length"],
        memory_segments: Int[Array, "batch source"],
    ) -> Float[Array, "batch length width"]:
        """``attn(norm(x))``."""
        del memory, memory_segments
        return self.dropout(self.attention(self.attention_norm(x), None, segments))

    def look_up(
        self,
        x: Float[Array, "batch length width"],
        memory: Float[Array, "batch source width"],
        segments: Int[Array, "batch length"],
        memory_segments: Int[Array, "batch source"],
    ) -> Float[Array, "batch length width"]:
        """``attn(norm(x), memory)``."""
        found = self.cross(self.cross_norm(x), None, segments, (memory, memory_segments))
        return self.dropout(found)

    def feed_forward(
        self, x: Float[Array, "batch length width"], *_consts
    ) -> Float[Array, "batch length width"]:
        """``ffn(norm(x))``; a chunk of positions at a time, if so configured."""
        h = by_chunks(lambda x: self.ffn(self.ffn_norm(x)), x, size=self.ffn_chunk)
        return self.dropout(h)

    def extend(
        self,
        x: Float[Array, "batch length width"],
        cache: KeysValues,
        start: Int[Array, ""] | int,
        present: Int[Array, "batch slot"],
        keys_values: KeysValues,
        memory_present: Int[Array, "batch source"],
    ) -> tuple[Float[Array, "batch length width"], KeysValues]:
        """The update after what is in a cache, and the longer cache.

        Args:
          x, cache, start, present: as in :meth:`GroupedQueryAttention.extend`.
          keys_values, memory_present: as in :meth:`GroupedQueryAttention.look_up`.
        """
        a, cache = self.attention.extend(self.attention_norm(x), None, cache, start, present)
        a += self.cross.look_up(self.cross_norm(x + a), keys_values, memory_present)
        return a + self.feed_forward(x + a), cache
