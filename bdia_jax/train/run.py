"""A run in progress: the loop over steps, and what is told, evaluated and saved in it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from bdia_jax.train import gap, wording
from bdia_jax.train.checkpoints import Checkpoints, score
from bdia_jax.train.errors import raise_if_not_finite, raise_if_wrong, reversibility
from bdia_jax.train.feed import Feed
from bdia_jax.train.memory import peak_bytes
from bdia_jax.train.metrics import MetricsWriter
from bdia_jax.train.pace import Pace
from bdia_jax.train.programs import Programs, means
from bdia_jax.train.result import Result, best_of, evaluations, without_better
from bdia_jax.train.signals import Stop
from bdia_jax.train.step import State, StepReport
from bdia_jax.train.weights import give_back

log = logging.getLogger("bdia_jax")

OnEvaluation = Callable[[nnx.Module, int], Any]
"""Is called with the model as it is after an evaluated step, and the step."""


class Run:
    """A run in progress."""

    def __init__(
        self,
        programs: Programs,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        pace: Pace,
        tell: Callable[[int, str], None],
        state: State,
        step: int,
        feed: Feed | None = None,
    ):
        """``tell`` is that of :func:`bdia_jax.train.run_folder.logging_to`."""
        self.feed = feed
        self.programs, self.checkpoints, self.writer = programs, checkpoints, writer
        self.pace, self.tell, self.metric = pace, tell, programs.task.best
        self.settings, self.state, self.step = programs.settings, state, step
        self.last = self.settings.total_steps
        self.end = min(self.last, self.settings.stop_at or self.last)
        self.history: list[dict[str, Any]] = [*writer.kept]
        self.ending = ""
        """Why no further step is taken."""
        self._pending: list[StepReport] = []
        """Reports that nobody has looked at yet, on the device."""
        self._seen: list[StepReport] = []
        """Reports of steps that went well, and are not written yet."""
        self._network_loss: jax.Array | None = None
        """The loss without γ of the last step's batch, where it was asked for."""
        self._evaluated: dict[str, float] = {}
        """The metrics of the evaluation at this very step, if there was one."""
        self._best_saved = checkpoints.best_score()
        self._without_better = self._count_without_better()

    def until_the_end(
        self,
        model: nnx.Module,
        stop: Stop,
        progress: bool | None,
        on_evaluation: OnEvaluation | None,
    ) -> None:
        """Steps, logs, evaluates and saves until the last step, or an earlier end."""
        from tqdm import tqdm

        s, hidden = self.settings, None if progress is None else not progress
        saved, has_evaluated = self.step, False
        with tqdm(total=self.last, initial=self.step, disable=hidden, unit="step") as self._bar:
            while not self._is_over(stop):
                logs, evaluates, saves = (
                    self.step + 1 == self.end or (self.step + 1) % every == 0
                    for every in (s.log_every, s.eval_every, s.checkpoint_every)
                )
                # With the first step of a call, so that it is compiled before time is taken.
                told = logs or evaluates or saves or not self.pace.has_begun
                self._take_step(with_network_loss=told and self.programs.has_gap)
                self._bar.update()
                if not self.pace.has_begun:
                    self._look_at_first(model)
                if logs:
                    self._log()
                if evaluates:
                    self._evaluate()
                if saves or self._is_best() or self._is_out_of_patience():
                    self._save()
                    saved = self.step
                if evaluates and on_evaluation is not None:
                    self._show(model, on_evaluation)
                if evaluates and not has_evaluated:
                    self.pace.forget()
                    has_evaluated = True
            if self.step > saved:
                # A signal: there may be seconds left, too few for an evaluation.
                self._save()
        log.info("%s", self.ending)

    def _is_over(self, stop: Stop) -> bool:
        """Whether no further step is taken, and why."""
        at = f"at step {self.step} of {self.last}"
        if self.step >= self.last:
            self.ending = f"The run is over, {at}."
        elif self._is_out_of_patience():
            best = best_of(evaluations(self.history), self.metric)
            told = "" if best is None else f"; the best is step {best['step']}"
            self.ending = (
                f"The run stopped early, {at}: the last {self._without_better} evaluations were "
                f"not better than one before them (patience = {self.settings.patience}){told}."
            )
        elif stop or self.step >= self.end:
            why = "it was told to" if stop else f"stop_at = {self.settings.stop_at}"
            self.ending = f"The run stopped {at} ({why}); it can be resumed."
        return bool(self.ending)

    def _take_step(self, with_network_loss: bool) -> None:
        # Before the step, which uses up the weights.
        fed = None if self.feed is None else self.feed.take()
        self._network_loss = (
            self.programs.network_loss(self.state, fed) if with_network_loss else None
        )
        self.state, report = self.programs.step(self.state, fed)
        self.step += 1
        self._evaluated = {}
        self._pending.append(report)
        # At most one step ahead of the device, so that a signal is answered in time.
        if len(self._pending) > 1:
            jax.block_until_ready(self._pending[-2])

    def _look_at_first(self, model: nnx.Module) -> None:
        """The first step of a call shows whether blocks are reversible here, and γ tolerated."""
        self._look()
        (report,) = self._seen
        log.info("%s", reversibility(model, report))
        if self.step == 1 and self._network_loss is not None:
            loss, without = float(report.sums.means()["loss"]), float(self._network_loss)
            if gap.is_far(loss, without, float(report.sums.weight)):
                gap.warn(model, loss, without)
        self.pace.begin(self.step)

    def _look(self) -> None:
        """Fetches the reports since the last time; raises if a step went wrong."""
        reports, self._pending = jax.device_get(self._pending), []
        for i, report in enumerate(reports):
            raise_if_wrong(self.step - len(reports) + 1 + i, report)
        self._seen += reports

    def _log(self) -> None:
        """Writes and tells a line about the steps since the last one."""
        self._look()
        reports, self._seen = self._seen, []
        network_loss, self._network_loss = self._network_loss, None
        if not reports:
            return
        speed = self.pace.lap(self.step, [float(report.sums.weight) for report in reports])
        line = means(report.sums for report in reports)
        if network_loss is not None:
            # Of one batch: the two are to be compared.
            line["batch_loss"] = float(reports[-1].sums.means()["loss"])
            line["network_loss"] = float(network_loss)
        line["grad_norm"] = float(np.mean([report.grad_norm for report in reports]))
        rates = [r.learning_rate for r in reports if r.learning_rate is not None]
        if rates:
            line["learning_rate"] = float(np.mean(rates))
        if backward := [b for report in reports for b in report.backward.values()]:
            line["mismatched"] = float(sum(b.mismatched.sum() for b in backward))
            line["corrected"] = float(sum(b.corrected.sum() for b in backward))
        peak = peak_bytes()
        record = self._write("train", line | speed | ({} if peak is None else {"peak_bytes": peak}))
        self._bar.set_postfix_str(wording.beside_a_bar(record, self.pace.unit))
        left = self.pace.left(self.step, self.end) if self.step < self.end else None
        told = wording.about_training(record, self.last, self.pace.unit, left)
        # A bar shows the same; where there is none, the lines tell that something happens.
        self.tell(logging.INFO if self._bar.disable else logging.DEBUG, told)
        self.checkpoints.sweep()
        self.pace.begin(self.step)

    def _evaluate(self) -> None:
        self._log()
        self._evaluated = self.programs.evaluate(self.state.params)
        raise_if_not_finite(self.step, self._evaluated, {"loss", self.metric.removeprefix("-")})
        record = self._write("eval", self._evaluated)
        self._without_better = self._count_without_better()
        best = best_of(evaluations(self.history), self.metric) or record
        told = wording.about_evaluation(record, self.last, best, self.metric)
        self.tell(logging.INFO, told)
        self.pace.begin(self.step)

    def _is_best(self) -> bool:
        """Whether this step was evaluated, and is better than every checkpoint."""
        return bool(self._evaluated) and score(self.metric, self._evaluated) > self._best_saved

    def _count_without_better(self) -> int:
        return without_better(self.history, self.metric, self.settings.eval_every)

    def _is_out_of_patience(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self._without_better >= patience

    def _show(self, model: nnx.Module, on_evaluation: OnEvaluation) -> None:
        give_back(model, self.state.params)
        model.eval()
        try:
            on_evaluation(model, self.step)
        finally:
            model.train()
        self.pace.begin(self.step)

    def _save(self) -> None:
        # All steps are looked at first: a step that went wrong must never be saved.
        self._log()
        self.writer.sync()
        about: dict[str, Any] = {"seconds": self.pace.seconds()}
        if self.feed is not None:
            about["position"] = self.feed.position
        self.checkpoints.save(self.step, self.state, about, self._evaluated)
        if self._evaluated:
            self._best_saved = max(self._best_saved, score(self.metric, self._evaluated))
        self.pace.begin(self.step)

    def _write(self, split: str, values: dict[str, float]) -> dict[str, Any]:
        seconds = round(self.pace.seconds(), 3)
        record = {"step": self.step, "split": split, "seconds": seconds, **values}
        self.history.append(record)
        self.writer.write(record)
        return record

    def result(self, best_step: int | None) -> Result:
        """What came of the run; ``best_step`` is that of the best checkpoint."""
        best = best_of(evaluations(self.history), self.metric)
        return Result(
            self.step,
            self.history,
            float("nan") if best is None else best[self.metric.removeprefix("-")],
            best_step,
            self.pace.seconds_per_step(),
            self.pace.seconds(),
        )
