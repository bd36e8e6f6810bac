"""How ``transformers`` writes vision transformers: a class for each family, and their table."""

from __future__ import annotations

import abc
from collections.abc import Mapping
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
    """Other values of it, of models without a classifier."""
    architecture: ClassVar[str]
    """The class in ``transformers`` that classifies."""
    prefix: ClassVar[str]
    """Of the names of its tensors, which a model without a classifier may lack."""
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
    """Likewise modules of a block."""
    mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    """Of images from 0 to 1, where preprocessor_config.json is missing."""
    std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)

    @abc.abstractmethod
    def details(self, c: Config) -> dict[str, Any]:
        """Settings that differ from family to family.

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
        """The inverse of :meth:`read`, but for the classes."""
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
        """Where each parameter is found, the classifier aside; arguments as :meth:`Family.layout`.

        (:class:`bdia_jax.interop.families.Family`.)
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


_ATTENTION = {
    "attention.q": "attention.attention.query",
    "attention.k": "attention.attention.key",
    "attention.v": "attention.attention.value",
    "attention.out": "attention.output.dense",
}
_MODULES = {
    **{f"attention.{ours}": f"attention.{ours}_proj" for ours in "qkv"},
    "attention.out": "attention.o_proj",
    "ffn.up": "mlp.fc1",
    "ffn.down": "mlp.fc2",
}
_PATCHES = {
    "patches": "embeddings.patch_embeddings.projection.weight",
    "patch_bias": "embeddings.patch_embeddings.projection.bias",
    "token": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    "norm": "layernorm",
}


class PretrainedViT(VisionFamily):
    """Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021."""

    name = "vit"
    architecture = "ViTForImageClassification"
    prefix = "vit."
    outside: ClassVar = _PATCHES
    block = "encoder.layer.{}."
    inside: ClassVar = {
        **_ATTENTION,
        "attention_norm": "layernorm_before",
        "ffn_norm": "layernorm_after",
        "ffn.up": "intermediate.dense",
        "ffn.down": "output.dense",
    }
    block_of_modules = "layers.{}."
    modules: ClassVar = _MODULES

    def details(self, c: Config) -> dict[str, Any]:
        epsilon = c.get("layer_norm_eps", 1e-12)
        return {
            "hidden": c["intermediate_size"],
            "qkv_bias": c.get("qkv_bias", True),
            "norm_epsilon": epsilon,
        }

    def write(self, config: VisionTowerConfig) -> dict[str, Any]:
        more = {"intermediate_size": config.hidden, "qkv_bias": config.qkv_bias}
        return super().write(config) | more


class DINOv2(VisionFamily):
    """Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023."""

    name = "dinov2"
    architecture = "Dinov2ForImageClassification"
    prefix = "dinov2."
    outside: ClassVar = _PATCHES
    block = "encoder.layer.{}."
    inside: ClassVar = {
        **_ATTENTION,
        "attention_norm": "norm1",
        "attention_scale": "layer_scale1.lambda1",
        "ffn_norm": "norm2",
        "ffn.up": "mlp.fc1",
        "ffn.down": "mlp.fc2",
        "ffn_scale": "layer_scale2.lambda1",
    }
    modules: ClassVar = _MODULES
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def details(self, c: Config) -> dict[str, Any]:
        expect(c, "use_swiglu_ffn", (False,), False)
        return {
            "hidden": int(c["hidden_size"] * c.get("mlp_ratio", 4)),
            "qkv_bias": c.get("qkv_bias", True),
            "layer_scale": True,
            "pool": "both",
        }

    def write(self, config: VisionTowerConfig) -> dict[str, Any]:
        ratio = config.hidden / config.width
        more = {"mlp_ratio": int(ratio) if ratio.is_integer() else ratio}
        return super().write(config) | more | {"qkv_bias": config.qkv_bias}

    def left(self, config: VisionTowerConfig) -> dict[str, np.ndarray]:
        return {"dinov2.embeddings.mask_token": np.zeros((1, config.width), np.float32)}


class _TextAndImages(VisionFamily):
    """The tower for images of a model that compares these with texts."""

    prefix = "vision_model."
    outside: ClassVar = {
        "patches": "embeddings.patch_embedding.weight",
        "patch_bias": "embeddings.patch_embedding.bias",
        "token": "embeddings.class_embedding",
        "positions": "embeddings.position_embedding.weight",
        "input_norm": "pre_layrnorm",
        "norm": "post_layernorm",
    }
    block = "encoder.layers.{}."
    inside: ClassVar = {
        **{f"attention.{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")},
        "attention_norm": "layer_norm1",
        "ffn_norm": "layer_norm2",
        "ffn.up": "mlp.fc1",
        "ffn.down": "mlp.fc2",
    }

    def tower(self, c: Config) -> Config:
        # What transformers takes where a setting is missing.
        usual = {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            **self.usual,
        }
        nested = c["model_type"] == self.name
        return usual | dict(c.get("vision_config") or {} if nested else c)

    usual: ClassVar[dict[str, Any]]

    def write(self, config: VisionTowerConfig) -> dict[str, Any]:
        return super().write(config) | {"intermediate_size": config.hidden}

    def written(self, config: VisionTowerConfig, given: Config) -> dict[str, Any]:
        nested = given.get("model_type") == self.name
        tower = dict(given.get("vision_config") or {}) if nested else {}
        tower |= {**self.write(config), "model_type": self.also[0]}
        return (dict(given) if nested else {}) | {"model_type": self.name, "vision_config": tower}


class CLIP(_TextAndImages):
    """Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"."""

    name, also = "clip", ("clip_vision_model",)
    architecture = "CLIPForImageClassification"
    usual: ClassVar = {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)

    def details(self, c: Config) -> dict[str, Any]:
        return {
            "hidden": c["intermediate_size"],
            "patch_bias": False,
            "input_norm": True,
            "output_norm": False,
            "pool": "mean",
        }

    def left(self, config: VisionTowerConfig) -> dict[str, np.ndarray]:
        # It normalizes the class token for the comparison with texts; the mean is classified.
        name = "vision_model.post_layernorm"
        values = {"weight": np.ones, "bias": np.zeros}
        return {f"{name}.{kind}": make(config.width, np.float32) for kind, make in values.items()}


class SigLIP(_TextAndImages):
    """Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023."""

    name, also = "siglip", ("siglip_vision_model",)
    architecture = "SiglipForImageClassification"
    usual: ClassVar = {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}

    def details(self, c: Config) -> dict[str, Any]:
        return {"hidden": c["intermediate_size"], "token": False, "pool": "mean"}

    def write(self, config: VisionTowerConfig) -> dict[str, Any]:
        # The attention that pools for the comparison with texts has no part in classifying.
        return super().write(config) | {"vision_use_head": False}


FAMILIES: dict[str, VisionFamily] = {
    name: f for f in (PretrainedViT(), DINOv2(), CLIP(), SigLIP()) for name in (f.name, *f.also)
}


def family_of(c: Config) -> VisionFamily:
    """The family of a config.json.

    Raises:
      FolderError: if there is none.
    """
    name = c.get("model_type")
    if name not in FAMILIES:
        raise FolderError(
            f"model_type of a vision model must be one of {', '.join(FAMILIES)}; got {name!r}"
        )
    return FAMILIES[name]


def read(c: Config) -> VisionTowerConfig:
    """The configuration that a config.json holds.

    Raises:
      FolderError: for another architecture, or settings that there is no equivalent of.
    """
    family = family_of(c)
    try:
        return family.read(c)
    except KeyError as error:
        raise FolderError(f"config.json of a {family.name} model lacks {error}") from None
    except (TypeError, ValueError) as error:
        if isinstance(error, FolderError):
            raise
        raise FolderError(f"config.json of a {family.name} model: {error}") from error


def write(
    family: VisionFamily, config: VisionTowerConfig, given: Mapping[str, Any], labels: list[str]
) -> dict[str, Any]:
    """The inverse of :func:`read`; what else was given is kept."""
    return {
        **family.written(config, given),
        "architectures": [family.architecture],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
