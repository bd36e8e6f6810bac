"""Image classification data: loaded once, held on the device, batched by pure functions.

Which images a step sees, in which order, and how they are augmented, are functions of
``(key, step)`` alone. A resumed run therefore needs no state of a data pipeline, and continues
bit for bit.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key, Num, UInt8

EMBEDDED = ("digits",)


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Images and labels of a training and an evaluation split, in host memory."""

    name: str
    train_images: UInt8[np.ndarray, "train height width channel"]
    train_labels: Int32[np.ndarray, "train"]
    eval_images: UInt8[np.ndarray, "eval height width channel"]
    eval_labels: Int32[np.ndarray, "eval"]
    num_classes: int

    @functools.cached_property
    def statistics(self) -> tuple[Float[np.ndarray, "channel"], Float[np.ndarray, "channel"]]:
        """Mean and standard deviation per channel, over the training split."""
        # Summed by value rather than by pixel: exact, and no float copy of the images.
        counts = np.stack(
            [
                np.bincount(self.train_images[..., c].ravel(), minlength=256)
                for c in range(self.train_images.shape[-1])
            ]
        )
        share, values = counts / counts.sum(1, keepdims=True), np.arange(256)
        mean = share @ values
        variance = (share * (values - mean[:, None]) ** 2).sum(1)
        return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)


def load_images(
    name: str, data_dir: str | pathlib.Path | None = None, *, download: bool = False
) -> ImageData:
    """Loads a data set by name.

    Args:
      name: ``"digits"`` (scikit-learn's 1,797 handwritten digits of 8 × 8 pixels, embedded: every
        fifth image is for evaluation), or any image classification set of TensorFlow Datasets
        with images of one size, such as ``"cifar10"`` or ``"cifar100"``. Its evaluation split is
        ``test``, else ``validation``.
      data_dir: where prepared TFDS sets lie (``<data_dir>/<name>/<version>``); by default TFDS's
        own folder, ``~/tensorflow_datasets`` or ``$TFDS_DATA_DIR``.
      download: prepare the set if it is not there. Only this needs TensorFlow; reading a prepared
        set does not.

    Raises:
      ValueError: for an unknown name, or a set that is not image classification.
      FileNotFoundError: for a set that has not been prepared.
      ModuleNotFoundError: if preparing one lacks a package; before anything is downloaded.
    """
    if name == "digits":
        return _digits()
    builder = _tfds_builder(name, data_dir)
    train, evaluation = _splits(builder)
    if not builder.is_prepared():
        _prepare(builder, download)
    return ImageData(
        name, *_read(builder, train), *_read(builder, evaluation),
        num_classes=builder.info.features["label"].num_classes,
    )  # fmt: skip


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 0 … 16 in the source, 0 … 255 here like any image.
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    held_out = np.arange(len(labels)) % 5 == 4
    return ImageData(
        "digits", images[~held_out], labels[~held_out], images[held_out], labels[held_out], 10
    )


def _tfds_builder(name: str, data_dir):
    import tensorflow_datasets as tfds

    if data_dir is not None and not pathlib.Path(data_dir).expanduser().is_dir():
        raise FileNotFoundError(f"data_dir must be an existing folder; got {str(data_dir)!r}")
    try:
        # array_record can be read at random, and without TensorFlow.
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError:
        known = [*EMBEDDED, *tfds.list_builders(with_community_datasets=False)]
        close = difflib.get_close_matches(name, known)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"unknown data set {name!r}: neither embedded ({', '.join(EMBEDDED)}) nor a name of "
            f"TensorFlow Datasets{hint}"
        ) from None


def _splits(builder) -> tuple[str, str]:
    """The names of the splits to train and to evaluate on, of a set that fits."""
    features = builder.info.features
    names = list(features.keys()) if hasattr(features, "keys") else []
    is_classification = {"image", "label"} <= {*names} and hasattr(features["label"], "num_classes")
    if not is_classification:
        raise ValueError(
            f"{builder.name} is not an image classification set: needed are the features 'image' "
            f"and 'label'; it has {names}"
        )
    shape = features["image"].shape
    if None in shape:
        raise ValueError(
            f"images of {builder.name} vary in size ({shape}), and cannot be stacked; allowed are "
            "sets with images of one size"
        )
    if not builder.is_prepared():
        return "train", "test"
    found = list(builder.info.splits)
    evaluation = next((split for split in ("test", "validation") if split in found), None)
    if "train" not in found or evaluation is None:
        raise ValueError(
            f"{builder.name} needs a split 'train', and 'test' or 'validation'; it has {found}"
        )
    return "train", evaluation


def _prepare(builder, download: bool) -> None:
    if not download:
        raise FileNotFoundError(
            f"{builder.name} is not prepared: looked in {builder.data_dir}. Give the folder of "
            "prepared sets as data_dir, or ask for it to be downloaded with download=True"
        )
    missing = [
        package
        for package in ("tensorflow", "importlib_resources")
        if importlib.util.find_spec(package) is None
    ]
    if missing:
        raise ModuleNotFoundError(
            f"preparing {builder.name} for the first time needs {' and '.join(missing)}: "
            'pip install "bdia_jax[prepare]" (reading a prepared set needs neither)'
        )
    builder.download_and_prepare(file_format="array_record")


def _read(builder, split: str) -> tuple[np.ndarray, np.ndarray]:
    examples = list(builder.as_data_source(split=split))
    images = np.stack([example["image"] for example in examples])
    return images, np.array([example["label"] for example in examples], np.int32)


# ---------------------------------------------------------------------------------------------
# Batches, as functions of the key and the step
# ---------------------------------------------------------------------------------------------


def batch_indices(
    key: Key[Array, ""], step: Int32[Array, ""], batch_size: int, samples: int
) -> Int32[Array, "batch"]:
    """The samples of a step: epoch after epoch, each in an order of its own.

    An epoch has ``samples // batch_size`` steps, and leaves out what is left over (other samples
    each time).
    """
    if not 1 <= batch_size <= samples:
        raise ValueError(f"batch_size must lie in [1, {samples}], the samples; got {batch_size}")
    steps_per_epoch = samples // batch_size
    epoch, position = step // steps_per_epoch, step % steps_per_epoch
    order = jax.random.permutation(jax.random.fold_in(key, epoch), samples)
    return jax.lax.dynamic_slice(order, (position * batch_size,), (batch_size,))


def normalize(
    images: UInt8[Array, "batch height width channel"],
    mean: Float[Array, "channel"],
    std: Float[Array, "channel"],
) -> Float[Array, "batch height width channel"]:
    """Images in float32 with mean 0 and standard deviation 1 per channel."""
    return (images.astype(jnp.float32) - mean) / std


def random_crop(
    key: Key[Array, ""], images: Num[Array, "batch height width channel"], padding: int
) -> Num[Array, "batch height width channel"]:
    """Each image moved by up to ``padding`` pixels in both directions; zeros move in."""
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def crop(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


def random_flip(
    key: Key[Array, ""], images: Num[Array, "batch height width channel"]
) -> Num[Array, "batch height width channel"]:
    """Each image mirrored left to right with probability 1/2."""
    flip = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def augment(
    key: Key[Array, ""], images: Num[Array, "batch height width channel"], name: str
) -> Num[Array, "batch height width channel"]:
    """As is customary, on raw images: digits move by a pixel, others are cropped and mirrored."""
    crop_key, flip_key = jax.random.split(key)
    if name == "digits":
        return random_crop(crop_key, images, 1)
    return random_flip(flip_key, random_crop(crop_key, images, 4))
