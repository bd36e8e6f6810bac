"""Configurations of the models: frozen dataclasses, checked when they are made."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bdia_jax.nn.decoder_config import DecoderConfig, ParamDtype, llama
from bdia_jax.nn.settings import (
    COUPLED,
    CoupledMethod,
    Method,
    ReversibleSettings,
    check_dropout,
    check_sizes,
)

__all__ = ["DecoderConfig", "EncoderDecoderConfig", "ResNetConfig", "ViTConfig", "llama"]


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
    """How the blocks are trained. bdia, midpoint, coupled: every step is taken back. standard,
    -direct: activations are kept. -checkpoint: the input of every step is kept. Two are other
    networks: midpoint (x_{k-1} + 2 h(x_k)), and coupled (RevViT: attention and feed-forward network
    update two streams in turns)."""

    def __post_init__(self):
        super().__post_init__()
        check_sizes(
            self,
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
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size must divide image_size = {self.image_size}; got {self.patch_size}"
            )
        check_dropout(self)

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
        return self.method in COUPLED


@dataclasses.dataclass(frozen=True)
class ResNetConfig(ReversibleSettings):
    """A pre-activation residual network (He, Zhang, Ren, Sun 2016) for images of 32 × 32 pixels.

    Group normalization, because a block must be a pure function. Batch statistics would couple
    samples whose γ is drawn independently, and a block that is computed twice would update their
    running averages twice.
    """

    image_size: int = 32
    """Height and width of the images in pixels."""
    channels: int = 3
    """Colour channels of the images."""
    num_classes: int = 10
    """Number of classes."""
    widths: tuple[int, ...] = (64, 128, 256)
    """Channels of each stage; from one stage to the next, height and width are halved."""
    depth: int = 5
    """Residual blocks per stage."""
    groups: int = 8
    """Groups of the normalization; divides every width."""
    dropout: float = 0.0
    """Probability of dropping, between the two convolutions of a block."""

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self, "image_size", "channels", "num_classes", "depth", "groups")
        if not self.widths:
            raise ValueError("widths must name at least one stage; got none")
        for i, width in enumerate(self.widths):
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise ValueError(f"widths[{i}] must be an int >= 1; got {width!r}")
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"groups must divide the widths {self.widths}; got {self.groups}")
        if self.image_size % 2 ** (len(self.widths) - 1):
            raise ValueError(
                f"image_size must be divisible by {2 ** (len(self.widths) - 1)}, for "
                f"{len(self.widths)} stages; got {self.image_size}"
            )
        check_dropout(self)


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig(ReversibleSettings):
    """A pre-norm encoder-decoder transformer (Vaswani et al. 2017, norms before the sublayers)."""

    source_vocab: int = 8000
    """Number of tokens of the sources."""
    target_vocab: int | None = None
    """Number of tokens of the targets; None for one vocabulary, and one embedding, of both."""
    max_length: int = 256
    """Most positions of a sequence, on either side."""
    width: int = 512
    """Features of the residual stream."""
    encoder_depth: int = 6
    """Blocks of the encoder."""
    decoder_depth: int = 6
    """Blocks of the decoder."""
    heads: int = 8
    """Attention heads."""
    hidden: int | None = None
    """Features of the hidden layer of the feed-forward networks; None for 4 width."""
    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    """What is added to the embeddings."""
    tied_head: bool = True
    """Whether the output matrix is the embedding of the targets."""
    dropout: float = 0.1
    """Probability of dropping: on the embeddings, the attention weights and all updates."""
    param_dtype: ParamDtype = "float32"
    """What the parameters are kept in."""

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self, "source_vocab", "target_vocab", "encoder_depth", "decoder_depth")
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(f"sinusoidal positions need an even width; got {self.width}")
        _ = self.block

    @property
    def vocab_size(self) -> int:
        """Number of tokens that a translation is made of."""
        return self.target_vocab or self.source_vocab

    @property
    def block(self) -> DecoderConfig:
        """The settings of a block, which are a decoder's."""
        return DecoderConfig(
            vocab_size=self.vocab_size,
            max_length=self.max_length,
            width=self.width,
            heads=self.heads,
            hidden=self.hidden,
            dropout=self.dropout,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
