"""Folders of images by class: any size, format and depth go in, squares of 8 bits come out."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import math
import os
import pathlib
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps
from tqdm import tqdm

from bdia_jax.data.images import ImageData
from bdia_jax.data.scaling import Scaling, check_size, square_of

log = logging.getLogger("bdia_jax")

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
"""Of files that are taken for images."""
SIXTEEN_BITS = ("PNG", "PPM")
"""Pillow's names of formats whose numbers it gives 32 bits, though they have at most 16."""
PHOTOMETRIC, DEPTH = 262, 258
"""Numbers of the tags of a TIFF that say whether 0 is white, and how many bits a number has."""
TRAINING = ("train", "training")
EVALUATION = ("validation", "valid", "val", "dev", "evaluation", "eval", "test", "testing")
"""Names, in any case, of the folders of both splits; of each the first that is there."""
HIDDEN = ("__MACOSX",)
"""Names of folders beside the images that hold none of them, besides those that begin with a dot.
"""
EVERY = 10
"""Without such a folder, one image in so many of each class is for evaluation."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolder(ImageData):
    """Images of a folder, and the names of its classes."""

    one_shape: ClassVar[bool] = False
    class_names: tuple[str, ...] = ()
    middle: float = 1.0
    """Share of the sides of training images that lies around their middle, and that an image for
    evaluation would show."""


def load_image_folder(
    path: str | os.PathLike,
    size: int,
    *,
    larger: float = 1.0,
    scaling: Scaling = Scaling(),  # noqa: B008  (a tuple)
    channels: int = 3,
    progress: bool | None = None,
) -> ImageFolder:
    """Reads a folder that has a folder of images for each class.

    Either ``path`` has the folders of the classes, and every tenth image of a class, by name, is
    for evaluation. Or it has a folder ``train`` with those, and another one, ``validation``
    (or of another name in :data:`EVALUATION`).

    An image is rotated as its EXIF data say, put on white where it is transparent, and made a
    square. All images are held in memory: 224 × 224 × 3 bytes are 0.15 MB an image.

    Args:
      path: of the folder.
      size: height and width in pixels.
      larger: images for training have so many times as many pixels a side, of which crops are
        taken.
      scaling: how images become squares. Those for training keep some of what is around the square
        that is cut out, if there is something (:attr:`ImageFolder.middle`).
      channels: 3 for colours, 1 for shades of grey.
      progress: whether to show a bar; None for: on a terminal.

    Raises:
      FileNotFoundError, NotADirectoryError: for a path that is no folder.
      ValueError: for a size, or how many times larger, below 1, and an unknown scaling; without
        two classes, or an image to evaluate; for a class without images, or one to evaluate that is
        not trained; for classes that look like splits; for files that cannot be read as images,
        with their names.
    """
    check_size(size)
    scaling.check()
    if not 1 <= larger < math.inf:
        raise ValueError(f"larger must be at least 1; got {larger}")
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"the folder of images must exist; got {str(path)!r}")
    if not path.is_dir():
        raise NotADirectoryError(f"the images must be in a folder; got the file {str(path)!r}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3; got {channels}")
    for_training, given = (_split(path, names) for names in (TRAINING, EVALUATION))
    if for_training is not None and given is not None:
        train, evaluation = _by_class(for_training), _by_class(given)
        if unknown := set(evaluation) - set(train):
            raise ValueError(
                f"the classes in {given} must be those in {for_training}; got, besides, "
                f"{', '.join(sorted(unknown))}"
            )
    else:
        _refuse_splits(path)
        found = _by_class(path)
        # At least one of each class that has two.
        held = {n: range(min(EVERY, len(f)) - 1, len(f), EVERY) for n, f in found.items()}
        evaluation = {n: [f[i] for i in held[n]] for n, f in found.items() if len(f) > 1}
        train = {
            n: [file for i, file in enumerate(f) if len(f) == 1 or i not in held[n]]
            for n, f in found.items()
        }
    names = sorted(train)
    if len(names) < 2:
        raise ValueError(
            f"{path} must have a folder for each of at least two classes; it has "
            f"{', '.join(names) or 'none'}"
        )
    if not any(evaluation.values()):
        counted = f"{sum(map(len, train.values()))} images of {len(train)} classes in all"
        raise ValueError(
            f"{path} must have an image to evaluate, in {EVALUATION[0]}, or as another one of a "
            f"class; got {counted}"
        )
    files, labels = zip(*(_listed(split, names) for split in (train, evaluation)), strict=True)
    side = round(size * larger)
    wider = scaling._replace(edge=max(1.0, scaling.edge * size / side))
    images = _read([*zip(files, (side, size), (wider, scaling))], channels, progress)
    labels = [np.asarray(some, np.int32) for some in labels]
    return ImageFolder(
        path.name,
        *(images[0], labels[0], images[1], labels[1]),
        len(names),
        tuple(names),
        wider.edge / scaling.edge,
    )


def _split(path: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path | None:
    """The folder in a folder that has one of some names, in any case."""
    folders = {place.name.lower(): place for place in _folders(path)}
    return next((folders[name] for name in names if name in folders), None)


def _refuse_splits(path: pathlib.Path) -> None:
    """A ``ValueError`` for "classes" that are splits, by their names or by their folders."""
    classes = _folders(path)
    inner = [{place.name for place in _folders(folder)} for folder in classes]
    splits = [place.name for place in classes]
    alike = len(inner) > 1 and len(inner[0]) > 1 and all(names == inner[0] for names in inner)
    if not alike:
        # The other ones may have other classes, as splits of another name have.
        splits = [
            place.name
            for place in classes
            if place.name.lower() in (*TRAINING, *EVALUATION)
            and sum(any(map(_is_image, _files(one))) for one in _folders(place)) > 1
        ]
    if splits:
        held = sorted(
            {name for place, names in zip(classes, inner) if place.name in splits for name in names}
        )
        raise ValueError(
            f"{' and '.join(splits)} in {path} hold{'' if len(splits) > 1 else 's'} the folders "
            f"{', '.join(held)}: are they splits? Name them {TRAINING[0]} and {EVALUATION[0]}"
        )


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    """The folders in a folder, sorted by name, but for hidden ones."""
    return [place for place in sorted(path.iterdir()) if place.is_dir() and not _hidden(place.name)]


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files in a folder and in those in it, sorted by name, but for hidden ones."""
    found = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return [file for file in found if not any(map(_hidden, file.relative_to(folder).parts))]


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN


def _is_image(file: pathlib.Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _by_class(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """The images in each folder of a folder, sorted by name."""
    found, others = {}, []
    for place in _folders(folder):
        files = _files(place)
        found[place.name] = [file for file in files if _is_image(file)]
        others += [file for file in files if not _is_image(file)]
    if empty := [name for name, files in found.items() if not files]:
        raise ValueError(
            f"each class in {folder} must have images ({', '.join(SUFFIXES)}); got none in "
            f"{', '.join(empty)}"
        )
    if others:
        log.warning("%d files in %s are no images, such as %s", len(others), folder, others[0])
    return found


def _listed(
    split: dict[str, list[pathlib.Path]], names: list[str]
) -> tuple[list[pathlib.Path], list[int]]:
    pairs = [(file, names.index(name)) for name in names for file in split.get(name, [])]
    return [file for file, _ in pairs], [label for _, label in pairs]


def _read(
    splits: Sequence[tuple[Sequence[pathlib.Path], int, Scaling]],
    channels: int,
    progress: bool | None,
) -> list[UInt8[np.ndarray, "image size size channel"]]:
    """The images of each split: files, the size of the squares, and how they are made."""
    made = [np.empty((len(files), n, n, channels), np.uint8) for files, n, _ in splits]
    jobs = [
        (images, i, file, size, scaling)
        for images, (files, size, scaling) in zip(made, splits)
        for i, file in enumerate(files)
    ]
    wrong: list[str] = []

    def read(job) -> None:
        images, i, file, size, scaling = job
        try:
            images[i] = read_image(file, size, channels, scaling)
        # Pillow's readers raise whatever a damaged file makes them meet.
        except Exception as error:
            wrong.append(f"{file} ({error})")

    hidden = None if progress is None else not progress
    # Pillow lets other threads run while it reads and scales.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in tqdm(pool.map(read, jobs), total=len(jobs), unit="image", disable=hidden):
            pass
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"{len(wrong)} of {len(jobs)} images cannot be read: {'; '.join(sorted(wrong)[:5])}"
            f"{more}. Mend or remove them"
        )
    return made


def read_image(
    path: str | os.PathLike,
    size: int,
    channels: int = 3,
    scaling: Scaling = Scaling(),  # noqa: B008  (a tuple)
) -> UInt8[np.ndarray, "size size channel"]:
    """One image as a square, rotated as its EXIF data say, on white where it is transparent.

    Args:
      path: of the file.
      size: height and width in pixels.
      channels: 3 for colours, 1 for shades of grey.
      scaling: how it becomes a square.

    Raises:
      OSError: for a file that is no image, or damaged.
      ValueError: for one whose white is not known: numbers of 32 bits.
    """
    with Image.open(path) as image:
        image = _in_eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = square_of(image.convert("RGB" if channels == 3 else "L"), size, scaling)
    return np.asarray(image).reshape(size, size, channels)


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """An image as its camera was held; numbers of up to 16 bits as 8, shades of grey on white."""
    # Pillow inverts those of 8 bits alone, and gives 12 bits as they are.
    tags = getattr(image, "tag_v2", {})
    inverted = tags.get(PHOTOMETRIC) == 0
    white = 2 ** tags.get(DEPTH, (16,))[0] - 1
    clear = image.info.get("transparency")
    in_sixteen = image.format in SIXTEEN_BITS
    image = ImageOps.exif_transpose(image)
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image)
    if image.mode == "F" or (image.mode == "I" and not in_sixteen):
        raise ValueError(
            f"pixels must have 8 or 16 bits; got 32 ({image.mode}), from {values.min():g} "
            f"to {values.max():g}"
        )
    shades = np.uint8(np.round(values * (255 / white)))
    shades = 255 - shades if inverted else shades
    return Image.fromarray(shades if clear is None else np.where(values == clear, 255, shades))
