"""Stacks of two streams as Flax modules (RevNet, Rev-ViT)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from bdia_jax import coupling
from bdia_jax.adjoints import Direct, Online
from bdia_jax.nn.stacked import StackedBlocks


class CoupledStack(StackedBlocks):
    """Blocks in which two streams are updated in turns (RevNet, Rev-ViT), taken back in floats.

    A block is a module with two methods, ``attend(x)`` and ``feed_forward(x)``, as
    :class:`bdia_jax.nn.TransformerBlock`. Both streams start as ``x``; what is returned is both,
    side by side: another architecture than the standard one, twice as wide at its end.
    """

    def __init__(
        self,
        make_block: Callable[[nnx.Rngs], nnx.Module],
        depth: int,
        *,
        adjoint: Online | Direct = Online(),  # noqa: B008
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the blocks.

        Args:
          make_block, depth, rngs: as for :class:`ReversibleStack`.
          adjoint: :class:`bdia_jax.Online` or :class:`bdia_jax.Direct`.
          dtype: what the blocks see; the streams are float32.
        """
        super().__init__(make_block, depth, rngs)
        if adjoint not in (Online(), Direct()):
            raise ValueError(f"adjoint must be Online() or Direct(); got {adjoint!r}")
        self.adjoint = adjoint
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "batch *shape"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch *shape_but_doubled"]:
        """Runs the blocks; the streams, in float32, one after the other on the last axis."""
        pair = coupling.coupled_scan(
            *self.functional(), self._start(x), key=key, adjoint=self.adjoint
        )
        return jnp.concatenate(pair, axis=-1)

    def functional(self) -> tuple[coupling.Half, coupling.Half, PyTree[Array]]:
        """Both halves and the stacked parameters, as :func:`bdia_jax.coupling.coupled_scan`."""
        attend, params = self._half("attend")
        return attend, self._half("feed_forward")[0], params

    def _half(self, method: str):
        function, params = self.pure(lambda block, x: getattr(block, method)(x.astype(self.dtype)))
        return lambda params, x, key: function(params, key, x), params

    def reconstruction_errors(
        self, x: Float[Array, "batch *shape"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "blocks"]:
        """:func:`bdia_jax.coupling.reconstruction_errors` of these blocks."""
        return jax.jit(coupling.reconstruction_errors, static_argnums=(0, 1))(
            *self.functional(), self._start(x), key=key
        )

    def _start(self, x) -> coupling.Pair:
        return x.astype(jnp.float32), x.astype(jnp.float32)
