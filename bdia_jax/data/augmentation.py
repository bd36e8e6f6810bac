"""Training images varied as recipes for vision transformers do; pure functions of a key.

Images have values from 0 to 255 here. Whatever comes out is of one size, whatever goes in.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from bdia_jax.data.batches import random_flip
from bdia_jax.data.rand_augment import LARGEST, rand_augment
from bdia_jax.data.scaling import METHODS, Scaling, squares_of


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How training images are varied."""

    smallest: float = 0.25
    """The smallest share of an image's area that a random crop has; 1 for no crops. (Training from
    scratch, 0.08 is usual.)"""
    stretch: float = 4 / 3
    """The largest ratio of a crop's sides."""
    flip: bool | None = None
    """Mirror every other image, left to right; None for: unless they are of characters, by the name
    of the set."""
    mixup: float = 0.0
    """Parameter of the beta distribution that shares of two images are drawn from; 0 for no mixing.
    (Zhang, Cissé, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", 2018.)"""
    operations: int = 0
    """How many operations of :func:`~bdia_jax.data.rand_augment.rand_augment` an image gets: 2 are
    usual, 0 for none."""
    magnitude: float = 9
    """The magnitude of these operations, in [0, 30]."""

    def __post_init__(self):
        if not 0 < self.smallest <= 1:
            raise ValueError(f"smallest must lie in (0, 1]; got {self.smallest}")
        if not 1 <= self.stretch < math.inf:
            raise ValueError(f"stretch must be at least 1; got {self.stretch}")
        if not 0 <= self.mixup < math.inf:
            raise ValueError(f"mixup must be at least 0; got {self.mixup}")
        if self.operations < 0:
            raise ValueError(f"operations must be at least 0; got {self.operations}")
        if not 0 <= self.magnitude <= LARGEST:
            raise ValueError(f"magnitude must lie in [0, {LARGEST}]; got {self.magnitude}")


def crop_and_resize(
    images: Num[Array, "batch height width channel"],
    top_left: Float[Array, "batch 2"],
    sides: Float[Array, "batch 2"],
    size: int,
    method: str = "cubic",
) -> Float[Array, "batch size size channel"]:
    """A rectangle of each image, scaled to a square, in float32.

    Args:
      images: values from 0 to 255.
      top_left: row and column where the rectangle begins, in pixels; fractions count.
      sides: its height and width.
      size: of the square.
      method: JAX's name of the kernel.
    """

    def one(image, top_left, sides):
        scale = size / sides
        shape = (size, size, image.shape[-1])
        return jax.image.scale_and_translate(
            image, shape, (0, 1), scale, -top_left * scale, method=method
        )

    scaled = jax.vmap(one)(images.astype(jnp.float32), top_left, sides)
    # A cubic kernel goes beyond the values that it is given.
    return scaled.clip(0, 255)


def random_resized_crop(
    key: Key[Array, ""],
    images: Num[Array, "batch height width channel"],
    size: int,
    smallest: float,
    stretch: float,
    scaling: Scaling = Scaling(),  # noqa: B008  (a tuple)
) -> Float[Array, "batch size size channel"]:
    """A random rectangle of each image, scaled to a square.

    Its area is uniform in ``[smallest, 1]`` of the image, the logarithm of its ratio of sides
    uniform in ``± log(stretch)``, and its place uniform in the image; sides longer than the image
    are cut to it. (Szegedy et al., "Going Deeper with Convolutions", 2015.) Where whole images are
    squashed, the ratio is that in the square.
    """
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    height, width = images.shape[1:3]
    count = (len(images),)
    share = jax.random.uniform(area_key, count, minval=smallest, maxval=1)
    bound = math.log(stretch)
    ratio = jnp.exp(jax.random.uniform(ratio_key, count, minval=-bound, maxval=bound))
    whole = jnp.asarray([height, width], jnp.float32)
    unit = whole if scaling.squash else math.sqrt(height * width)
    sides = unit * jnp.sqrt(jnp.stack([share * ratio, share / ratio], axis=-1))
    sides = jnp.minimum(sides, whole)
    place = jax.random.uniform(place_key, (len(images), 2)) * (whole - sides)
    method = METHODS.get(scaling.resample, "linear")
    return crop_and_resize(images, place, sides, size, method)


def augment_to(
    key: Key[Array, ""],
    images: Num[Array, "batch height width channel"],
    size: int,
    how: Augmentation,
    scaling: Scaling = Scaling(),  # noqa: B008  (a tuple)
) -> Float[Array, "batch size size channel"]:
    """Training images, varied: cropped and scaled, mirrored, changed by random operations.

    Args:
      key: chooses crops, mirrors and operations.
      images: values from 0 to 255.
      size: height and width of what comes out.
      how: what is done; they are mirrored unless it says no.
      scaling: how they become squares where they are not cropped.
    """
    crop_key, flip_key, operations_key = jax.random.split(key, 3)
    if how.smallest < 1:
        images = random_resized_crop(crop_key, images, size, how.smallest, how.stretch, scaling)
    else:
        images = squares_of(images, size, scaling)
    if how.flip is not False:
        images = random_flip(flip_key, images)
    if how.operations:
        images = rand_augment(operations_key, images, how.operations, how.magnitude)
    return images


def mix(
    key: Key[Array, ""], images: Float[Array, "batch height width channel"], alpha: float
) -> tuple[Float[Array, "batch height width channel"], Float[Array, "batch"]]:
    """Each image with the one at the other end of the batch, in shares drawn from Beta(α, α).

    Returns:
      The mixed images, and the share of each that is the image's own: at least 1/2.
    """
    share = jax.random.beta(key, alpha, alpha, (len(images),))
    share = jnp.maximum(share, 1 - share)
    s = share[:, None, None, None]
    return s * images + (1 - s) * images[::-1], share
