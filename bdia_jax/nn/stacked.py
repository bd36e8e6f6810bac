"""Blocks of one kind with stacked parameters, and where their arrays are."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, PyTree

from bdia_jax.nn.placement import Placement
from bdia_jax.nn.pure import as_function


class PerBlock(nnx.Variable):
    """A number that differs from block to block, and is not trained."""


class StackedBlocks(nnx.Module):
    """``depth`` blocks of one kind, with stacked parameters. Subclasses say how they are run.

    They are the module ``stacked``, every array of which has a leading block axis.
    """

    def __init__(self, make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs):
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth, the number of blocks, must be an int >= 1; got {depth!r}")
        if isinstance(make_block, nnx.Module):
            raise TypeError(
                "make_block must make a block, such as lambda rngs: MyBlock(32, rngs=rngs); got a "
                f"block itself, of {type(make_block).__name__}"
            )
        self.depth = depth
        self.deterministic = False
        self.stacked = nnx.vmap(make_block)(rngs.split(depth))

    def pure(self, call: Callable[..., PyTree[Array]]) -> tuple[Callable, PyTree[Array]]:
        """``call(block, *args)`` as a function of a block's arrays; and those, stacked.

        :func:`bdia_jax.nn.pure.as_function` says more. The function is given one block's arrays,
        without the block axis.
        """
        function, params = as_function(self.stacked, call)
        placement = self.placement
        if placement is None:
            return function, params

        def placed(params, key, x, *args):
            return function(placement.weights(params), key, placement.samples(x), *args)

        return placed, params

    def place(self, placement: Placement) -> None:
        """Has blocks compute where ``placement`` says; for use within a traced function."""
        # Past nnx, which would look for arrays in it: it goes with this copy, and is no state.
        object.__setattr__(self, "_placement", placement)

    @property
    def placement(self) -> Placement | None:
        """Where blocks compute; None for one device."""
        return getattr(self, "_placement", None)


def placement_of(model: nnx.Module) -> Placement | None:
    """Where the blocks of a model compute; None for one device."""
    stacks = (m for _, m in nnx.iter_modules(model) if isinstance(m, StackedBlocks))
    return next((stack.placement for stack in stacks), None)


def is_stacked(path: tuple) -> bool:
    """Whether the leaf at a path of a model's state has a leading block axis."""
    return any(getattr(entry, "key", None) == "stacked" for entry in path)
