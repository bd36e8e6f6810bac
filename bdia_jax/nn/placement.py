"""Where the arrays of a model are, when it runs on several devices."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Array, PyTree


class Placement(Protocol):
    """Samples on their devices, and what all samples share on all of them.

    Hashable. A mesh's is :class:`bdia_jax.train.mesh.OnMesh`.
    """

    @property
    def devices(self) -> int:
        """Over how many a batch is split."""
        ...

    def weights(self, tree: PyTree[Array]) -> PyTree[Array]:
        """Those of one block, as the block computes with them."""
        ...

    def samples(self, x: Array) -> Array:
        """An array with a batch axis."""
        ...

    def total(self, tree: PyTree[Array]) -> PyTree[Array]:
        """Sums over samples, which a loop adds to: devices add them up after the loop, once."""
        ...
