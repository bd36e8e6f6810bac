"""Folders of images by class: any size, format and depth go in, squares of 8 bits come out."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import os
import pathlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps
from tqdm import tqdm

from bdia_jax.data.images import ImageData

log = logging.getLogger("bdia_jax")

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
"""Of files that are taken for images."""
EVALUATION = ("validation", "valid", "val", "test")
"""Names of a folder with images to evaluate on, beside "train"; the first that is there."""
EVERY = 10
"""Without such a folder, one image in so many of each class is for evaluation."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolder(ImageData):
    """Images of a folder, and the names of its classes."""

    class_names: tuple[str, ...] = ()


def load_image_folder(
    path: str | os.PathLike, size: int, *, channels: int = 3, progress: bool | None = None
) -> ImageFolder:
    """Reads a folder that has a folder of images for each class.

    Either ``path`` has the folders of the classes, and every tenth image of a class, by name, is
    for evaluation. Or it has a folder ``train`` with those, and another one, ``validation``
    (``valid``, ``val``, ``test``).

    An image is rotated as its EXIF data say, put on white where it is transparent, scaled until its
    shorter side has ``size`` pixels, and cut to the square in its middle. All images are held in
    memory: 224 × 224 × 3 bytes are 0.15 MB an image.

    Args:
      path: of the folder.
      size: height and width in pixels.
      channels: 3 for colours, 1 for shades of grey.
      progress: whether to show a bar; None for: on a terminal.

    Raises:
      FileNotFoundError, NotADirectoryError: for a path that is no folder.
      ValueError: without two classes; for a class without images, or one to evaluate that is not
        trained; for files that cannot be read as images, with their names.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"the folder of images must exist; got {str(path)!r}")
    if not path.is_dir():
        raise NotADirectoryError(f"the images must be in a folder; got the file {str(path)!r}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3; got {channels}")
    given = next((path / name for name in EVALUATION if (path / name).is_dir()), None)
    if (path / "train").is_dir() and given is not None:
        train, evaluation = _by_class(path / "train"), _by_class(given)
        if unknown := set(evaluation) - set(train):
            raise ValueError(
                f"the classes in {given} must be those in {path / 'train'}; got, besides, "
                f"{', '.join(sorted(unknown))}"
            )
    else:
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
    files, labels = zip(*(_listed(split, names) for split in (train, evaluation)), strict=True)
    images = _read([*files[0], *files[1]], size, channels, progress)
    return ImageFolder(
        path.name,
        images[: len(files[0])],
        np.asarray(labels[0], np.int32),
        images[len(files[0]) :],
        np.asarray(labels[1], np.int32),
        len(names),
        tuple(names),
    )


def _by_class(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """The images in each folder of a folder, sorted by name."""
    found, others = {}, []
    for place in sorted(folder.iterdir()):
        if not place.is_dir() or place.name.startswith("."):
            continue
        files = [f for f in sorted(place.rglob("*")) if f.is_file() and f.name[0] != "."]
        found[place.name] = [file for file in files if file.suffix.lower() in SUFFIXES]
        others += [file for file in files if file.suffix.lower() not in SUFFIXES]
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
    files: list[pathlib.Path], size: int, channels: int, progress: bool | None
) -> UInt8[np.ndarray, "image size size channel"]:
    images = np.empty((len(files), size, size, channels), np.uint8)
    wrong: list[str] = []

    def read(i: int) -> None:
        try:
            images[i] = read_image(files[i], size, channels)
        # Pillow's readers raise whatever a damaged file makes them meet.
        except Exception as error:
            wrong.append(f"{files[i]} ({error})")

    hidden = None if progress is None else not progress
    # Pillow lets other threads run while it reads and scales.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in tqdm(
            pool.map(read, range(len(files))), total=len(files), unit="image", disable=hidden
        ):
            pass
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"{len(wrong)} of {len(files)} images cannot be read: {'; '.join(sorted(wrong)[:5])}"
            f"{more}. Mend or remove them"
        )
    return images


def read_image(
    path: str | os.PathLike, size: int, channels: int = 3
) -> UInt8[np.ndarray, "size size channel"]:
    """One image, as :func:`load_image_folder` reads it.

    Raises:
      OSError: for a file that is no image, or damaged.
      ValueError: for one whose white is not known: numbers of 32 bits.
    """
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            values = np.asarray(image)
            if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError(
                    f"pixels must have 8 or 16 bits; got {image.mode} from {values.min():g} to "
                    f"{values.max():g}"
                )
            image = Image.fromarray(np.uint8(np.round(values / 257)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB" if channels == 3 else "L")
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, channels)
