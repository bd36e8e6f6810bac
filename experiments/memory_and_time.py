"""What a training step costs in memory and time: plain, checkpointed blocks, BDIA.

    python experiments/memory_and_time.py                        # a quarter of an hour on 2 cores
    python experiments/memory_and_time.py --rounds 3 --widths 256   # a look

The same stack of pre-norm transformer blocks, differentiated by parameters and input in four
ways: plainly, with ``jax.checkpoint`` around each block, and as BDIA with online back-propagation
without and with one tolerance bit (r = 1). float32 and bfloat16; no optimizer.

BDIA computes one matrix product per block that checkpointing need not: the last one of the block
(``hidden`` × width), whose result only the inverse needs. Therefore time is measured for
feed-forward networks as wide as the stream, as in the published experiments on images, and of
four times that width, as in most language models.

- *Memory*: peak temporaries of the compiled step over depth, and their slope in bytes per
  activation element (batch × length × width) and block. Known from compilation; parameters and
  gradients are not temporaries. Parameters are few here, but not so few that a copy of their
  gradients could hide: it would add 0.4 to a slope. On devices that count it, also the peak of
  the memory in use while a step runs (it never falls, hence a process for each method), which
  includes parameters and gradients. (A CPU has no bfloat16 arithmetic: there XLA keeps a float32
  copy of all that plain and checkpointed blocks save, which costs them 2 bytes more.)
- *Time*: rounds in which each method runs once, in turns. What is reported is the median over
  rounds of a method's time over that of another in the same round, with its quartiles: a load
  that comes and goes slows down both. CPU time (of all threads of this process) beside it.

Writes results/memory_and_time-DEVICE.json and .png.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import results
import tyro
from blocks import attention, stacked_params

from bdia_jax import reversible_scan
from bdia_jax.planning import memory
from bdia_jax.train import figures

METHODS = {
    "plain": "plain",
    "checkpoint": "checkpointed blocks",
    "bdia": "BDIA",
    "bdia-r1": "BDIA, r = 1",
}
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class MemoryAndTime:
    """What a training step costs in memory and time: plain, checkpointed blocks, BDIA."""

    depths: tuple[int, ...] = (8, 16, 32, 64)
    """Memory: numbers of blocks."""
    memory_shape: tuple[int, int, int] = (64, 128, 64)
    """Memory: batch, length, width."""
    widths: tuple[int, ...] = (256, 512)
    """Time: widths."""
    expansions: tuple[int, ...] = (1, 4)
    """Time: width of the hidden layer over that of the stream."""
    batch: int = 8
    """Time: samples."""
    length: int = 128
    """Time: positions."""
    blocks: int = 12
    """Time: blocks."""
    rounds: int = 12
    """Time: rounds in which each method runs once; 0 leaves time out."""
    dropout: float = 0.1
    """Probability of dropping."""
    out: pathlib.Path | None = None
    """Folder for the results; by default experiments/results."""
    peak_of: tuple[Literal["plain", "checkpoint", "bdia", "bdia-r1"], str, int] | None = None
    """Used by the script itself: prints the peak of one method, type of number and depth."""


def training_step(method: str, dropout: float) -> Callable[..., Any]:
    """Loss and gradients of a stack, as a function of ``(params, x, key)``."""
    block = functools.partial(attention, dropout=dropout)
    if method.startswith("bdia"):
        options = {"gamma": 0.5, "frac_bits": 9, "tolerance_bits": int(method == "bdia-r1")}
    else:
        options = {"gamma": 0.0, "frac_bits": None}
    if method == "checkpoint":
        # Inside a scan, XLA cannot merge the recomputation with the original.
        block = jax.checkpoint(block, prevent_cse=False)

    def loss(params, x, key):
        y = reversible_scan(block, params, x, key=key, **options)
        return jnp.mean(y.astype(jnp.float32) ** 2)

    return jax.value_and_grad(loss, (0, 1))


def arguments(depth: int, shape: tuple[int, ...], dtype: str, expansion: int = 4):
    """Parameters, an input, and a key."""
    hidden = expansion * shape[-1]
    params = stacked_params("attention", jax.random.key(0), depth, shape[-1], hidden)
    return params, jax.random.normal(jax.random.key(1), shape, dtype), jax.random.key(2)


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


def memory_over_depth(e: MemoryAndTime, method: str, dtype: str) -> dict[str, Any]:
    """Peak temporaries for each depth, and the slope per activation element and block."""
    step = training_step(method, e.dropout)
    peaks = [
        memory.temporaries(
            step, *jax.eval_shape(functools.partial(arguments, depth, e.memory_shape, dtype))
        )
        for depth in e.depths
    ]
    slopes = np.diff(peaks) / np.diff(e.depths) / math.prod(e.memory_shape)
    row = {
        "method": method,
        "dtype": dtype,
        "temporaries": peaks,
        "bytes_per_element_and_block": float(
            np.polyfit(e.depths, peaks, 1)[0] / math.prod(e.memory_shape)
        ),
        "between_depths": slopes.tolist(),
    }
    if counts_memory():
        row["peak_in_use"] = [peak_in_own_process(e, method, dtype, depth) for depth in e.depths]
    return row


def counts_memory() -> bool:
    """Whether the device tells how much memory was in use at most."""
    return "peak_bytes_in_use" in (jax.devices()[0].memory_stats() or {})


def peak_in_own_process(e: MemoryAndTime, method: str, dtype: str, depth: int) -> int:
    """Bytes in use at most while a step runs, measured in a process of its own."""
    ran = subprocess.run(
        [
            sys.executable,
            __file__,
            "--peak-of",
            method,
            dtype,
            str(depth),
            "--memory-shape",
            *map(str, e.memory_shape),
            f"--dropout={e.dropout}",
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        # This process holds the device, too.
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    return json.loads(ran.stdout.splitlines()[-1])


def peak_in_use(e: MemoryAndTime, method: str, dtype: str, depth: int) -> int:
    """Bytes in use at most, in this process, after one step."""
    step = jax.jit(training_step(method, e.dropout))
    jax.block_until_ready(step(*arguments(depth, e.memory_shape, dtype)))
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


# ---------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------


def times(e: MemoryAndTime, dtype: str, width: int, expansion: int) -> list[dict[str, Any]]:
    """Seconds per step and ratios, for each method."""
    given = arguments(e.blocks, (e.batch, e.length, width), dtype, expansion)
    steps = {method: jax.jit(training_step(method, e.dropout)) for method in METHODS}

    def run(step, repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            out = step(*given)
        jax.block_until_ready(out)
        return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats

    for step in steps.values():
        run(step, 2)
    # A round of each method is long enough to be timed.
    repeats = max(1, math.ceil(0.1 / run(steps["plain"], 1)[0]))
    samples = {method: [] for method in METHODS}
    turns = list(METHODS)
    for _ in range(e.rounds):
        for method in turns:
            samples[method].append(run(steps[method], repeats))
        turns = turns[1:] + turns[:1]

    rows = []
    for method in METHODS:
        row = {
            "method": method,
            "dtype": dtype,
            "width": width,
            "hidden": expansion * width,
            "steps_per_round": repeats,
        }
        for column, kind in enumerate(("wall", "cpu")):
            seconds = {m: np.array(samples[m])[:, column] for m in METHODS}
            row[f"{kind}_seconds"] = float(np.median(seconds[method]))
            for base in ("checkpoint", "plain"):
                ratios = seconds[method] / np.maximum(seconds[base], 1e-9)
                row[f"{kind}_over_{base}"] = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        row["rounds"] = np.array(samples[method]).tolist()
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------
# Tables and figure
# ---------------------------------------------------------------------------------------------


def memory_line(row: dict[str, Any]) -> str:
    """Peak temporaries of one method in MB, and their slope."""
    peaks = "".join(f"{peak / 1e6:>10.1f}" for peak in row["temporaries"])
    return (
        f"{row['dtype']:<9} {METHODS[row['method']]:<20}{peaks}"
        f"{row['bytes_per_element_and_block']:>12.4f}"
    )


def time_line(row: dict[str, Any]) -> str:
    """Milliseconds per step of one method, and ratios with quartiles."""
    cells = []
    for kind in ("wall", "cpu"):
        cells.append(f"{row[f'{kind}_seconds'] * 1e3:>8.0f}")
        for base in ("checkpoint", "plain"):
            low, median, high = row[f"{kind}_over_{base}"]
            cells.append(f"{median:>8.3f} [{low:.3f}, {high:.3f}]")
    sizes = f"{row['width']:>4} {row['hidden']:>5}"
    return f"{row['dtype']:<9}{sizes} {METHODS[row['method']]:<20}" + "".join(cells)


def plot_memory(e: MemoryAndTime, rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Peak temporaries over depth."""
    with figures.figure(path, len(DTYPES)) as axes:
        for axis, dtype in zip(axes, DTYPES):
            for i, method in enumerate(METHODS):
                (row,) = (r for r in rows if (r["method"], r["dtype"]) == (method, dtype))
                slope = row["bytes_per_element_and_block"]
                axis.plot(
                    e.depths,
                    [peak / 1e6 for peak in row["temporaries"]],
                    **figures.style(i),
                    label=f"{METHODS[method]}: {slope:.3g}",
                    # The two of BDIA nearly coincide.
                    markersize=13 if method == "bdia" else 8,
                    linestyle="-:"[method == "bdia-r1"],
                )
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(e.depths, [str(depth) for depth in e.depths])
            figures.plain_logarithms(axis)
            axis.tick_params(labelleft=True)
            axis.set_xlabel("blocks")
            axis.set_title(dtype)
            axis.legend(title="bytes per element and block")
        axes[0].set_ylabel("peak temporaries in MB")
        # Room for the legends above the highest curve.
        low, high = axes[0].get_ylim()
        axes[0].set_ylim(low, high * (high / low) ** 0.5)


def main(e: MemoryAndTime) -> dict[str, Any]:
    """Runs it; what is written."""
    heads = "".join(f"{depth:>10}" for depth in e.depths)
    print(f"peak temporaries in MB, by number of blocks; bytes per element and block\n{heads:>70}")
    found = {"memory": [], "time": []}
    for dtype, method in itertools.product(DTYPES, METHODS):
        found["memory"].append(memory_over_depth(e, method, dtype))
        print(memory_line(found["memory"][-1]), flush=True)
    path = results.write("memory_and_time", e, found, e.out)
    plot_memory(e, found["memory"], path.with_suffix(".png"))
    if e.rounds:
        print(
            f"\n{'milliseconds per step, and over those of ...':<40}{'wall':>8}"
            f"{'checkpointed':>22}{'plain':>22}{'CPU':>12}{'checkpointed':>22}{'plain':>22}"
        )
        for setting in itertools.product(DTYPES, e.widths, e.expansions):
            rows = times(e, *setting)
            found["time"] += rows
            print("\n".join(map(time_line, rows)), flush=True)
            results.write("memory_and_time", e, found, e.out)
    print(f"\n{path}, {path.with_suffix('.png').name}")
    return found


if __name__ == "__main__":
    given = tyro.cli(MemoryAndTime, description=__doc__)
    if given.peak_of:
        print(peak_in_use(given, *given.peak_of))
    else:
        main(given)
