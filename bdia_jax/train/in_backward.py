"""The optimizer in the backward pass: a step of one block as soon as its gradient is known.

The idea is that of LOMO (Lv et al., "Full Parameter Fine-tuning for Large Language Models with
Limited Resources", 2023), here for any optimizer of optax whose update of an array depends on that
array alone (SGD, Adam, AdamW, SET-Adam, with schedules and weight decay), and in place.

An optimizer's state is a tree in which some nodes are as the parameters (moments), and the others
are shared (a count of steps). Of the former, a stack's part goes along with its blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from bdia_jax.nn.stack import ReversibleStack
from bdia_jax.reversible import Update

Path = tuple[str | int, ...]
"""Of the stacked blocks in a model."""


def depths(model: nnx.Module) -> dict[Path, int]:
    """The stacks whose blocks are updated in the backward pass, and how many blocks each has.

    Raises:
      ValueError: if there is none.
    """
    found = {
        (*path, "stacked"): module.depth
        for path, module in nnx.iter_modules(model)
        if isinstance(module, ReversibleStack) and module.method in ("bdia", "midpoint")
        if jax.tree.leaves(nnx.state(module.stacked, nnx.Param))
    }
    if not found:
        raise ValueError(
            "update_in_backward needs reversible blocks with parameters to train: a stack with "
            "method bdia or midpoint; the model has none"
        )
    return found


class BlockStep(NamedTuple):
    """An optimizer's step of one block."""

    optimizer: optax.GradientTransformation
    state: optax.OptState
    """Of all parameters; what is shared is taken from here."""
    scale: Float[Array, ""] | float
    """Of the gradient."""

    def __call__(self, params: nnx.State, grads: nnx.State, moments: list[nnx.State]):
        """New parameters and moments; the old ones, if the gradient is not finite."""
        grads = jax.tree.map(lambda d: d * jnp.asarray(self.scale, d.dtype), grads)
        items, structure = jax.tree.flatten(self.state, is_leaf=_is_state)
        own = iter(moments)
        state = structure.unflatten([next(own) if _is_state(item) else item for item in items])
        updates, state = self.optimizer.update(grads, state, params)
        new = [item for item in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(item)]
        fine = jnp.isfinite(optax.tree.norm(grads))
        return jax.tree.map(
            lambda new, old: jnp.where(fine, new, old),
            (optax.apply_updates(params, updates), new),
            (params, moments),
        )


def install(
    model: nnx.Module, path: Path, slot: tuple[list[nnx.State], Array], step: BlockStep | None
) -> None:
    """Has the backward pass of a stack take a step of each block, in a model that is traced.

    ``slot`` holds the stack's moments, and room for a number per block: the sum of squares of its
    gradient. Without ``step``, these are all that the backward pass finds.
    """

    def function(params, grads, slot):
        moments, _ = slot
        squares = optax.tree.norm(grads) ** 2
        if step is not None:
            params, moments = step(params, grads, moments)
        return params, (moments, squares.astype(jnp.float32))

    modules = dict(nnx.iter_modules(model))
    modules[path[:-1]].updates(Update(function, slot))


def part(state: optax.OptState, path: Path) -> list[nnx.State]:
    """Of every node that is as the parameters, what belongs to a stack."""
    nodes = jax.tree.leaves(state, is_leaf=_is_state)
    return [at(node, path) for node in nodes if _is_state(node)]


def at(state: nnx.State, path: Path) -> nnx.State:
    """What is below a path."""
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(p[len(path) :], leaf) for p, leaf in flat if _below(p, path)])


def without(tree: Any, paths: dict[Path, Any]) -> Any:
    """Every node that is as the parameters, without what belongs to the stacks."""

    def cut(node):
        if not _is_state(node):
            return node
        flat = nnx.to_flat_state(node)
        return nnx.from_flat_state(
            [(p, leaf) for p, leaf in flat if not any(_below(p, path) for path in paths)]
        )

    return jax.tree.map(cut, tree, is_leaf=_is_state)


def joined(tree: Any, parts: dict[Path, nnx.State | list[nnx.State]]) -> Any:
    """The inverse of :func:`without`: ``parts`` have an entry per node of a stack."""
    items, structure = jax.tree.flatten(tree, is_leaf=_is_state)
    lists = {path: iter(p if isinstance(p, list) else [p]) for path, p in parts.items()}

    def join(node):
        if not _is_state(node):
            return node
        flat = [*nnx.to_flat_state(node)]
        for path, some in lists.items():
            flat += [((*path, *p), leaf) for p, leaf in nnx.to_flat_state(next(some))]
        return nnx.from_flat_state(flat)

    return structure.unflatten([join(item) for item in items])


def _is_state(node: Any) -> bool:
    return isinstance(node, nnx.State)


def _below(path: tuple, stack: Path) -> bool:
    return path[: len(stack)] == stack
