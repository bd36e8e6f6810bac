"""Learned positions of patches, for images of another size."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

SHARPNESS = -0.75
"""Of the cubic; what PyTorch's interpolation has, and with it the towers' own code."""


def resize(
    positions: Float[np.ndarray, "length width"], grid: int, token: bool
) -> Float[np.ndarray, "other_length width"]:
    """Positions of ``grid`` × ``grid`` patches, by bicubic interpolation; in float32.

    Args:
      positions: of a square of patches, row by row.
      grid: patches per row, and rows, of the new images.
      token: whether the first position is a class token's, which stays as it is.

    Raises:
      ValueError: for positions that are no square.
    """
    first, patches = positions[: int(token)], positions[int(token) :]
    side = round(len(patches) ** 0.5)
    if side**2 != len(patches):
        raise ValueError(f"positions of patches must be those of a square; got {len(patches)}")
    if side == grid:
        return positions
    along = interpolation(side, grid)
    square = np.float64(patches).reshape(side, side, -1)
    new = np.einsum("ih,jw,hwf->ijf", along, along, square)
    return np.concatenate([np.float32(first), np.float32(new.reshape(grid * grid, -1))])


def interpolation(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The matrix of a cubic convolution (Keys, 1981): each row has the weights of old values.

    Centers of pixels are at halves; beyond the border its value goes on.
    """
    at = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    for shift in range(-1, 3):
        index = np.floor(at) + shift
        weight = cubic(np.abs(at - index))
        np.add.at(matrix, (np.arange(new), np.clip(index, 0, old - 1).astype(int)), weight)
    return matrix


def cubic(x: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """The kernel of a cubic convolution (Keys, 1981), at distances ``x`` below 2."""
    a = SHARPNESS
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, far)
