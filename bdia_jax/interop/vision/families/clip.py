"""CLIP and SigLIP: the towers for images of models that compare these with texts."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from bdia_jax.interop.families.family import Config
from bdia_jax.interop.vision.families.family import VisionFamily
from bdia_jax.nn.vision import VisionTowerConfig


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
    processor = "CLIPImageProcessor"
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
    processor = "SiglipImageProcessor"
    architecture = "SiglipForImageClassification"
    usual: ClassVar = {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}

    def details(self, c: Config) -> dict[str, Any]:
        return {"hidden": c["intermediate_size"], "token": False, "pool": "mean"}

    def write(self, config: VisionTowerConfig) -> dict[str, Any]:
        # The attention that pools for the comparison with texts has no part in classifying.
        return super().write(config) | {"vision_use_head": False}
