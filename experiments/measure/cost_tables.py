"""Tables and a figure of what :mod:`measure.costs` finds."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from bdia_jax.train.figures import figure, plain_logarithms, style
from measure import records, timing
from measure.ways import BASES

Rows = list[dict[str, Any]]


def memory_table(rows: Rows) -> str:
    """Of peaks along an axis."""
    one, sloped = rows[0], any("bytes per element and block" in row for row in rows)
    header = [f"MB, by {one['axis']}", *map(str, one["values"])]
    lines = []
    for row in rows:
        cells = ["" if peak is None else f"{peak / 1e6:,.1f}" for peak in row["peaks"]]
        slope = row.get("bytes per element and block")
        cells += ["" if slope is None else f"{slope:.3f}"] if sloped else []
        lines.append([label(rows, row), *cells])
    return records.markdown(header + ["bytes per element and block"] * sloped, lines)


def label(rows: Rows, row: dict[str, Any]) -> str:
    """The way, and the type of number where rows have several."""
    several = len({r.get("dtype") for r in rows}) > 1
    return f"{row['way']}, {row['dtype']}" if several else row["way"]


def time_table(rows: Rows) -> str:
    """Of what was timed: medians, and ratios with quartiles."""
    header = ["way", "batch", "peak in GB", "s per step", "per second"]
    header += [f"over {base}" for base in BASES]
    lines = []
    for row in rows:
        line = [label(rows, row)]
        if "error" in row:
            lines.append([*line, f"not here: {row['error']}", *[""] * (len(header) - 2)])
            continue
        line += [str(row["batch"]), f"{row['peak'] / 1e9:.2f}"]
        line += [f"{row['seconds']:.3f}", f"{row['per second']:.3g}"]
        lines.append(line + [timing.ratio(row.get(f"over {base}")) for base in BASES])
    return records.markdown(header, lines)


def besides_table(rows: Rows) -> str:
    """Of what the loops do besides the blocks."""
    return records.markdown(
        ["per block", "milliseconds", "of the step"],
        [[row["what"], f"{row['seconds'] * 1e3:.2f}", f"{row['share']:.1%}"] for row in rows],
    )


def plans_table(rows: Rows) -> str:
    """In GB (10^9 bytes) per device."""
    columns = [name for name in rows[0] if name not in ("LoRA rank", "way")]
    lines = [
        [row["way"] + (f", LoRA {row['LoRA rank']}" if row["LoRA rank"] else "")]
        + [f"{row[name] / 1e9:.2f}" for name in columns]
        for row in rows
    ]
    return records.markdown(["GB per device", *columns], lines)


def draw(rows: Rows, path: pathlib.Path) -> None:
    """Peaks along the axis; every line has its label at its end."""
    with figure(path) as (axis,):
        for i, row in enumerate(rows):
            found = [(v, p / 1e6) for v, p in zip(row["values"], row["peaks"]) if p is not None]
            axis.plot(*zip(*found), **style(i))
            axis.annotate(
                label(rows, row), found[-1], xytext=(8, 0), textcoords="offset points", va="center"
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(rows[0]["values"], [str(value) for value in rows[0]["values"]])
        plain_logarithms(axis)
        axis.set_xlabel({"depth": "blocks"}.get(rows[0]["axis"], rows[0]["axis"]))
        axis.set_ylabel("MB")
        # Room for the labels.
        low, high = axis.get_xlim()
        axis.set_xlim(low, high * (high / low) ** 0.7)


TABLES: dict[str, Callable[[Rows], str]] = {
    "activations": memory_table,
    "totals": memory_table,
    "besides": besides_table,
    "plans": plans_table,
    "in-use": records.as_they_are,
    **dict.fromkeys(("steps", "equal"), time_table),
}
"""By the part that was measured."""
