"""Flax (nnx) modules over the reversible scan."""

from bdia_jax.nn.attention import LinearAttention, SelfAttention
from bdia_jax.nn.blocks import FeedForward, TransformerBlock
from bdia_jax.nn.dropout import Dropout
from bdia_jax.nn.resnet import ResNet, ResNetConfig
from bdia_jax.nn.stack import METHODS, CoupledStack, Probe, ReversibleStack
from bdia_jax.nn.vit import ViT, ViTConfig

__all__ = [
    "METHODS",
    "CoupledStack",
    "Dropout",
    "FeedForward",
    "LinearAttention",
    "Probe",
    "ResNet",
    "ResNetConfig",
    "ReversibleStack",
    "SelfAttention",
    "TransformerBlock",
    "ViT",
    "ViTConfig",
]
