"""Trees of which some leaves are taken out: None stands where a leaf is missing."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import PyTree


def partition(tree: PyTree, mask: PyTree[bool]) -> tuple[PyTree, PyTree]:
    """The leaves that a mask of the same structure keeps, and the others."""
    kept = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, tree)
    rest = jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, tree)
    return kept, rest


def combine(some: PyTree, others: PyTree) -> PyTree:
    """The inverse of :func:`partition`: ``some``, and ``others`` where it has None."""
    return jax.tree.map(lambda a, b: b if a is None else a, some, others, is_leaf=is_none)


def is_none(leaf: Any) -> bool:
    """For ``is_leaf``."""
    return leaf is None
