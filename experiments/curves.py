"""Curves of training and validation loss, and a table of where they end."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import results

from bdia_jax.train.figures import COLOURS, figure


def best(history: list[dict[str, Any]]) -> tuple[float, int]:
    """Minus the lowest validation loss, and at which step."""
    return max((-r["loss"], -r["step"]) for r in history if r["split"] == "eval")


def summary(runs: list[list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Per seed: losses at the end, the lowest one of validation, and its step."""
    last = {
        split: [[r for r in history if r["split"] == split][-1]["loss"] for history in runs]
        for split in ("train", "eval")
    }
    return {
        "training, last": last["train"],
        "validation, last": last["eval"],
        "validation, best": [-best(history)[0] for history in runs],
        "at step": [-best(history)[1] for history in runs],
    }


def table(found: dict[str, dict[str, list[float]]], digits: dict[str, int]) -> str:
    """Means over seeds, and their standard deviations; with three digits, or as many as given."""

    def cell(values: list[float], digits: int) -> str:
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{spread}"

    columns = list(next(iter(found.values())))
    return results.markdown(
        ["loss in nats per token", *columns],
        [
            [name, *(cell(values[c], digits.get(c, 3)) for c in columns)]
            for name, values in found.items()
        ],
    )


def draw(curves: dict[str, list[list[dict[str, Any]]]], path: pathlib.Path) -> None:
    """Training and validation loss over steps: means over seeds, and from lowest to highest."""
    with figure(path, 2) as axes:
        for axis, split in zip(axes, ("train", "eval"), strict=True):
            for i, (name, runs) in enumerate(curves.items()):
                records = [[r for r in history if r["split"] == split] for history in runs]
                steps = sorted(set.intersection(*({r["step"] for r in run} for run in records)))
                losses = np.array(
                    [[r["loss"] for r in run if r["step"] in set(steps)] for run in records]
                )
                axis.plot(steps, losses.mean(0), label=name, color=COLOURS[i])
                axis.fill_between(
                    steps, losses.min(0), losses.max(0), color=COLOURS[i], alpha=0.2, linewidth=0
                )
            axis.set_xlabel("step")
            axis.set_title("training" if split == "train" else "validation")
        axes[0].set_ylabel("loss, nats per token")
        axes[1].legend()
