"""ViT and DINOv2: trained on images alone."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from bdia_jax.interop.families.family import Config, expect
from bdia_jax.interop.vision.families.family import VisionFamily
from bdia_jax.nn.vision import VisionTowerConfig

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
    processor = "ViTImageProcessor"
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
    processor = "BitImageProcessor"
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
