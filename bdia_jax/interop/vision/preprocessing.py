"""How images are prepared, by the files of ``transformers`` that say so; read and written."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bdia_jax.data.scaling import FILTERS, Scaling
from bdia_jax.interop.checkpoint import Checkpoint, FolderError
from bdia_jax.interop.folder import Folder
from bdia_jax.interop.hub import resolve
from bdia_jax.interop.vision import families

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
"""Files that say how images are prepared; the second one under :data:`NESTED`, if at all."""
NESTED = "image_processor"

Settings = dict[str, Any]

_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_BILINEAR, _BICUBIC = int(Image.Resampling.BILINEAR), int(Image.Resampling.BICUBIC)


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _edge(side: int) -> dict[str, int]:
    return {"shortest_edge": side}


# Image processors without a default for a square cut out need one where they are told to cut.
_WHOLE: Settings = {"size": _square(224), "do_center_crop": False, "default_to_square": True}
_CUT: Settings = {"do_center_crop": True, "crop_size": _square(224), "resample": _BICUBIC}
PROCESSORS: dict[str, Settings] = {
    "ViTImageProcessor": _WHOLE | _HALF | {"resample": _BILINEAR},
    "DeiTImageProcessor": _CUT | _HALF | {"size": _square(256), "default_to_square": True},
    "BitImageProcessor": _CUT | _CLIP | {"size": _edge(224), "default_to_square": False},
    "CLIPImageProcessor": _CUT | _CLIP | {"size": _edge(224), "default_to_square": False},
    "SiglipImageProcessor": _WHOLE | _HALF | {"resample": _BICUBIC, "default_to_square": False},
}
"""Image processors of ``transformers``, and what they take where their file says nothing."""
SAME = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_pad": False}
"""Settings of an image processor that must have these values, if they are given."""


class Normalization(NamedTuple):
    """What a tower's images are made of: ``(pixel - mean) / std``, by channel, of 0 … 255."""

    mean: np.ndarray
    std: np.ndarray


class _Preparation(NamedTuple):
    """What a folder says of images."""

    where: str
    """The file, for messages."""
    given: bool
    """Whether there is a file."""
    settings: Settings
    """What it says, and what its image processor takes where it says nothing."""


def load_scaling(path: str | os.PathLike) -> Scaling:
    """How images become squares, by ``processor_config.json`` in a folder.

    Or by ``preprocessor_config.json``, where that says nothing of images. Where neither does, or
    not all of it: as the image processor does that it names, or that is its family's.

    Raises:
      FileNotFoundError: for a folder that does not exist.
      FolderError: for a file that is damaged, or prepares images in another way than by scaling
        them and cutting a square out of their middle.
    """
    with Folder(resolve(path)) as folder:
        return _scaling(_preparation(folder))


def load_normalization(path: str | os.PathLike) -> Normalization:
    """How images are to be normalized, by the same files as :func:`load_scaling`.

    Where there is none: as the family's own images were.

    Raises:
      FileNotFoundError: for a folder that does not exist.
      FolderError: for a file that is damaged, or scales pixels by anything but 1/255.
    """
    with Folder(resolve(path)) as folder:
        family, found = families.family_of(folder.config), _preparation(folder)
        channels = families.read(folder.config).channels
    c = found.settings
    _check_same(found, ("rescale_factor", "do_rescale"), "must scale pixels by 1/255")
    mean: Any
    std: Any
    mean, std = (c["image_mean"], c["image_std"]) if found.given else (family.mean, family.std)
    if c.get("do_normalize", True) is False:
        mean, std = 0.0, 1.0
    try:
        mean, std = (np.broadcast_to(np.float32(v), channels) for v in (mean, std))
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            raise ValueError
    except (TypeError, ValueError):
        raise FolderError(
            f"{found.where}: image_mean and image_std must be numbers of {channels} channels, "
            f"those of image_std positive; got {mean}, {std}"
        ) from None
    return Normalization(mean * 255, std * 255)


def for_size(folder: Checkpoint, size: int) -> dict[str, bytes]:
    """The files of a folder that say how images are prepared, for images of another size.

    Raises:
      FolderError: as of :func:`load_scaling`.
    """
    made: dict[str, Settings] = {}
    for name, whole in _files(folder).items():
        c = whole.get(NESTED) if name == PROCESSOR else whole
        if c is not None:
            resized = _resized(_with_usual(folder, name, c), c, size)
            made[name] = whole | {NESTED: resized} if name == PROCESSOR else resized
    return {name: json.dumps(c, indent=2).encode() for name, c in made.items()}


def _files(folder: Checkpoint) -> dict[str, Settings]:
    """What both files say, as far as they are there."""
    found: dict[str, Settings] = {}
    beside = folder.beside()
    for name in (PROCESSOR, PREPROCESSOR):
        if name not in beside:
            continue
        try:
            value = json.loads(beside[name].decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise FolderError(f"{folder.where}: {name} is not JSON: {error}") from error
        held = value.get(NESTED) if isinstance(value, dict) and name == PROCESSOR else value
        if not isinstance(value, dict) or not isinstance(held, dict | None):
            raise FolderError(f"{folder.where}: {name} must hold an object; got {str(held)[:80]}")
        found[name] = value
    return found


def _preparation(folder: Checkpoint) -> _Preparation:
    """What is said of images, where ``transformers`` looks."""
    files = _files(folder)
    nested = files.get(PROCESSOR, {}).get(NESTED)
    name = PREPROCESSOR if nested is None else PROCESSOR
    c = files.get(PREPROCESSOR) if nested is None else nested
    return _with_usual(folder, name, c)


def _with_usual(folder: Checkpoint, name: str, c: Settings | None) -> _Preparation:
    """Settings with those that their image processor takes where they say nothing."""
    given = {name: value for name, value in (c or {}).items() if value is not None}
    kind = given.get("image_processor_type") or str(
        given.get("feature_extractor_type") or folder.config.get("image_processor_type") or ""
    ).replace("FeatureExtractor", "ImageProcessor")
    kind = str(kind or families.family_of(folder.config).processor)
    known = kind.removesuffix("Fast").removesuffix("Pil")
    if known not in PROCESSORS:
        raise FolderError(
            f"{folder.where}: {name} must be of one of the image processors "
            f"{', '.join(PROCESSORS)}; got {kind!r}"
        )
    return _Preparation(f"{folder.where}: {name}", c is not None, PROCESSORS[known] | given)


def _check_same(found: _Preparation, names: tuple[str, ...], must: str) -> None:
    """An error for settings that have no equivalent."""
    given = {name: found.settings.get(name, SAME[name]) for name in names}

    def same(name: str) -> bool:
        value, expected = given[name], SAME[name]
        if isinstance(expected, bool):
            return value is expected
        return isinstance(value, int | float) and abs(value / expected - 1) <= 1e-6

    if not all(map(same, names)):
        told = ", ".join(f"{name} = {value!r}" for name, value in given.items())
        raise FolderError(f"{found.where} {must}; got {told}")


def _scaling(found: _Preparation) -> Scaling:
    c = found.settings
    _check_same(found, ("do_resize", "do_pad"), "must scale images, and not widen them")
    if isinstance(c["resample"], bool) or c["resample"] not in FILTERS:
        allowed = ", ".join(f"{f.value} ({f.name.lower()})" for f in sorted(FILTERS))
        raise FolderError(
            f"{found.where}: resample must be Pillow's number of a filter, {allowed}; got "
            f"{c['resample']!r}"
        )
    squash, side = _size(found)
    cut = _side(c.get("crop_size")) if c["do_center_crop"] else side
    if cut is None or cut > side:
        raise FolderError(
            f"{found.where}: crop_size must be one of a square, of at most {side} pixels a side as "
            f"size has them; got {c.get('crop_size')!r}"
        )
    if not squash and not c["do_center_crop"]:
        raise FolderError(
            f"{found.where} must make squares of images: do_center_crop must be true where size is "
            f"{c['size']!r}, of the shorter side; got {c['do_center_crop']!r}"
        )
    return Scaling(squash, side / cut, int(c["resample"]))


def _size(found: _Preparation) -> tuple[bool, int]:
    """Whether images are squashed, and the side, or the shorter one, that they get."""
    c = found.settings
    size = c["size"]
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        squash, side = False, _whole(size["shortest_edge"])
    else:
        # A number means what it did before there were names.
        squash, side = isinstance(size, dict | list) or bool(c["default_to_square"]), _side(size)
    if side is None:
        raise FolderError(
            f"{found.where}: size must be the side of a square in pixels, as a number, height and "
            f"width, or shortest_edge; got {size!r}"
        )
    return squash, side


def _side(square: Any) -> int | None:
    """Of a square that is written as a number, as two, or as height and width; None for no such."""
    if isinstance(square, dict) and set(square) == {"height", "width"}:
        square = [square["height"], square["width"]]
    if isinstance(square, list) and len(square) == 2 and square[0] == square[1]:
        square = square[0]
    return _whole(square)


def _whole(side: Any) -> int | None:
    return side if isinstance(side, int) and not isinstance(side, bool) and side >= 1 else None


def _resized(found: _Preparation, c: Settings, size: int) -> Settings:
    """Settings of an image processor, for squares of another size."""
    scaling = _scaling(found)
    side = scaling.side(size)
    made: Settings = {"size": _square(side) if scaling.squash else _edge(side)}
    if found.settings["do_center_crop"] or c.get("crop_size") is not None:
        made["crop_size"] = _square(size)
    return c | made
