"""RandAugment: random operations on training images; pure functions of a key.

Source: Cubuk, Zoph, Shlens, Le, "RandAugment: Practical automated data augmentation with a reduced
search space", 2020. An image gets some operations, one after the other, each drawn from fourteen,
all with one magnitude. Each gives what Pillow's gives, with which the authors' code works;
magnitudes mean what they do in torchvision.

No operation is a branch, so that a batch is computed as one, and where its images are. All that
moves is one resampling with the drawn operation's matrix, all that maps values is one look-up in
the drawn operation's table, and the two others are mixtures with a duller image.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
TABLES = ("identity", "brightness", "contrast", "posterize", "solarize", "autocontrast", "equalize")
MIXTURES = ("color", "sharpness")
OPERATIONS = (*TABLES, *MOVES, *MIXTURES)
"""What an operation is drawn from, with equal chances."""
LARGEST = 30
"""The largest magnitude."""
GREY = 128.0
"""What is seen where an image has been moved away."""
VALUES = np.arange(256, dtype=np.float32)

Image = Float[Array, "height width channel"]


def rand_augment(
    key: Key[Array, ""],
    images: Num[Array, "batch height width channel"],
    operations: int,
    magnitude: float,
) -> Float[Array, "batch height width channel"]:
    """``operations`` random operations on each image, in whole values from 0 to 255.

    Args:
      key: chooses operations and directions.
      images: of one or three channels, with values from 0 to 255.
      operations: how many, one after the other.
      magnitude: in [0, 30].

    Raises:
      ValueError: for images of other channels, of which no luma is known.
    """
    if (channels := images.shape[-1]) not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels; got {channels}")
    images = jnp.round(images.astype(jnp.float32)).clip(0, 255)
    count = (len(images),)
    for step in range(operations):
        draw_key, sign_key = jax.random.split(jax.random.fold_in(key, step))
        drawn = jax.random.randint(draw_key, count, 0, len(OPERATIONS))
        signs = 2.0 * jax.random.bernoulli(sign_key, 0.5, count) - 1
        images = jax.vmap(functools.partial(operate, share=magnitude / LARGEST))(
            images, drawn, signs
        )
    return images


def operate(image: Image, drawn: Int[Array, ""], sign: Float[Array, ""], share: float) -> Image:
    """An image after one operation.

    Args:
      image: with whole values.
      drawn: the number of the operation, in :data:`OPERATIONS`.
      sign: 1 or -1: the direction, of operations that have one.
      share: of the largest magnitude.
    """
    by_table, by_move = len(TABLES), len(TABLES) + len(MOVES)
    factor = 1 + sign * 0.9 * share
    found = looked_up(image, tables(image, factor, share)[drawn.clip(0, by_table - 1)])
    height, width, _ = image.shape
    matrix = matrices(height, width, sign, share)[(drawn - by_table).clip(0, len(MOVES) - 1)]
    dull = jnp.where(drawn == by_move, grey(image), smoothed(image))
    mixed = dull + factor * (image - dull)
    result = jnp.where(drawn < by_table, found, moved(image, matrix))
    return jnp.round(jnp.where(drawn < by_move, result, mixed)).clip(0, 255)


# ---------------------------------------------------------------------------------------------
# What maps values
# ---------------------------------------------------------------------------------------------


def tables(
    image: Image, factor: Float[Array, ""], share: float
) -> Float[Array, "operation channel 256"]:
    """What each of :data:`TABLES` makes of every value."""
    middle = jnp.floor(jnp.mean(grey(image)) + 0.5)
    kept = 2.0 ** round(4 * share)
    low, high = image.min((0, 1))[:, None], image.max((0, 1))[:, None]
    stretched = (VALUES - low) * 255 / jnp.maximum(high - low, 1)
    of = {
        "identity": jnp.asarray(VALUES),
        "brightness": factor * VALUES,
        "contrast": middle + factor * (VALUES - middle),
        "posterize": jnp.floor(VALUES / kept) * kept,
        "solarize": np.where(255 * (1 - share) > VALUES, VALUES, 255 - VALUES),
        "autocontrast": jnp.where(high > low, jnp.floor(stretched), VALUES),
        "equalize": equalizing(image),
    }
    shape = (image.shape[-1], 256)
    return jnp.stack([jnp.broadcast_to(of[name], shape) for name in TABLES])


def equalizing(image: Image) -> Float[Array, "channel 256"]:
    """The table by which every value is about as frequent as any other."""

    def of_channel(values):
        counts = jnp.zeros(256, jnp.int32).at[values.astype(jnp.int32).ravel()].add(1)
        below = jnp.cumsum(counts) - counts
        last = counts[255 - jnp.argmax(counts[::-1] > 0)]
        step = (values.size - last) // 255
        table = (step // 2 + below) // jnp.maximum(step, 1)
        return jnp.where(step > 0, table.astype(jnp.float32), VALUES)

    return jax.vmap(of_channel, in_axes=-1)(image)


def looked_up(image: Image, table: Float[Array, "channel 256"]) -> Image:
    """Every value's entry in the table of its channel."""
    return table[jnp.arange(image.shape[-1]), image.astype(jnp.int32)]


# ---------------------------------------------------------------------------------------------
# What moves
# ---------------------------------------------------------------------------------------------


def matrices(
    height: int, width: int, sign: Float[Array, ""], share: float
) -> Float[Array, "operation 2 3"]:
    """Where a pixel at ``(column, row, 1)`` comes from, by each of :data:`MOVES`."""
    zero, one = jnp.zeros_like(sign), jnp.ones_like(sign)
    sheared = sign * 0.3 * share
    across, down = (sign * 150 / 331 * share * side for side in (width, height))
    angle = sign * math.radians(30) * share
    cos, sin, x, y = jnp.cos(angle), jnp.sin(angle), width / 2, height / 2
    rows = [
        [one, sheared, zero, zero, one, zero],
        [one, zero, zero, sheared, one, zero],
        [one, zero, across, zero, one, zero],
        [one, zero, zero, zero, one, down],
        [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y],
    ]
    return jnp.stack([jnp.stack(row).reshape(2, 3) for row in rows])


def moved(image: Image, matrix: Float[Array, "2 3"]) -> Image:
    """Every pixel from the nearest one of where it comes from; grey from outside."""
    height, width, _ = image.shape
    rows, columns = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
    from_column, from_row = (
        jnp.floor(a * columns + b * rows + c).astype(jnp.int32) for a, b, c in matrix
    )
    inside = (from_row >= 0) & (from_row < height) & (from_column >= 0) & (from_column < width)
    found = image[from_row.clip(0, height - 1), from_column.clip(0, width - 1)]
    return jnp.where(inside[..., None], found, GREY)


# ---------------------------------------------------------------------------------------------
# What is duller
# ---------------------------------------------------------------------------------------------


def grey(image: Image) -> Image:
    """The luma of ITU-R BT.601, in every channel."""
    if image.shape[-1] != 3:
        return image
    weights = jnp.array([0.299, 0.587, 0.114])
    luma = jnp.round(jnp.sum(image * weights, axis=-1, keepdims=True))
    return jnp.broadcast_to(luma, image.shape)


def smoothed(image: Image) -> Image:
    """Pixels with their eight neighbours, of which the middle counts 5; the border as it is."""
    height, width, _ = image.shape
    around = [image[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
    inner = jnp.round((sum(around) + 4 * image[1:-1, 1:-1]) / 13)
    return image.at[1:-1, 1:-1].set(inner)
