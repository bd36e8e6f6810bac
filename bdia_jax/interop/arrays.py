"""Parameters of ours from tensors of other libraries, and tensors from parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdia_jax.interop.checkpoint import Checkpoint, FolderError
from bdia_jax.interop.families import Source
from bdia_jax.nn.quantized import Codes, Kind, encode

Place = Callable[[np.ndarray | jax.Array], jax.Array]
"""Puts an array on its devices."""


def parameter(
    name: str,
    shape: tuple[int, ...],
    dtype: Any,
    source: Source,
    tensors: Checkpoint,
    place: Place = jnp.asarray,
) -> jax.Array:
    """A parameter of ours, on its devices; of stacked blocks, if the source has a number in it.

    Raises:
      FolderError: for a tensor that is missing, or has another shape.
    """
    if "{}" not in source.name:
        return place(_one(name, source.name, shape, source, tensors).astype(dtype, copy=False))
    stacked = np.empty(shape, dtype)
    for i, tensor in enumerate(_of_blocks(name, shape, source, tensors)):
        stacked[i] = tensor
    return place(stacked)


def quantized(
    name: str,
    shape: tuple[int, ...],
    source: Source,
    tensors: Checkpoint,
    kind: Kind,
    place: Place = jnp.asarray,
) -> Codes:
    """A kernel of ours, of stacked blocks, quantized; one block's at a time is in memory whole.

    Raises:
      FolderError: for a tensor that is missing, or has another shape.
    """
    encoded = jax.jit(encode, static_argnums=1)
    found = [
        encoded(jnp.asarray(tensor), kind) for tensor in _of_blocks(name, shape, source, tensors)
    ]
    return jax.tree.map(lambda *blocks: place(jnp.stack(blocks)), *found)


def _of_blocks(
    name: str, shape: tuple[int, ...], source: Source, tensors: Checkpoint
) -> Iterator[np.ndarray]:
    for i in range(shape[0]):
        if source.experts is None:
            yield _one(name, source.name.format(i), shape[1:], source, tensors)
        else:
            names = (source.name.format(i, expert) for expert in range(source.experts))
            yield np.stack([_one(name, theirs, shape[2:], source, tensors) for theirs in names])


def _one(
    name: str, theirs: str, shape: tuple[int, ...], source: Source, tensors: Checkpoint
) -> np.ndarray:
    tensor = tensors.get(theirs)
    if source.transposed:
        tensor = tensor.T
    tensor = cut(tensor, source)
    if tensor.shape != shape:
        raise FolderError(
            f"{tensors.where}: the tensor {theirs}, for {name}, should give an array of shape "
            f"{shape}; it gives {tensor.shape}"
        )
    return rewritten(tensor, source)


def cut(tensor: np.ndarray, source: Source) -> np.ndarray:
    """The part of a tensor of theirs, along its last axis, that is ours."""
    if source.span is None:
        return tensor
    groups = tensor.reshape(*tensor.shape[:-1], source.groups, -1)
    return groups[..., slice(*source.span)].reshape(*tensor.shape[:-1], -1)


def among_zeros(array: np.ndarray, source: Source, size: int) -> np.ndarray:
    """A tensor of theirs with an array of ours in it, and zeros where it is not ours.

    Args:
      array: of ours.
      source: where in the tensor it is.
      size: of the tensor's last axis.
    """
    if source.span is None:
        return array
    tensor = np.zeros((*array.shape[:-1], source.groups, size // source.groups), array.dtype)
    tensor[..., slice(*source.span)] = array.reshape(*array.shape[:-1], source.groups, -1)
    return tensor.reshape(*array.shape[:-1], size)


def rewritten(array: np.ndarray, source: Source) -> np.ndarray:
    """An array of theirs, with our axes, in our order and scale; if scaled, float32 (float64)."""
    if source.heads is not None:
        pairs = array.reshape(*array.shape[:-1], source.heads, -1, 2)
        array = pairs.swapaxes(-1, -2).reshape(array.shape)
    return array if source.scale == 1 else _scaled(np.multiply, array, source.scale)


def original(array: np.ndarray, source: Source) -> np.ndarray:
    """An array of ours, in their order and scale: the inverse of :func:`rewritten`.

    Where the scale is no power of 2, but for the last bit of float32 (float64).
    """
    if source.heads is not None:
        halves = array.reshape(*array.shape[:-1], source.heads, 2, -1)
        array = halves.swapaxes(-1, -2).reshape(array.shape)
    return array if source.scale == 1 else _scaled(np.divide, array, source.scale)


def _scaled(operation: np.ufunc, array: np.ndarray, scale: float) -> np.ndarray:
    # In float64, so that only the result is rounded; numpy widens a piece of it at a time.
    out = np.empty(array.shape, np.promote_types(array.dtype, np.float32))
    return operation(array, scale, out=out, dtype=np.float64, casting="same_kind")


def tensors(
    parameters: Mapping[str, jax.Array], layout: Mapping[str, Source], dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of theirs from parameters of ours, by name; one in memory at a time.

    Args:
      parameters: by our names.
      layout: where each of them is found.
      dtype: of the tensors.
    """
    by_name: dict[str, list[tuple[Source, jax.Array]]] = {}
    for ours, source in layout.items():
        by_name.setdefault(source.name, []).append((source, parameters[ours]))
    for name, parts in by_name.items():
        parts.sort(key=lambda part: part[0].span or (0, 0))

        def whole(pick: Callable[[jax.Array], jax.Array], parts=parts) -> np.ndarray:
            arrays = [
                original(np.asarray(pick(array)), source).astype(dtype)
                if source.rewritten
                else np.asarray(pick(array).astype(dtype))
                for source, array in parts
            ]
            leading, groups = arrays[0].shape[:-1], parts[0][0].groups
            arrays = [array.reshape(*leading, groups, -1) for array in arrays]
            together = np.concatenate(arrays, axis=-1).reshape(*leading, -1)
            return np.ascontiguousarray(together.T if parts[0][0].transposed else together)

        if "{}" not in name:
            yield name, whole(lambda array: array)
            continue
        for i in range(len(parts[0][1])):
            if (experts := parts[0][0].experts) is None:
                yield name.format(i), whole(lambda array, i=i: array[i])
                continue
            for expert in range(experts):
                yield name.format(i, expert), whole(lambda array, i=i, e=expert: array[i, e])
