"""Figures: curves in colours that can be told apart with any colour vision."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from bdia_jax.train.metrics import read_metrics

# Okabe and Ito's; their yellow is too faint for a line on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>p"


def style(index: int) -> dict[str, str]:
    """Colour and marker of a curve."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


@contextlib.contextmanager
def figure(path: pathlib.Path, columns: int = 1) -> Iterator[list[Any]]:
    """Matplotlib's axes, side by side, one vertical axis for all; saved as a PNG in the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks: dict[Any, Any] = {
        "font.size": 13,
        "legend.fontsize": 11,
        "lines.linewidth": 2,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
    with plt.rc_context(looks):
        drawn, axes = plt.subplots(
            1, columns, figsize=(1.2 + 5 * columns, 4.6), sharey=True, squeeze=False
        )
        try:
            yield list(axes[0])
            drawn.tight_layout()
            pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
            drawn.savefig(path, dpi=120)
        finally:
            plt.close(drawn)


def plain_logarithms(axis: Any) -> None:
    """Labels 1, 2, 5, 10, ... on a logarithmic vertical axis."""
    from matplotlib.ticker import LogLocator

    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")


def plot_curves(
    runs: dict[str, pathlib.Path | list[dict[str, Any]]],
    path: pathlib.Path,
    *,
    metric: str = "accuracy",
    split: str = "eval",
    x_axes: Iterable[str] = ("step", "seconds"),
) -> None:
    """Draws a metric of several runs, over steps and over seconds, into one PNG.

    Args:
      runs: a label, and a run's folder or its records, for each curve.
      path: of the PNG.
      metric, split, x_axes: names of fields of the records.
    """
    x_axes = tuple(x_axes)
    with figure(path, len(x_axes)) as axes:
        for i, (label, run) in enumerate(runs.items()):
            records = run if isinstance(run, list) else read_metrics(run)
            records = [r for r in records if r["split"] == split and metric in r]
            for axis, x in zip(axes, x_axes, strict=True):
                axis.plot(
                    [r[x] for r in records],
                    [r[metric] for r in records],
                    label=label,
                    markersize=4,
                    **style(i),
                )
        for axis, x in zip(axes, x_axes, strict=True):
            axis.set_xlabel(x)
        axes[0].set_ylabel(f"{split} {metric}")
        axes[-1].legend()
