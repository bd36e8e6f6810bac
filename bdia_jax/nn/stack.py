"""A stack of residual blocks as a Flax module, run by :func:`bdia_jax.reversible_scan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from bdia_jax.check import Reversibility, check_reversible
from bdia_jax.reversible import BackwardReport, Block, reversible_scan

Method = Literal["bdia", "bdia-stored", "standard", "standard-checkpoint"]
METHODS: tuple[str, ...] = get_args(Method)


def check_method(method: str) -> str:
    """``method`` itself, or a ``ValueError`` that lists the methods."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    return method


class Probe(nnx.Variable):
    """Holds zeros; the "gradient" by it is the :class:`bdia_jax.BackwardReport` of a stack."""


class ReversibleStack(nnx.Module):
    """``depth`` residual blocks in a row, with stacked parameters.

    A block is any Flax module that maps ``x`` (and whatever else the stack is called with) to
    its update ``h(x)``. It may use dropout: every random stream in it is seeded per block, and
    per call, from the key that the stack is called with. It must not keep statistics between
    calls (batch normalization): normalize by layer, group or root mean square.

    Four training methods share the parameters, so that a network trained by one can be
    evaluated, or trained on, by another:

    - ``"bdia"``: BDIA with online back-propagation; keeps bits, not activations.
    - ``"bdia-stored"``: the same network and gradients by plain automatic differentiation.
    - ``"standard"``: ``x + h(x)``, plain automatic differentiation.
    - ``"standard-checkpoint"``: the same, each block under ``jax.checkpoint``.

    In evaluation mode (``model.eval()``) the BDIA methods have γ = 0: ``x + h(x)`` on the grid.
    """

    def __init__(
        self,
        make_block: Callable[[nnx.Rngs], nnx.Module],
        depth: int,
        *,
        method: Method = "bdia",
        gamma: float = 0.5,
        frac_bits: int | None = 9,
        tolerance_bits: int = 0,
        quantize_standard: bool = False,
        residual: bool = False,
        rngs: nnx.Rngs,
    ):
        """Builds the blocks.

        Args:
          make_block: a function (or class) of ``nnx.Rngs`` that returns a block.
          depth: number of blocks, at least 1.
          method: one of the above.
          gamma, frac_bits, tolerance_bits: as in :func:`bdia_jax.reversible_scan`.
          quantize_standard: whether the standard methods run on the grid, too.
          residual: whether a block returns ``x + h(x)`` rather than ``h(x)``.
          rngs: for the initialization; each block draws its own.
        """
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth, the number of blocks, must be an int >= 1; got {depth!r}")
        self.depth = depth
        self.method = check_method(method)
        self.gamma = gamma
        self.frac_bits = frac_bits
        self.tolerance_bits = tolerance_bits
        self.quantize_standard = quantize_standard
        self.residual = residual
        self.deterministic = False
        self.blocks = nnx.vmap(make_block)(rngs.split(depth))
        self.probe = Probe(BackwardReport.zeros(depth))
        kept = nnx.state(self.blocks, nnx.BatchStat)
        if jax.tree.leaves(kept):
            raise ValueError(
                "blocks must be pure functions, and cannot keep batch statistics: use layer, group "
                f"or RMS normalization; got {', '.join(map(_name, nnx.to_flat_state(kept)))}"
            )

    def __call__(
        self, x: Float[Array, "batch *shape"], *consts, key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch *shape"]:
        """Runs the blocks on ``x``.

        Args:
          x: input of the first block; its dtype is what the blocks see.
          *consts: given to every block after ``x``; differentiable.
          key: PRNG key of this call, for γ and dropout. None in evaluation mode.
        """
        block, stacked_params = self.functional()
        if (
            key is None
            and not self.deterministic
            and jax.tree.leaves(nnx.state(self, nnx.RngState))
        ):
            raise ValueError(
                "in training mode the blocks draw random numbers, and need one PRNG key per call: "
                "stack(x, key=key); got key=None (model.eval() is the mode without)"
            )
        bdia = self.method.startswith("bdia")
        if self.method == "standard-checkpoint":
            # Inside a scan, XLA cannot merge the recomputation with the original.
            block = jax.checkpoint(block, prevent_cse=False)
        return reversible_scan(
            block,
            stacked_params,
            x,
            key=key,
            consts=consts,
            gamma=self.gamma if bdia and not self.deterministic else 0.0,
            frac_bits=self.frac_bits if bdia or self.quantize_standard else None,
            tolerance_bits=self.tolerance_bits,
            backprop="online" if self.method == "bdia" else "stored",
            probe=self.probe.get_value(),
        )

    def functional(self) -> tuple[Block, PyTree[Array]]:
        """The blocks as :func:`bdia_jax.reversible_scan` takes them: a function, and parameters."""
        graphdef, params, streams, rest = nnx.split(self.blocks, nnx.Param, nnx.RngState, ...)

        def block(state, x, key, *consts):
            params, rest = state
            module = nnx.merge(graphdef, params, _seeded(streams, key), rest)
            y = module(x, *consts)
            return y - x if self.residual else y

        return block, (params, rest)

    def check_reversible(
        self, x: Float[Array, "batch *shape"], *consts, key: Key[Array, ""]
    ) -> Reversibility:
        """:func:`bdia_jax.check_reversible` of these blocks, in their mode and settings."""
        block, stacked_params = self.functional()
        return check_reversible(
            block, stacked_params, x, key=key, consts=consts, gamma=self.gamma,
            frac_bits=self.frac_bits, tolerance_bits=self.tolerance_bits,
        )  # fmt: skip


def _seeded(streams: nnx.State, key: Key[Array, ""] | None) -> nnx.State:
    """The random streams of a block, started afresh from ``key``: each gets its own."""
    flat = []
    for i, (path, leaf) in enumerate(nnx.to_flat_state(streams)):
        if isinstance(leaf, nnx.RngKey):
            value = jax.random.key(0) if key is None else jax.random.fold_in(key, i)
        else:
            value = jnp.uint32(0)
        flat.append((path, leaf.replace(value)))
    return nnx.from_flat_state(flat)


def _name(item) -> str:
    path, _ = item
    return ".".join(map(str, path))
