"""The optimizer in the backward pass: a step of one block as soon as its gradient is known.

The idea is that of LOMO (Lv et al., "Full Parameter Fine-tuning for Large Language Models with
Limited Resources", 2023), here for any optimizer of optax whose update of an array depends on that
array alone (SGD, Adam, AdamW, SET-Adam, with schedules and weight decay), and in place.

An optimizer's state is a tree in which some nodes are as the parameters (moments), and the others
are shared (a count of steps). A stack's part of the former goes along with its blocks, in a
:class:`Slot`: differentiated by the slots, the loss gives their new values. The blocks read their
parameters from the slots alone; whatever else differentiates them is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from bdia_jax import Checkpoint, Online, Update
from bdia_jax.nn.stack import ReversibleStack
from bdia_jax.train.step import Recipe, State, StepReport, draw, judge, keep_if, shard

Path = tuple[str | int, ...]
"""Of the stacked blocks in a model."""


class Slot(NamedTuple):
    """What a stack brings into the backward pass, to be replaced by new values block by block."""

    params: nnx.State
    moments: list[nnx.State]
    """Its part of every node of the optimizer's state that is as the parameters."""
    squares: Float[Array, "blocks"]
    """Replaced by the sum of squares of each block's gradient."""


def depths(model: nnx.Module) -> dict[Path, int]:
    """The stacks whose blocks are updated in the backward pass, and how many blocks each has.

    Raises:
      ValueError: if there is none.
    """
    found: dict[Any, int] = {
        (*path, "stacked"): module.depth
        for path, module in nnx.iter_modules(model)
        if isinstance(module, ReversibleStack)
        if isinstance(module.adjoint, Online | Checkpoint)
        if jax.tree.leaves(nnx.state(module.stacked, nnx.Param))
    }
    if not found:
        raise ValueError(
            "update_in_backward needs a stack with parameters to train that is taken back or "
            "checkpointed (method bdia, midpoint, bdia-checkpoint or standard-checkpoint); the "
            "model has none"
        )
    return found


def with_norm(opt_state: optax.OptState, clip_norm: float | None) -> Any:
    """The first state: with clipping, the norm of the gradient of the step before belongs to it."""
    # There is no step before the first one, which is not clipped.
    return (
        opt_state if clip_norm is None else {"optimizer": opt_state, "norm": jnp.float32(clip_norm)}
    )


def updating_step(
    recipe: Recipe, stacks: dict[Path, int], state: State, rest, arrays
) -> tuple[State, StepReport]:
    """:func:`bdia_jax.train.step.train_step`, with the blocks updated in the backward pass."""
    clip_norm, opt_state = recipe.settings.clip_norm, state.opt_state
    batch, (key,) = draw(recipe, state, arrays)
    batch = shard(recipe, batch)
    whole = opt_state if clip_norm is None else opt_state["optimizer"]
    others, others_state = (without(tree, stacks) for tree in (state.params, whole))
    slots = {
        path: Slot(below(state.params, path), part(whole, path), jnp.zeros(blocks))
        for path, blocks in stacks.items()
    }

    def backward(block_step: BlockStep | None):
        """The sums, and gradients by the others, the probes and the slots."""
        updated = set()

        def mean_loss(others, probes, slots):
            guarded = {path: guard(slot.params, path) for path, slot in slots.items()}
            model = nnx.merge(recipe.graph, joined(others, guarded), probes, rest)
            for path, slot in slots.items():
                install(model, path, slot, block_step, updated)
            sums = recipe.task.loss(model, batch, key)
            return sums.means()["loss"], sums

        (_, sums), grads = jax.value_and_grad(mean_loss, argnums=(0, 1, 2), has_aux=True)(
            others, recipe.probes, slots
        )
        if missed := slots.keys() - updated:
            # The "gradients" of these slots are zeros, which must not become their weights.
            raise ValueError(
                f"update_in_backward: the loss does not depend on {', '.join(map(_name, missed))}; "
                "freeze its weights (bdia_jax.nn.freeze), or set update_in_backward=False"
            )
        return sums, *grads

    def norm_of(d_others, slots) -> Float[Array, ""]:
        squares = sum(jnp.sum(slot.squares) for slot in slots.values())
        return jnp.sqrt(squares + optax.tree.norm(d_others) ** 2)

    scale = 1.0
    if clip_norm is not None:
        norm = opt_state["norm"]
        if recipe.settings.clip_by == "second-pass":
            _, d_others, _, untouched = backward(None)
            norm = norm_of(d_others, untouched)
        scale = jnp.minimum(1.0, clip_norm / norm)
    sums, d_others, probes, slots = backward(BlockStep(recipe.optimizer, whole, scale))
    norm = norm_of(d_others, slots)
    fine, report = judge(recipe, state.step, sums, norm, probes)

    d_others = scaled(d_others, scale)
    updates, new_state = recipe.optimizer.update(d_others, others_state, others)
    new, new_state = keep_if(
        fine, (optax.apply_updates(others, updates), new_state), (others, others_state)
    )
    params = joined(new, {path: slot.params for path, slot in slots.items()})
    new_state = joined(new_state, {path: slot.moments for path, slot in slots.items()})
    if clip_norm is not None:
        new_state = {"optimizer": new_state, "norm": jnp.where(fine, norm, opt_state["norm"])}
    return State(state.step + fine.astype(jnp.int32), params, new_state, state.key), report


class BlockStep(NamedTuple):
    """An optimizer's step of one block."""

    optimizer: optax.GradientTransformation
    state: optax.OptState
    """Of all parameters; what is shared is taken from here."""
    scale: Float[Array, ""] | float
    """Of the gradient."""

    def __call__(self, params: nnx.State, grads: nnx.State, moments: list[nnx.State]):
        """New parameters and moments; the old ones, if the gradient is not finite."""
        grads = scaled(grads, self.scale)
        items, structure = jax.tree.flatten(self.state, is_leaf=_is_state)
        own = iter(moments)
        state = structure.unflatten([next(own) if _is_state(item) else item for item in items])
        updates, state = self.optimizer.update(grads, state, params)
        new = [item for item in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(item)]
        fine = jnp.isfinite(optax.tree.norm(grads))
        return keep_if(fine, (optax.apply_updates(params, updates), new), (params, moments))


def install(
    model: nnx.Module, path: Path, slot: Slot, step: BlockStep | None, updated: set[Path]
) -> None:
    """Has the backward pass of a stack take a step of each block, in a model that is traced.

    Without ``step``, only the sums of squares are new. ``updated`` gets the path when the backward
    pass is traced.
    """

    def function(params, grads, state):
        updated.add(path)
        moments, _ = state
        squares = optax.tree.norm(grads) ** 2
        if step is not None:
            params, moments = step(params, grads, moments)
        return params, (moments, squares.astype(jnp.float32))

    stack: Any = dict(nnx.iter_modules(model))[path[:-1]]
    stack.updates(Update(function, slot.params, (slot.moments, slot.squares)))


def guard(params: nnx.State, path: Path) -> nnx.State:
    """``params``; an error at trace time if they are differentiated.

    The call of the stack does not differentiate them: its blocks read the slot. What does, such as
    a penalty on the weights, would add a gradient to what is a new value.
    """

    @jax.custom_vjp
    def same(params):
        return params

    def backward(_, cotangents):
        raise ValueError(
            f"update_in_backward: the loss depends on the weights of {_name(path)} in another way "
            "than through the call of the stack (a penalty on them, for instance), and there is no "
            "gradient to add that to: use weight_decay, or set update_in_backward=False"
        )

    same.defvjp(lambda params: (params, None), backward)
    return same(params)


def scaled(grads: nnx.State, scale: Float[Array, ""] | float) -> nnx.State:
    """The gradient, scaled in its own dtype."""
    return jax.tree.map(lambda d: d * jnp.asarray(scale, d.dtype), grads)


def part(state: optax.OptState, path: Path) -> list[nnx.State]:
    """A stack's part of every node that is as the parameters."""
    nodes = jax.tree.leaves(state, is_leaf=_is_state)
    return [below(node, path) for node in nodes if _is_state(node)]


def below(state: nnx.State, path: Path) -> nnx.State:
    """What a state has below a path."""
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(p[len(path) :], leaf) for p, leaf in flat if _is_below(p, path)])


def without(tree: Any, paths: dict[Path, Any]) -> Any:
    """Every node that is as the parameters, without the parts of the stacks."""

    def cut(node):
        if not _is_state(node):
            return node
        flat = nnx.to_flat_state(node)
        return nnx.from_flat_state(
            [(p, leaf) for p, leaf in flat if not any(_is_below(p, path) for path in paths)]
        )

    return jax.tree.map(cut, tree, is_leaf=_is_state)


def joined(tree: Any, parts: Mapping[Path, nnx.State | list[nnx.State]]) -> Any:
    """The inverse of :func:`without`; ``parts`` has a state per node that is as the parameters."""
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


def _is_below(path: tuple, stack: Path) -> bool:
    return path[: len(stack)] == stack


def _name(path: Path) -> str:
    return ".".join(map(str, path[:-1])) or "the model"
