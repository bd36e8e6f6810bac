"""Checkpoints by orbax: the last few and the best, written beside and then renamed."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

log = logging.getLogger("bdia_jax")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, and what is left."""


class Checkpoints:
    """The checkpoints of a run, in a folder of their own.

    Saving is asynchronous: arrays are copied to the host, and written while training goes on.
    A checkpoint appears under its name when it is complete.
    """

    def __init__(self, folder: pathlib.Path, keep_last: int, best: str):
        self.folder = folder.resolve()
        policy = checkpoint_managers.preservation_policy
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(
                [
                    policy.LatestN(keep_last),
                    policy.BestN(get_metric_fn=lambda metrics: metrics[best], n=1),
                ]
            ),
            step_prefix=None,
            cleanup_tmp_directories=True,
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint."""
        return sorted(self.manager.all_steps())

    def save(
        self, step: int, state: PyTree[jax.Array], about: dict[str, Any], metrics: dict[str, float]
    ) -> None:
        """Starts to save; an error of the save before this one is raised here."""
        try:
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
                ),
                metrics=metrics,
            )
        except Exception as error:
            raise self._failed(error) from error

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

    def restore(self, abstract: PyTree) -> tuple[int, PyTree[jax.Array], dict[str, Any]] | None:
        """The newest checkpoint that can be read: step, state, what was said about it.

        One that can't is moved out of the way, into ``<folder>-unreadable``, with a warning.
        None if there is no checkpoint at all.
        """
        failures = []
        for step in reversed(self.steps()):
            try:
                restored = self.manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract), about=ocp.args.JsonRestore()
                    ),
                )
                break
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
        return step, restored["state"], restored["about"]

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

    def _failed(self, error: Exception) -> CheckpointError:
        left = sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())
        kept = f"the last good one is step {left[-1]}" if left else "there is no earlier one"
        return CheckpointError(
            f"a checkpoint could not be written to {self.folder}: {error}. Checkpoints are renamed "
            f"into place when complete, and {kept}; make room, and resume"
        )
