"""The configuration of decoders."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from bdia_jax.nn.attention.kernels import KERNELS, KernelName
from bdia_jax.nn.blocks import Activation
from bdia_jax.nn.positions import Rotation
from bdia_jax.nn.rotary_scaling import LongScaling, Scaling
from bdia_jax.nn.settings import ReversibleSettings, check_dropout, check_sizes

FEED_FORWARD: dict[str, tuple[Activation, bool]] = {
    "gelu": ("gelu_tanh", False),
    "exact_gelu": ("gelu", False),
    "swiglu": ("silu", True),
    "geglu": ("gelu_tanh", True),
}
"""Kinds of feed-forward networks: the activation, and whether there is a gate."""
ParamDtype = Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig(ReversibleSettings):
    """A residual decoder. The defaults are GPT-2's kind; :func:`llama` gives the other."""

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
    norm_place: Literal["before", "after", "both"] = "before"
    """What is normalized: the argument of a sublayer, its result (OLMo 2), or both (Gemma 2)."""
    zero_centered_norm: bool = False
    """Whether an rms norm multiplies by 1 + its scale, rather than by its scale (Gemma)."""
    positions: Literal["learned", "rotary"] = "learned"
    """Learned vectors, added to the embedding; or rotation of queries and keys."""
    rope_theta: float = 10_000.0
    """Base of the wavelengths of rotary positions."""
    rope_scaling: Scaling | None = None
    """For contexts longer than those of the first training."""
    rotary_dim: int | None = None
    """Features of a head that are rotated, the first ones; None for all."""
    rotated: tuple[bool, ...] | None = None
    """Which blocks rotate queries and keys; None for all."""
    window: int | None = None
    """How many tokens a position attends to: itself and those right before; None for all before."""
    windowed: tuple[bool, ...] | None = None
    """Which blocks have that window; None for all."""
    window_rope_theta: float | None = None
    """Base of the wavelengths in blocks with a window, which then have no rope_scaling (Gemma 3);
    None for what other blocks have."""
    parallel: bool = False
    """Whether the feed-forward network reads what attention reads, x, rather than x and the update
    of attention (Pythia). A block is then one part."""
    feed_forward: Literal["gelu", "exact_gelu", "swiglu", "geglu"] = "gelu"
    """Two matrices and a GELU, by tanh or exact; or three and a gate, of SiLU or GELU by tanh."""
    experts: int | None = None
    """Feed-forward networks of a block, of which a router picks some for each position; None for
    one without a router."""
    experts_per_token: int = 2
    """How many it picks."""
    normalized_shares: bool = True
    """Whether the shares of those that it picks sum up to 1."""
    qkv_bias: bool = True
    """Whether queries, keys and values have biases."""
    out_bias: bool = True
    """Whether the output of attention has a bias."""
    ffn_bias: bool = True
    """Whether the feed-forward network has biases."""
    qk_norm: bool = False
    """Whether queries and keys are normalized, head by head (Qwen 3)."""
    qk_norm_whole: bool = False
    """Whether they are normalized over all heads together (OLMo 2)."""
    attention_scale: float | None = None
    """What products of queries and keys are multiplied by; None for 1/sqrt(head_dim)."""
    attention_cap: float | None = None
    """Soft cap of these scores (Gemma 2): chunked and plain attention have it. None for no cap."""
    logit_cap: float | None = None
    """Soft cap of the logits; None for no cap."""
    embedding_scale: float | None = None
    """What the embedding is multiplied by, in dtype (Gemma: the root of width); None for 1."""
    tied_head: bool = True
    """Whether the output matrix is that of the embedding."""
    dropout: float = 0.0
    """Probability of dropping: on the embedding, the attention weights and both updates."""
    attention: KernelName = "auto"
    """chunked: over the keys in chunks, without the length × length matrix; plain: with it; xla,
    cudnn: implementations of jax.nn.dot_product_attention (no dropout of the weights; cudnn:
    NVIDIA's fused one, in bfloat16 or float16; segments are a length × length mask to both). auto:
    cudnn where it can be had, but for long sequences with such a mask; chunked elsewhere."""
    ffn_chunk: int | None = None
    """All of a block but attention itself is computed for this many positions at a time, and the
    hidden layer of the feed-forward network once more in the backward pass: less memory, more
    time. None for all positions."""
    param_dtype: ParamDtype = "float32"
    """What the parameters are kept in."""

    def __post_init__(self):
        super().__post_init__()
        check_sizes(
            self,
            "vocab_size",
            "max_length",
            "width",
            "depth",
            "heads",
            "kv_heads",
            "head_dim",
            "hidden",
            "window",
            "rotary_dim",
            "ffn_chunk",
            "experts",
            "experts_per_token",
        )
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"heads must divide width = {self.width}, or head_dim be given; got {self.heads}"
            )
        if self.heads % self.num_kv_heads:
            raise ValueError(f"kv_heads must divide heads = {self.heads}; got {self.num_kv_heads}")
        if self.positions == "rotary" and self.turned % 2:
            name = "head_dim" if self.rotary_dim is None else "rotary_dim"
            raise ValueError(f"rotary positions turn pairs: {name} must be even; got {self.turned}")
        if self.turned > self.size_of_head:
            raise ValueError(
                f"rotary_dim must be at most head_dim = {self.size_of_head}; got {self.rotary_dim}"
            )
        if isinstance(s := self.rope_scaling, LongScaling):
            for name in ("short", "long"):
                if len(factors := getattr(s, name)) != self.turned // 2:
                    raise ValueError(
                        f"{name} factors of rope_scaling must be {self.turned // 2}, one for each "
                        f"pair of features that is rotated; got {len(factors)}"
                    )
        self._check_kinds_of_blocks()
        _, gated = FEED_FORWARD[self.feed_forward]
        if self.experts is not None and (self.ffn_bias or not gated):
            raise ValueError(
                "experts need feed_forward = swiglu or geglu, and ffn_bias = False; got "
                f"{self.feed_forward}, {self.ffn_bias}"
            )
        if self.experts is not None and self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token must be at most experts = {self.experts}; got "
                f"{self.experts_per_token}"
            )
        check_dropout(self)
        if self.zero_centered_norm and self.norm != "rms":
            raise ValueError(f"zero_centered_norm needs norm = 'rms'; got {self.norm!r}")
        if self.qk_norm and self.qk_norm_whole:
            raise ValueError("qk_norm and qk_norm_whole exclude each other; got both")
        for name in ("attention_scale", "attention_cap", "logit_cap", "embedding_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive; got {value!r}")
        capping = ["auto", *(name for name, kernel in KERNELS.items() if kernel.caps)]
        if self.attention_cap is not None and self.attention not in capping:
            raise ValueError(
                f"with attention_cap = {self.attention_cap}, attention must be one of "
                f"{', '.join(capping)}; got {self.attention!r}"
            )
        dropping = ["auto", *(name for name, kernel in KERNELS.items() if kernel.drops)]
        if self.dropout and self.attention not in dropping:
            raise ValueError(
                f"with dropout = {self.dropout}, attention must be one of {', '.join(dropping)}; "
                f"got {self.attention!r}"
            )

    def _check_kinds_of_blocks(self) -> None:
        for name in ("rotated", "windowed"):
            flags = getattr(self, name)
            if flags is not None and len(flags) != self.depth:
                raise ValueError(
                    f"{name} must have an entry for each of {self.depth} blocks; got {len(flags)}"
                )
        for name in ("windowed", "window_rope_theta"):
            if self.window is None and getattr(self, name) is not None:
                raise ValueError(f"{name} needs a window; got window = None")

    @property
    def windows(self) -> tuple[int | None, ...]:
        """That of every block; None where it would hold the longest sequence, or there is none."""
        window = None if self.window is None or self.window >= self.max_length else self.window
        return tuple(window if within else None for within in self._within())

    @property
    def rotations(self) -> tuple[Rotation | None, ...]:
        """Of queries and keys, in every block; None where there is none."""
        if self.positions == "learned":
            return (None,) * self.depth
        plain = local = Rotation(self.rope_theta, self.rope_scaling)
        if self.window_rope_theta is not None:
            local = Rotation(self.window_rope_theta)
        rotated = (True,) * self.depth if self.rotated is None else self.rotated
        kinds = (local if within else plain for within in self._within())
        return tuple(kind if turned else None for kind, turned in zip(kinds, rotated))

    def _within(self) -> tuple[bool, ...]:
        """Which blocks have the window."""
        every = (self.window is not None,) * self.depth
        return every if self.windowed is None else self.windowed

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def size_of_head(self) -> int:
        """Features per head."""
        return self.head_dim or self.width // self.heads

    @property
    def turned(self) -> int:
        """Features of a head that rotary positions turn."""
        return self.rotary_dim or self.size_of_head


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
