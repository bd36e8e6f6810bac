"""Data sets, and batches as pure functions of a key and a step."""

from bdia_jax.data.images import (
    ImageData,
    augment,
    batch_indices,
    load_images,
    normalize,
    random_crop,
    random_flip,
)

__all__ = [
    "ImageData",
    "augment",
    "batch_indices",
    "load_images",
    "normalize",
    "random_crop",
    "random_flip",
]
