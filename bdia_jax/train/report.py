"""The page at the end of a run: what was run, how it went, and what it cost."""

from __future__ import annotations

import logging
import pathlib
import platform
import shlex
import statistics
import sys
from typing import Any

import flax
import jax
import optax
import yaml
from flax import nnx

import bdia_jax
from bdia_jax.files import write_text
from bdia_jax.nn.gamma import reversible_stacks
from bdia_jax.train.figures import plot_losses
from bdia_jax.train.result import Result, best_of, evaluations
from bdia_jax.train.settings import TrainSettings
from bdia_jax.train.tasks import Task
from bdia_jax.train.wording import duration, gigabytes, metrics_of, number, speed

log = logging.getLogger("bdia_jax")

REPORT, CURVES = "report.md", "report.png"
MOST_ROWS = 24
"""Evaluations in the table; of more, some between are left out."""


def write_report(
    folder: pathlib.Path,
    model: nnx.Module,
    task: Task,
    settings: TrainSettings,
    described: dict[str, Any],
    result: Result,
    ending: str,
) -> None:
    """Writes the page into the folder of the run; a warning where that is not possible.

    Args:
      folder: of the run.
      model, task, settings: as in :func:`bdia_jax.train.train`.
      described: as in settings.json.
      result: what came of the run.
      ending: a sentence on why it took no further step.
    """
    try:
        # The folder may be a relative one, such as ".".
        title = folder.absolute().name
        plot_losses(result.history, folder / CURVES)
        told = [
            f"# Run {title}",
            ending,
            "## What was run",
            _table(("", ""), what_was_run(model, task, described["train"]["optimizer"], settings)),
            "## Evaluations",
            evaluation_table(result.history, task.best),
            f"![Losses]({CURVES})",
            "## What it cost",
            _table(("", ""), costs(result, task.unit)),
            "## Settings",
            f"```yaml\n{yaml.safe_dump(described, sort_keys=False, allow_unicode=True)}```",
        ]
        write_text(folder / REPORT, "\n\n".join(told) + "\n")
    except Exception as error:
        # All that was trained is saved by now: that must not be lost for a page about it.
        log.warning("%s could not be written: %s", folder / REPORT, error)


def what_was_run(
    model: nnx.Module, task: Task, optimizer: str, settings: TrainSettings
) -> list[tuple[str, str]]:
    """Rows about model, data, machine and command."""
    trained = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    # Stacks of one network have the same step, as a rule.
    steps = dict.fromkeys(f"{s.step}, {s.adjoint}" for s in reversible_stacks(model))
    devices = jax.devices()
    packages = {"bdia_jax": bdia_jax, "jax": jax, "flax": flax, "optax": optax}
    versions = [f"{name} {package.__version__}" for name, package in packages.items()]
    own = optimizer != settings.optimizer
    rate = "" if own else f", learning rate {number(settings.learning_rate)}"
    parts = "" if settings.accumulate == 1 else f", in {settings.accumulate} parts"
    return [
        ("model", f"{type(model).__name__}, {trained:,} parameters trained"),
        *(("method", step) for step in steps),
        ("data", f"{task.name}, {task.eval_samples:,} {task.unit} for evaluation"),
        ("batches", f"{settings.batch_size:,} {task.unit}{parts}"),
        ("optimizer", optimizer + rate),
        ("device", f"{len(devices)} × {devices[0].device_kind}"),
        ("versions", ", ".join([f"Python {platform.python_version()}", *versions])),
        ("command", f"`{shlex.join(['python', *sys.argv])}`"),
    ]


def evaluation_table(history: list[dict[str, Any]], metric: str) -> str:
    """Evaluations, one a row, the best marked."""
    records = evaluations(history)
    best = best_of(records, metric)
    if best is None:
        return "There was none."
    kept = set(range(len(records)))
    if len(records) > MOST_ROWS:
        gap = (len(records) - 1) / (MOST_ROWS - 2)
        kept = {round(i * gap) for i in range(MOST_ROWS - 1)} | {records.index(best)}
    names = [*metrics_of(best)]
    rows = []
    for record in (records[i] for i in sorted(kept)):
        cells = [f"{record['step']:,}", duration(record["seconds"])]
        cells += [number(record[name]) if name in record else "" for name in names]
        is_best = record is best
        rows.append([f"**{c}**" if is_best else c for c in cells] + ["best" * is_best])
    left_out = len(records) - len(kept)
    table = _table(("step", "time", *names, ""), rows)
    return f"{table}\n\n{left_out} evaluations between are left out." if left_out else table


def costs(result: Result, unit: str) -> list[tuple[str, str]]:
    """Rows about time and memory."""
    lines = [record for record in result.history if record["split"] == "train"]
    rows = [("time", f"{duration(result.seconds)}, for {result.step:,} steps and all between")]
    fields = [
        field for field in ("per_second", "tokens_per_second") if lines and field in lines[-1]
    ]
    medians = {f: statistics.median(line[f] for line in lines if f in line) for f in fields}
    if medians:
        rows.append(("speed", f"{', '.join(speed(medians, unit))} (median)"))
    peaks = [line["peak_bytes"] for line in lines if "peak_bytes" in line]
    told = f"{gigabytes(max(peaks))} at most" if peaks else "the device does not tell"
    return [*rows, ("memory of the device", told)]


def _table(header: tuple[str, ...], rows: Any) -> str:
    def line(cells):
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|" + " --- |" * len(header), *map(line, rows)])
