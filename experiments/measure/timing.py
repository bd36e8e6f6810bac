"""Time: rounds in which everything runs once, in turns, so that what else a machine does meets all.

What is told is the median over rounds, and of ratios within a round the median and the quartiles: a
load that comes and goes slows down both sides of a ratio.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from bdia_jax.train import Task, TrainSettings
from bdia_jax.train.programs import Programs
from bdia_jax.train.step import State


def in_turns(
    runs: dict[str, Callable[[], Any]], rounds: int, *, least: float = 0.1
) -> dict[str, list[float]]:
    """Seconds of each function, round by round.

    Args:
      runs: what returns JAX arrays, which are waited for. Each runs twice before.
      rounds: at least 1.
      least: a function is repeated within a round until it takes about so many seconds.
    """
    repeats = {}
    for name, run in runs.items():
        jax.block_until_ready(run())
        repeats[name] = max(1, math.ceil(least / max(1e-6, _seconds(run, 1))))
    found: dict[str, list[float]] = {name: [] for name in runs}
    order = [*runs]
    for _ in range(rounds):
        for name in order:
            found[name].append(_seconds(runs[name], repeats[name]))
        order = order[1:] + order[:1]
    return found


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - started) / repeats


def step_of(
    make: Callable[[], nnx.Module], task: Task, settings: TrainSettings, states: dict[Any, State]
) -> tuple[Programs, Callable[[], Any]]:
    """The programs of a training step; and a function that takes one.

    Ways whose states are alike go on from each other's, in ``states``: a device has room for one.
    """
    programs = Programs(make(), task, settings)
    alike = jax.tree.structure(programs.abstract_state())

    def step():
        # Where it was compiled for, or it would be compiled again.
        state = states.pop(alike, None) or jax.device_put(
            programs.first_state(make()), jax.devices()[0]
        )
        states[alike], report = programs.step(state)
        return report

    return programs, step


def summary(samples: dict[str, list[float]], bases: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """By name: the median, the rounds, and quartiles of the ratio to each base that there is."""
    found = {}
    for name, seconds in samples.items():
        row: dict[str, Any] = {"seconds": float(np.median(seconds)), "rounds": seconds}
        for base in bases:
            if base in samples:
                ratios = np.array(seconds) / np.array(samples[base])
                row[f"over {base}"] = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        found[name] = row
    return found


def ratio(quartiles: list[float] | None) -> str:
    """A cell of a table."""
    if quartiles is None:
        return ""
    low, median, high = quartiles
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"
