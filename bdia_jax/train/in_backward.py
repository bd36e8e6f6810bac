"""The optimizer in the backward pass: a step of one block as soon as its gradient is known.

The idea is that of LOMO (Lv et al., "Full Parameter Fine-tuning for Large Language Models with
Limited Resources", 2023), here for any optimizer of optax whose update of a block depends on that
block alone (:mod:`bdia_jax.train.blockwise`), and in place.

A stack's parameters and moments go along with its blocks, in a :class:`Slot`: differentiated by the
slots, the loss gives their new values. The blocks read their parameters from the slots alone;
whatever else differentiates them is an error.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from bdia_jax import Checkpoint, Online, Update
from bdia_jax.nn.stack import ReversibleStack
from bdia_jax.pinning import fence
from bdia_jax.train import mesh as meshes
from bdia_jax.train.blockwise import (
    Blockwise,
    Path,
    below,
    joined,
    moments,
    stack_name,
    with_moments,
    without,
)
from bdia_jax.train.norms import global_norm
from bdia_jax.train.step import Recipe, State, StepReport, draw, judge, keep_if, scaled, shard


class Slot(NamedTuple):
    """What a stack brings into the backward pass, to be replaced by new values block by block."""

    params: nnx.State
    moments: list[Array]
    """What the optimizer keeps for each block."""
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
    # There is no step before the first one: its gradient is scaled to 0, and it finds the norm. As
    # it is, a large first gradient would stay in Adam's second moment for a long time.
    return opt_state if clip_norm is None else {"optimizer": opt_state, "norm": jnp.float32("inf")}


def updating_step(
    recipe: Recipe, stacks: dict[Path, int], state: State, rest, arrays
) -> tuple[State, StepReport]:
    """:func:`bdia_jax.train.step.train_step`, with the blocks updated in the backward pass."""
    clip_norm, opt_state = recipe.settings.clip_norm, state.opt_state
    optimizer = recipe.optimizer
    assert isinstance(optimizer, Blockwise)
    batch, (key,) = draw(recipe, state, arrays)
    batch = shard(recipe, batch)
    whole = opt_state if clip_norm is None else opt_state["optimizer"]
    own = {path: whole["stacks"][stack_name(path)] for path in stacks}
    others = without(state.params, stacks)
    rest_of_stacks = {
        n: of for n, of in whole["stacks"].items() if n not in map(stack_name, stacks)
    }
    others_state = whole | {"stacks": rest_of_stacks}
    slots = {
        path: Slot(below(state.params, path), moments(own[path]), jnp.zeros(blocks, jnp.float32))
        for path, blocks in stacks.items()
    }

    def backward(scale: Float[Array, ""] | float | None):
        """The sums, and gradients by the others, the probes and the slots."""
        updated = set()

        def mean_loss(others, probes, slots):
            guarded = {path: guard(slot.params, path) for path, slot in slots.items()}
            params = joined(others, guarded)
            model = meshes.merged(recipe.mesh, recipe.graph, params, probes, rest)
            for path, slot in slots.items():
                step = None if scale is None else BlockStep(optimizer.blocks, own[path], scale)
                install(model, path, slot, step, recipe.loss_scale, updated)
            sums = recipe.task.loss(model, batch, key)
            return recipe.loss_scale * sums.means()["loss"], sums

        (_, sums), grads = jax.value_and_grad(mean_loss, argnums=(0, 1, 2), has_aux=True)(
            others, recipe.probes, slots
        )
        if missed := slots.keys() - updated:
            # The "gradients" of these slots are zeros, which must not become their weights.
            names = ", ".join(map(stack_name, missed))
            raise ValueError(
                f"update_in_backward: the loss does not depend on {names}; "
                "freeze its weights (bdia_jax.nn.freeze), or set update_in_backward=False"
            )
        d_others, *of_stacks = grads
        return sums, scaled(d_others, 1 / recipe.loss_scale), *of_stacks

    def norm_of(d_others, slots) -> Float[Array, ""]:
        squares = sum(jnp.sum(slot.squares) for slot in slots.values())
        return jnp.sqrt(squares + global_norm(d_others) ** 2).astype(jnp.float32)

    scale = 1.0
    if clip_norm is not None:
        norm = opt_state["norm"]
        if recipe.settings.clip_by == "second-pass":
            _, d_others, _, untouched = backward(None)
            norm = norm_of(d_others, untouched)
        scale = jnp.minimum(1.0, clip_norm / norm)
    sums, d_others, probes, slots = backward(scale)
    norm = norm_of(d_others, slots)
    fine, report = judge(recipe, state.step, sums, norm, probes)

    updates, new_state = optimizer.update(scaled(d_others, scale), others_state, others)
    for path, slot in slots.items():
        others_state["stacks"][stack_name(path)] = with_moments(own[path], slot.moments)
        new_state["stacks"][stack_name(path)] = optimizer.counted(
            slot.params, own[path], slot.moments
        )
    new, new_state = keep_if(
        fine, (optax.apply_updates(others, updates), new_state), (others, others_state)
    )
    params = joined(new, {path: slot.params for path, slot in slots.items()})
    if clip_norm is not None:
        new_state = {"optimizer": new_state, "norm": jnp.where(fine, norm, opt_state["norm"])}
    return State(state.step + fine.astype(jnp.int32), params, new_state, state.key), report


class BlockStep(NamedTuple):
    """An optimizer's step of one block."""

    optimizer: optax.GradientTransformation
    state: optax.OptState
    """Of the stack; what the blocks share is taken from here."""
    scale: Float[Array, ""] | float
    """Of the gradient."""

    def __call__(self, params: nnx.State, grads: nnx.State, own: list[Array]):
        """New parameters and moments; the old ones, if the gradient is not finite."""
        grads = scaled(grads, self.scale)
        updates, state = self.optimizer.update(grads, with_moments(self.state, own), params)
        fine = jnp.isfinite(global_norm(grads))
        return keep_if(fine, (optax.apply_updates(params, updates), moments(state)), (params, own))


def install(
    model: nnx.Module,
    path: Path,
    slot: Slot,
    step: BlockStep | None,
    loss_scale: float,
    updated: set[Path],
) -> None:
    """Has the backward pass of a stack take a step of each block, in a model that is traced.

    The gradient that it is given is that of the loss times ``loss_scale``. Without ``step``, only
    the sums of squares are new. ``updated`` gets the path when the backward pass is traced.
    """

    def function(params, grads, state):
        updated.add(path)
        own, _ = state
        # Laid out as weights and moments are: a compiler would copy all of these to another layout
        # that a product or a collective prefers for the gradient.
        grads = scaled(fence(grads), 1 / loss_scale)
        squares = global_norm(grads) ** 2
        if step is not None:
            params, own = step(params, grads, own)
        return params, (own, squares.astype(jnp.float32))

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
            f"update_in_backward: the loss depends on the weights of {stack_name(path)} in another "
            "way than through the call of the stack (a penalty on them, for instance), and there "
            "is no gradient to add that to: use weight_decay, or set update_in_backward=False"
        )

    same.defvjp(lambda params: (params, None), backward)
    return same(params)
