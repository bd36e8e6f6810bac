"""What came of a run, and which of its evaluations is the best."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from bdia_jax.train.checkpoints import score


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


def evaluations(history: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of evaluations."""
    return [record for record in history if record["split"] == "eval"]


def best_of(records: Iterable[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The best of some evaluations, the first one of equals; None if there is none."""
    return max(records, key=lambda record: score(metric, record), default=None)


def without_better(history: Iterable[dict[str, Any]], metric: str, every: int) -> int:
    """How many evaluations there were since the best one.

    Those at multiples of ``every`` steps count. Any others (a run that is stopped evaluates first)
    would not be there if the run had not been stopped, and it has to end at the same step.
    """
    regular = [record for record in evaluations(history) if record["step"] % every == 0]
    best = best_of(regular, metric)
    return 0 if best is None else len(regular) - 1 - regular.index(best)
