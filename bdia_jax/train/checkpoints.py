"""Checkpoints by orbax: the last few and the best, written beside and then renamed.

orbax notices a checkpoint that was cut short, but neither a flipped bit in its data nor a dtype
that differs (it casts). Each checkpoint therefore says which arrays it holds, and a checksum.

A checkpoint that is no longer kept is renamed before it is deleted: under its name, it is whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, PyTree, UInt32
from orbax.checkpoint import checkpoint_managers

from bdia_jax.states import checksum
from bdia_jax.train.step import State

log = logging.getLogger("bdia_jax")

DELETING = "deleting"
"""The folder, among the checkpoints, of those that are being deleted."""
ITEMS = ("state", "about", "metrics")
"""What a whole checkpoint consists of."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, and what is left."""


class OtherArraysError(ValueError):
    """A checkpoint holds other arrays, by name, shape or dtype, than it is restored into."""


def score(metric: str, metrics: dict[str, float]) -> float:
    """The value of a metric, negated for a name with a leading "-": higher is better."""
    name = metric.removeprefix("-")
    return metrics[name] if name == metric else -metrics[name]


def describe(tree: PyTree) -> dict[str, str]:
    """Shape and dtype of every array by name, such as ``{"params.head.bias": "float32[10]"}``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    return {
        # What Flax calls the array in a variable says nothing here.
        name.removesuffix(".value"): f"{leaf.dtype}{list(leaf.shape)}"
        for name, (_, leaf) in zip(names, leaves, strict=True)
    }


@jax.jit
def _fingerprint(tree: PyTree[Array]) -> UInt32[Array, ""]:
    """A checksum of all bits, the same on any mesh: integers are summed, in no matter what order.

    As in the guard of the backward pass, a change of one element always shows.
    """
    total = jnp.uint32(0)
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        if leaf.dtype == bool:
            leaf = leaf.astype(jnp.uint32)
        bits = min(8 * leaf.dtype.itemsize, 32)
        words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{bits}")).astype(jnp.int32)
        total += jnp.uint32(2 * i + 1) * checksum(words[None])[0]
    return total


@contextlib.contextmanager
def _without_a_word() -> Iterator[None]:
    """Orbax warns of every folder that is opened to be read only."""
    logger = logging.getLogger("absl")
    logger.addFilter(refuses := lambda record: "read only" not in str(record.msg))
    try:
        yield
    finally:
        logger.removeFilter(refuses)


class Checkpoints:
    """The checkpoints of a run, in a folder of their own.

    Saving is asynchronous: arrays are copied to the host, and written while training goes on.
    A checkpoint appears under its name when it is complete.
    """

    def __init__(self, folder: pathlib.Path, keep_last: int, best: str, *, read_only: bool = False):
        """Opens the folder.

        Args:
          folder: that of the checkpoints; made if it is not there, unless ``read_only``.
          keep_last: how many of the newest are kept.
          best: the metric to choose by, highest first; lowest first after a leading "-".
          read_only: changes nothing there: the run that writes may be going on.
        """
        self.folder, self.read_only = folder.resolve(), read_only
        if not read_only:
            self._remove_half_deleted()
        policy = checkpoint_managers.preservation_policy

        def rank(metrics: dict[str, float]) -> Any:
            # To sort by: the first one of equals, as in all that is told of the run. (An older
            # version's metrics do not say the step.)
            return (score(best, metrics), -metrics.get("step", 0)) if metrics else (-math.inf, 0)

        self._rank = rank
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(
                [
                    policy.LatestN(keep_last),
                    policy.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False),
                ]
            ),
            # The policy alone decides what is kept; without best_fn no metrics would be saved,
            # and a resumed run would not know its best.
            best_fn=rank,
            step_prefix=None,
            read_only=read_only,
            # What seems to be left over may be what a run is writing. (Orbax would turn all of
            # these off by itself, with a warning for each.)
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            todelete_subdir=None if read_only else DELETING,
            save_interval_steps=0 if read_only else 1,
        )
        with _without_a_word() if read_only else contextlib.nullcontext():
            self.manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint."""
        return sorted(self.manager.all_steps())

    def best_step(self) -> int | None:
        """The best checkpoint of those at steps that were evaluated; None if there is none."""
        best = self.manager.best_step()
        return best if best is not None and self.manager.metrics(best) else None

    def best_score(self) -> float:
        """The :func:`score` of that checkpoint; -inf if there is none."""
        best = self.manager.best_step()
        return -math.inf if best is None else self._rank(self.manager.metrics(best) or {})[0]

    def save(
        self, step: int, state: State, about: dict[str, Any], metrics: dict[str, float]
    ) -> None:
        """Starts to save; an error of the save before this one is raised here.

        ``metrics`` are those of this very state; {} if it was not evaluated.
        """
        about = about | {
            "arrays": describe(state),
            "checksum": int(_fingerprint(state)),
            "checksum of params": int(_fingerprint(state.params)),
        }
        try:
            saved = self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
                ),
                metrics=metrics and {**metrics, "step": step},
            )
        except Exception as error:
            raise self._failed(error) from error
        if not saved:
            raise CheckpointError(
                f"step {step} was not saved: {self.folder} holds {self.steps()} already"
            )

    def wait(self) -> None:
        """Waits until everything is on disk."""
        try:
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Waits, and frees threads."""
        self.wait()
        self.manager.close()
        self.sweep()

    def sweep(self) -> None:
        """Deletes the checkpoints that are no longer kept."""
        if jax.process_index() == 0 and not self.read_only:
            for path in (self.folder / DELETING).glob("*"):
                shutil.rmtree(path, ignore_errors=True)

    def abandon(self) -> None:
        """Closes after an error; a save under way is finished, and if it can't be, told so."""
        try:
            self.close()
        except Exception as error:
            log.warning("%s", error)

    def restore(self, abstract: State) -> tuple[int, State, dict[str, Any]] | None:
        """The newest checkpoint that can be read: step, state, what was said about it.

        One that can't is moved out of the way, into ``<folder>-unreadable``, with a warning.
        None if there is no checkpoint at all.

        Raises:
          ValueError: if a checkpoint is of other arrays than ``abstract``.
          CheckpointError: if there are checkpoints, and none can be read.
        """
        failures = []
        for step in reversed(self.steps()):
            try:
                state, about = self._read(step, abstract)
                break
            except OtherArraysError:
                raise
            except Exception as error:
                failures.append((step, error))
                log.warning("checkpoint %d in %s can't be read: %s", step, self.folder, error)
        else:
            if failures:
                raise CheckpointError(
                    f"none of the checkpoints in {self.folder} can be read "
                    f"({', '.join(str(step) for step, _ in failures)}); the newest one says: "
                    f"{failures[0][1]}"
                ) from failures[0][1]
            return None
        for failed, _ in failures:
            self._put_aside(failed)
        return step, state, about

    def _read(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        about = self._about(step)
        self._check_arrays(step, about, abstract)
        restore = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        state = self.manager.restore(step, args=restore)["state"]
        self._check_data(state, about["checksum"])
        return state, about

    def _about(self, step: int) -> dict[str, Any]:
        args = ocp.args
        return self.manager.restore(step, args=args.Composite(about=args.JsonRestore()))["about"]

    def _check_arrays(self, step: int, about: dict[str, Any], abstract, below: str = "") -> None:
        """That a checkpoint holds these arrays, as far as names begin with ``below``."""
        found = {n: a for n, a in about["arrays"].items() if n.startswith(below)}
        expected = describe(abstract)
        differences = [
            f"{name}: {found.get(name, 'nothing')} there, {expected.get(name, 'nothing')} now"
            # The parameters before what the optimizer keeps about them.
            for name in sorted({*found, *expected}, key=lambda n: (not n.startswith("params"), n))
            if found.get(name) != expected.get(name)
        ]
        if differences:
            more = f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
            raise OtherArraysError(
                f"checkpoint {step} in {self.folder} is of another model or optimizer: "
                f"{'; '.join(differences[:8])}{more}"
            )

    @staticmethod
    def _check_data(tree: PyTree[jax.Array], checksum: int) -> None:
        if int(_fingerprint(tree)) != checksum:
            raise CheckpointError("its data is not what was saved (the checksum differs)")

    def restore_params(self, step: int, abstract: nnx.State) -> nnx.State:
        """The weights of a checkpoint, without the optimizer's state.

        Raises:
          ValueError: if they are not as ``abstract``.
          CheckpointError: if they cannot be read.
        """
        about = self._about(step)
        self._check_arrays(step, about, {"params": abstract}, "params")
        item = {"params": abstract}
        args = ocp.args.PyTreeRestore(
            item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
        )
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                params = reader.restore(self.folder / str(step) / "state", args=args)["params"]
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} can't be read: {error}"
            ) from error
        self._check_data(params, about["checksum of params"])
        return params

    def _put_aside(self, step: int) -> None:
        # A later save of this step would otherwise find the name taken. Nothing is deleted.
        aside = self.folder.with_name(self.folder.name + "-unreadable")
        aside.mkdir(exist_ok=True)
        target = aside / str(step)
        for i in range(1, 1000):
            if not target.exists():
                break
            target = aside / f"{step}-{i}"
        (self.folder / str(step)).rename(target)
        self.manager.reload()
        log.warning("moved the unreadable checkpoint %d to %s", step, target)

    def _remove_half_deleted(self) -> None:
        """Removes what a process left that was killed while it deleted a checkpoint.

        The newest checkpoint is never deleted: if that one is incomplete, it was damaged otherwise,
        and stays to be put aside.
        """
        if jax.process_index() != 0 or not self.folder.is_dir():
            return
        self.sweep()
        steps = sorted((p for p in self.folder.iterdir() if p.name.isdigit()), key=_step_of)
        for path in steps[:-1]:
            missing = [item for item in ITEMS if not any((path / item).glob("*"))]
            if missing:
                shutil.rmtree(path)
                log.warning(
                    "removed %s, which was half deleted: it had no %s", path, " or ".join(missing)
                )

    def _failed(self, error: Exception) -> CheckpointError:
        left = sorted(_step_of(p) for p in self.folder.iterdir() if p.name.isdigit())
        kept = f"the last good one is step {left[-1]}" if left else "there is no earlier one"
        return CheckpointError(
            f"a checkpoint could not be written to {self.folder}: {error}. Checkpoints are renamed "
            f"into place when complete, and {kept}; make room, and resume"
        )


def restore_best(folder: str | pathlib.Path, model: nnx.Module) -> int:
    """Gives a model the weights of the best checkpoint of a run, and returns its step.

    The best is that of the steps that were evaluated, by the metric of the task: :func:`train`
    saves each that is the best so far. Only weights are read. They go where those of ``model`` are.
    The run may still be going on.

    Args:
      folder: of the run.
      model: the one that was trained, or another of the same configuration.

    Raises:
      FileNotFoundError: if there is no run.
      CheckpointError: if no checkpoint is of a step that was evaluated, or it cannot be read.
      ValueError: if the weights are those of another model.
    """
    folder = pathlib.Path(folder).expanduser()
    settings = folder / "settings.json"
    if not settings.exists():
        raise FileNotFoundError(f"there is no run in {folder}")
    best = json.loads(settings.read_text(encoding="utf-8"))["data"]["best"]
    checkpoints = Checkpoints(folder / "checkpoints", 1, best, read_only=True)
    try:
        step = checkpoints.best_step()
        if step is None:
            raise CheckpointError(
                f"no checkpoint in {checkpoints.folder} is of a step that was evaluated; there are "
                f"{checkpoints.steps()}"
            )
        abstract = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding),
            nnx.state(model, nnx.Param),
        )
        nnx.update(model, checkpoints.restore_params(step, abstract))
    finally:
        checkpoints.close()
    return step


def _step_of(path: pathlib.Path) -> int:
    return int(path.name)
