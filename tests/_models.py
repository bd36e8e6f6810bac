"""One small model of each kind, with its loss: what tests of all models go through."""

import jax
import jax.numpy as jnp
import numpy as np

from bdia_jax.nn import (
    Decoder,
    DecoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    ResNet,
    ResNetConfig,
    RotaryScaling,
    ViT,
    ViTConfig,
    llama,
)

TEXT = {"vocab_size": 31, "max_length": 16, "width": 16, "depth": 2, "heads": 4, "dropout": 0.1}
IMAGE = {"image_size": 8, "channels": 1, "dropout": 0.1}
SMALL_VIT = IMAGE | {"patch_size": 4, "width": 16, "depth": 2, "heads": 2, "head_dim": 8}
CONFIGS = {
    "vit": ViTConfig(**SMALL_VIT, hidden=24),
    "vit-full": ViTConfig(**SMALL_VIT, hidden=24, attention="full", pool="mean"),
    "vit-linear": ViTConfig(**SMALL_VIT, hidden=24, attention="linear", projection=3),
    "resnet": ResNetConfig(**IMAGE, widths=(8, 16), depth=2, groups=4),
    "gpt2": DecoderConfig(**TEXT),
    "gpt2-plain": DecoderConfig(**TEXT, attention="plain", ffn_chunk=5),
    "llama": llama(**TEXT, kv_heads=2, qk_norm=True, rope_scaling=RotaryScaling(original_length=8)),
    "gemma": llama(
        **TEXT,
        norm_place="both",
        zero_centered_norm=True,
        feed_forward="geglu",
        qk_norm=True,
        window=5,
        windowed=(True, False),
        window_rope_theta=100.0,
        attention_scale=0.3,
        attention_cap=2.0,
        logit_cap=3.0,
        embedding_scale=4.0,
    ),
    "olmo": llama(
        **TEXT, kv_heads=2, norm_place="after", qk_norm_whole=True, rotated=(True, False)
    ),
    "encoder-decoder": EncoderDecoderConfig(
        source_vocab=23, max_length=16, width=16, encoder_depth=2, decoder_depth=2, heads=2
    ),
}
MODELS = {
    ViTConfig: ViT,
    ResNetConfig: ResNet,
    DecoderConfig: Decoder,
    EncoderDecoderConfig: EncoderDecoder,
}


def build(config, rngs):
    """The model of a configuration."""
    return MODELS[type(config)](config, rngs=rngs)


def inputs(kind):
    """Arguments of a call: images; tokens; or sources and tokens."""
    rng = np.random.default_rng(5)
    if kind in (ViTConfig, ResNetConfig):
        return (jnp.asarray(rng.normal(size=(3, 8, 8, 1)), jnp.float32),)
    sizes = (31,) if kind is DecoderConfig else (23, 23)
    return tuple(jnp.asarray(rng.integers(size, size=(3, 12)), jnp.int32) for size in sizes)


def loss_of(model, key=None):
    """A scalar; of texts, with segments and a position without weight."""
    given = inputs(type(model.config))
    if isinstance(model, ViT | ResNet):
        return jnp.mean(jax.nn.log_softmax(model(*given, key=key))[:, 0])
    segments = jnp.where(jnp.arange(12) < 7, 0, 1)[None].repeat(3, axis=0)
    options = {"segments": segments, "key": key}
    if isinstance(model, EncoderDecoder):
        options["source_segments"] = segments
    weights = jnp.ones((3, 12)).at[0, 2].set(0)
    sums = model.loss(*given, jnp.roll(given[-1], -1, 1), weights, **options)
    return sums.loss / sums.weight
