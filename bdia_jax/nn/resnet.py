"""A residual network for small images: several reversible stacks, with ordinary layers between."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from bdia_jax.nn.configs import ResNetConfig
from bdia_jax.nn.dropout import Dropout
from bdia_jax.nn.settings import DTYPES
from bdia_jax.nn.stack import ReversibleStack


class ResidualConv(nnx.Module):
    """The update of a pre-activation block: twice group norm, ReLU, 3 × 3 convolution."""

    def __init__(
        self, width: int, groups: int, *, dropout: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        layers = {"dtype": dtype, "rngs": rngs}
        self.norm1, self.norm2 = (nnx.GroupNorm(width, groups, **layers) for _ in range(2))
        self.conv1, self.conv2 = (
            nnx.Conv(width, width, (3, 3), use_bias=False, **layers) for _ in range(2)
        )
        self.dropout = Dropout(dropout, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch height width channel"]:
        """The update ``h(x)``."""
        h = self.conv1(jax.nn.relu(self.norm1(x)))
        return self.conv2(self.dropout(jax.nn.relu(self.norm2(h))))


class Downsample(nnx.Module):
    """Half the height and width, another number of channels: group norm, ReLU, convolution."""

    def __init__(self, width_in: int, width: int, groups: int, *, dtype, rngs: nnx.Rngs):
        self.norm = nnx.GroupNorm(width_in, groups, dtype=dtype, rngs=rngs)
        self.conv = nnx.Conv(
            width_in, width, (3, 3), strides=2, use_bias=False, dtype=dtype, rngs=rngs
        )

    def __call__(self, x):
        """No residual path: what changes the width is no block."""
        return self.conv(jax.nn.relu(self.norm(x)))


class ResNet(nnx.Module):
    """Images to logits. Each stage is a reversible stack, each change of width checkpointed."""

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        c, dtype = config, DTYPES[config.dtype]
        self.config = c
        self.stem = nnx.Conv(c.channels, c.widths[0], (3, 3), use_bias=False, rngs=rngs)
        self.downs = nnx.List(
            [
                Downsample(a, b, c.groups, dtype=dtype, rngs=rngs)
                for a, b in zip(c.widths, c.widths[1:])
            ]
        )
        self.stages = nnx.List(
            [
                ReversibleStack(
                    functools.partial(_make_block, c, width), **c.of_stack(c.depth), rngs=rngs
                )
                for width in c.widths
            ]
        )
        self.norm = nnx.GroupNorm(c.widths[-1], c.groups, rngs=rngs)
        self.head = nnx.Linear(c.widths[-1], c.num_classes, rngs=rngs)

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
        x = self.stem(images).astype(DTYPES[c.dtype])
        for i, stage in enumerate(self.stages):
            if i:
                x = jax.checkpoint(self.downs[i - 1].__call__)(x)
            x = stage(x, key=None if key is None else jax.random.fold_in(key, i))
        x = jax.nn.relu(self.norm(x.astype(jnp.float32)))
        return self.head(x.mean(axis=(1, 2)))


def _make_block(c: ResNetConfig, width: int, rngs: nnx.Rngs) -> ResidualConv:
    return ResidualConv(width, c.groups, dropout=c.dropout, dtype=DTYPES[c.dtype], rngs=rngs)
