"""What a family of vision transformers is: one subclass says how ``transformers`` writes them."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import numpy as np

from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.families.family import BLOCKS, Config, Names, Source, expect
from bdia_jax.nn.blocks import Activation
from bdia_jax.nn.vision import VisionTowerConfig

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
WRITTEN = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}


class VisionFamily(abc.ABC):
    """One kind of vision transformers, with a classifier or without one."""

    name: ClassVar[str]
    """``model_type`` in config.json, of a model that classifies."""
    also: ClassVar[tuple[str, ...]] = ()
    """Other values of ``model_type``, of models without a classifier."""
    architecture: ClassVar[str]
    """The class in ``transformers`` that classifies."""
    prefix: ClassVar[str]
    """How the names of its tensors begin; those of a model without a classifier may lack it."""
    outside: ClassVar[dict[str, str]]
    """Our parameters outside of blocks, and the names of the tensors; ours are the latter's axes
    the other way round for a matrix or a convolution."""
    block: ClassVar[str]
    """How the names of a block's tensors begin; with ``{}`` for its number."""
    inside: ClassVar[dict[str, str]]
    """Modules of a block, and what they are called."""
    block_of_modules: ClassVar[str | None] = None
    """The block in names of modules, where it is not that of tensors: since version 5."""
    modules: ClassVar[dict[str, str]] = {}
    """Modules of a block, and their names, where they have others than tensors: since version 5."""
    mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    """Mean of each channel of images from 0 to 1, where preprocessor_config.json is missing."""
    std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    """Standard deviation of each channel of such images."""
    processor: ClassVar[str]
    """The image processor that ``transformers`` takes where no file names one."""

    @abc.abstractmethod
    def details(self, c: Config) -> dict[str, Any]:
        """Settings of ours that differ from family to family.

        Raises:
          FolderError: for one that there is no equivalent of.
        """

    def tower(self, c: Config) -> Config:
        """The part of a config.json that is about images."""
        return c

    def read(self, c: Config) -> VisionTowerConfig:
        """A configuration of ours; the number of classes is that of the names of classes."""
        labels = c.get("id2label")
        classes = len(labels) if labels is not None else c.get("num_labels", 2)
        c = self.tower(c)
        activation = c.get("hidden_act", "gelu")
        expect(c, "hidden_act", tuple(ACTIVATIONS), "gelu")
        side = c["image_size"]
        if not isinstance(side, int):
            raise FolderError(f"config.json: image_size must be an int, for squares; got {side!r}")
        return VisionTowerConfig(
            image_size=side,
            patch_size=c["patch_size"],
            channels=c.get("num_channels", 3),
            num_classes=classes,
            width=c["hidden_size"],
            depth=c["num_hidden_layers"],
            heads=c["num_attention_heads"],
            activation=ACTIVATIONS[activation],
            **{"norm_epsilon": c.get("layer_norm_eps", 1e-6)} | self.details(c),
        )

    def write(self, config: VisionTowerConfig) -> dict[str, Any]:
        """Settings of a config.json, but for the classes: the inverse of :meth:`read`."""
        return {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "num_channels": config.channels,
            "hidden_size": config.width,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads,
            "hidden_act": WRITTEN[config.activation],
            "layer_norm_eps": config.norm_epsilon,
        }

    def written(self, config: VisionTowerConfig, given: Config) -> dict[str, Any]:
        """A config.json: what was given, with what :meth:`write` says."""
        return {**given, **self.write(config), "model_type": self.name}

    def layout(self, config: VisionTowerConfig, names: Names | None) -> dict[str, Source]:
        """Where each parameter of ours is found, the classifier aside.

        Args:
          config: of the network.
          names: those of the tensors that are there, if it is read; None if it is written.
        """
        c, prefix = config, self.prefix
        if names is not None and f"{prefix}{self.outside['positions']}" not in names:
            prefix = ""
        there = {"token": c.token, "patch_bias": c.patch_bias}
        there |= {"input_norm": c.input_norm, "norm": c.output_norm}
        layout = {}
        for ours, theirs in self.outside.items():
            if not there.get(ours, True):
                continue
            if ours in ("norm", "input_norm"):
                layout |= _with_bias(ours, f"{prefix}{theirs}", "scale")
            else:
                layout[ours] = Source(f"{prefix}{theirs}", transposed=ours == "patches")
        block = f"{prefix}{self.block}"
        for ours, theirs in self.inside.items():
            if ours.endswith("_norm"):
                layout |= _with_bias(f"{BLOCKS}{ours}", f"{block}{theirs}", "scale")
            elif ours.endswith("_scale"):
                layout[f"{BLOCKS}{ours}"] = Source(f"{block}{theirs}")
            else:
                bias = c.qkv_bias or ours not in ("attention.q", "attention.k", "attention.v")
                layout |= _with_bias(f"{BLOCKS}{ours}", f"{block}{theirs}", "kernel", bias)
        return layout

    def left(self, config: VisionTowerConfig) -> dict[str, np.ndarray]:
        """Tensors of the class that classifies, which have no part in what it computes."""
        return {}

    def module(self, ours: str) -> str:
        """What ``transformers`` calls a module of a block, with ``{}`` for the block's number."""
        theirs = self.modules.get(ours, self.inside[ours])
        return f"{self.prefix}{self.block_of_modules or self.block}{theirs}"


def _with_bias(ours: str, theirs: str, kind: str, bias: bool = True) -> dict[str, Source]:
    found = {f"{ours}.{kind}": Source(f"{theirs}.weight", transposed=kind == "kernel")}
    return found | {f"{ours}.bias": Source(f"{theirs}.bias")} if bias else found
