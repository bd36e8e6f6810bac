"""An optimizer of one block at a time, in the backward pass or after it.

Some optimizers look at a whole array: Muon makes a matrix orthogonal, Adafactor keeps sums of its
rows and columns. What is stacked is no such array, but one of each block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

Path = tuple[Any, ...]
"""Of the stacked blocks in a model."""


class Blockwise(NamedTuple):
    """An optimizer of a model: of every block by itself, and of what is in no stack.

    Its state is ``{"others": …, "stacks": {name: …}}``. Of a stack, floating-point arrays have a
    leading axis of blocks; what counts steps, an integer, is shared by the blocks.
    """

    blocks: optax.GradientTransformation
    others: optax.GradientTransformation

    def init(self, params: Any) -> dict[str, Any]:
        """The first state, of an ``nnx.State`` of parameters."""
        paths = stack_paths(params)
        return {
            "others": self.others.init(without(params, paths)),
            "stacks": {stack_name(path): self._init_stack(below(params, path)) for path in paths},
        }

    def update(self, updates: Any, state: Any, params: Any = None) -> tuple[Any, dict[str, Any]]:
        """What is to be added to the parameters, of their gradient; and the next state."""
        grads, paths = updates, stack_paths(updates)
        of_others, others = self.others.update(
            without(grads, paths), state["others"], without(params, paths)
        )
        found, stacks = {}, {}
        for path in paths:
            own = state["stacks"][stack_name(path)]
            axes = (0, block_axes(own), 0)
            found[path], stacks[stack_name(path)] = jax.vmap(self.blocks.update, axes, axes[:2])(
                below(grads, path), own, below(params, path)
            )
        return joined(of_others, found), {"others": others, "stacks": stacks}

    def as_optax(self) -> optax.GradientTransformation:
        """The same, to be chained with others."""
        return optax.GradientTransformation(self.init, self.update)

    def counted(self, params: nnx.State, state: Any, own: list[Any]) -> Any:
        """A stack's state after a step that left its blocks' moments as ``own``.

        What is shared comes from the step of a block of zeros. The compiler drops the rest of it.
        """
        zeros, some = jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), (params, own))
        _, after = self.blocks.update(zeros, with_moments(state, some), zeros)
        return with_moments(after, own)

    def _init_stack(self, params: nnx.State) -> Any:
        block = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), params)
        state = jax.eval_shape(self.blocks.init, block)
        for leaf in jax.tree.leaves(state):
            if leaf.ndim and not is_moment(leaf):
                raise TypeError(
                    "what an optimizer keeps for each weight of a block must be floating-point "
                    f"numbers; got {leaf.dtype}{[*leaf.shape]}"
                )
        return jax.vmap(self.blocks.init, out_axes=block_axes(state))(params)


def is_moment(leaf: Any) -> bool:
    """Whether each block has its own; otherwise it is shared."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def block_axes(state: Any) -> Any:
    """The axis that counts blocks in a stack's state; None where it is shared."""
    return jax.tree.map(lambda leaf: 0 if is_moment(leaf) else None, state)


def moments(state: Any) -> list[Any]:
    """What of a stack's state each block has for itself."""
    return [leaf for leaf in jax.tree.leaves(state) if is_moment(leaf)]


def with_moments(state: Any, new: list[Any]) -> Any:
    """A stack's state with other moments."""
    some = iter(new)
    return jax.tree.map(lambda leaf: next(some) if is_moment(leaf) else leaf, state)


# ---------------------------------------------------------------------------------------------
# Stacks as parts of a model's state
# ---------------------------------------------------------------------------------------------


def stack_paths(params: nnx.State) -> list[Path]:
    """The paths of all stacks that have parameters."""
    paths = (path for path, _ in nnx.to_flat_state(params))
    return [*dict.fromkeys(p[: p.index("stacked") + 1] for p in paths if "stacked" in p)]


def below(state: nnx.State, path: Path) -> nnx.State:
    """What a state has below a path."""
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(p[len(path) :], leaf) for p, leaf in flat if _is_below(p, path)])


def without(state: nnx.State, paths: Any) -> nnx.State:
    """What a state has elsewhere."""
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state(
        [(p, leaf) for p, leaf in flat if not any(_is_below(p, path) for path in paths)]
    )


def joined(state: Any, parts: Mapping[Path, nnx.State]) -> nnx.State:
    """The inverse of :func:`without` and :func:`below`."""
    flat = [*nnx.to_flat_state(state)]
    for path, some in parts.items():
        flat += [((*path, *p), leaf) for p, leaf in nnx.to_flat_state(some)]
    return nnx.from_flat_state(flat)


def stack_name(path: Path) -> str:
    """Of a stack, as messages and states have it."""
    return ".".join(map(str, path[:-1])) or "the model"


def _is_below(path: tuple, stack: Path) -> bool:
    return path[: len(stack)] == stack
