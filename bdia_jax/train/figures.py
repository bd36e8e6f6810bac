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
MARGINS = {"left": 0.075, "right": 0.985, "bottom": 0.14, "top": 0.96, "wspace": 0.06}
"""Of two axes, for numbers of up to five digits."""


def style(index: int) -> dict[str, str]:
    """Colour and marker of a curve."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


@contextlib.contextmanager
def figure(
    path: pathlib.Path, columns: int = 1, margins: dict[str, float] | None = None
) -> Iterator[list[Any]]:
    """Matplotlib's axes, side by side, one vertical axis for all; saved as a PNG in the end.

    Without pyplot: a run must not change how its caller's figures are shown. To find margins, all
    is drawn once more; ``margins`` saves that.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    looks: dict[Any, Any] = {
        "font.size": 13,
        "legend.fontsize": 11,
        "lines.linewidth": 2,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
    with matplotlib.rc_context(looks):
        drawn = Figure(figsize=(1.2 + 5 * columns, 4.6))
        FigureCanvasAgg(drawn)
        yield list(drawn.subplots(1, columns, sharey=True, squeeze=False)[0])
        if margins is None:
            drawn.tight_layout()
        else:
            drawn.subplots_adjust(**margins)
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, dpi=120)


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


def plot_losses(records: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws all losses of a run, over steps and over seconds, into one PNG.

    Args:
      records: of the run, as in metrics.jsonl.
      path: of the PNG.
    """
    curves = [
        (name, [(r["step"], r["seconds"], r[field]) for r in records if _has(r, split, field)])
        for name, split, field in (
            ("training", "train", "loss"),
            ("network, training batches", "train", "network_loss"),
            ("evaluation", "eval", "loss"),
        )
    ]
    with figure(path, 2, MARGINS) as axes:
        for i, (name, points) in enumerate(curves):
            for axis, place in zip(axes, (0, 1), strict=True):
                if points:
                    # Markers of many points would hide the curve.
                    looks = style(i) | ({"marker": ""} if len(points) > 40 else {})
                    # Training is of a few batches, and goes up and down.
                    wide = 2.5 if name == "evaluation" else 1
                    x, y = [p[place] for p in points], [p[2] for p in points]
                    axis.plot(x, y, label=name, markersize=4, linewidth=wide, **looks)
        axes[0].set_xlabel("step")
        axes[1].set_xlabel("seconds")
        axes[0].set_ylabel("loss")
        if any(points for _, points in curves):
            axes[-1].legend()


def _has(record: dict[str, Any], split: str, field: str) -> bool:
    return record["split"] == split and field in record
