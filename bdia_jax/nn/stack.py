"""Stacks of residual blocks as Flax modules, run by scans that can be taken back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from bdia_jax import coupling
from bdia_jax.check import Reversibility, check_reversible
from bdia_jax.reversible import BackwardReport, Block, Update, reversible_scan

Method = Literal[
    "bdia", "bdia-stored", "standard", "standard-checkpoint", "midpoint", "midpoint-stored"
]
METHODS: tuple[str, ...] = get_args(Method)
CoupledMethod = Literal["coupled", "coupled-stored"]


DTYPES = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "float64": jnp.float64,
}


def check_dtype(name: str, what: str = "dtype") -> None:
    """A ``ValueError`` for what is none of the names, or cannot be had."""
    if name not in DTYPES:
        raise ValueError(f"{what} must be one of {', '.join(DTYPES)}; got {name!r}")
    if name == "float64" and not jax.config.jax_enable_x64:
        raise ValueError(f"{what}='float64' needs jax_enable_x64; it is not set")


def check_method(method: str, methods: tuple[str, ...] = METHODS) -> str:
    """``method`` itself, or a ``ValueError`` that lists the methods."""
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}; got {method!r}")
    return method


@dataclasses.dataclass(frozen=True)
class ReversibleSettings:
    """How reversible blocks are trained: what the configurations of all networks have."""

    method: Method = "bdia"
    """How the blocks are trained."""
    gamma: float = 0.5
    """Magnitude of γ: 2^-m, or any in (0, 1] with bdia-stored."""
    frac_bits: int | None = 9
    """Fractional bits l of the fixed-point grid."""
    tolerance_bits: int = 0
    """Bits of side information beyond those of γ, for hardware that is not deterministic."""
    stored_blocks: int = 0
    """How many blocks, from the last one down, keep their activations: more memory, less time."""
    quantize_standard: bool = False
    """Whether the standard methods run on the grid, too."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """What the blocks compute in."""

    def of_stacks(self, *depths: int) -> list[dict[str, Any]]:
        """Arguments of a :class:`ReversibleStack` for each of some depths, in their order."""
        total = sum(depths)
        if isinstance(self.stored_blocks, bool) or not 0 <= self.stored_blocks <= total:
            raise ValueError(
                f"stored_blocks must lie in [0, {total}], the number of blocks; got "
                f"{self.stored_blocks!r}"
            )
        common = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(ReversibleSettings)
            if f.name != "dtype"
        }
        stacks, above = [], total
        for depth in depths:
            above -= depth
            stored = min(depth, max(0, self.stored_blocks - above))
            stacks.append(common | {"depth": depth, "stored_blocks": stored})
        return stacks


class Probe(nnx.Variable):
    """Holds zeros; the "gradient" by it is the :class:`bdia_jax.BackwardReport` of a stack."""


class StackedBlocks(nnx.Module):
    """``depth`` blocks of one kind, with stacked parameters; what runs them is a subclass.

    They are the module ``stacked``, every array of which has a leading block axis.
    """

    def __init__(self, make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs):
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth, the number of blocks, must be an int >= 1; got {depth!r}")
        self.depth = depth
        self.deterministic = False
        self.stacked = nnx.vmap(make_block)(rngs.split(depth))
        kept = nnx.state(self.stacked, nnx.BatchStat)
        if jax.tree.leaves(kept):
            raise ValueError(
                "blocks must be pure functions, and cannot keep batch statistics: use layer, group "
                f"or RMS normalization; got {', '.join(map(_name, nnx.to_flat_state(kept)))}"
            )

    def _pure(self, call: Callable[..., Array]) -> tuple[Block, PyTree[Array]]:
        """``call(block, x, *consts)`` as a function of a block's arrays; and those, stacked."""
        graphdef, params, streams, rest = nnx.split(self.stacked, nnx.Param, nnx.RngState, ...)

        def function(state, x, key, *consts):
            params, rest = state
            return call(nnx.merge(graphdef, params, _seeded(streams, key), rest), x, *consts)

        return function, (params, rest)

    def _check_key(self, key) -> None:
        if key is None and not self.deterministic:
            if not jax.tree.leaves(nnx.state(self.stacked, nnx.RngState)):
                return
            raise ValueError(
                "in training mode the blocks draw random numbers, and need one PRNG key per call: "
                "stack(x, key=key); got key=None (model.eval() is the mode without)"
            )


class ReversibleStack(StackedBlocks):
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

    Two more are another network, with the same parameters: ``"midpoint"`` (online
    back-propagation) and ``"midpoint-stored"``, the reversible mid-point network
    ``x_{k+1} = x_{k-1} + 2 h_k(x_k)`` on the grid, in training and in evaluation.
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
        stored_blocks: int = 0,
        quantize_standard: bool = False,
        residual: bool = False,
        rngs: nnx.Rngs,
    ):
        """Builds the blocks.

        Args:
          make_block: a function (or class) of ``nnx.Rngs`` that returns a block.
          depth: number of blocks, at least 1.
          method: one of the above.
          gamma, frac_bits, tolerance_bits, stored_blocks: as in
            :func:`bdia_jax.reversible_scan`.
          quantize_standard: whether the standard methods run on the grid, too.
          residual: whether a block returns ``x + h(x)`` rather than ``h(x)``.
          rngs: for the initialization; each block draws its own.
        """
        super().__init__(make_block, depth, rngs)
        if isinstance(stored_blocks, bool) or not 0 <= stored_blocks <= depth:
            raise ValueError(
                f"stored_blocks must lie in [0, depth = {depth}]; got {stored_blocks!r}"
            )
        self.method = check_method(method)
        self.gamma = gamma
        self.frac_bits = frac_bits
        self.tolerance_bits = tolerance_bits
        self.stored_blocks = stored_blocks
        self.quantize_standard = quantize_standard
        self.residual = residual
        self.probe = Probe(BackwardReport.zeros(depth))

    def updates(self, update: Update | None) -> None:
        """Has the backward pass update the parameters: :class:`bdia_jax.Update`.

        Set it within a traced function, on the model that is differentiated. ``update.function``
        is given the ``nnx.Param`` of a block, as an ``nnx.State`` without the block axis.
        """
        # Not an attribute of the module's state: it holds traced values, and is not to be kept.
        object.__setattr__(self, "_update", update)

    def __call__(
        self, x: Float[Array, "batch *shape"], *consts, key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch *shape"]:
        """Runs the blocks on ``x``.

        Args:
          x: input of the first block; its dtype is what the blocks see.
          *consts: given to every block after ``x``; differentiable.
          key: PRNG key of this call, for γ and dropout. None in evaluation mode.
        """
        self._check_key(key)
        block, stacked_params = self.functional()
        standard = self.method.startswith("standard")
        if self.method == "standard-checkpoint":
            # Inside a scan, XLA cannot merge the recomputation with the original.
            block = jax.checkpoint(block, prevent_cse=False)
        gamma, signs = self._gamma_and_signs()
        return reversible_scan(
            block,
            stacked_params,
            x,
            key=key,
            consts=consts,
            gamma=gamma,
            signs=signs,
            frac_bits=self.frac_bits if not standard or self.quantize_standard else None,
            tolerance_bits=self.tolerance_bits,
            backprop="online" if self.method in ("bdia", "midpoint") else "stored",
            stored_blocks=self.stored_blocks,
            probe=self.probe.get_value(),
            update=self._params_only(getattr(self, "_update", None)),
        )

    @staticmethod
    def _params_only(update: Update | None) -> Update | None:
        """For the pairs of parameters and the rest that a block is a function of."""
        if update is None:
            return None

        def function(params, d_params, state):
            new, state = update.function(params[0], d_params[0], state)
            return (new, params[1]), state

        return Update(function, update.state)

    def _gamma_and_signs(self) -> tuple[float, str]:
        if self.method.startswith("midpoint"):
            return 1.0, "positive"
        bdia = self.method.startswith("bdia") and not self.deterministic
        return self.gamma if bdia else 0.0, "random"

    def functional(self) -> tuple[Block, PyTree[Array]]:
        """The blocks as :func:`bdia_jax.reversible_scan` takes them: a function, and parameters."""

        def update(block, x, *consts):
            y = block(x, *consts)
            return y - x if self.residual else y

        return self._pure(update)

    def check_reversible(
        self, x: Float[Array, "batch *shape"], *consts, key: Key[Array, ""]
    ) -> Reversibility:
        """:func:`bdia_jax.check_reversible` of these blocks, in their mode and settings."""
        block, stacked_params = self.functional()
        gamma, signs = self.gamma, "random"
        if self.method.startswith("midpoint"):
            gamma, signs = self._gamma_and_signs()
        return check_reversible(
            block,
            stacked_params,
            x,
            key=key,
            consts=consts,
            gamma=gamma,
            signs=signs,
            frac_bits=self.frac_bits,
            tolerance_bits=self.tolerance_bits,
        )


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
        method: CoupledMethod = "coupled",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """``dtype`` is what the blocks see; the streams are float32. Otherwise as above."""
        super().__init__(make_block, depth, rngs)
        self.method = check_method(method, get_args(CoupledMethod))
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "batch *shape"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch *shape_but_doubled"]:
        """Runs the blocks; the streams, in float32, one after the other on the last axis."""
        self._check_key(key)
        pair = coupling.coupled_scan(
            *self.functional(),
            self._start(x),
            key=key,
            backprop="online" if self.method == "coupled" else "stored",
        )
        return jnp.concatenate(pair, axis=-1)

    def functional(self) -> tuple[coupling.Half, coupling.Half, PyTree[Array]]:
        """Both halves and the stacked parameters, as :func:`bdia_jax.coupling.coupled_scan`."""
        attend, params = self._pure(lambda block, x: block.attend(x.astype(self.dtype)))
        feed_forward, _ = self._pure(lambda block, x: block.feed_forward(x.astype(self.dtype)))
        return attend, feed_forward, params

    def reconstruction_errors(
        self, x: Float[Array, "batch *shape"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "blocks"]:
        """:func:`bdia_jax.coupling.reconstruction_errors` of these blocks."""
        return jax.jit(coupling.reconstruction_errors, static_argnums=(0, 1))(
            *self.functional(), self._start(x), key=key
        )

    def _start(self, x):
        return (x.astype(jnp.float32),) * 2


def is_stacked(path: tuple) -> bool:
    """Whether the leaf at a path of a model's state has a leading block axis."""
    return any(getattr(entry, "key", None) == "stacked" for entry in path)


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
