"""Image classification data: loaded once, and held in host memory."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int32, Integer, UInt8

from bdia_jax.data import sets
from bdia_jax.data.fingerprints import fingerprint

EMBEDDED = ("digits",)


def check_classes(name: str, found: int, allowed: int) -> None:
    """A ``ValueError`` if the classes of a data set are not those of a model.

    Args:
      name: of the data set, for the message.
      found: its number of classes.
      allowed: the model's.
    """
    if found != allowed:
        raise ValueError(
            f"the images of {name} have {found} classes, the model {allowed}: give the model "
            f"num_classes={found}, or other images"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """Images and labels of a training and an evaluation split, in host memory.

    Raises:
      ValueError: for splits that are empty, images that are not uint8 arrays of one and the same
        shape, not a label per image, no classes, or labels outside ``[0, num_classes)``.
    """

    name: str
    train_images: UInt8[np.ndarray, "train height width channel"]
    train_labels: Integer[np.ndarray, "train"]
    eval_images: UInt8[np.ndarray, "eval eval_height eval_width channel"]
    eval_labels: Integer[np.ndarray, "eval"]
    num_classes: int
    one_shape: ClassVar[bool] = True
    """Whether the images of both splits are of one shape."""

    def __post_init__(self):
        if not isinstance(self.num_classes, int | np.integer) or self.num_classes < 1:
            raise ValueError(f"num_classes must be an int >= 1; got {self.num_classes!r}")
        if not len(self.train_labels) or not len(self.eval_labels):
            raise ValueError(
                f"both splits need samples; got {len(self.train_labels)} for training and "
                f"{len(self.eval_labels)} for evaluation"
            )
        for split in ("train", "eval"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            if images.dtype != np.uint8 or images.ndim != 4:
                raise ValueError(
                    f"{split}_images must be uint8 [{split}, height, width, channel]; got "
                    f"{images.dtype}{list(images.shape)}"
                )
            if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
                raise ValueError(
                    f"{split}_labels must be {len(images)} integers, one per image; got "
                    f"{labels.dtype}{list(labels.shape)}"
                )
            if labels.min() < 0 or labels.max() >= self.num_classes:
                raise ValueError(
                    f"labels must lie in [0, {self.num_classes}), the classes; got {split}_labels "
                    f"from {labels.min()} to {labels.max()}"
                )
        if self.one_shape and self.train_images.shape[1:] != self.eval_images.shape[1:]:
            raise ValueError(
                "the images of both splits must be of one shape; got "
                f"{self.train_images.shape[1:]} and {self.eval_images.shape[1:]}"
            )

    @functools.cached_property
    def statistics(self) -> tuple[Float[np.ndarray, "channel"], Float[np.ndarray, "channel"]]:
        """Mean and standard deviation per channel, over the training split, in float32.

        A channel that is constant has the deviation 1.
        """
        shape = self.train_images.shape[1:]
        # Sums of integers are exact. Pixel by pixel first, a few images at a time: the copies are
        # small, and the inner loops long.
        total, squares = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for start in range(0, len(self.train_images), 256):
            values = self.train_images[start : start + 256]
            total += values.sum(0, dtype=np.int64)
            squares += np.square(values, dtype=np.uint16).sum(0, dtype=np.int64)
        count = self.train_images.size // shape[-1]
        mean, mean_square = (sums.sum((0, 1)) / count for sums in (total, squares))
        std = np.sqrt(mean_square - mean**2)
        return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all images and labels, and the number of classes."""
        arrays = (self.train_images, self.train_labels, self.eval_images, self.eval_labels)
        return fingerprint((*arrays, np.asarray(self.num_classes)))


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


def load_images(
    name: str, data_dir: str | pathlib.Path | None = None, *, download: bool = False
) -> ImageData:
    """Loads a data set by name.

    Args:
      name: ``"digits"`` (scikit-learn's 1,797 handwritten digits of 8 × 8 pixels, embedded: every
        fifth image of a class is for evaluation), or any image classification set of TensorFlow
        Datasets with images of one size, such as ``"cifar10"``, ``"emnist/letters"`` or
        ``"cifar10:3.0.2"``. Its evaluation split is ``test``, else ``validation``.
      data_dir: where prepared TFDS sets lie (``<data_dir>/<name>/<version>``); by default TFDS's
        own folder, ``~/tensorflow_datasets`` or ``$TFDS_DATA_DIR``.
      download: prepare the set if it is not there. Only this needs TensorFlow; reading a prepared
        set does not.

    Raises:
      ValueError: for an unknown name, or a set that is not image classification, or has images of
        several sizes, or was prepared in a format that needs TensorFlow to be read.
      FileNotFoundError, NotADirectoryError, PermissionError: for a ``data_dir`` that cannot be
        read, or a set that has not been prepared. All of these, and the next, before anything is
        downloaded or read.
      ModuleNotFoundError: if preparing a set lacks a package.
      RuntimeError: if preparing a set went wrong.
      OSError: if a prepared set is damaged.
    """
    if name == "digits":
        return _digits()
    builder = sets.find(name, data_dir, may_be_missing=download, embedded=EMBEDDED)
    _check_features(builder)
    sets.prepare(builder, name, download)
    train, evaluation = _splits(builder)
    return ImageData(
        name,
        *_read(builder, train),
        *_read(builder, evaluation),
        num_classes=builder.info.features["label"].num_classes,
    )


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    # 0 … 16 in the source, 0 … 255 here like any image.
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    # Every fifth of each class: of the source's own order, that would be 12 to 28 % of a class.
    held_out = np.zeros(len(labels), bool)
    held_out[np.argsort(labels, kind="stable")[4::5]] = True
    return ImageData(
        "digits", images[~held_out], labels[~held_out], images[held_out], labels[held_out], 10
    )


def _check_features(builder) -> None:
    features = builder.info.features
    names = list(features.keys()) if hasattr(features, "keys") else []
    is_classification = {"image", "label"} <= {*names} and hasattr(features["label"], "num_classes")
    if not is_classification:
        raise ValueError(
            f"{builder.name} is not an image classification set: needed are the features 'image' "
            f"and 'label'; it has {names}"
        )
    if not features["label"].num_classes:
        raise ValueError(f"the labels of {builder.name} must have classes; their number is not set")
    shape, dtype = features["image"].shape, np.dtype(features["image"].np_dtype)
    if None in shape:
        raise ValueError(
            f"images of {builder.name} vary in size ({shape}), and cannot be stacked; allowed are "
            "sets with images of one size"
        )
    if len(shape) != 3 or dtype != np.uint8:
        raise ValueError(
            f"images must be uint8 (height, width, channel); those of {builder.name} are "
            f"{dtype} {shape}"
        )


def _splits(builder) -> tuple[str, str]:
    """The names of the splits of a prepared set to train and to evaluate on.

    The weights of the best evaluation are kept: a set that has both keeps its test apart from that.
    """
    found = list(builder.info.splits)
    evaluation = next((split for split in ("validation", "test") if split in found), None)
    if "train" not in found or evaluation is None:
        raise ValueError(
            f"{builder.name} needs a split 'train', and 'validation' or 'test'; it has {found}"
        )
    for split in ("train", evaluation):
        if not builder.info.splits[split].num_examples:
            raise ValueError(f"the split {split!r} of {builder.name} must have images; got none")
    return "train", evaluation


def _read(
    builder, split: str
) -> tuple[UInt8[np.ndarray, "split height width channel"], Int32[np.ndarray, "split"]]:
    count = builder.info.splits[split].num_examples
    images = np.empty((count, *builder.info.features["image"].shape), np.uint8)
    labels = np.empty(count, np.int32)
    for i, example in enumerate(sets.read(builder, split)):
        if example["image"].shape != images.shape[1:]:
            raise ValueError(
                f"image {i} of {builder.name}, {split} has the shape {example['image'].shape}; "
                f"its description says {images.shape[1:]}"
            )
        images[i], labels[i] = example["image"], example["label"]
    return images, labels
