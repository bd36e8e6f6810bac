"""Stacks of residual blocks as Flax modules, run by scans that can be taken back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from flax import nnx
from jax import lax
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array, Float, Key, PyTree

from bdia_jax.adjoints import Adjoint, BackwardReport, Direct, Online, Update
from bdia_jax.arguments import Block
from bdia_jax.check import Reversibility, check_reversible
from bdia_jax.checks import check_combination
from bdia_jax.nn.stacked import StackedBlocks
from bdia_jax.nn.updates import Updates
from bdia_jax.reversible import reversible_scan
from bdia_jax.steps import BDIA, Step


class Probe(nnx.Variable):
    """Holds zeros; the "gradient" by it is the :class:`bdia_jax.BackwardReport` of a stack."""


class ReversibleStack(StackedBlocks):
    """``depth`` residual blocks in a row, with stacked parameters.

    A block is any Flax module that maps ``x`` (and whatever else the stack is called with) to
    its update ``h(x)``. It may use dropout: every random stream in it is seeded per block, and
    per call, from the key that the stack is called with. It must not write to variables (batch
    normalization does): normalize by layer, group or root mean square.

    A step and an adjoint say what the network does from block to block in training, and how that
    is differentiated. Stacks with other steps and adjoints have the same parameters. In evaluation
    mode (``model.eval()``) the stack is the network that is handed back, ``step.network``,
    differentiated directly: for :class:`bdia_jax.BDIA`, ``x + h(x)`` on the grid.
    """

    def __init__(
        self,
        make_block: Callable[[nnx.Rngs], nnx.Module],
        depth: int,
        *,
        step: Step = BDIA(),  # noqa: B008  (frozen)
        adjoint: Adjoint = Online(),  # noqa: B008
        parts: tuple[str, ...] | None = None,
        residual: bool = False,
        rngs: nnx.Rngs,
    ):
        """Builds the blocks.

        Args:
          make_block: a function (or class) of ``nnx.Rngs`` that returns a block.
          depth: number of blocks, at least 1.
          step: :class:`bdia_jax.BDIA`, :class:`bdia_jax.Midpoint` or :class:`bdia_jax.Euler`.
          adjoint: :class:`bdia_jax.Online`, :class:`bdia_jax.Checkpoint` or
            :class:`bdia_jax.Direct`, without probe and update, which the stack installs.
          parts: names of methods of the block, such as ``("attend", "feed_forward")``. Each is
            called as the block would be, is an update of its own, and a step of its own. None for
            the block as a whole.
          residual: whether a block (a part) returns ``x + h(x)`` rather than ``h(x)``.
          rngs: for the initialization; each block draws its own.

        ``fixed`` says that :func:`bdia_jax.nn.set_step` and :func:`bdia_jax.nn.choose_gamma` leave
        the step alone, as of a teacher.

        Raises:
          TypeError, ValueError: for a step and an adjoint, or parts, that do not fit.
        """
        super().__init__(make_block, depth, rngs)
        check_combination(step, adjoint)
        if not isinstance(adjoint, Direct) and (adjoint.probe, adjoint.update) != (None, None):
            raise ValueError(
                "adjoint must be given without probe and update: the stack has a probe, and "
                f"updates are installed by stack.updates(update); got {adjoint}"
            )
        if parts is not None:
            missing = [p for p in parts if not callable(getattr(self.stacked, p, None))]
            if not isinstance(parts, tuple) or not parts or missing:
                raise ValueError(
                    f"parts must be a tuple of names of methods of {type(self.stacked).__name__}; "
                    f"got {parts!r}"
                )
        self.step = step
        self.adjoint = adjoint
        self.parts = parts
        self.residual = residual
        self.fixed = False
        self.probe = Probe(BackwardReport.zeros(depth))

    def updates(self, update: Update) -> None:
        """Has the backward pass of the next call update the parameters.

        For use within a traced function that is differentiated, on the model that is made there::

            def loss(slots):
                model = nnx.merge(graph, params, rest)
                model.blocks.updates(Update(function, slots.params, slots.state))
                return mean_loss(model, batch)

            new_slots = jax.grad(loss)(slots)

        Args:
          update: ``update.params`` is the ``nnx.State`` of the ``nnx.Param`` in ``stacked``, and
            ``update.function`` is given that of one block, without the block axis.

        Raises:
          ValueError: for an adjoint that does not finish one block after the other. And, at trace
            time, where the stack is called in evaluation mode, a second time, or in another trace
            (within ``jax.lax.scan``, ``jax.vmap``, ``jax.checkpoint``): new values would then be
            summed as if they were gradients.
        """
        if isinstance(self.adjoint, Direct):
            raise ValueError(
                "updates need an adjoint that finishes one block after the other, Online() or "
                f"Checkpoint(); got {self.adjoint}"
            )
        # Past nnx: it holds traced values, and goes with this copy, which is not kept.
        object.__setattr__(self, "_updates", Updates(update, get_opaque_trace_state()))

    def __call__(
        self, x: Float[Array, "batch *shape"], *consts, key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch *shape"]:
        """Runs the blocks on ``x``.

        Args:
          x: input of the first block; its dtype is what the blocks see.
          *consts: given to every block after ``x``; differentiable.
          key: PRNG key of this call, for signs and dropout. None where nothing is drawn: in
            evaluation mode, and in training for a step without random signs and blocks without
            dropout.

        Raises:
          ValueError: for ``key=None`` where something is drawn, and for blocks that write to
            variables.
        """
        if (placement := self.placement) is not None:
            x = placement.samples(x)
        block, stacked_params = self.functional()
        return reversible_scan(
            block,
            stacked_params,
            x,
            key=key,
            consts=consts,
            step=self.step.network if self.deterministic else self.step,
            adjoint=self._adjoint(stacked_params),
        )

    def extend(
        self,
        x: Float[Array, "batch *shape"],
        per_block: PyTree[Array],
        call: Callable[..., tuple[Array, PyTree[Array]]],
    ) -> tuple[Float[Array, "batch *shape"], PyTree[Array]]:
        """The standard network, off the grid, of blocks that carry something along.

        It is what generation needs, whose blocks extend a cache.

        Args:
          x: input of the first block.
          per_block: arrays with a leading block axis.
          call: ``call(block, x, given)`` with a block and its entries of ``per_block``; returns the
            update h, and what is told of the block.

        Returns:
          What comes out of the last block; and what was told, stacked.

        Raises:
          ValueError: for a stack of another network.
        """
        check_standard(self, "generation runs blocks as")
        function, params = self.pure(call)

        def advance(x, inputs):
            params, given = inputs
            h, told = function(params, None, x, given)
            return x + h, told

        return lax.scan(advance, x, (params, per_block))

    def _adjoint(self, stacked_params) -> Adjoint:
        """With the probe, and with the updates if there are any, for one call."""
        updates: Updates | None = getattr(self, "_updates", None)
        if self.deterministic:
            if updates is not None:
                raise ValueError("blocks are updated in training mode; the stack is in evaluation")
            return Direct()
        if isinstance(self.adjoint, Direct):
            return self.adjoint
        update = None if updates is None else updates.of_blocks(stacked_params)
        return dataclasses.replace(self.adjoint, probe=self.probe.get_value(), update=update)

    def functional(self) -> tuple[Block | tuple[Block, ...], PyTree[Array]]:
        """The blocks as :func:`bdia_jax.reversible_scan` takes them.

        Returns:
          A function, or one per part; and the stacked parameters.
        """
        if self.parts is None:
            return self._update("__call__")
        functions, params = zip(*map(self._update, self.parts))
        return functions, params[0]

    def _update(self, method: str):
        """The update of the block, or of a part of it."""

        def call(block, x, *consts):
            y = getattr(block, method)(x, *consts)
            return y - x if self.residual else y

        function, params = self.pure(call)
        return lambda params, x, key, *consts: function(params, key, x, *consts), params

    def check_reversible(
        self, x: Float[Array, "batch *shape"], *consts, key: Key[Array, ""] | None = None
    ) -> Reversibility:
        """:func:`bdia_jax.check_reversible` of these blocks, in their mode, with their step."""
        block, stacked_params = self.functional()
        return check_reversible(block, stacked_params, x, key=key, consts=consts, step=self.step)


def check_standard(stack: ReversibleStack, what: str) -> None:
    """A ``ValueError`` unless a stack hands back the standard network, which ``what`` needs."""
    if stack.step.network.gamma:
        raise ValueError(
            f"{what} the standard network, x + h(x), which BDIA(...) and Euler(...) train; this "
            f"model is another one, of {stack.step}"
        )
