"""Batches as pure functions: which samples a step sees, in which order, and how they are augmented.

They depend on ``(key, step)`` alone. A resumed run therefore needs no state of a data pipeline, and
continues bit for bit. All of them can be traced, and work on arrays whose batch axis is sharded.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key, Num, UInt8

# Of characters, which mean something else, or nothing, in a mirror.
_CHARACTERS = (
    "binary_alpha_digits",
    "cmaterdb",
    "digits",
    "emnist",
    "kmnist",
    "mnist",
    "mnist_corrupted",
    "omniglot",
    "svhn_cropped",
)


def batch_indices(
    key: Key[Array, ""], step: Int32[Array, ""], batch_size: int, samples: int
) -> Int32[Array, "batch"]:
    """The samples of a step: epoch after epoch, each in an order of its own.

    An epoch has ``samples // batch_size`` steps, and leaves out what is left over (other samples
    each time).

    Raises:
      ValueError: for a ``batch_size`` that is no int in ``[1, samples]``.
    """
    whole = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if not whole or not 1 <= batch_size <= samples:
        raise ValueError(
            f"batch_size must be an int in [1, {samples}], the samples; got {batch_size!r}"
        )
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
    for axis, offset in ((1, offsets[:, 0]), (2, offsets[:, 1])):
        widths = [(0, 0)] * 4
        widths[axis] = (padding, padding)
        padded, size = jnp.pad(images, widths), images.shape[axis]
        # Every offset in turn, chosen where it was drawn: a gather would be one line, but JAX
        # refuses it for images that are sharded over explicit mesh axes.
        for shift in range(2 * padding + 1):
            moved = jax.lax.slice_in_dim(padded, shift, shift + size, axis=axis)
            images = jnp.where(offset[:, None, None, None] == shift, moved, images)
    return images


def random_flip(
    key: Key[Array, ""], images: Num[Array, "batch height width channel"]
) -> Num[Array, "batch height width channel"]:
    """Each image mirrored left to right with probability 1/2."""
    flip = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def augment(
    key: Key[Array, ""], images: Num[Array, "batch height width channel"], name: str
) -> Num[Array, "batch height width channel"]:
    """Raw images, varied as is customary: moved by up to an eighth of their size, and mirrored.

    That is a pixel for digits, 4 for CIFAR. Sets of characters (by ``name``) are not mirrored.
    """
    crop_key, flip_key = jax.random.split(key)
    images = random_crop(crop_key, images, max(1, min(images.shape[1:3]) // 8))
    return images if of_characters(name) else random_flip(flip_key, images)


def of_characters(name: str) -> bool:
    """Whether a set of this name has images of characters, which are not to be mirrored."""
    return re.split("[/:]", name)[0] in _CHARACTERS
