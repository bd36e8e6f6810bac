"""The vision transformer, and its variant for small images."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from bdia_jax.nn.attention import LinearAttention, SelfAttention
from bdia_jax.nn.blocks import TransformerBlock
from bdia_jax.nn.configs import ViTConfig
from bdia_jax.nn.coupled import CoupledStack
from bdia_jax.nn.dropout import Dropout
from bdia_jax.nn.settings import COUPLED, DTYPES
from bdia_jax.nn.stack import ReversibleStack


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
            self.blocks = CoupledStack(
                make_block,
                c.depth,
                adjoint=COUPLED[c.method],
                dtype=dtype,
                rngs=rngs,
            )
        else:
            self.blocks = ReversibleStack(
                make_block, **c.of_stack(c.depth, TransformerBlock.PARTS), rngs=rngs
            )
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
          key: PRNG key for dropout and the signs of γ; None where nothing is drawn.
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
    ) -> Float[Array, "batch length features"]:
        """The input of the first block, in float32."""
        c = self.config
        if c.shifted_patches:
            images = shifted(images)
        x = patches(images, c.patch_size)
        if self.norm is not None:
            x = self.norm(x)
        x = self.project(x)
        if self.token is not None:
            token = jnp.broadcast_to(self.token[...], (len(x), 1, c.width))
            x = jnp.concatenate([token, x], axis=1)
        return self.dropout(x + self.positions[...][None], rngs=key)


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
