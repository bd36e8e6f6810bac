"""The training loop: steps, lines about them, evaluations, checkpoints.

:func:`train` reads from top to bottom: what is refused, what is compiled, the state, the loop, and
what is left behind. :class:`Run` is the loop itself.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from bdia_jax.train import gap
from bdia_jax.train.checkpoints import Checkpoints, score
from bdia_jax.train.errors import raise_if_not_finite, raise_if_wrong, reversibility
from bdia_jax.train.metrics import MetricsWriter
from bdia_jax.train.programs import Programs, means
from bdia_jax.train.run_folder import (
    check_room,
    check_run_folder,
    check_same_run,
    describe_run,
    logging_to,
    make_run_folder,
)
from bdia_jax.train.settings import TrainSettings
from bdia_jax.train.signals import Stop
from bdia_jax.train.step import State, StepReport
from bdia_jax.train.tasks import Task, check_batch_size
from bdia_jax.train.weights import check_trained_dtypes, give_back

log = logging.getLogger("bdia_jax")


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a run."""

    step: int
    """Steps taken, over all continuations."""
    history: list[dict[str, Any]]
    """The records of the whole run, as in metrics.jsonl."""
    best: float
    """The best value of the metric that the task is judged by; NaN without an evaluation."""
    best_step: int | None
    """The best checkpoint of those at steps that were evaluated, which
    :func:`bdia_jax.train.restore_best` reads."""
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

    The arrays of the model are used up, so that every weight is held once: copy what is to be kept
    of the weights before (``jax.tree.map(jnp.copy, nnx.state(model))``). When the function returns,
    or raises, the model has the weights of the last step that was taken.

    Args:
      model: ``task`` says how it is called. Its ``nnx.Param`` are trained.
      task: data, loss and metrics.
      settings: how to train.
      folder: of the run (:mod:`bdia_jax.train.run_folder` says what it will hold).
      resume: continue from the newest checkpoint in ``folder``, if there is one.
      about: settings of the model and the data, saved, and compared when a run is resumed.
      optimizer: instead of the one that ``settings`` names, with its schedule and clipping.
      progress: whether to show a bar; None for: on a terminal.

    Raises:
      ValueError: for settings that do not fit, trained weights of too few bits, or a folder of
        another run; on resuming, steps may be more or fewer with a constant schedule, and how often
        something is done may change.
      FileExistsError: for a folder with a run in it, without ``resume``.
      NotADirectoryError, PermissionError: for a folder that cannot be written. All of these, and
        any error of the model or the task in tracing, before anything is compiled or trained.
      InexactInverseError, NonFiniteError: ``model`` has the parameters before the step that went
        wrong; the last checkpoint is of an earlier one.
      CheckpointError: a checkpoint could not be written or read.
      SystemExit, KeyboardInterrupt: after SIGTERM (with :data:`EXIT_TERMINATED`) and Ctrl-C, when
        all is saved. After a second one, at once.
    """
    main = jax.process_index() == 0
    folder = check_run_folder(folder, resume)
    check_batch_size(task, settings.batch_size)
    if optimizer is None:
        check_trained_dtypes(model, settings)
    described = describe_run(settings, task, about, optimizer is not None)
    check_same_run(folder, described, settings)

    programs = Programs(model, task, settings, optimizer)
    programs.trace()
    check_room(folder, programs.abstract_state(), settings.keep_last)
    make_run_folder(folder, described, main)
    with logging_to(folder, main):
        checkpoints = Checkpoints(folder / "checkpoints", settings.keep_last, task.best)
        writer = run = None
        try:
            restored = checkpoints.restore(programs.abstract_state()) if resume else None
            if restored is None:
                step, state, spent = 0, programs.first_state(model), 0.0
            else:
                step, state, told = restored
                spent = told["seconds"]
                if step > settings.steps:
                    raise ValueError(
                        f"the run in {folder} is at step {step}; got steps={settings.steps}"
                    )
                log.info("resumed at step %d", step)
            programs.share_arrays(model, state)
            writer = MetricsWriter(folder, step, main)
            run = Run(programs, checkpoints, writer, state, step, spent, progress)
            with Stop() as stop:
                run.until_the_end(model, stop)
                checkpoints.wait()
            best_step = checkpoints.best_step()
            checkpoints.close()
            run.tell_if_the_best_is_lost(best_step)
        except BaseException as error:
            # After a second Ctrl-C, nothing is waited for.
            if not isinstance(error, KeyboardInterrupt):
                checkpoints.abandon()
            raise
        finally:
            if writer is not None:
                writer.close()
            if run is not None:
                give_back(model, run.state.params)
    assert run is not None
    stop.leave(run.step)
    return Result(
        run.step, run.history, run.best(), best_step, run.seconds_per_step(), run.seconds()
    )


def evaluate(
    model: nnx.Module, task: Task, *, eval_batch_size: int | None = None
) -> dict[str, float]:
    """Means of the metrics over the evaluation split, in evaluation mode; on one device.

    Args:
      model: its parameters may be of any dtype; it comes back in training mode.
      task: data and metrics.
      eval_batch_size: samples per batch; None for what the task says.
    """
    model.eval()
    graph, state = nnx.split(model)
    model.train()
    size = min(eval_batch_size or task.eval_batch_size, task.eval_samples)

    @jax.jit
    def step(state, arrays, i):
        return task.evaluate(nnx.merge(graph, state), task.eval_batch(arrays, i, size))

    arrays = jax.device_put(task.arrays())
    return means(step(state, arrays, np.int32(i)) for i in range(-(-task.eval_samples // size)))


def training_step(
    model: nnx.Module,
    task: Task,
    settings: TrainSettings,
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[Callable[[State], tuple[State, StepReport]], State]:
    """The step that :func:`train` repeats, compiled when it is first taken, and its first state.

    For measurements, and for loops of one's own. A state is used up by its step; that includes the
    arrays of ``model``, which the first state is made of. Reports are on the device. Arguments as
    in :func:`train`.
    """
    programs = Programs(model, task, settings, optimizer)
    state = programs.first_state(model)
    programs.share_arrays(model, state)
    return programs.step, state


class Run:
    """A run in progress."""

    def __init__(
        self,
        programs: Programs,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        state: State,
        step: int,
        spent: float,
        progress: bool | None,
    ):
        """``spent``: seconds that the run took before it was resumed."""
        self.programs, self.checkpoints, self.writer = programs, checkpoints, writer
        self.settings, self.state, self.step = programs.settings, state, step
        self.history: list[dict[str, Any]] = [*writer.kept]
        self._hide_bar = None if progress is None else not progress
        self._pending: list[StepReport] = []
        """Reports that nobody has looked at yet, on the device."""
        self._seen: list[StepReport] = []
        """Reports of steps that went well, and are not written yet."""
        self._network_loss: jax.Array | None = None
        """The loss without γ of the last step's batch, where it was asked for."""
        self._evaluated: dict[str, float] = {}
        """The metrics of the evaluation at this very step, if there was one."""
        self._times: list[float] = []
        self._clock: tuple[float, int] | None = None
        """When, and at which step, the time of the steps to come began; None before the first."""
        self._began = time.monotonic() - spent

    def until_the_end(self, model: nnx.Module, stop: Stop) -> None:
        """Steps, logs, evaluates and saves until the last step, ``stop_at`` or a signal."""
        from tqdm import tqdm

        s = self.settings
        end, saved = min(s.steps, s.stop_at or s.steps), self.step
        with tqdm(total=s.steps, initial=self.step, disable=self._hide_bar, unit="step") as bar:
            while self.step < end and not stop:
                logs, evaluates, saves = (
                    self.step + 1 == end or (self.step + 1) % every == 0
                    for every in (s.log_every, s.eval_every, s.checkpoint_every)
                )
                told = logs or evaluates or saves or self.step == 0
                self._take_step(with_network_loss=told and self.programs.has_gap)
                bar.update()
                if self._clock is None:
                    self._look_at_first(model)
                if logs:
                    bar.set_postfix(loss=f"{self._log():.4f}")
                if evaluates:
                    self._evaluate()
                if saves:
                    self._save()
                    saved = self.step
        if self.step > saved:
            # A signal: there may be seconds left, too few for an evaluation.
            self._save()

    def _take_step(self, with_network_loss: bool) -> None:
        # Before the step, which uses up the weights.
        self._network_loss = self.programs.network_loss(self.state) if with_network_loss else None
        self.state, report = self.programs.step(self.state)
        self.step += 1
        self._evaluated = {}
        self._pending.append(report)
        # At most one step ahead of the device, so that a signal is answered in time.
        if len(self._pending) > 1:
            jax.block_until_ready(self._pending[-2])

    def _look_at_first(self, model: nnx.Module) -> None:
        """The first step of a call tells whether blocks are reversible here, and γ bearable."""
        self._look()
        (report,) = self._seen
        log.info("%s", reversibility(report))
        if self.step == 1 and self._network_loss is not None:
            loss, without = float(report.sums.means()["loss"]), float(self._network_loss)
            if gap.is_far(loss, without, float(report.sums.weight)):
                gap.warn(model, loss, without)
        self._clock = time.monotonic(), self.step

    def _look(self) -> None:
        """Fetches the reports since the last time; raises if a step went wrong."""
        reports, self._pending = jax.device_get(self._pending), []
        for i, report in enumerate(reports):
            raise_if_wrong(self.step - len(reports) + 1 + i, report)
        self._seen += reports

    def _log(self) -> float:
        """Writes a line about the steps since the last one; their mean loss."""
        self._look()
        reports, self._seen = self._seen, []
        network_loss, self._network_loss = self._network_loss, None
        if not reports:
            return float("nan")
        if self._clock is not None and self.step > self._clock[1]:
            began, first = self._clock
            self._times.append((time.monotonic() - began) / (self.step - first))
        line = means(report.sums for report in reports)
        if network_loss is not None:
            line["network_loss"] = float(network_loss)
        line["grad_norm"] = float(np.mean([report.grad_norm for report in reports]))
        rates = [r.learning_rate for r in reports if r.learning_rate is not None]
        if rates:
            line["learning_rate"] = float(np.mean(rates))
        backward = [b for report in reports for b in report.backward.values()]
        line["mismatched"] = float(sum(b.mismatched.sum() for b in backward))
        line["corrected"] = float(sum(b.corrected.sum() for b in backward))
        self._write("train", line)
        self.checkpoints.sweep()
        self._clock = time.monotonic(), self.step
        return line["loss"]

    def _evaluate(self) -> None:
        self._log()
        self._evaluated = self.programs.evaluate(self.state.params)
        best = self.programs.task.best.removeprefix("-")
        raise_if_not_finite(self.step, self._evaluated, {"loss", best})
        self._write("eval", self._evaluated)
        self._clock = time.monotonic(), self.step

    def _save(self) -> None:
        # All steps are looked at first: a step that went wrong must never be saved.
        self._log()
        self.writer.sync()
        about = {"seconds": self.seconds()}
        self.checkpoints.save(self.step, self.state, about, self._evaluated)
        self._clock = time.monotonic(), self.step

    def _write(self, split: str, values: dict[str, float]) -> None:
        record = {"step": self.step, "split": split, "seconds": round(self.seconds(), 3), **values}
        self.history.append(record)
        self.writer.write(record)

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def seconds_per_step(self) -> float:
        return float(np.median(self._times)) if self._times else float("nan")

    def best(self) -> float:
        metric = self.programs.task.best
        name = metric.removeprefix("-")
        return max(self._evaluations(), key=lambda r: score(metric, r), default={name: np.nan})[
            name
        ]

    def tell_if_the_best_is_lost(self, saved: int | None) -> None:
        """Warns if the best evaluation was at a step without a checkpoint.

        Args:
          saved: the step of the best checkpoint; None if there is none that was evaluated.
        """
        metric = self.programs.task.best
        name = metric.removeprefix("-")
        values = {r["step"]: r[name] for r in self._evaluations()}
        best = max(values, key=lambda step: score(metric, {name: values[step]}), default=None)
        if best is None or (saved is not None and values[saved] == values[best]):
            return
        log.warning(
            "the best evaluation, %s %.4g at step %d, is of a step without a checkpoint; %s. To "
            "keep the best, save wherever you evaluate: eval_every = %d, checkpoint_every = %d",
            name,
            values[best],
            best,
            "no evaluated step has one"
            if saved is None
            else f"the best that was saved is {values[saved]:.4g} at step {saved}",
            self.settings.eval_every,
            self.settings.checkpoint_every,
        )

    def _evaluations(self) -> list[dict[str, Any]]:
        return [record for record in self.history if record["split"] == "eval"]
