"""One training step, as a pure function: batch, gradient, optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, Key, PyTree, UInt32

from bdia_jax import BackwardReport
from bdia_jax.nn.losses import Sums
from bdia_jax.train import mesh as meshes
from bdia_jax.train.blockwise import Blockwise
from bdia_jax.train.norms import global_norm
from bdia_jax.train.settings import TrainSettings
from bdia_jax.train.tasks import Task


class State(NamedTuple):
    """All that a step changes, and the key from which it draws; this is what is saved.

    The position in the data is a function of the key and the step. A step that goes wrong changes
    nothing, ``step`` included: every later one repeats it, until the loop notices. (But with
    ``update_in_backward``, of which :class:`TrainSettings` says what happens.)
    """

    step: Int32[Array, ""]
    params: nnx.State
    opt_state: PyTree[Array]
    key: UInt32[Array, "words"]


LOSS_SCALE = 1024.0
"""For blocks in float16. Of a mean over thousands of tokens, most derivatives would be below its
smallest number. A power of two changes no digit of the others."""


class StepReport(NamedTuple):
    """What is told of a step."""

    sums: Sums
    """Loss and metrics, summed over the batch."""
    grad_norm: Float[Array, ""]
    """Of the whole gradient, before it is clipped."""
    learning_rate: Float[Array, ""] | None
    """None for an optimizer that was given to :func:`bdia_jax.train.train`."""
    backward: dict[str, BackwardReport]
    """What the backward pass saw, by the path of a stack's probe."""


class Recipe(NamedTuple):
    """What the steps of a run have in common."""

    graph: nnx.GraphDef
    """The model in training mode."""
    probes: nnx.State
    """Zeros, one probe per stack."""
    task: Task
    settings: TrainSettings
    optimizer: optax.GradientTransformation | Blockwise
    schedule: optax.Schedule | None
    mesh: jax.sharding.Mesh | None
    loss_scale: float
    """The loss is differentiated times this power of two: 1, or :data:`LOSS_SCALE`."""


def train_step(recipe: Recipe, state: State, rest, arrays) -> tuple[State, StepReport]:
    """One optimizer step; with a gradient that is not finite or not exact, no step.

    Args:
      recipe: what is static.
      state: as the step before left it.
      rest: the variables of the model that are not trained.
      arrays: the data.
    """
    batch, keys = draw(recipe, state, arrays)
    grads, sums, probes = gradient(recipe, state.params, rest, batch, keys)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    fine, report = judge(recipe, state.step, sums, global_norm(grads), probes)
    params, opt_state = keep_if(fine, (params, opt_state), (state.params, state.opt_state))
    return State(state.step + fine.astype(jnp.int32), params, opt_state, state.key), report


def draw(recipe: Recipe, state: State, arrays) -> tuple[Any, Key[Array, "parts"]]:
    """The batch of a step, and a key for each of its micro-batches."""
    settings = recipe.settings
    data_key, model_key = jax.random.split(jax.random.wrap_key_data(state.key))
    batch = recipe.task.batch(arrays, data_key, state.step, settings.batch_size)
    keys = jax.random.split(jax.random.fold_in(model_key, state.step), settings.accumulate)
    return batch, keys


def micro_batches(recipe: Recipe, batch: Any) -> Any:
    """The batch with a leading axis of micro-batches."""
    parts = recipe.settings.accumulate
    return jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), batch)


def shard(recipe: Recipe, batch: Any) -> Any:
    """Splits the samples over the devices."""
    if recipe.mesh is None:
        return batch
    return jax.lax.with_sharding_constraint(batch, meshes.batch_sharding(recipe.mesh))


def gradient(recipe: Recipe, params: nnx.State, rest, batch, keys):
    """The gradient of the mean loss of a batch, its sums, and the "gradient" by the probes.

    Micro-batches differ in weight: one has more tokens to learn than another. What they add to the
    gradient of the batch is their own mean's, times their weight.
    """

    def mean_loss(params, probes, part, key):
        model = meshes.merged(recipe.mesh, recipe.graph, params, probes, rest)
        sums = recipe.task.loss(model, part, key)
        return recipe.loss_scale * sums.means()["loss"], sums

    def of_part(part, key):
        (_, sums), (grads, probes) = jax.value_and_grad(mean_loss, argnums=(0, 1), has_aux=True)(
            params, recipe.probes, shard(recipe, part), key
        )
        return scaled(grads, 1 / recipe.loss_scale), sums, probes

    if recipe.settings.accumulate == 1:
        return of_part(batch, keys[0])

    def add(total, part_and_key):
        grads, sums, probes = of_part(*part_and_key)
        total = jax.tree.map(lambda t, g: t + sums.weight.astype(t.dtype) * g, total, grads)
        return total, (sums, probes)

    # In float32 (or wider): a sum in bfloat16 would lose small parts.
    zeros = jax.tree.map(
        lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params
    )
    total, of_parts = jax.lax.scan(add, zeros, (micro_batches(recipe, batch), keys))
    sums = jax.tree.map(lambda a: a.sum(axis=0), of_parts[0])
    probes = jax.tree.map(of_all, of_parts[1], is_leaf=_is_report)
    weight = sums.weight + (sums.weight == 0)
    grads = jax.tree.map(lambda t, p: (t / weight.astype(t.dtype)).astype(p.dtype), total, params)
    return grads, sums, probes


def scaled(grads: PyTree[Array], scale: Float[Array, ""] | float) -> PyTree[Array]:
    """A gradient, scaled in its own dtype; untouched by a scale of 1 that is known before."""
    if isinstance(scale, float) and scale == 1:
        return grads
    return jax.tree.map(lambda d: d * jnp.asarray(scale, d.dtype), grads)


def of_all(reports: BackwardReport) -> BackwardReport:
    """One report of those of all micro-batches: what is counted is added up."""
    counts = BackwardReport(*(count.sum(axis=0) for count in reports))
    return counts._replace(deviation=reports.deviation.max(axis=0))


def _is_report(leaf: Any) -> bool:
    return isinstance(leaf, BackwardReport)


def judge(
    recipe: Recipe, step: Int32[Array, ""], sums: Sums, norm: Float[Array, ""], probes: nnx.State
) -> tuple[Bool[Array, ""], StepReport]:
    """Whether a step went well, and its report."""
    backward = {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(probes)
    }
    fine = jnp.isfinite(norm) & jnp.isfinite(sums.loss)
    for stack in backward.values():
        fine &= ~jnp.any(stack.mismatched != 0)
    rate = None if recipe.schedule is None else jnp.float32(recipe.schedule(step))
    return fine, StepReport(sums, norm, rate, backward)


def keep_if(fine: Bool[Array, ""], new: PyTree[Array], old: PyTree[Array]) -> PyTree[Array]:
    """``new`` after a step that went well, otherwise ``old``."""
    return jax.tree.map(lambda new, old: jnp.where(fine, new, old), new, old)
