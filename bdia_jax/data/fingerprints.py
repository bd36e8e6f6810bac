"""Fingerprints of data: what a resumed run is trained on must be what it was started with."""

from __future__ import annotations

import hashlib

import jax
import numpy as np
from jaxtyping import PyTree


def fingerprint(arrays: PyTree[np.ndarray]) -> str:
    """SHA-256 of a tree of arrays, in hexadecimal: of their names, dtypes, shapes and contents."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.ascontiguousarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {np.shape(leaf)}\n".encode())
        sha.update(array.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()
