"""Flax (nnx) modules over the reversible scan."""

from bdia_jax.nn.attention import Attention, LinearAttention, SelfAttention
from bdia_jax.nn.blocks import FeedForward, TransformerBlock
from bdia_jax.nn.chunked_attention import chunked_attention
from bdia_jax.nn.configs import (
    DecoderConfig,
    EncoderDecoderConfig,
    ResNetConfig,
    RotaryScaling,
    ViTConfig,
    llama,
)
from bdia_jax.nn.decoder import Decoder
from bdia_jax.nn.dropout import Dropout
from bdia_jax.nn.encoder_decoder import EncoderDecoder
from bdia_jax.nn.generation import beam_search, generate
from bdia_jax.nn.lora import Frozen, LowRankLinear, add_lora, freeze, merge_lora, unfreeze
from bdia_jax.nn.losses import cross_entropy
from bdia_jax.nn.resnet import ResNet
from bdia_jax.nn.settings import METHODS, ReversibleSettings
from bdia_jax.nn.stack import CoupledStack, Probe, ReversibleStack
from bdia_jax.nn.vit import ViT

__all__ = [
    "METHODS",
    "Attention",
    "CoupledStack",
    "Decoder",
    "DecoderConfig",
    "Dropout",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "FeedForward",
    "Frozen",
    "LinearAttention",
    "LowRankLinear",
    "Probe",
    "ResNet",
    "ResNetConfig",
    "ReversibleSettings",
    "ReversibleStack",
    "RotaryScaling",
    "SelfAttention",
    "TransformerBlock",
    "ViT",
    "ViTConfig",
    "add_lora",
    "beam_search",
    "chunked_attention",
    "cross_entropy",
    "freeze",
    "generate",
    "llama",
    "merge_lora",
    "unfreeze",
]
