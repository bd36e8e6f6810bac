"""How numbers of a run are told: in a line each, for people."""

from __future__ import annotations

import math
from typing import Any

import jax

from bdia_jax.train.optimizers import decay_mask
from bdia_jax.train.pace import COUNTED
from bdia_jax.train.settings import TrainSettings

NOT_METRICS = ("step", "split", "seconds", "per_second", "tokens_per_second", "peak_bytes")
"""Fields of a record that say when, where and how fast."""
FAULTS = ("mismatched", "corrected")
"""Fields that are told where they are not 0."""


def metrics_of(record: dict[str, Any]) -> dict[str, float]:
    """What was computed, of a record."""
    return {
        name: value
        for name, value in record.items()
        if name not in NOT_METRICS and (value or name not in FAULTS)
    }


def about_training(record: dict[str, Any], end: int, unit: str, left: float | None) -> str:
    """The line about some steps.

    Args:
      record: as in metrics.jsonl.
      end: the last step of the run.
      unit: of the task.
      left: seconds.
    """
    costs = speed(record, unit)
    if left is not None:
        costs.append(f"{duration(left)} left")
    if "peak_bytes" in record:
        costs.append(f"{gigabytes(record['peak_bytes'])} at most")
    told = f"step {record['step']} of {end}: {_listed(record)}"
    return f"{told}; {', '.join(costs)}" if costs else told


def per_step(seconds: float) -> str:
    """The time that a step takes; NaN is not known."""
    return "too few steps to time" if math.isnan(seconds) else f"{seconds:.3g} s per step"


def about_evaluation(record: dict[str, Any], end: int, best: dict[str, Any], metric: str) -> str:
    """The line about an evaluation.

    Args:
      record: as in metrics.jsonl.
      end: the last step of the run.
      best: the record of the best evaluation so far.
      metric: that it is the best by.
    """
    name = metric.removeprefix("-")
    compared = (
        "the best so far"
        if best is record
        else f"the best is {name} {number(best[name])} at step {best['step']}"
    )
    return f"step {record['step']} of {end}, evaluation: {_listed(record)}; {compared}"


def about_decay(params: Any, settings: TrainSettings) -> str:
    """The line about what decays."""
    if settings.decayed == "all":
        return f"weight decay {settings.weight_decay:g} of all parameters"
    decays = jax.tree.leaves(decay_mask(params))
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    share = sum(size for size, does in zip(sizes, decays, strict=True) if does) / sum(sizes)
    return (
        f"weight decay {settings.weight_decay:g} of {share:.2%} of the parameters; norms, biases "
        "and other arrays of one axis do not decay"
    )


def beside_a_bar(record: dict[str, Any], unit: str) -> str:
    """The same about training, in few words."""
    losses = ("loss", "network_loss")
    told = [f"{n.replace('_', ' ')} {number(record[n])}" for n in losses if n in record]
    return ", ".join([*told, *speed(record, unit)[-1:]])


def speed(record: dict[str, Any], unit: str) -> list[str]:
    """Samples and tokens per second, as far as a record has them."""
    units = {"per_second": unit} | {
        f"{counted}_per_second": counted for counted in COUNTED.values()
    }
    return [f"{number(record[key])} {of}/s" for key, of in units.items() if key in record]


def _listed(record: dict[str, Any]) -> str:
    told = metrics_of(record).items()
    return ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in told)


def number(value: float) -> str:
    """A few digits: 0.5123, 2.345, 12.35, 12,345, 4.9e-05."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Such as 4.2 s, 42 s, 3 min 5 s, 2 h 7 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def gigabytes(size: float) -> str:
    """Such as 10.3 GB."""
    return f"{size / 1e9:.1f} GB"
