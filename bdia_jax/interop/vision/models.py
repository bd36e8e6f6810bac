"""Vision towers from folders of ``transformers``, and such folders from towers."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from bdia_jax.interop import arrays
from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.families.family import Source
from bdia_jax.interop.folder import Folder
from bdia_jax.interop.hub import resolve
from bdia_jax.interop.saving import parameters_of, replace_model
from bdia_jax.interop.vision import families
from bdia_jax.interop.vision.positions import resize
from bdia_jax.interop.vision.preprocessing import (
    Normalization,
    for_size,
    load_normalization,
    load_scaling,
)
from bdia_jax.nn.settings import DTYPES, check_dtype
from bdia_jax.nn.stack import check_standard
from bdia_jax.nn.vision import VisionTower, VisionTowerConfig

__all__ = [
    "Normalization",
    "load_normalization",
    "load_scaling",
    "load_vision",
    "read_vision_config",
    "save_vision",
]

HEAD = {
    "head.kernel": Source("classifier.weight", transposed=True),
    "head.bias": Source("classifier.bias"),
}
LEADING = {"embeddings.cls_token": 2, "embeddings.position_embeddings": 1}
"""Ends of the names of tensors that have axes of one before ours, and how many."""
NETWORK = (
    *("image_size", "patch_size", "channels", "num_classes", "width", "depth", "heads", "hidden"),
    *("activation", "norm_epsilon", "patch_bias", "qkv_bias", "token", "input_norm", "output_norm"),
    *("layer_scale", "pool"),
)
"""Settings of a tower that say which network it is."""
NOT_OURS = re.compile(
    r"(text_model|text_projection|visual_projection|logit_(scale|bias)|(vit\.)?pooler)\b"
    r"|(vision_model\.)?(head\.|post_layernorm\.)|(dinov2\.)?embeddings\.mask_token"
)
"""Starts of the names of tensors without which the classes of an image are computed."""


class VisionFolder(Folder):
    """A folder with a vision tower; axes of one that lead a tensor are gone."""

    def get(self, name: str) -> np.ndarray:
        tensor = super().get(name)
        for end, axes in LEADING.items():
            if name.endswith(end) and tensor.shape[:axes] == (1,) * axes:
                return tensor.reshape(tensor.shape[axes:])
        return tensor

    def unused(self) -> list[str]:
        return [name for name in super().unused() if not NOT_OURS.match(name)]


def load_vision(
    path: str | os.PathLike,
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    **settings: Any,
) -> VisionTower:
    """A vision transformer with the weights of a folder of ``transformers``.

    ViT, DINOv2, and the towers for images of CLIP and SigLIP. It classifies as the classes
    ``…ForImageClassification`` there do, and is trained reversibly.

    Args:
      path: a folder with ``config.json`` and ``*.safetensors``, or a name on the Hugging Face hub.
      num_classes: for a new head, of zeros; None for the folder's.
      image_size: height and width of the images; None for the pretraining's. Learned positions are
        interpolated, as by ``interpolate_pos_encoding`` in ``transformers``.
      **settings: of :class:`bdia_jax.nn.VisionTowerConfig`, in place of those that are read:
        ``method``, ``dtype``, ``param_dtype``, ``dropout``, …

    Raises:
      FileNotFoundError: for a folder that does not exist, or has no weights.
      FolderError: for a folder that does not fit, with the name of the tensor; for one without a
        head where ``num_classes`` is None.
      ValueError: for an ``image_size`` that patches do not divide.
    """
    with VisionFolder(resolve(path)) as folder:
        read = families.read(folder.config)
        config = dataclasses.replace(
            read,
            **{"num_classes": read.num_classes if num_classes is None else num_classes}
            | {"image_size": read.image_size if image_size is None else image_size}
            | settings,
        )
        layout = families.family_of(folder.config).layout(config, folder)
        if num_classes is None:
            if HEAD["head.kernel"].name not in folder:
                raise FolderError(
                    f"{folder.where} has no classifier: give num_classes, for a new one"
                )
            layout |= HEAD
        graph, abstract, rest = nnx.split(
            nnx.eval_shape(lambda: VisionTower(config, rngs=nnx.Rngs(0))), nnx.Param, ...
        )
        state = {}
        for keys, leaf in nnx.to_flat_state(abstract):
            name = ".".join(map(str, keys))
            if name not in layout:
                value = jax.numpy.zeros(leaf.shape, leaf.dtype)
            elif name == "positions":
                tensor = folder.get(layout[name].name)
                if tensor.shape != (read.length, read.width):
                    raise FolderError(
                        f"{folder.where}: the tensor {layout[name].name} should have the shape "
                        f"{(read.length, read.width)}; it has {tensor.shape}"
                    )
                value = jax.numpy.asarray(resize(tensor, config.grid, config.token), leaf.dtype)
            else:
                value = arrays.parameter(name, leaf.shape, leaf.dtype, layout[name], folder)
            state[keys] = leaf.replace(value)
        if num_classes is not None:
            # The old head is known, and not wanted.
            for source in HEAD.values():
                if source.name in folder:
                    folder.get(source.name)
        if unused := folder.unused():
            raise FolderError(
                f"{folder.where}: tensors that no parameter is made from: {', '.join(unused)}"
            )
        rest = jax.jit(
            lambda: nnx.split(VisionTower(config, rngs=nnx.Rngs(0)), nnx.Param, ...)[2]
        )()
    return nnx.merge(graph, nnx.from_flat_state([*state.items()]), rest)


def read_vision_config(path: str | os.PathLike) -> VisionTowerConfig:
    """The configuration of a folder of ``transformers`` with a vision transformer.

    Raises:
      FileNotFoundError: for a folder that does not exist.
      FolderError: for another architecture, and settings that there is no equivalent of.
    """
    with VisionFolder(resolve(path)) as folder:
        return families.read(folder.config)


def save_vision(
    model: VisionTower,
    folder: str | os.PathLike,
    *,
    like: str | os.PathLike,
    labels: Sequence[str] | None = None,
    dtype: str | None = None,
) -> None:
    """Writes a folder that ``transformers`` loads, as an image classifier.

    A model that was in the folder before is replaced as a whole, as by :func:`save`.

    Args:
      model: without low-rank updates (:func:`bdia_jax.nn.merge_lora`).
      folder: is made; what is in it beside a model stays.
      like: the folder that the model was loaded from, of which config.json, processor_config.json
        and preprocessor_config.json are kept, but for what they say of classes and sizes.
      labels: names of the classes; None for those of ``like``, if it has as many, or numbers.
      dtype: float32, bfloat16, float16 or float64; by default that of the parameters.

    Raises:
      ValueError: for a model of another family than ``like``, or with low-rank updates, a wrong
        number of labels, two equal ones, an unknown dtype.
      FolderError: as of :func:`load_vision`, and of :func:`load_scaling`.
    """
    check_standard(model.blocks, "transformers knows")
    c = model.config
    folder = pathlib.Path(folder).expanduser()
    dtype = dtype or c.param_dtype
    check_dtype(dtype)
    with VisionFolder(resolve(like)) as source:
        family, given = families.family_of(source.config), source.config
        beside = source.beside() | for_size(source, c.image_size)
    if labels is None:
        before = given.get("id2label") or {}
        kept = len(before) == c.num_classes
        labels = [before[str(i)] if kept else f"LABEL_{i}" for i in range(c.num_classes)]
    if len(set(labels)) != c.num_classes or len(labels) != c.num_classes:
        raise ValueError(f"labels must be {c.num_classes} different names; got {labels}")
    written = families.write(family, c, given, list(labels)) | {"dtype": dtype}
    written.pop("torch_dtype", None)
    _check_same(families.read(written), c)
    layout = family.layout(c, None) | HEAD
    parameters = parameters_of(model, layout)
    tensors = _tensors(family, c, parameters, layout, DTYPES[dtype])
    replace_model(folder, tensors, written, beside)


def _tensors(family, config, parameters, layout, dtype) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in arrays.tensors(parameters, layout, dtype):
        axes = next((axes for end, axes in LEADING.items() if name.endswith(end)), 0)
        yield name, tensor.reshape(*[1] * axes, *tensor.shape)
    for name, tensor in family.left(config).items():
        yield name, tensor.astype(dtype)


def _check_same(written: VisionTowerConfig, config: VisionTowerConfig) -> None:
    """An error unless what is written is of the same network."""
    differing = [n for n in NETWORK if getattr(written, n) != getattr(config, n)]
    if differing:
        raise ValueError(
            "like must be of the model's family; they differ in "
            + ", ".join(f"{n} ({getattr(written, n)}, {getattr(config, n)})" for n in differing)
        )
