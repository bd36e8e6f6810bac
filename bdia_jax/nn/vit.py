"""The vision transformer, and its variant for small images."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from bdia_jax.nn.attention import LinearAttention, SelfAttention
from bdia_jax.nn.blocks import TransformerBlock
from bdia_jax.nn.dropout import Dropout
from bdia_jax.nn.stack import (
    DTYPES,
    CoupledMethod,
    CoupledStack,
    Method,
    ReversibleSettings,
    ReversibleStack,
    check_dtype,
    check_method,
)


@dataclasses.dataclass(frozen=True)
class ViTConfig(ReversibleSettings):
    """A pre-norm vision transformer.

    The defaults are those of the BDIA experiments on CIFAR: shifted-patch tokenization and
    locality self-attention, for small images (Lee, Lee, Song 2021).
    """

    image_size: int = 32
    """Height and width of the images in pixels."""
    channels: int = 3
    """Colour channels of the images."""
    num_classes: int = 10
    """Number of classes."""
    patch_size: int = 4
    """Height and width of a patch in pixels; divides image_size."""
    width: int = 512
    """Features of the residual stream."""
    depth: int = 6
    """Number of transformer blocks."""
    heads: int = 8
    """Attention heads."""
    head_dim: int = 64
    """Features per attention head."""
    hidden: int = 512
    """Features of the hidden layer of the feed-forward network."""
    dropout: float = 0.1
    """Probability of dropping, in the blocks and on the embedding."""
    pool: Literal["cls", "mean"] = "cls"
    """What is classified: a class token, or the mean over the patches."""
    shifted_patches: bool = True
    """Shifted-patch tokenization: patches of the image and of its four one-pixel shifts."""
    attention: Literal["local", "full", "linear"] = "local"
    """local: masked diagonal, learned temperature; full: the usual one; linear: to a few learned
    mixtures of positions (Linformer)."""
    projection: int = 16
    """Number of mixtures of linear attention."""
    method: Method | CoupledMethod = "bdia"
    """How the blocks are trained. Two are other networks: midpoint (x_{k-1} + 2 h(x_k)), and
    coupled (RevViT: attention and feed-forward network update two streams in turns)."""

    def __post_init__(self):
        sizes = (
            "image_size",
            "channels",
            "num_classes",
            "patch_size",
            "width",
            "depth",
            "heads",
            "head_dim",
            "hidden",
            "projection",
        )
        for name in sizes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int >= 1; got {value!r}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size must divide image_size = {self.image_size}; got {self.patch_size}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {self.dropout}")
        if self.pool not in ("cls", "mean"):
            raise ValueError(f'pool must be "cls" or "mean"; got {self.pool!r}')
        if self.attention not in ("local", "full", "linear"):
            raise ValueError(f"attention must be local, full or linear; got {self.attention!r}")
        check_dtype(self.dtype)
        check_method(self.method, (*get_args(Method), *get_args(CoupledMethod)))

    @property
    def patches(self) -> int:
        """Patches per image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def length(self) -> int:
        """Positions of the residual stream."""
        return self.patches + (self.pool == "cls")

    @property
    def coupled(self) -> bool:
        """Whether there are two streams."""
        return self.method in get_args(CoupledMethod)


class ViT(nnx.Module):
    """Images to logits. Randomness comes from the key of the call, and from nowhere else."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        c, dtype = config, DTYPES[config.dtype]
        self.embedding = PatchEmbedding(c, rngs=rngs)
        attention = functools.partial(
            _attention(c), c.width, c.heads, c.head_dim, dropout=c.dropout, dtype=dtype
        )

        def make_block(rngs):
            return TransformerBlock(
                c.width, attention, hidden=c.hidden, dropout=c.dropout, dtype=dtype, rngs=rngs
            )

        if c.coupled:
            self.blocks = CoupledStack(make_block, c.depth, method=c.method, dtype=dtype, rngs=rngs)
        else:
            self.blocks = ReversibleStack(make_block, **c.of_stacks(c.depth)[0], rngs=rngs)
        width = c.width * (2 if c.coupled else 1)
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(width, c.num_classes, rngs=rngs)

    def __call__(
        self,
        images: Float[Array, "batch height width channel"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Logits in float32.

        Args:
          images: normalized images.
          key: PRNG key for dropout and γ; None in evaluation mode.
        """
        c = self.config
        expected = (c.image_size, c.image_size, c.channels)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"images must have the shape [batch, {expected}]; got {images.shape}")
        embed_key, block_key = (None, None) if key is None else jax.random.split(key)
        x = self.embedding(images, key=embed_key)
        x = self.blocks(x.astype(DTYPES[c.dtype]), key=block_key).astype(jnp.float32)
        x = x[:, 0] if c.pool == "cls" else x.mean(axis=1)
        return self.head(self.norm(x))


def _attention(c: ViTConfig):
    """The class of a configuration's attention, with what is special to it."""
    if c.attention == "linear":
        return functools.partial(LinearAttention, length=c.length, projection=c.projection)
    return functools.partial(SelfAttention, local=c.attention == "local")


class PatchEmbedding(nnx.Module):
    """Patches, projected to the width of the stream; a class token; learned positions."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        features = c.patch_size**2 * c.channels * (5 if c.shifted_patches else 1)
        self.norm = nnx.LayerNorm(features, epsilon=1e-5, rngs=rngs) if c.shifted_patches else None
        self.project = nnx.Linear(features, c.width, rngs=rngs)
        init = nnx.initializers.normal(0.02)
        self.positions = nnx.Param(init(rngs.params(), (c.length, c.width)))
        self.token = nnx.Param(init(rngs.params(), (1, c.width))) if c.pool == "cls" else None
        self.dropout = Dropout(c.dropout)

    def __call__(
        self, images: Float[Array, "batch height width channel"], *, key: Key[Array, ""] | None
    ) -> Float[Array, "batch length width"]:
        """The input of the first block, in float32."""
        c = self.config
        if c.shifted_patches:
            images = shifted(images)
            x = self.norm(patches(images, c.patch_size))
        else:
            x = patches(images, c.patch_size)
        x = self.project(x)
        if c.pool == "cls":
            token = jnp.broadcast_to(self.token[...], (len(x), 1, c.width))
            x = jnp.concatenate([token, x], axis=1)
        return self.dropout(x + self.positions[...], rngs=key)


def patches(
    images: Float[Array, "batch height width channel"], size: int
) -> Float[Array, "batch patch feature"]:
    """Images cut into ``size`` × ``size`` patches, row by row; features: row, column, channel."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)


def shifted(
    images: Float[Array, "batch height width channel"],
) -> Float[Array, "batch height width 5*channel"]:
    """An image and its four shifts by one pixel (zeros move in), stacked on the channels."""
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    offsets = ((1, 1), (1, 2), (1, 0), (2, 1), (0, 1))
    return jnp.concatenate([padded[:, i : i + height, j : j + width] for i, j in offsets], axis=-1)
