"""Networks that memory and time are measured of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdia_jax import reversible_scan
from bdia_jax.data import ImageData, TextData, pack_pairs
from bdia_jax.nn import (
    Decoder,
    DecoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    ReversibleSettings,
    ViT,
    ViTConfig,
    llama,
)
from bdia_jax.planning.ways import Way
from bdia_jax.train import (
    ImageClassification,
    LanguageModelling,
    Task,
    TrainSettings,
    Translation,
)
from measure.blocks import make_block, stacked_params

Axis = Literal["depth", "width", "tokens"]
KINDS: dict[type, type] = {
    ViTConfig: ViT,
    DecoderConfig: Decoder,
    EncoderDecoderConfig: EncoderDecoder,
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, and what a step of it sees."""

    config: ReversibleSettings
    batch: int
    length: int = 1
    """Tokens per sequence; 1 for images."""

    @property
    def elements(self) -> int:
        """Of an activation: of the residual stream."""
        positions = self.config.length if isinstance(self.config, ViTConfig) else self.length
        return self.batch * positions * self.config.width

    def along(self, axis: Axis, value: int) -> Network:
        """The network with another depth, width, or number of tokens (of images: a batch)."""
        c = self.config
        if axis == "tokens":
            if isinstance(c, ViTConfig):
                return dataclasses.replace(self, batch=value)
            return dataclasses.replace(
                self, length=value, config=dataclasses.replace(c, max_length=value)
            )
        if axis == "depth":
            single = hasattr(c, "depth")
            names = ("depth",) if single else ("encoder_depth", "decoder_depth")
            changes = dict.fromkeys(names, value)
        else:
            hidden = c.hidden and c.hidden * value // c.width
            changes = {"width": value, "hidden": hidden}
            changes |= {"head_dim": value // c.heads} if isinstance(c, ViTConfig) else {}
        return dataclasses.replace(self, config=dataclasses.replace(c, **changes))

    def prepared(self, way: Way) -> tuple[Callable[[], nnx.Module], Task, TrainSettings]:
        """What makes the network, what it is trained on, and how."""
        config = way.config(self.config, self.length)

        def make() -> nnx.Module:
            model = KINDS[type(config)](config, rngs=nnx.Rngs(0))
            way.install(model)
            return model

        return make, self.task(), way.train(TrainSettings(batch_size=self.batch))

    def task(self) -> Task:
        """Random data."""
        c, rng = self.config, np.random.default_rng(0)
        if isinstance(c, ViTConfig):
            shape = (2 * self.batch, c.image_size, c.image_size, c.channels)
            images = rng.integers(0, 256, shape).astype(np.uint8)
            labels = rng.integers(0, c.num_classes, len(images)).astype(np.int32)
            return ImageClassification(
                ImageData("random", images, labels, images[:8], labels[:8], c.num_classes)
            )
        if isinstance(c, DecoderConfig):
            text = rng.integers(0, c.vocab_size, 4 * self.length + 2).astype(np.int32)
            return LanguageModelling(TextData("random", text, text, c.vocab_size), self.length)
        pair = [1] * self.length, [1] * (self.length - 1)
        pairs = pack_pairs([pair] * self.batch, self.length, end=0)
        return Translation("random", pairs, pairs)

    def loss(self, way: Way) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
        """The loss as a function of parameters, what is not trained, a batch and a key.

        And shapes of all those.
        """
        make, task, _ = self.prepared(way)
        graph, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)

        def loss(params, rest, batch, key):
            return task.loss(nnx.merge(graph, params, rest), batch, key).means()["loss"]

        key = jax.eval_shape(lambda: jax.random.key(0))
        batch = jax.eval_shape(
            lambda arrays, key: task.batch(arrays, key, jnp.int32(0), self.batch),
            task.arrays(),
            key,
        )
        return loss, (params, rest, batch, key)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Pre-norm transformer blocks in plain JAX: loss and gradient, no embedding, no optimizer.

    Parameters are few, but not so few that a copy of their gradients could hide in a slope.
    """

    dtype: str = "float32"
    batch: int = 64
    length: int = 128
    width: int = 64
    hidden: int = 256
    depth: int = 8
    dropout: float = 0.1

    @property
    def elements(self) -> int:
        """Of an activation."""
        return self.batch * self.length * self.width

    def along(self, axis: Axis, value: int) -> Stack:
        """The stack with another depth, width, or number of tokens."""
        if axis == "width":
            return dataclasses.replace(self, width=value, hidden=self.hidden * value // self.width)
        return dataclasses.replace(self, **{"length" if axis == "tokens" else axis: value})

    def loss(self, way: Way) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
        """As of a network."""
        parts = way.settings.get("parts_as_steps", False)
        block = make_block("attention", dropout=self.dropout, parts=parts)

        def loss(params, x, key):
            y = reversible_scan(block, params, x, key=key, step=way.step, adjoint=way.adjoint)
            return jnp.mean(y.astype(jnp.float32) ** 2)

        return loss, jax.eval_shape(self.arguments)

    def arguments(self) -> tuple[Any, jax.Array, jax.Array]:
        """Parameters, an input, and a key."""
        params = stacked_params("attention", jax.random.key(0), self.depth, self.width, self.hidden)
        shape = (self.batch, self.length, self.width)
        return params, jax.random.normal(jax.random.key(1), shape, self.dtype), jax.random.key(2)


def vit(dtype: str, large: bool) -> Network:
    """That of the paper's experiments on CIFAR: 6 blocks of width 512, dropout 0.1."""
    return Network(ViTConfig(dtype=dtype), 128 if large else 16)


def deep_vit(dtype: str, large: bool) -> Network:
    """The same with 24 blocks."""
    return vit(dtype, large).along("depth", 24)


def gpt2(dtype: str, large: bool) -> Network:
    """GPT-2 small."""
    return _decoder(DecoderConfig, dtype, large, vocab_size=50257)


def gpt2_medium(dtype: str, large: bool) -> Network:
    """GPT-2 medium."""
    size = {"width": 1024, "depth": 24, "heads": 16, "vocab_size": 50257}
    return _decoder(DecoderConfig, dtype, large, **size)


def of_llamas_kind(dtype: str, large: bool) -> Network:
    """As large as GPT-2 small."""
    more = {"vocab_size": 32_000, "kv_heads": 4, "hidden": 2048, "tied_head": True}
    return _decoder(llama, dtype, large, **more)


def _decoder(kind, dtype: str, large: bool, **settings) -> Network:
    length = 1024 if large else 128
    size = {"width": 768, "depth": 12, "heads": 12, "max_length": length, "dtype": dtype}
    config = kind(**(size | settings))
    return Network(config, 8 if large else 1, length)


def translation(dtype: str, large: bool) -> Network:
    """A base-size encoder-decoder, 6 + 6 blocks of width 512."""
    length = 256 if large else 64
    config = EncoderDecoderConfig(dtype=dtype, max_length=length)
    return Network(config, 32 if large else 2, length)


NETWORKS: dict[str, Callable[[str, bool], Network | Stack]] = {
    "stack": lambda dtype, large: Stack(dtype),
    "vit": vit,
    "vit-24": deep_vit,
    "gpt2": gpt2,
    "gpt2-medium": gpt2_medium,
    "llama": of_llamas_kind,
    "translation": translation,
}
"""By name: functions of what the blocks compute in, and of whether batches are those of real
training, or such as 2 cores can do."""
