"""Families of vision transformers: a class for each, and the table of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.families.family import Config, reading
from bdia_jax.interop.vision.families.clip import CLIP, SigLIP
from bdia_jax.interop.vision.families.family import VisionFamily
from bdia_jax.interop.vision.families.vit import DINOv2, PretrainedViT
from bdia_jax.nn.vision import VisionTowerConfig

FAMILIES: dict[str, VisionFamily] = {
    name: f for f in (PretrainedViT(), DINOv2(), CLIP(), SigLIP()) for name in (f.name, *f.also)
}

__all__ = ["FAMILIES", "VisionFamily", "family_of", "read", "write"]


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
    with reading(family.name):
        return family.read(c)


def write(
    family: VisionFamily, config: VisionTowerConfig, given: Mapping[str, Any], labels: list[str]
) -> dict[str, Any]:
    """The contents of the config.json of an image classifier: the inverse of :func:`read`.

    Args:
      family: of the tower.
      config: of the tower.
      given: contents of another config.json, which are kept where they do not contradict.
      labels: names of the classes.
    """
    return {
        **family.written(config, given),
        "architectures": [family.architecture],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
