"""Decoder language models: GPT-2 and the Llama family, as settings of one network."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from bdia_jax.grid import accumulator
from bdia_jax.nn.blocks import FeedForward, LayerNorm, RMSNorm
from bdia_jax.nn.chunked_attention import chunked_attention
from bdia_jax.nn.chunks import by_chunks
from bdia_jax.nn.dropout import Dropout
from bdia_jax.nn.losses import Sums, cross_entropy, logits
from bdia_jax.nn.stack import DTYPES, ReversibleSettings, ReversibleStack, check_dtype, check_method


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How Llama 3.1 stretches rotary positions beyond the length it was first trained at."""

    factor: float = 8.0
    """Low frequencies are divided by it."""
    low_freq_factor: float = 1.0
    """What turns less often than this over the original length is a low frequency."""
    high_freq_factor: float = 4.0
    """What turns more often than this is left as it is; between, a mixture."""
    original_length: int = 8192
    """Positions in the first training."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig(ReversibleSettings):
    """A pre-norm decoder. The defaults are GPT-2's kind; :func:`llama` gives the other."""

    vocab_size: int = 256
    """Number of tokens."""
    max_length: int = 1024
    """Most positions of a sequence."""
    width: int = 128
    """Features of the residual stream."""
    depth: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention heads."""
    kv_heads: int | None = None
    """Heads of keys and values, each for heads / kv_heads heads; None for as many as heads."""
    head_dim: int | None = None
    """Features per head; None for width / heads."""
    hidden: int | None = None
    """Features of the hidden layer of the feed-forward network; None for 4 width."""
    norm: Literal["layer", "rms"] = "layer"
    """Layer normalization, or that by the root mean square."""
    norm_epsilon: float = 1e-5
    """Added to the variance, or the mean square."""
    positions: Literal["learned", "rotary"] = "learned"
    """Learned vectors, added to the embedding; or rotation of queries and keys."""
    rope_theta: float = 10_000.0
    """Base of the wavelengths of rotary positions."""
    rope_scaling: RotaryScaling | None = None
    """For contexts longer than those of the first training."""
    feed_forward: Literal["gelu", "swiglu"] = "gelu"
    """Two matrices and a GELU, or three and a gate."""
    qkv_bias: bool = True
    """Whether queries, keys and values have biases."""
    out_bias: bool = True
    """Whether the output of attention has a bias."""
    ffn_bias: bool = True
    """Whether the feed-forward network has biases."""
    qk_norm: bool = False
    """Whether queries and keys are normalized, head by head (Qwen 3)."""
    tied_head: bool = True
    """Whether the output matrix is that of the embedding."""
    dropout: float = 0.0
    """Probability of dropping: on the embedding, the attention weights and both updates."""
    attention: Literal["auto", "chunked", "xla", "cudnn"] = "auto"
    """chunked: over the keys in chunks, without the length × length matrix; xla, cudnn:
    implementations of jax.nn.dot_product_attention (no dropout of the weights; cudnn: NVIDIA's
    fused one, in bfloat16 or float16; segments are a length × length mask to both). auto: cudnn
    where it can be had, chunked elsewhere."""
    ffn_chunk: int | None = None
    """Positions of which the hidden layer of the feed-forward network exists at a time. It is then
    computed once more in the backward pass: less memory, more time. None for all positions."""
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """What the parameters are kept in."""

    def __post_init__(self):
        sizes = (
            "vocab_size",
            "max_length",
            "width",
            "depth",
            "heads",
            "kv_heads",
            "head_dim",
            "hidden",
            "ffn_chunk",
        )
        for name in sizes:
            value = getattr(self, name)
            if value is None and name in ("kv_heads", "head_dim", "hidden", "ffn_chunk"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int >= 1; got {value!r}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"heads must divide width = {self.width}, or head_dim be given; got {self.heads}"
            )
        if self.heads % self.num_kv_heads:
            raise ValueError(f"kv_heads must divide heads = {self.heads}; got {self.num_kv_heads}")
        if self.positions == "rotary" and self.size_of_head % 2:
            raise ValueError(
                f"rotary positions turn pairs: head_dim must be even; got {self.size_of_head}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {self.dropout}")
        choices = {
            "norm": ("layer", "rms"),
            "positions": ("learned", "rotary"),
            "feed_forward": ("gelu", "swiglu"),
            "attention": ("auto", "chunked", "xla", "cudnn"),
            "param_dtype": ("float32", "bfloat16", "float64"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}"
                )
        for name in ("dtype", "param_dtype"):
            check_dtype(getattr(self, name), name)
        if self.dropout and self.attention not in ("auto", "chunked"):
            raise ValueError(
                f'dropout={self.dropout} needs attention="chunked"; got {self.attention!r}'
            )
        check_method(self.method)

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def size_of_head(self) -> int:
        """Features per head."""
        return self.head_dim or self.width // self.heads


def llama(**settings) -> DecoderConfig:
    """A configuration of the Llama kind: RMS norm, rotary positions, gated, without biases."""
    kind = {
        "norm": "rms",
        "positions": "rotary",
        "feed_forward": "swiglu",
        "qkv_bias": False,
        "out_bias": False,
        "ffn_bias": False,
        "tied_head": False,
    }
    return DecoderConfig(**(kind | settings))


def lookup(
    table: Float[Array, "rows width"], indices: Int[Array, "*shape"]
) -> Float[Array, "*shape width"]:
    """Rows of a table. One that does not exist is NaN, rather than the first or the last."""
    return table.at[indices].get(mode="fill", fill_value=jnp.nan)


def rotary_angles(
    config: DecoderConfig, positions: Int[Array, "batch length"]
) -> tuple[Float[Array, "batch length pair"], Float[Array, "batch length pair"]]:
    """Cosines and sines by which pairs of features are rotated (Su et al., RoFormer, 2021)."""
    pairs = config.size_of_head // 2
    frequency = config.rope_theta ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    if (s := config.rope_scaling) is not None:
        turns = s.original_length * frequency / (2 * math.pi)
        share = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        share = jnp.clip(share, 0, 1)
        frequency = share * frequency + (1 - share) * frequency / s.factor
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "batch length head dim"],
    angles: tuple[Float[Array, "batch length pair"], Float[Array, "batch length pair"]],
) -> Float[Array, "batch length head dim"]:
    """Features i and i + dim/2 are a pair; in float32 (float64)."""
    cos, sin = (a[:, :, None] for a in angles)
    a, b = jnp.split(x.astype(accumulator(x.dtype)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


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


def fusible(config: DecoderConfig) -> bool:
    """Whether cuDNN's fused attention can do what is configured, without dropout."""
    return (
        config.dtype in ("bfloat16", "float16")
        and config.size_of_head % 8 == 0
        and config.size_of_head <= 128
    )


def has_fused_attention() -> bool:
    """Whether there is a device with cuDNN's fused attention."""
    if jax.default_backend() != "gpu":
        return False
    # Of AMD's GPUs it is a name, such as gfx942.
    capability = getattr(jax.devices()[0], "compute_capability", "")
    return re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8


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
        dropping = self.dropout.rate and not self.dropout.deterministic
        implementation = self.config.attention
        if implementation == "auto":
            # Of odd lengths it does not take a mask.
            even = q.shape[1] % 2 == k.shape[1] % 2 == 0
            fused = even and not dropping and fusible(self.config) and has_fused_attention()
            implementation = "cudnn" if fused else "chunked"
        if implementation == "chunked":
            attended = chunked_attention(
                q,
                k,
                v,
                causal=self.causal,
                segments=None if segments is None else (segments, other_segments),
                dropout=self.dropout.rate if dropping else 0.0,
                key=self.dropout.rngs() if dropping else None,
            )
        else:
            mask = None
            if segments is not None:
                mask = (segments[:, :, None] == other_segments[:, None, :])[:, None]
            attended = jax.nn.dot_product_attention(
                q, k, v, mask=mask, is_causal=self.causal, implementation=implementation
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


def feed_forward(
    block: nnx.Module, x: Float[Array, "batch length width"]
) -> Float[Array, "batch length width"]:
    """``ffn(norm(x))`` of a block; a chunk of positions at a time, if it says so."""
    return by_chunks(lambda x: block.ffn(block.ffn_norm(x)), x, block.ffn_chunk)


class DecoderBlock(nnx.Module):
    """``h(x) = a + ffn(norm(x + a))`` with causal ``a = attn(norm(x))`` (or, on request, not)."""

    def __init__(self, config: DecoderConfig, *, causal: bool = True, rngs: nnx.Rngs):
        c = config
        self.attention_norm = make_norm(c, c.width, rngs)
        self.attention = Attention(c, causal=causal, rngs=rngs)
        self.ffn_norm = make_norm(c, c.width, rngs)
        self.ffn = make_feed_forward(c, rngs)
        self.dropout = Dropout(c.dropout, rngs=rngs)
        self.ffn_chunk = c.ffn_chunk

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        angles: tuple[Array, Array] | None = None,
        segments: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """The update ``h(x)``."""
        a = self.dropout(self.attention(self.attention_norm(x), angles, segments))
        return a + self.dropout(feed_forward(self, x + a))

    def extend(self, x, angles, cache, start, present):
        """The update after what is in a cache, and the longer cache."""
        a, cache = self.attention.extend(self.attention_norm(x), angles, cache, start, present)
        return a + self.ffn(self.ffn_norm(x + a)), cache


class Decoder(nnx.Module):
    """Tokens to logits of the next token."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        init, dtype = nnx.initializers.normal(0.02), DTYPES[c.param_dtype]
        self.embedding = nnx.Param(init(rngs.params(), (c.vocab_size, c.width), dtype))
        learned = c.positions == "learned"
        self.positions = (
            nnx.Param(init(rngs.params(), (c.max_length, c.width), dtype)) if learned else None
        )
        self.dropout = Dropout(c.dropout)
        self.blocks = ReversibleStack(
            lambda rngs: DecoderBlock(c, rngs=rngs), **c.of_stacks(c.depth)[0], rngs=rngs
        )
        self.norm = make_norm(c, c.width, rngs)
        self.head = (
            None if c.tied_head else nnx.Param(init(rngs.params(), (c.vocab_size, c.width), dtype))
        )

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        *,
        segments: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Logits in float32.

        Args:
          tokens: in [0, vocab_size); others give NaN.
          segments: numbers of the texts that are packed into a sequence; there is no attention
            from one to another. None for one text.
          positions: of the tokens in their texts; None for 0, 1, 2, …
          key: PRNG key for dropout and γ; None in evaluation mode.
        """
        return self.logits(self.features(tokens, segments=segments, positions=positions, key=key))

    def features(self, tokens, *, segments=None, positions=None, key=None):
        """What the logits are computed from: ``[batch, length, width]``, arguments as above."""
        self._check(tokens)
        embed_key, block_key = (None, None) if key is None else jax.random.split(key)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.dropout(self._embed(tokens, positions), rngs=embed_key)
        return self.norm(self.blocks(x, self._angles(positions), segments, key=block_key))

    def logits(self, features: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """In float32 (float64)."""
        return logits(features, self.output_matrix())

    def output_matrix(self) -> Float[Array, "vocab width"]:
        """That of the head, or of the embedding."""
        return (self.embedding if self.head is None else self.head)[...]

    def loss(
        self,
        tokens: Int[Array, "batch length"],
        targets: Int[Array, "batch length"],
        weights: Float[Array, "batch length"] | None = None,
        *,
        segments: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        chunk: int | None = None,
    ) -> Sums:
        """Cross-entropy of the targets, without the logits of more than ``chunk`` tokens at once.

        Args:
          targets: the tokens to predict; any where the weight is 0.
          weights: of the positions; None for 1.
          tokens, segments, positions, key: as above.
          chunk: number of tokens; None as in :func:`cross_entropy`.
        """
        x = self.features(tokens, segments=segments, positions=positions, key=key)
        return cross_entropy(x, self.output_matrix(), targets, weights, chunk=chunk)

    def new_cache(self, batch: int, slots: int) -> tuple[Array, Array]:
        """Room for the keys and values of ``slots`` positions, of all blocks."""
        c = self.config
        shape = (c.depth, batch, slots, c.num_kv_heads, c.size_of_head)
        return tuple(jnp.zeros(shape, DTYPES[c.dtype]) for _ in range(2))

    def extend(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        cache: tuple[Array, Array],
        start: Int[Array, ""] | int,
        present: Int[Array, "batch slot"],
    ) -> tuple[Float[Array, "batch vocab"], tuple[Array, Array]]:
        """Logits after the last of some more tokens, and the longer cache; the standard network.

        Args:
          tokens: for the slots from ``start`` on.
          positions: of them in their texts.
          cache: of the tokens before.
          start: number of slots that are filled.
          present: 1 for slots with a token, 0 for padding; the new ones included.
        """
        x = self._embed(tokens, positions)
        angles = self._angles(positions)
        extend, params = self.blocks._pure(lambda block, *args: block.extend(*args))

        def step(x, block):
            params, cache = block
            h, cache = extend(params, x, None, angles, cache, start, present)
            return x + h, cache

        x, cache = jax.lax.scan(step, x, (params, cache))
        return self.logits(self.norm(x[:, -1])), cache

    def _embed(self, tokens, positions):
        x = lookup(self.embedding[...], tokens)
        if self.positions is not None:
            x += lookup(self.positions[...], positions)
        return x.astype(DTYPES[self.config.dtype])

    def _angles(self, positions):
        if self.config.positions == "learned":
            return None
        return rotary_angles(self.config, positions)

    def _check(self, tokens):
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                "tokens must be integers of the shape [batch, length]; got "
                f"{tokens.dtype}{list(tokens.shape)}"
            )
        if tokens.shape[1] > self.config.max_length:
            raise ValueError(
                f"sequences may have {self.config.max_length} tokens (max_length); "
                f"got {tokens.shape[1]}"
            )
