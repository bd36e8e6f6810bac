"""Pretrained vision transformers: ViT, DINOv2, CLIP's and SigLIP's, as settings of one network."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from bdia_jax.nn.attention import GroupedQueryAttention
from bdia_jax.nn.attention.kernels import KernelName
from bdia_jax.nn.blocks import Activation, Block, FeedForward, LayerNorm
from bdia_jax.nn.configs import ParamDtype
from bdia_jax.nn.dropout import Dropout
from bdia_jax.nn.settings import DTYPES, ReversibleSettings, check_dropout, check_sizes
from bdia_jax.nn.stack import ReversibleStack

Pool = Literal["token", "mean", "both"]


@dataclasses.dataclass(frozen=True)
class VisionTowerConfig(ReversibleSettings):
    """A pre-norm vision transformer as others have pretrained it. The defaults are ViT-B/16's."""

    image_size: int = 224
    """Height and width of the images in pixels."""
    channels: int = 3
    """Colour channels of the images."""
    num_classes: int = 1000
    """Number of classes."""
    patch_size: int = 16
    """Height and width of a patch in pixels; divides image_size."""
    width: int = 768
    """Features of the residual stream."""
    depth: int = 12
    """Number of transformer blocks."""
    heads: int = 12
    """Attention heads; divides width."""
    hidden: int = 3072
    """Features of the hidden layer of the feed-forward network."""
    activation: Activation = "gelu"
    """CLIP has quick_gelu."""
    norm_epsilon: float = 1e-12
    """Added to the variance."""
    patch_bias: bool = True
    """Whether the projection of the patches has a bias; CLIP's has none."""
    qkv_bias: bool = True
    """Whether queries, keys and values have biases."""
    token: bool = True
    """Whether a learned class token precedes the patches; SigLIP has none."""
    input_norm: bool = False
    """Whether the input of the first block is normalized (CLIP)."""
    output_norm: bool = True
    """Whether the output of the last block is normalized, before pooling; CLIP's is not."""
    layer_scale: bool = False
    """Whether both updates of a block are scaled, feature by feature (DINOv2; Touvron et al.,
    "Going Deeper with Image Transformers", 2021)."""
    pool: Pool = "token"
    """What is classified: the class token, the mean of the patches, or both, side by side."""
    dropout: float = 0.0
    """Probability of dropping: on the embedding, the attention weights and both updates."""
    attention: KernelName = "auto"
    """As of :class:`bdia_jax.nn.DecoderConfig`."""
    param_dtype: ParamDtype = "float32"
    """What the parameters are kept in."""

    def __post_init__(self):
        super().__post_init__()
        sizes = ("image_size", "channels", "num_classes", "patch_size", "width", "depth", "heads")
        check_sizes(self, *sizes, "hidden")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size must divide image_size = {self.image_size}; got {self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"heads must divide width = {self.width}; got {self.heads}")
        if self.pool != "mean" and not self.token:
            raise ValueError(
                f"pool must be mean in a network without a class token; got {self.pool!r}"
            )
        check_dropout(self)

    @property
    def grid(self) -> int:
        """Patches per row, and rows of patches."""
        return self.image_size // self.patch_size

    @property
    def length(self) -> int:
        """Positions of the residual stream."""
        return self.grid**2 + self.token


class VisionTower(nnx.Module):
    """Images to logits. Randomness comes from the key of the call, and from nowhere else."""

    def __init__(self, config: VisionTowerConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        init, dtype = nnx.initializers.normal(0.02), DTYPES[c.param_dtype]

        def drawn(*shape: int) -> nnx.Param:
            return nnx.Param(init(rngs.params(), shape, dtype))

        # Axes: column and row in a patch, channel, feature. That is a convolution's kernel of other
        # libraries with its axes the other way round.
        self.patches = drawn(c.patch_size, c.patch_size, c.channels, c.width)
        self.patch_bias = nnx.Param(jnp.zeros(c.width, dtype)) if c.patch_bias else None
        self.token = drawn(c.width) if c.token else None
        self.positions = drawn(c.length, c.width)
        self.dropout = Dropout(c.dropout)
        self.input_norm = make_norm(c, rngs) if c.input_norm else None
        self.blocks = ReversibleStack(
            lambda rngs: VisionBlock(c, rngs=rngs),
            **c.of_stack(c.depth, VisionBlock.PARTS),
            rngs=rngs,
        )
        self.norm = make_norm(c, rngs) if c.output_norm else None
        # Zeros: a new head says nothing yet, rather than something arbitrary.
        self.head = nnx.Linear(
            c.width * (2 if c.pool == "both" else 1),
            c.num_classes,
            kernel_init=nnx.initializers.zeros,
            param_dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        images: Float[Array, "batch height width channel"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Logits in float32 (float64).

        Args:
          images: normalized as for the pretraining.
          key: PRNG key for dropout and the signs of γ; None where nothing is drawn.

        Raises:
          ValueError: for images of another shape.
        """
        return self.head(self.pooled(images, key=key))

    def pooled(
        self,
        images: Float[Array, "batch height width channel"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch feature"]:
        """What the head is given, in float32 (float64); arguments as of a call."""
        c, x = self.config, self.features(images, key=key)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        token, mean = x[:, 0], x[:, c.token :].mean(axis=1)
        pooled = {"token": [token], "mean": [mean], "both": [token, mean]}[c.pool]
        return jnp.concatenate(pooled, axis=-1)

    def features(
        self,
        images: Float[Array, "batch height width channel"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch length feature"]:
        """The class token, if there is one, and the patches, row by row; arguments as of a call."""
        c = self.config
        expected = (c.image_size, c.image_size, c.channels)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"images must have the shape [batch, {expected}]; got {images.shape}")
        embed_key, block_key = (None, None) if key is None else jax.random.split(key)
        x = self.dropout(self._embed(images), rngs=embed_key)
        x = self.blocks(x.astype(DTYPES[c.dtype]), key=block_key)
        return x if self.norm is None else self.norm(x)

    def _embed(self, images):
        c = self.config
        cut = images.reshape(len(images), c.grid, c.patch_size, c.grid, c.patch_size, c.channels)
        x = jnp.einsum("bhiwjc,jicf->bhwf", cut, self.patches[...].astype(images.dtype))
        x = x.reshape(len(images), -1, c.width)
        if self.patch_bias is not None:
            x += self.patch_bias[...]
        if self.token is not None:
            token = jnp.broadcast_to(self.token[...], (len(x), 1, c.width))
            x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
        x += self.positions[...]
        return x if self.input_norm is None else self.input_norm(x)


class VisionBlock(Block):
    """``h(x) = a + s₂ mlp(norm(x + a))``, ``a = s₁ attn(norm(x))``; all scales are 1, if none."""

    PARTS = ("attend", "feed_forward")

    def __init__(self, config: VisionTowerConfig, *, rngs: nnx.Rngs):
        c, dtypes = config, {n: DTYPES[getattr(config, n)] for n in ("dtype", "param_dtype")}
        self.attention_norm = make_norm(c, rngs)
        self.attention = GroupedQueryAttention(
            c.width,
            c.heads,
            c.heads,
            c.width // c.heads,
            causal=False,
            qkv_bias=c.qkv_bias,
            out_bias=True,
            dropout=c.dropout,
            kernel=c.attention,
            rngs=rngs,
            **dtypes,
        )
        self.ffn_norm = make_norm(c, rngs)
        self.ffn = FeedForward(c.width, c.hidden, activation=c.activation, rngs=rngs, **dtypes)

        def scale() -> nnx.Param | None:
            return nnx.Param(jnp.ones(c.width, dtypes["param_dtype"])) if c.layer_scale else None

        self.attention_scale, self.ffn_scale = scale(), scale()
        self.dropout = Dropout(c.dropout, rngs=rngs)

    def attend(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        """``s₁ attn(norm(x))``."""
        return self.dropout(scaled(self.attention(self.attention_norm(x)), self.attention_scale))

    def feed_forward(
        self, x: Float[Array, "batch length width"]
    ) -> Float[Array, "batch length width"]:
        """``s₂ mlp(norm(x))``."""
        return self.dropout(scaled(self.ffn(self.ffn_norm(x)), self.ffn_scale))


def scaled(
    h: Float[Array, "batch length width"], scale: nnx.Param | None
) -> Float[Array, "batch length width"]:
    """Feature by feature, if there is a scale."""
    return h if scale is None else h * scale[...].astype(h.dtype)


def make_norm(c: VisionTowerConfig, rngs: nnx.Rngs) -> LayerNorm:
    """Layer normalization, as configured."""
    return LayerNorm(
        c.width,
        epsilon=c.norm_epsilon,
        dtype=DTYPES[c.dtype],
        param_dtype=DTYPES[c.param_dtype],
        rngs=rngs,
    )
