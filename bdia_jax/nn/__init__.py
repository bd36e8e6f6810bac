"""Flax (nnx) modules over the reversible scan."""

from bdia_jax.nn.attention import SelfAttention
from bdia_jax.nn.blocks import FeedForward, TransformerBlock
from bdia_jax.nn.stack import METHODS, Probe, ReversibleStack
from bdia_jax.nn.vit import ViT, ViTConfig

__all__ = [
    "METHODS",
    "FeedForward",
    "Probe",
    "ReversibleStack",
    "SelfAttention",
    "TransformerBlock",
    "ViT",
    "ViTConfig",
]
