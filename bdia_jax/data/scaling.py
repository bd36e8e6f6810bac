"""How images of any shape become squares: as Pillow scales them, in Pillow and in JAX.

Both give the numbers that the image processors of ``transformers`` give, those made with Pillow
(``…ImageProcessorPil``): the whole image is scaled, and a square is cut out of its middle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num
from PIL import Image, __version__

Kernel = Callable[[np.ndarray], np.ndarray]

BITS = 22
"""Pillow's weights are whole multiples of 2⁻²²."""
HALF = 2**10
"""Of the numbers that such a multiple is split into, the higher one counts twice this: products of
both with 8 bits, and sums of some 60 of them, are whole numbers in float32."""


def _cubic(x: np.ndarray) -> np.ndarray:
    # a = -0.5.
    return np.where(
        x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0)
    )


KERNELS: dict[Image.Resampling, Kernel] = {
    Image.Resampling.LANCZOS: lambda x: np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0),
    Image.Resampling.BILINEAR: lambda x: np.maximum(1 - x, 0),
    Image.Resampling.BICUBIC: _cubic,
}
"""Pillow's filters that average pixels, by the distance of these."""
FILTERS = (Image.Resampling.NEAREST, *KERNELS)
"""Pillow's numbers of the filters that images can be scaled by."""
METHODS: dict[int, str] = {Image.Resampling.LANCZOS: "lanczos3", Image.Resampling.BICUBIC: "cubic"}
"""What JAX calls the filters that random rectangles are scaled by; ``linear`` in place of others.
"""


class Scaling(NamedTuple):
    """How an image becomes a square of some size."""

    squash: bool = False
    """Whether height and width are scaled apart from each other; or both alike."""
    edge: float = 1.0
    """The shorter side over the square's, before this is cut out of the middle; at least 1."""
    resample: int = Image.Resampling.BICUBIC
    """Pillow's number of the filter."""

    def side(self, size: int) -> int:
        """The shorter side in pixels, before a square of this size is cut out."""
        return round(size * self.edge)

    def shape(self, height: int, width: int, size: int) -> tuple[int, int]:
        """Height and width of the scaled image, before a square of this size is cut out."""
        side = self.side(size)
        if self.squash:
            return side, side
        # Cut, not rounded, in transformers.
        return (
            (int(side * height / width), side)
            if width <= height
            else (side, int(side * width / height))
        )

    def check(self) -> None:
        """A ``ValueError`` for an edge below 1, or a filter that Pillow does not have."""
        if not 1 <= self.edge < np.inf:
            raise ValueError(f"the edge of a scaling must be at least 1; got {self.edge}")
        if isinstance(self.resample, bool) or self.resample not in FILTERS:
            allowed = ", ".join(f"{filter.value} ({filter.name})" for filter in sorted(FILTERS))
            raise ValueError(f"resample must be {allowed}; got {self.resample!r}")


def check_size(size: int) -> None:
    """A ``ValueError`` unless a square can have sides of so many pixels."""
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise ValueError(f"size must be an int >= 1, in pixels; got {size!r}")


def square_of(image: Image.Image, size: int, scaling: Scaling) -> Image.Image:
    """An image as a square, by Pillow."""
    height, width = scaling.shape(image.height, image.width, size)
    left, top = (width - size) // 2, (height - size) // 2
    scaled = image.resize((width, height), scaling.resample)
    return scaled.crop((left, top, left + size, top + size))


def squares_of(
    images: Num[Array, "batch height width channel"], size: int, scaling: Scaling
) -> Float[Array, "batch size size channel"]:
    """Images of whole values from 0 to 255 as squares: the numbers of :func:`square_of`."""
    before = images.shape[1], images.shape[2]
    after = scaling.shape(*before, size)
    x = images.astype(jnp.float32)
    for axis in (0, 1) if _height_first(before, after) else (1, 0):
        cut = (after[axis] - size) // 2
        if before[axis] == after[axis]:
            x = jax.lax.slice_in_dim(x, cut, cut + size, axis=axis + 1)
            continue
        matrix = weights(before[axis], after[axis], scaling.resample)[cut : cut + size]
        # Pillow has 8 bits in between, too: the order matters.
        x = _times(matrix, x, ("bhwc,yh->bywc", "bhwc,xw->bhxc")[axis])
    return x


def _times(
    matrix: Int[np.ndarray, "count length"], x: Float[Array, "batch height width channel"], how: str
) -> Float[Array, "batch new_height new_width channel"]:
    """Pillow's sum of integers, cut to 8 bits; by two products of float32, which are exact."""
    low = (matrix + HALF) % (2 * HALF) - HALF
    high = (matrix - low) // (2 * HALF)
    sums = [
        jnp.einsum(how, x, jnp.float32(part), precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)
        for part in (high, low)
    ]
    rounded = (sums[0] * (2 * HALF) + sums[1] + 2 ** (BITS - 1)) >> BITS
    return rounded.clip(0, 255).astype(jnp.float32)


def _height_first(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether this release of Pillow scales the height first, which is quicker for tall images."""
    less_height, less_width = (was - becomes for was, becomes in zip(before, after, strict=True))
    since = int(__version__.split(".")[0]) >= 13
    return since and less_height > max(0, 2 * less_width)


def weights(length: int, count: int, resample: int) -> Int[np.ndarray, "count length"]:
    """What Pillow makes each of ``count`` pixels of, out of ``length`` ones: multiples of 2⁻²².

    (``ImagingResample`` in Pillow's ``Resample.c``; nearest pixels in ``Geometry.c``.)
    """
    step = length / count
    if resample == Image.Resampling.NEAREST:
        # Added up, as there: what is rounded decides between two pixels.
        places = np.cumsum(np.append(step * 0.5, np.full(count - 1, step)))
        return 2**BITS * np.eye(length, dtype=np.int64)[places.astype(int)]
    centers = (np.arange(count) + 0.5) * step
    # What is made smaller is averaged over as many pixels as become one.
    distances = (np.arange(length) - centers[:, None] + 0.5) * (1 / max(step, 1.0))
    values = KERNELS[Image.Resampling(resample)](np.abs(distances))
    values = values / values.sum(axis=1, keepdims=True) * 2**BITS
    return np.trunc(values + np.copysign(0.5, values)).astype(np.int64)
