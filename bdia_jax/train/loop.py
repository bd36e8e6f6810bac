"""Training from beginning to end: what is refused, compiled, restored, run, and left behind.

The loop itself is :class:`bdia_jax.train.run.Run`.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
from typing import Any

import jax
import optax
from flax import nnx

from bdia_jax.train import weights_and_biases, wording
from bdia_jax.train.checkpoints import Checkpoints
from bdia_jax.train.epochs import in_steps
from bdia_jax.train.feed import Feed
from bdia_jax.train.metrics import MetricsWriter
from bdia_jax.train.pace import Pace
from bdia_jax.train.programs import Programs
from bdia_jax.train.report import write_report
from bdia_jax.train.result import Result
from bdia_jax.train.run import OnEvaluation, Run
from bdia_jax.train.run_folder import (
    check_room,
    check_run_folder,
    check_same_run,
    describe_run,
    locked,
    logging_to,
    make_run_folder,
)
from bdia_jax.train.settings import TrainSettings
from bdia_jax.train.signals import Stop
from bdia_jax.train.tasks import Fed, Task, check_batch_size
from bdia_jax.train.weights import check_trained_dtypes, give_back

log = logging.getLogger("bdia_jax")


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
    on_evaluation: OnEvaluation | None = None,
) -> Result:
    """Trains ``model`` in place.

    A run that is stopped, by ``stop_at``, a signal or a power cut, and resumed ends with the same
    parameters, bit for bit, as one that was not.

    The arrays of the model are donated, so that every weight is held once. To keep the old weights,
    copy them before (``jax.tree.map(jnp.copy, nnx.state(model))``). When the function returns,
    or raises, the model has the weights of the last step that was taken.

    Args:
      model: ``task`` says how it is called. Its ``nnx.Param`` are trained.
      task: data, loss and metrics.
      settings: how to train. Epochs are converted to steps first, which is logged.
      folder: of the run (:mod:`bdia_jax.train.run_folder` says what it will hold).
      resume: continue from the newest checkpoint in ``folder``, if there is one.
      about: settings of the model and the data, saved, and compared when a run is resumed.
      optimizer: instead of the one that ``settings`` names, with its schedule and clipping. When a
        run is resumed, nobody can tell whether it is the same one.
      progress: whether to show a bar; None for: on a terminal.
      on_evaluation: is called after every evaluation with the model, in evaluation mode and with
        the weights that were evaluated, and the step. The run does not depend on what it does; the
        next step uses the weights up.

    Raises:
      ValueError: for settings that do not fit, trained weights of too few bits, or a folder of
        another run. A resumed run may log, evaluate and save at other intervals, and with a
        constant schedule have another number of steps.
      FileExistsError: for a folder with a run in it, without ``resume``, or one that another
        process is training in.
      ImportError: if the settings name a project of Weights & Biases, and ``wandb`` is missing.
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
        check_trained_dtypes(model)
    if main:
        weights_and_biases.check_installed(settings.wandb)
    settings = in_steps(settings, task)
    described = describe_run(settings, model, task, about, optimizer is not None)
    check_same_run(folder, described, settings)

    programs = Programs(model, task, settings, optimizer)
    programs.trace()
    check_room(folder, programs.abstract_state(), settings.keep_last)
    with contextlib.ExitStack() as held:
        held.enter_context(locked(folder, main))
        if main:
            # Another process may have been faster.
            check_same_run(check_run_folder(folder, resume), described, settings)
        make_run_folder(folder, described, main)
        tell = held.enter_context(logging_to(folder, main))
        checkpoints = Checkpoints(folder / "checkpoints", settings.keep_last, task.best)
        writer = run = feed = None
        interrupted = False
        try:
            restored = checkpoints.restore(programs.abstract_state()) if resume else None
            if restored is None:
                step, state, spent, position = 0, programs.first_state(model), 0.0, None
            else:
                step, state, told = restored
                spent, position = told["seconds"], told.get("position")
                if step > settings.total_steps:
                    raise ValueError(
                        f"the run in {folder} is at step {step}; got steps={settings.total_steps}"
                    )
                log.info("resumed at step %d", step)
            if optimizer is None and settings.weight_decay:
                log.info("%s", wording.about_decay(state.params, settings))
            programs.share_arrays(model, state)
            project = None
            if main and settings.wandb is not None:
                project = weights_and_biases.Project(settings.wandb, folder, described)
            writer = MetricsWriter(folder, step, main, project)
            pace = Pace(task.unit, settings.batch_size, spent)
            if isinstance(task, Fed):
                feed = Feed(task, settings.batch_size, position)
            run = Run(programs, checkpoints, writer, pace, tell, state, step, feed)
            with Stop() as stop:
                run.until_the_end(model, stop, progress, on_evaluation)
                checkpoints.wait()
            best_step = checkpoints.best_step()
            checkpoints.close()
            result = run.result(best_step)
            if main:
                write_report(folder, model, task, settings, described, result, run.ending)
        except BaseException as error:
            # A second Ctrl-C. Nothing is waited for: it may have come while a lock was taken that
            # others wait for.
            interrupted = isinstance(error, KeyboardInterrupt)
            if not interrupted:
                checkpoints.abandon()
            raise
        finally:
            if feed is not None:
                feed.close(wait=not interrupted)
            if writer is not None and not interrupted:
                writer.close()
            if run is not None:
                give_back(model, run.state.params)
    stop.leave(result.step)
    return result
