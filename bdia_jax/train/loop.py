"""The training loop: one jitted step, metrics, checkpoints, and a stop when numbers go wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Int32, Key, PyTree, UInt32

from bdia_jax.files import write_json
from bdia_jax.nn.stack import Probe
from bdia_jax.pinning import several_devices
from bdia_jax.planning import memory
from bdia_jax.train import in_backward, optimizers
from bdia_jax.train import mesh as meshes
from bdia_jax.train.checkpoints import Checkpoints, score
from bdia_jax.train.metrics import MetricsWriter
from bdia_jax.train.tasks import Task

log = logging.getLogger("bdia_jax")

EXIT_TERMINATED = 143
"""Exit status after SIGTERM (128 + 15): the state was saved, and the run can be resumed.

For one process; several would have to agree on the step.
"""


class InexactInverseError(RuntimeError):
    """The backward pass did not reconstruct the states of the forward pass to the last bit."""


class NonFiniteError(RuntimeError):
    """The loss, the gradient, or an evaluation was not finite."""


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train."""

    steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int = 128
    """Samples per step."""
    accumulate: int = 1
    """Micro-batches that a batch is computed in, one after the other; divides batch_size."""
    optimizer: str = "adamw"
    """adam, adamw, set-adam, or sgd (momentum 0.9)."""
    learning_rate: float = 1e-3
    """Highest learning rate."""
    schedule: str = "cosine"
    """constant, or cosine: half a cosine to 0 at the last step."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Weight decay; adamw only."""
    clip_norm: float | None = 1.0
    """The gradient is scaled down to this global norm; None for no clipping."""
    update_in_backward: bool = False
    """Update a block as soon as its gradient is known, so that the gradient of all blocks never
    exists; for method bdia. Should a step go wrong, a block whose gradient is not finite is left
    as it is, but those above it have taken the step: go on from the last checkpoint."""
    clip_by: Literal["previous", "second-pass"] = "previous"
    """With update_in_backward, clip by the previous step's norm (which is nearly this one's, and
    free), or find this one's in a backward pass of its own (which costs another step)."""
    seed: int = 0
    """Of order, augmentation, dropout and γ (the initialization has a seed of its own)."""
    log_every: int = 50
    """Steps between lines about training; errors are noticed at that rate, too. (There is a line
    at evaluations and checkpoints as well.)"""
    eval_every: int = 500
    """Steps between evaluations; there is one at the end in any case."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is one at the end in any case."""
    keep_last: int = 2
    """Checkpoints kept, besides the best of those at steps that were evaluated."""
    stop_at: int | None = None
    """Save and leave after this step, to be resumed later."""
    mesh: str | None = None
    """Devices, such as data=4,fsdp=2: batches over both, parameters over fsdp."""

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep_last",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int >= 1; got {value!r}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate must divide batch_size = {self.batch_size}; got {self.accumulate}"
            )
        if self.optimizer not in optimizers.OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(optimizers.OPTIMIZERS)}; "
                f"got {self.optimizer!r}"
            )
        if self.schedule not in optimizers.SCHEDULES:
            raise ValueError(
                f"schedule must be one of {', '.join(optimizers.SCHEDULES)}; got {self.schedule!r}"
            )
        for name, allowed in (
            ("learning_rate", "positive"),
            ("weight_decay", "0 or positive"),
            ("clip_norm", "positive, or None"),
        ):
            value = getattr(self, name)
            if name == "clip_norm" and value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be finite and {allowed}; got {value!r}")
            if value == 0 and name != "weight_decay":
                raise ValueError(f"{name} must be {allowed}; got {value!r}")
        for name in ("warmup_steps", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an int; got {value!r}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"warmup_steps must lie in [0, steps = {self.steps}]; got {self.warmup_steps}"
            )
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(
                f"weight_decay is for optimizer='adamw'; got {self.weight_decay} with "
                f"{self.optimizer!r}"
            )
        if self.stop_at is not None and self.stop_at < 1:
            raise ValueError(f"stop_at must be >= 1, or None; got {self.stop_at}")
        if self.clip_by not in ("previous", "second-pass"):
            raise ValueError(f"clip_by must be previous or second-pass; got {self.clip_by!r}")
        if self.update_in_backward and self.accumulate > 1:
            raise ValueError(
                "update_in_backward uses a gradient up at once, and cannot accumulate: allowed is "
                f"accumulate=1; got {self.accumulate}"
            )


# May differ between a run and its continuation: they change neither the parameters that come out
# nor their order in time. (On another mesh sums are rounded otherwise: equal to float tolerance.)
_HARMLESS = ("log_every", "eval_every", "checkpoint_every", "keep_last", "stop_at", "mesh")


class State(NamedTuple):
    """All that a step changes, and the key from which it draws; this is what is saved.

    The position in the data is a function of the key and the step. A step that goes wrong changes
    nothing, ``step`` included: it is what every later one repeats, until the loop notices.
    """

    step: Int32[Array, ""]
    params: nnx.State
    opt_state: PyTree[Array]
    key: UInt32[Array, "words"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a run."""

    step: int
    """Steps taken, over all continuations."""
    history: list[dict[str, Any]]
    """The records of the whole run, as in metrics.jsonl."""
    best: float
    """The best value of the metric that the task is judged by; NaN without an evaluation."""
    seconds_per_step: float
    """Median over the steps of this call, evaluation and compilation left out; NaN if too few."""
    seconds: float
    """Wall-clock time over all continuations."""

    def last(self, split: str, metric: str) -> float:
        """The last value of a metric; KeyError if there is none."""
        for record in reversed(self.history):
            if record["split"] == split and metric in record:
                return record[metric]
        raise KeyError(f"no record of {split} {metric}")


def train(
    model: nnx.Module,
    task: Task,
    settings: TrainSettings,
    folder: str | pathlib.Path,
    *,
    resume: bool = False,
    about: dict[str, Any] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    progress: bool | None = None,
) -> Result:
    """Trains ``model`` in place.

    A run that is stopped, by ``stop_at``, a signal or a power cut, and resumed ends with the same
    parameters, bit for bit, as one that was not.

    Args:
      model: ``task`` says how it is called. Its ``nnx.Param`` are trained.
      task: data, loss and metrics.
      settings: how to train.
      folder: of the run: ``settings.json``, ``metrics.jsonl``, ``tensorboard``, ``checkpoints``.
      resume: continue from the newest checkpoint in ``folder``, if there is one.
      about: settings of the model and the data, saved, and compared when a run is resumed.
      optimizer: instead of the one that ``settings`` names, with its schedule and clipping.
      progress: whether to show a bar; None for: on a terminal.

    Raises:
      ValueError: for settings that do not fit, or a folder of another run; on resuming, steps may
        be more or fewer with a constant schedule, and how often something is done may change.
      FileExistsError: for a folder with a run in it, without ``resume``.
      NotADirectoryError, PermissionError: for a folder that cannot be written. All of these, and
        any error of the model or the task in tracing, before anything is compiled or trained.
      InexactInverseError, NonFiniteError: ``model`` has the parameters before the step that went
        wrong; the last checkpoint is of an earlier one.
      CheckpointError: a checkpoint could not be written or read.
      SystemExit: with :data:`EXIT_TERMINATED`, after SIGTERM, when all is saved.
    """
    folder = pathlib.Path(folder).expanduser()
    main = jax.process_index() == 0
    described = _settings(settings, task, about, optimizer)
    _check_folder(folder, resume, described, settings)

    programs = _programs(model, task, settings, optimizer)
    programs.trace()
    _make_folder(folder, described, main)
    checkpoints = Checkpoints(folder / "checkpoints", settings.keep_last, task.best)
    writer, run = None, None
    try:
        state, step, spent = programs.initial_state(), 0, 0.0
        if resume and (restored := checkpoints.restore(programs.abstract_state())) is not None:
            step, state, told = restored
            spent = told["seconds"]
            if step > settings.steps:
                raise ValueError(
                    f"the run in {folder} is at step {step}; got steps={settings.steps}"
                )
            log.info("resumed at step %d", step)
        writer = MetricsWriter(folder, step, main)
        run = _Run(programs, checkpoints, writer, state, step, spent, progress)
        with _Terminated() as terminated:
            run.until(settings, terminated)
            checkpoints.close()
    except BaseException as error:
        if isinstance(error, (InexactInverseError, NonFiniteError)):
            nnx.update(model, run.state.params)
        checkpoints.abandon()
        raise
    finally:
        if writer is not None:
            writer.close()
    nnx.update(model, run.state.params)
    if terminated:
        raise SystemExit(EXIT_TERMINATED)
    return Result(run.step, run.history, run.best(), run.seconds_per_step(), run.seconds())


def evaluate(model: nnx.Module, task: Task) -> dict[str, float]:
    """Means of the metrics over the evaluation split, in evaluation mode; on one device."""
    model.eval()
    graph, state = nnx.split(model)
    model.train()

    @jax.jit
    def step(state, arrays, i):
        return task.evaluate(nnx.merge(graph, state), arrays, i)

    arrays = jax.device_put(task.arrays())
    return _means(step(state, arrays, jnp.int32(i)) for i in range(task.eval_steps()))


class StepMemory(NamedTuple):
    """Bytes of a training step, per device."""

    parameters: int
    """Trained weights."""
    frozen: int
    """The rest of the model."""
    optimizer: int
    """The optimizer's state."""
    gradients: int
    """Of all weights that are not updated in the backward pass."""
    batch_shards: int
    """Into how many parts a batch is split."""
    memory: memory.Memory
    """All of it, as compiled."""


def step_memory(
    model: nnx.Module,
    task: Task,
    settings: TrainSettings,
    optimizer: optax.GradientTransformation | None = None,
    *,
    compiler_options: dict[str, str] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> StepMemory:
    """What a training step will need, by compiling it for shapes; nothing is run.

    Args:
      model: may be abstract: ``nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))``.
      task, settings, optimizer: as in :func:`train`.
      compiler_options: for XLA.
      devices: to compile for, which need not be there (``jax.experimental.topologies``); None for
        those that are.
    """
    return _programs(model, task, settings, optimizer, devices).memory(compiler_options)


def training_step(
    model: nnx.Module,
    task: Task,
    settings: TrainSettings,
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[Callable[[State], tuple[State, dict[str, Any]]], State]:
    """The step that :func:`train` repeats, compiled when it is first taken, and its first state.

    For measurements, and for loops of one's own. A state is used up by its step; metrics are
    arrays on the device. Arguments as in :func:`train`.
    """
    programs = _programs(model, task, settings, optimizer)
    return programs.step, programs.initial_state()


def _bytes_per_device(leaf) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 0
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _means(batches: Iterable[tuple[dict[str, Array], Array]]) -> dict[str, float]:
    """Of metrics, from their sums over batches and the numbers of samples."""
    sums, count = {}, 0.0
    for batch_sums, batch_count in jax.device_get([*batches]):
        count += float(batch_count)
        for name, value in batch_sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return {name: value / count for name, value in sums.items()}


# ---------------------------------------------------------------------------------------------
# The compiled programs
# ---------------------------------------------------------------------------------------------


def _programs(model, task: Task, settings: TrainSettings, optimizer, elsewhere=None) -> _Programs:
    """With the optimizer and on the mesh of the settings; maybe for devices that are not there."""
    mesh = meshes.parse_mesh(settings.mesh, elsewhere)
    if mesh is not None and settings.batch_size // settings.accumulate % mesh.size:
        raise ValueError(
            f"the {mesh.size} devices of mesh {settings.mesh!r} must divide a micro-batch of "
            f"{settings.batch_size // settings.accumulate} samples"
        )
    schedule = None
    if optimizer is None:
        schedule = optimizers.make_schedule(
            settings.schedule, settings.learning_rate, settings.steps, settings.warmup_steps
        )
        optimizer = optimizers.make_optimizer(
            settings.optimizer,
            schedule,
            weight_decay=settings.weight_decay,
            clip_norm=None if settings.update_in_backward else settings.clip_norm,
        )
    return _Programs(model, task, settings, optimizer, schedule, mesh, elsewhere)


class _Programs:
    """The training step and the evaluation step of a model, compiled once each."""

    def __init__(self, model, task: Task, settings, optimizer, schedule, mesh, elsewhere=None):
        model.eval()
        self._eval_graph = nnx.split(model, nnx.Param, ...)[0]
        model.train()
        self._graph, self._params, probes, rest = nnx.split(model, nnx.Param, Probe, ...)
        # Of an abstract model, too: they are zeros.
        self._probes = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), probes)
        self._depths = in_backward.depths(model) if settings.update_in_backward else {}
        self._task, self._settings, self._optimizer = task, settings, optimizer
        self._schedule, self._mesh, self._elsewhere = schedule, mesh, elsewhere
        self.task = task
        self._arrays = self._place(task.arrays())
        shardings = None
        if mesh is not None:
            shardings = meshes.state_shardings(mesh, self._shapes())
        self._shardings = shardings
        # What is not trained may be most of the model; given to the programs as an argument, it
        # is not copied into them.
        self._rest = self._place(rest, None if mesh is None else meshes.state_shardings(mesh, rest))
        self.train_step = jax.jit(
            self._train_step,
            donate_argnums=0,
            out_shardings=None if mesh is None else (shardings, meshes.replicated(mesh)),
        )
        self.eval_step = jax.jit(self._eval_step)

    def _place(self, tree, shardings=None):
        """On the device: where ``shardings`` say, or on every one; shapes stay shapes."""
        shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))
        if shapes or self._elsewhere is not None:
            return self._abstract(tree, shardings)
        if self._mesh is None:
            return jax.device_put(tree)
        return jax.device_put(
            tree, meshes.replicated(self._mesh) if shardings is None else shardings
        )

    def _new_state(self, params) -> State:
        key = jax.random.key_data(jax.random.key(self._settings.seed))
        opt_state = self._optimizer.init(params)
        if self._settings.update_in_backward and self._settings.clip_norm is not None:
            # There is no step before the first: it is not clipped.
            opt_state = {"optimizer": opt_state, "norm": jnp.float32(self._settings.clip_norm)}
        return State(jnp.int32(0), params, opt_state, key)

    def _shapes(self) -> State:
        return jax.eval_shape(self._new_state, self._params)

    def initial_state(self) -> State:
        """The state before the first step."""
        # Copied, because steps overwrite it in place and the model keeps its own; with a dtype
        # of its own rather than a weak one, or the second step would be compiled anew.
        state = self._new_state(jax.tree.map(lambda p: jnp.array(p, p.dtype), self._params))
        return self._place(state, self._shardings)

    def trace(self) -> None:
        """Traces both programs, so that what does not fit fails now; jit remembers the result."""
        state = self.abstract_state()
        self.train_step.eval_shape(state, self._rest, self._arrays)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        self.eval_step.eval_shape(state.params, self._rest, self._arrays, step)

    def abstract_state(self) -> State:
        """Shapes and shardings, to restore into."""
        return self._abstract(self._shapes(), self._shardings)

    def _abstract(self, tree, shardings):
        if self._mesh is None:
            devices = self._elsewhere or jax.devices()
            device = jax.sharding.SingleDeviceSharding(devices[0])
            shardings = jax.tree.map(lambda _: device, tree)
        elif shardings is None:
            shardings = jax.tree.map(lambda _: meshes.replicated(self._mesh), tree)
        return jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            tree,
            shardings,
        )

    def memory(self, compiler_options: dict[str, str] | None) -> StepMemory:
        """What the training step needs."""
        state = self.abstract_state()
        one = self._mesh is None or self._mesh.size == 1
        with contextlib.nullcontext() if one else several_devices():
            lowered = self.train_step.lower(state, self._rest, self._arrays)
        compiled = lowered.compile(compiler_options)
        d_params = in_backward.without(state.params, self._depths)
        trees = state.params, self._rest, state.opt_state, d_params
        return StepMemory(
            *(sum(map(_bytes_per_device, jax.tree.leaves(tree))) for tree in trees),
            1 if self._mesh is None else self._mesh.size,
            memory.compiled_memory(compiled),
        )

    def step(self, state: State) -> tuple[State, dict[str, Array]]:
        """One optimizer step; ``state`` is used up."""
        return self.train_step(state, self._rest, self._arrays)

    def evaluate(self, params: nnx.State) -> dict[str, float]:
        """Means over the evaluation split."""
        return _means(
            self.eval_step(params, self._rest, self._arrays, jnp.int32(i))
            for i in range(self._task.eval_steps())
        )

    def _train_step(self, state: State, rest, arrays) -> tuple[State, dict[str, Array]]:
        settings = self._settings
        key = jax.random.wrap_key_data(state.key)
        data_key, model_key = jax.random.split(key)
        batch = self._task.batch(arrays, data_key, state.step, settings.batch_size)
        if settings.update_in_backward:
            return self._updating_step(state, rest, batch, model_key)

        def loss(params, probes, part, key: Key[Array, ""]):
            model = nnx.merge(self._graph, params, probes, rest)
            return self._task.loss(model, part, key)

        def part_gradient(total, part_and_key):
            part, key = part_and_key
            if self._mesh is not None:
                part = jax.lax.with_sharding_constraint(part, meshes.batch_sharding(self._mesh))
            (value, metrics), (grads, report) = jax.value_and_grad(
                loss, argnums=(0, 1), has_aux=True
            )(state.params, self._probes, part, key)
            return jax.tree.map(jnp.add, total, grads), ({"loss": value, **metrics}, report)

        parts = settings.accumulate
        keys = jax.random.split(jax.random.fold_in(model_key, state.step), parts)
        if parts == 1:
            zeros = jax.tree.map(lambda p: 0, state.params)
            grads, (metrics, report) = part_gradient(zeros, (batch, keys[0]))
        else:
            batch = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), batch)
            # Summed in float32 (or wider), or the sum in bfloat16 would forget small parts.
            zeros = jax.tree.map(
                lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), state.params
            )
            grads, (metrics, report) = jax.lax.scan(part_gradient, zeros, (batch, keys))
            grads = jax.tree.map(lambda g, p: (g / parts).astype(p.dtype), grads, state.params)
            metrics = jax.tree.map(lambda m: m.mean(), metrics)
            report = jax.tree.map(lambda r: r.sum(axis=0), report)

        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        norm = optax.tree.norm(grads)
        fine, metrics = self._judged(metrics, norm, report, state.step)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(fine, new, old),
            (optax.apply_updates(state.params, updates), opt_state),
            (state.params, state.opt_state),
        )
        step = state.step + fine.astype(jnp.int32)
        return State(step, params, opt_state, state.key), metrics

    def _judged(self, metrics, norm, report, step) -> tuple[Bool[Array, ""], dict[str, Any]]:
        """Whether a step went well, and all that is told of it."""
        reports = {
            ".".join(map(str, path)): variable.get_value()
            for path, variable in nnx.to_flat_state(report)
        }
        fine = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        for stack in reports.values():
            fine &= ~jnp.any(stack.mismatched != 0)
        metrics = metrics | {"grad_norm": norm, "reports": reports}
        if self._schedule is not None:
            metrics["learning_rate"] = jnp.float32(self._schedule(step))
        return fine, metrics

    def _updating_step(self, state: State, rest, batch, model_key):
        """The same, but blocks are updated in the backward pass."""
        settings = self._settings
        (key,) = jax.random.split(jax.random.fold_in(model_key, state.step), 1)
        if self._mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, meshes.batch_sharding(self._mesh))
        whole = state.opt_state if settings.clip_norm is None else state.opt_state["optimizer"]

        def passes(step_of_block):
            """Loss and gradients, or in their place what became of the blocks."""
            slots = {
                path: (in_backward.part(whole, path), jnp.zeros(self._depths[path]))
                for path in self._depths
            }

            def loss(params, probes, slots):
                model = nnx.merge(self._graph, params, probes, rest)
                for path, slot in slots.items():
                    in_backward.install(model, path, slot, step_of_block)
                return self._task.loss(model, batch, key)

            return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
                state.params, self._probes, slots
            )

        def norm_of(grads, slots) -> Float[Array, ""]:
            squares = sum(jnp.sum(squares) for _, squares in slots.values())
            others = in_backward.without(grads, self._depths)
            return jnp.sqrt(squares + optax.tree.norm(others) ** 2)

        scale = 1.0
        if settings.clip_norm is not None:
            norm = state.opt_state["norm"]
            if settings.clip_by == "second-pass":
                _, (grads, _, slots) = passes(None)
                norm = norm_of(grads, slots)
            scale = jnp.minimum(1.0, settings.clip_norm / norm)
        step_of_block = in_backward.BlockStep(self._optimizer, whole, scale)
        (value, metrics), (grads, report, slots) = passes(step_of_block)
        norm = norm_of(grads, slots)
        fine, metrics = self._judged({"loss": value, **metrics}, norm, report, state.step)

        others, others_state, d_others = (
            in_backward.without(tree, self._depths) for tree in (state.params, whole, grads)
        )
        d_others = jax.tree.map(lambda d: d * jnp.asarray(scale, d.dtype), d_others)
        updates, new_state = self._optimizer.update(d_others, others_state, others)
        new, new_state = jax.tree.map(
            lambda new, old: jnp.where(fine, new, old),
            (optax.apply_updates(others, updates), new_state),
            (others, others_state),
        )
        params = in_backward.joined(new, {path: in_backward.at(grads, path) for path in slots})
        opt_state = in_backward.joined(new_state, {path: s for path, (s, _) in slots.items()})
        if settings.clip_norm is not None:
            previous = jnp.where(fine, norm, state.opt_state["norm"])
            opt_state = {"optimizer": opt_state, "norm": previous}
        step = state.step + fine.astype(jnp.int32)
        return State(step, params, opt_state, state.key), metrics

    def _eval_step(self, params, rest, arrays, i):
        model = nnx.merge(self._eval_graph, params, nnx.merge_state(self._probes, rest))
        return self._task.evaluate(model, arrays, i)


# ---------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------


class _Run:
    """A run in progress."""

    def __init__(self, programs: _Programs, checkpoints, writer, state, step, spent, progress):
        self.programs, self.checkpoints, self.writer = programs, checkpoints, writer
        self.state, self.step, self.progress = state, step, progress
        self.history: list[dict[str, Any]] = [*writer.kept]
        self._pending: list[dict[str, Any]] = []
        """Metrics of steps not looked at yet, on the device."""
        self._seen: list[dict[str, Any]] = []
        """Metrics of steps looked at, but not written yet."""
        self._times: list[float] = []
        self._clock: tuple[float, int] | None = None
        """When, and at which step, the time of the steps to come began; None before the first."""
        self._began = time.monotonic() - spent
        self._metrics: dict[str, float] = {}
        """Of the evaluation at this very step, if there was one."""

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def seconds_per_step(self) -> float:
        return float(np.median(self._times)) if self._times else float("nan")

    def best(self) -> float:
        metric = self.programs.task.best
        name = metric.removeprefix("-")
        records = [r for r in self.history if r["split"] == "eval"]
        return max(records, key=lambda r: score(metric, r))[name] if records else float("nan")

    def until(self, settings: TrainSettings, terminated: _Terminated) -> None:
        """Steps, logs, evaluates and saves until the end, ``stop_at`` or SIGTERM."""
        from tqdm import tqdm

        end = min(settings.steps, settings.stop_at or settings.steps)
        hidden = None if self.progress is None else not self.progress
        saved = self.step
        with tqdm(total=settings.steps, initial=self.step, disable=hidden, unit="step") as bar:
            while self.step < end and not terminated:
                self.state, metrics = self.programs.step(self.state)
                self._pending.append(metrics)
                self._metrics = {}
                self.step += 1
                # At most one step ahead of the device, so that SIGTERM is answered in time.
                if len(self._pending) > 1:
                    jax.block_until_ready(self._pending[-2])
                bar.update()
                last = self.step == end
                if self._clock is None:
                    self._first()
                if last or self.step % settings.log_every == 0:
                    bar.set_postfix(loss=f"{self._log():.4f}")
                if last or self.step % settings.eval_every == 0:
                    self._evaluate()
                if last or self.step % settings.checkpoint_every == 0:
                    self._save()
                    saved = self.step
        if self.step > saved:
            # SIGTERM: there may be seconds left, which is too few for an evaluation.
            self._save()

    def _first(self) -> None:
        """The first step's report tells whether the blocks are reversible here."""
        self._look()
        log.info(_reversibility(self._seen[0]["reports"].values()))
        self._clock = time.monotonic(), self.step

    def _look(self) -> None:
        """Fetches the metrics of the steps since the last time; raises if one went wrong."""
        steps, self._pending = jax.device_get(self._pending), []
        for i, metrics in enumerate(steps):
            _raise_if_wrong(self.step - len(steps) + 1 + i, metrics)
        self._seen += steps

    def _log(self) -> float:
        """Writes a line about the steps since the last one; their mean loss."""
        self._look()
        steps, self._seen = self._seen, []
        if not steps:
            return float("nan")
        began, first = self._clock
        if self.step > first:
            self._times.append((time.monotonic() - began) / (self.step - first))
        reports = [report for metrics in steps for report in metrics.pop("reports").values()]
        means = {name: float(np.mean([m[name] for m in steps])) for name in steps[0]}
        for name in ("mismatched", "corrected"):
            means[name] = float(sum(getattr(report, name).sum() for report in reports))
        self._write("train", means)
        self._clock = time.monotonic(), self.step
        return means["loss"]

    def _evaluate(self) -> None:
        self._log()
        self._metrics = self.programs.evaluate(self.state.params)
        for name in {"loss", self.programs.task.best.removeprefix("-")} & {*self._metrics}:
            if not math.isfinite(self._metrics[name]):
                raise NonFiniteError(
                    f"step {self.step}: {name} is {self._metrics[name]} in evaluation, although "
                    "the steps of training were finite. A state left the range of the grid, "
                    "±2**(30 - frac_bits) (lower frac_bits), or the network diverges (lower the "
                    "learning rate)"
                )
        self._write("eval", self._metrics)
        self._clock = time.monotonic(), self.step

    def _save(self) -> None:
        # Looks at all steps first: what went wrong must never be saved.
        self._log()
        self.writer.sync()
        self.checkpoints.save(self.step, self.state, {"seconds": self.seconds()}, self._metrics)
        self._clock = time.monotonic(), self.step

    def _write(self, split: str, values: dict[str, float]) -> None:
        record = {"step": self.step, "split": split, "seconds": round(self.seconds(), 3), **values}
        self.history.append(record)
        self.writer.write(record)


def _raise_if_wrong(step: int, metrics: dict[str, Any]) -> None:
    for stack, report in metrics["reports"].items():
        if report.mismatched.any():
            wrong = np.flatnonzero(report.mismatched)
            raise InexactInverseError(
                f"step {step}: in the backward pass through {stack.removesuffix('.probe')}, the "
                f"input of block {wrong[-1]} was not reconstructed to the last bit for "
                f"{int(report.mismatched[wrong[-1]])} samples (mismatches in {len(wrong)} of "
                f"{report.mismatched.size} blocks: an error is passed down). The gradients are "
                "NaN, and the step was not taken. The block was "
                "computed differently the second time: set tolerance_bits=1 (or more; "
                "bdia_jax.check_reversible on your block says how many), or make the hardware "
                'deterministic (XLA_FLAGS="--xla_gpu_deterministic_ops=true")'
            )
    if not np.isfinite(metrics["loss"]):
        raise NonFiniteError(
            f"step {step}: the loss is {metrics['loss']}, and the step was not taken. Either it "
            "diverged (lower the learning rate, clip the gradient), or a state left the range of "
            "the grid, ±2**(30 - frac_bits) (lower frac_bits)"
        )
    if not np.isfinite(metrics["grad_norm"]):
        raise NonFiniteError(
            f"step {step}: the gradient is not finite, the loss is ({metrics['loss']:.4g}); the "
            "step was not taken. All states were reconstructed exactly: the derivative of a block "
            "overflows (lower the learning rate, or compute in bfloat16 or float32)"
        )


def _reversibility(reports) -> str:
    states = sum(report.mismatched.size for report in reports)
    if not states:
        return "no reversible blocks"
    mismatched = sum(report.mismatched.sum() for report in reports)
    corrected = sum(report.corrected.sum() for report in reports)
    return (
        f"reversible blocks: {states}; in the first step {mismatched:.0f} states mismatched, "
        f"{corrected:.0f} roundings corrected"
    )


class _Terminated:
    """Whether SIGTERM came; while it is entered, the signal only sets it."""

    def __init__(self):
        self._came = False

    def __bool__(self) -> bool:
        return self._came

    def __enter__(self) -> _Terminated:
        # Handlers can be set in the main thread only; elsewhere the signal has its usual effect.
        self._usable = threading.current_thread() is threading.main_thread()
        if self._usable:
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def _handle(self, *_) -> None:
        log.warning("SIGTERM: saving, then leaving with status %d", EXIT_TERMINATED)
        self._came = True

    def __exit__(self, *_) -> None:
        if self._usable:
            signal.signal(signal.SIGTERM, self._previous)


# ---------------------------------------------------------------------------------------------
# The folder of a run
# ---------------------------------------------------------------------------------------------


def _settings(settings: TrainSettings, task: Task, about, optimizer) -> dict[str, Any]:
    """As they come back from JSON, to compare with those of a saved run."""
    training = dataclasses.asdict(settings)
    if optimizer is not None:
        training["optimizer"] = "one given to train()"
    everything = {"train": training, "data": task.name, **(about or {})}
    return json.loads(json.dumps(everything, default=str))


def _check_folder(
    folder: pathlib.Path, resume: bool, described: dict[str, Any], settings: TrainSettings
) -> None:
    """Checks that the folder is empty, or what is in it is this run."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"the folder of the run must be a folder; {folder} is a file")
    path = folder / "settings.json"
    if not path.exists():
        # A process killed at its very start leaves a settings.json.tmp.
        if folder.exists() and {p.name for p in folder.iterdir()} - {"settings.json.tmp"}:
            raise FileExistsError(f"{folder} is not empty, and holds no run; give another folder")
        return
    if not resume:
        raise FileExistsError(
            f"there is a run in {folder}; continue it with resume=True (--resume), or give "
            "another folder"
        )
    try:
        found = dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} can't be read, so this may be another run: {error}") from error
    # What there was no setting for then, was done as by default now.
    defaults = json.loads(json.dumps(dataclasses.asdict(TrainSettings())))
    found = found | {"train": defaults | found.get("train", {})}
    # With a constant schedule, the number of steps changes none of them. Nor does the number of
    # stored blocks, whatever the model is described by.
    harmless = {*_HARMLESS, *(["steps"] if settings.schedule == "constant" else [])}
    differences = [
        f"{name}: {old!r} there, {new!r} now"
        for name, old, new in _differences(found, described)
        if name not in {f"train.{h}" for h in harmless} and not name.endswith(".stored_blocks")
    ]
    if differences:
        raise ValueError(f"the run in {folder} is another one: {'; '.join(differences)}")


def _make_folder(folder: pathlib.Path, described: dict[str, Any], main: bool) -> None:
    if jax.process_count() > 1:
        # No process may find the folder that another one has just made.
        multihost_utils.sync_global_devices("bdia_jax: folder checked")
    if main:
        try:
            write_json(folder / "settings.json", described)
        except OSError as error:
            raise PermissionError(f"the folder of the run cannot be written: {error}") from error


def _differences(old: Any, new: Any, name: str = ""):
    """All leaves at which two trees of dicts differ: name, old and new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(
                old.get(key, "nothing"), new.get(key, "nothing"), f"{name}.{key}".lstrip(".")
            )
    elif old != new:
        yield name, old, new
