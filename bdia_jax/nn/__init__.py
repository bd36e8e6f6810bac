"""Flax (nnx) modules over the reversible scan."""

from bdia_jax.nn.attention import (
    GroupedQueryAttention,
    LinearAttention,
    SelfAttention,
    chunked_attention,
)
from bdia_jax.nn.blocks import Block, FeedForward, TransformerBlock
from bdia_jax.nn.configs import (
    DecoderConfig,
    EncoderDecoderConfig,
    ResNetConfig,
    ViTConfig,
    llama,
)
from bdia_jax.nn.coupled import CoupledStack
from bdia_jax.nn.decoder import Decoder
from bdia_jax.nn.dropout import Dropout
from bdia_jax.nn.encoder_decoder import EncoderDecoder
from bdia_jax.nn.experts import Experts
from bdia_jax.nn.gamma import choose_gamma, set_step
from bdia_jax.nn.generation import beam_search, generate
from bdia_jax.nn.lora import (
    DecomposedLinear,
    Frozen,
    LowRankLinear,
    add_lora,
    freeze,
    merge_lora,
    unfreeze,
)
from bdia_jax.nn.losses import cross_entropy
from bdia_jax.nn.quantized import QuantizedLinear, expand_base, quantize_base
from bdia_jax.nn.resnet import ResNet
from bdia_jax.nn.rotary_scaling import LinearScaling, LongScaling, RotaryScaling, YarnScaling
from bdia_jax.nn.settings import METHODS, ReversibleSettings
from bdia_jax.nn.stack import Probe, ReversibleStack
from bdia_jax.nn.vision import VisionTower, VisionTowerConfig
from bdia_jax.nn.vit import ViT

__all__ = [
    "METHODS",
    "Block",
    "CoupledStack",
    "Decoder",
    "DecoderConfig",
    "DecomposedLinear",
    "Dropout",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Experts",
    "FeedForward",
    "Frozen",
    "GroupedQueryAttention",
    "LinearAttention",
    "LinearScaling",
    "LongScaling",
    "LowRankLinear",
    "Probe",
    "QuantizedLinear",
    "ResNet",
    "ResNetConfig",
    "ReversibleSettings",
    "ReversibleStack",
    "RotaryScaling",
    "SelfAttention",
    "TransformerBlock",
    "ViT",
    "ViTConfig",
    "VisionTower",
    "VisionTowerConfig",
    "YarnScaling",
    "add_lora",
    "beam_search",
    "choose_gamma",
    "chunked_attention",
    "cross_entropy",
    "expand_base",
    "freeze",
    "generate",
    "llama",
    "merge_lora",
    "quantize_base",
    "set_step",
    "unfreeze",
]
