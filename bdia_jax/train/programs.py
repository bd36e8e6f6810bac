"""The compiled programs of a run, and where their arrays live."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Float

from bdia_jax.nn.losses import Sums
from bdia_jax.nn.stack import Probe
from bdia_jax.train import gap, in_backward
from bdia_jax.train import mesh as meshes
from bdia_jax.train.blockwise import Blockwise, without
from bdia_jax.train.settings import TrainSettings
from bdia_jax.train.step import LOSS_SCALE, Recipe, State, StepReport, train_step
from bdia_jax.train.tasks import FED, Fed, Task


class Programs:
    """The training step, the evaluation and the loss without γ, compiled once each.

    A model is described here, not held: :meth:`first_state` takes its arrays over.
    """

    def __init__(
        self,
        model: nnx.Module,
        task: Task,
        settings: TrainSettings,
        optimizer: optax.GradientTransformation | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        """``optimizer``: instead of that of the settings. ``devices``: that need not be there."""
        if optimizer is not None:
            # It clips, or does not, by itself.
            settings = dataclasses.replace(settings, clip_norm=None)
        self.task, self.settings, self.devices = task, settings, devices
        self.mesh = mesh = meshes.parse_mesh(settings.mesh, devices)
        meshes.check_batch(mesh, settings.mesh, settings.batch_size // settings.accumulate)
        self._stacks = in_backward.depths(model) if settings.update_in_backward else {}
        self.has_gap = gap.has_gap(model)

        model.eval()
        self._eval_graph = nnx.split(model, nnx.Param, ...)[0]
        model.train()
        graph, params, probes, rest = nnx.split(model, nnx.Param, Probe, ...)
        # Zeros, also where the model is abstract.
        probes = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), probes)
        if optimizer is None:
            schedule, used = settings.make_schedule(), settings.make_optimizer()
        else:
            schedule, used = None, optimizer
            if settings.update_in_backward:
                used = Blockwise(optimizer, optimizer)
        self.recipe = Recipe(graph, probes, task, settings, used, schedule, mesh, loss_scale(model))

        self._shapes = jax.eval_shape(self._new_state, params)
        self._shardings = None if mesh is None else meshes.state_shardings(mesh, self._shapes)
        # What is not trained may be most of the model: an argument is not copied into a program.
        self._rest = self._place(rest, None if mesh is None else meshes.state_shardings(mesh, rest))
        self._arrays = self._place(task.arrays())
        self._eval_size = eval_batch_size(task, settings)

        step = functools.partial(train_step, self.recipe)
        if self._stacks:
            step = functools.partial(in_backward.updating_step, self.recipe, self._stacks)
        self._step = jax.jit(
            step,
            donate_argnums=0,
            out_shardings=None if mesh is None else (self._shardings, meshes.replicated(mesh)),
        )
        self._evaluate = jax.jit(self._eval_step)
        self._network_loss = jax.jit(functools.partial(gap.network_loss, self.recipe))

    # -----------------------------------------------------------------------------------------
    # What is run
    # -----------------------------------------------------------------------------------------

    def step(self, state: State, fed: Any = None) -> tuple[State, StepReport]:
        """One optimizer step; ``state`` is used up, ``fed`` is what the host feeds to it."""
        return self._step(state, self._rest, self._with(fed))

    def evaluate(self, params: nnx.State) -> dict[str, float]:
        """Means over the evaluation split."""
        return means(
            self._evaluate(params, self._rest, self._arrays, jnp.int32(i))
            for i in range(-(-self.task.eval_samples // self._eval_size))
        )

    def network_loss(self, state: State, fed: Any = None) -> Float[Array, ""]:
        """The loss without γ of the batch that the next step takes, before it is taken."""
        return self._network_loss(state, self._rest, self._with(fed))

    def _with(self, fed: Any) -> Any:
        """The arrays of a training step."""
        return self._arrays if fed is None else self._arrays | {FED: self._place(fed)}

    def _eval_step(self, params, rest, arrays, i) -> Sums:
        rest = nnx.merge_state(self.recipe.probes, rest)
        model = meshes.merged(self.mesh, self._eval_graph, params, rest)
        return self.task.evaluate(model, self.task.eval_batch(arrays, i, self._eval_size))

    # -----------------------------------------------------------------------------------------
    # States
    # -----------------------------------------------------------------------------------------

    def first_state(self, model: nnx.Module) -> State:
        """The state before the first step, made of the model's own arrays."""
        # A step writes into the arrays of a state: none may be that of a weight that stays.
        others = {id(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))}
        # A dtype of its own rather than a weak one, or the second step would be compiled anew.
        params = jax.tree.map(
            lambda p: (jnp.array if id(p) in others else jnp.asarray)(p, p.dtype),
            nnx.state(model, nnx.Param),
        )
        if self._shardings is None:
            return _unshared(self._place(self._new_state(params)))
        # Each device makes its own part of the optimizer's state: no device may have room for all.
        params = self._place(params, self._shardings.params)
        made = jax.jit(
            lambda params: self._new_state(params)._replace(params=()),
            out_shardings=self._shardings._replace(params=()),
        )(params)
        return _unshared(made._replace(params=params))

    def share_arrays(self, model: nnx.Module, state: State) -> None:
        """Has the model hold the arrays of the programs and of a state, so that none exists twice.

        A step writes into them, after which ``model`` cannot be used until it is given the weights
        of a later state.
        """
        nnx.update(model, state.params, self._rest)

    def abstract_state(self) -> State:
        """Shapes and shardings of a state, to restore into."""
        return self._abstract(self._shapes, self._shardings)

    def _new_state(self, params: nnx.State) -> State:
        settings = self.settings
        key = jax.random.key_data(jax.random.key(settings.seed))
        opt_state = self.recipe.optimizer.init(params)
        if settings.update_in_backward:
            opt_state = in_backward.with_norm(opt_state, settings.clip_norm)
        return State(jnp.int32(0), params, opt_state, key)

    # -----------------------------------------------------------------------------------------
    # Before anything is run
    # -----------------------------------------------------------------------------------------

    def trace(self) -> None:
        """Traces all programs, so that what does not fit fails now; jit remembers the result."""
        try:
            self._trace()
        except TraceContextError as error:
            raise ValueError(
                "the model must be a pure function in training, and cannot write to its variables, "
                f"as batch norms and layers with a random stream of their own do ({error}). Use "
                "layer, group or RMS normalization, and dropout that takes a key "
                "(nnx.Dropout(rate)(x, rngs=nnx.Rngs(key)))"
            ) from error

    def _trace(self) -> None:
        state = self.abstract_state()
        arrays = self._with(self._fed_shapes())
        self._step.eval_shape(state, self._rest, arrays)
        sums = self._evaluate.eval_shape(state.params, self._rest, self._arrays, _INDEX)
        metrics = ["loss", *sums.metrics]
        if (best := self.task.best).removeprefix("-") not in metrics:
            raise ValueError(
                f"best of the task must be one of its metrics, {', '.join(metrics)}, or the same "
                f'with a "-" before it; got {best!r}'
            )
        if self.has_gap:
            self._network_loss.eval_shape(state, self._rest, arrays)

    def compiled_step(self, options: dict[str, str | bool] | None = None) -> jax.stages.Compiled:
        """The training step, compiled for shapes; ``options`` are XLA's."""
        arrays = self._with(self._fed_shapes())
        lowered = self._step.lower(self.abstract_state(), self._rest, arrays)
        return lowered.compile(options)

    def compiled_evaluation(
        self, options: dict[str, str | bool] | None = None
    ) -> jax.stages.Compiled:
        """The evaluation of a batch, compiled for shapes."""
        params = self.abstract_state().params
        return self._evaluate.lower(params, self._rest, self._arrays, _INDEX).compile(options)

    def _fed_shapes(self) -> Any:
        task = self.task
        return task.fed_shapes(self.settings.batch_size) if isinstance(task, Fed) else None

    def trees(self) -> dict[str, Any]:
        """Shapes and shardings of what a step has on the device, besides what it computes."""
        state = self.abstract_state()
        return {
            "parameters": state.params,
            "frozen": self._rest,
            "optimizer": state.opt_state,
            "gradients": without(state.params, self._stacks),
        }

    def _place(self, tree, shardings=None):
        """Puts arrays where ``shardings`` say, or on every device; shapes stay shapes."""
        shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))
        if shapes or self.devices is not None:
            return self._abstract(tree, shardings)
        if self.mesh is None:
            return jax.device_put(tree)
        return jax.device_put(
            tree, meshes.replicated(self.mesh) if shardings is None else shardings
        )

    def _abstract(self, tree, shardings):
        if self.mesh is None:
            devices = self.devices or jax.devices()
            device = jax.sharding.SingleDeviceSharding(devices[0])
            shardings = jax.tree.map(lambda _: device, tree)
        elif shardings is None:
            everywhere = meshes.replicated(self.mesh)
            shardings = jax.tree.map(lambda _: everywhere, tree)
        return jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            tree,
            shardings,
        )


def loss_scale(model: nnx.Module) -> float:
    """What the loss of a model is multiplied by before it is differentiated."""
    configs = (getattr(module, "config", None) for _, module in nnx.iter_modules(model))
    dtypes = {getattr(config, "dtype", None) for config in configs}
    return LOSS_SCALE if "float16" in dtypes else 1.0


_INDEX = jax.ShapeDtypeStruct((), jnp.int32)


def eval_batch_size(task: Task, settings: TrainSettings) -> int:
    """Samples per evaluation batch: by default no more than a step computes at a time.

    What a step needs for its gradients, an evaluation batch of as many samples does without.
    """
    at_a_time = settings.batch_size // settings.accumulate
    size = settings.eval_batch_size or min(task.eval_batch_size, at_a_time)
    return min(size, task.eval_samples)


def means(batches: Iterable[Sums]) -> dict[str, float]:
    """The means over all batches, from the sums of each, which may be on the device."""
    first, *others = (jax.tree.map(float, sums) for sums in jax.device_get([*batches]))
    found = jax.tree.map(lambda *sums: sum(sums), first, *others).means()
    return {name: float(value) for name, value in found.items()}


def _unshared(state: State) -> State:
    """``state`` without an array that is in it twice: a step writes into each of them."""
    seen: set[int] = set()

    def own(leaf):
        if id(leaf) in seen:
            return jnp.array(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, state)
