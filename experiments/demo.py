"""The promise on one page: the same network trained three ways, in a few minutes on 2 cores.

    python experiments/demo.py --out demo

Trains a 12-block vision transformer on scikit-learn's digits with BDIA, in the standard way, and
in the standard way with per-block checkpointing, from the same seeds. Prints accuracy, memory,
time and exactness side by side, and draws accuracy, memory over depth, and the reconstruction
error over the blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from bdia_jax import maps, memory
from bdia_jax.data import load_images
from bdia_jax.nn import Probe, ViT, ViTConfig
from bdia_jax.train import ImageClassification, TrainSettings, metrics, train

METHODS = ("bdia", "standard", "standard-checkpoint")
LABELS = {
    "bdia": "BDIA-ViT",
    "standard": "ViT",
    "standard-checkpoint": "ViT, checkpointed blocks",
}
DEPTHS = (6, 12, 24, 48)
MODEL = ViTConfig(
    image_size=8, channels=1, patch_size=4, width=48, depth=12, heads=4, head_dim=12, hidden=96,
    pool="mean", dropout=0.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Demo:
    """The same network trained three ways: accuracy, memory, time, exactness."""

    out: pathlib.Path = pathlib.Path("demo")
    """Folder for figures, the table and the runs; emptied first."""
    steps: int = 1000
    """Optimizer steps of each run."""
    batch_size: int = 64
    """Samples per step."""


def main(demo: Demo) -> str:
    """Runs it; the table."""
    runs = demo.out / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    task = ImageClassification(load_images("digits"))
    settings = TrainSettings(
        steps=demo.steps, batch_size=demo.batch_size, learning_rate=2e-3,
        warmup_steps=min(30, demo.steps),
        log_every=25, eval_every=100, checkpoint_every=demo.steps,
    )  # fmt: skip
    rows, models = [], {}
    peaks = {m: [peak(MODEL, m, depth, demo.batch_size) for depth in DEPTHS] for m in METHODS}
    for method in METHODS:
        model = ViT(dataclasses.replace(MODEL, method=method), rngs=nnx.Rngs(0))
        result = train(model, task, settings, runs / method)
        models[method] = model
        mismatched = sum(r["mismatched"] for r in result.history if r["split"] == "train")
        elements = demo.batch_size * MODEL.patches * MODEL.width
        slope = (peaks[method][-1] - peaks[method][0]) / (DEPTHS[-1] - DEPTHS[0]) / elements
        rows.append(
            [
                LABELS[method],
                f"{result.last('eval', 'accuracy'):.2%}",
                f"{peaks[method][DEPTHS.index(MODEL.depth)] / 1e6:.1f} MB",
                f"{slope:.3f}",
                f"{result.seconds_per_step * 1e3:.0f} ms",
                f"{mismatched:.0f} of {elements * (MODEL.depth - 1) * demo.steps:,}"
                if method == "bdia"
                else "-",
            ]
        )
    x, key = stream(models["bdia"], task)
    audit = models["bdia"].blocks.check_reversible(x, key=key)
    table = markdown(
        ["", "validation accuracy", "peak temporaries", "bytes per activation and block",
         "time per step", "integers mismatched, of those reconstructed"],
        rows,
    )  # fmt: skip
    table += f"\n\nAudit of the trained BDIA-ViT, integer by integer: {audit}"
    metrics.write_text(demo.out / "table.md", table + "\n")
    metrics.plot_curves({LABELS[m]: runs / m for m in METHODS}, demo.out / "accuracy.png")
    plot_memory(peaks, demo.out / "memory.png")
    plot_reconstruction(reconstruction_errors(models["bdia"], task), demo.out / "inverse.png")
    print(f"\n{table}\n\nFigures: {demo.out}/accuracy.png, memory.png, inverse.png")
    return table


def peak(config: ViTConfig, method: str, depth: int, batch: int) -> int:
    """Peak temporaries, in bytes, of the gradient of a ViT."""
    model = ViT(dataclasses.replace(config, method=method, depth=depth), rngs=nnx.Rngs(0))
    graph, params, probes, rest = nnx.split(model, nnx.Param, Probe, ...)

    def loss(params, images, key):
        return nnx.merge(graph, params, probes, rest)(images, key=key).sum()

    images = jnp.zeros((batch, config.image_size, config.image_size, config.channels))
    return memory.temporaries(jax.grad(loss), params, images, jax.random.key(0))


def stream(model: ViT, task: ImageClassification) -> tuple[jax.Array, jax.Array]:
    """What the first block of a model is given, for 32 images; and a key."""
    mean, std = task.data.statistics
    images = (task.data.eval_images[:32].astype(np.float32) - mean) / std
    model.train()
    return model.embedding(jnp.asarray(images), key=jax.random.key(1)), jax.random.key(2)


def reconstruction_errors(model: ViT, task: ImageClassification) -> dict[str, np.ndarray]:
    """Largest error of each state, reconstructed from the last two, by three inverses."""
    block, stacked = model.blocks.functional()
    x, key = stream(model, task)
    depth, l = MODEL.depth, MODEL.frac_bits  # noqa: E741
    keys = jax.random.split(key, depth)
    sign = jax.random.bernoulli(key, 0.5, (depth, len(x), 1, 1)) * 2 - 1
    gamma = 0.5 * sign.at[0].set(0)
    params = [jax.tree.map(operator.itemgetter(k), stacked) for k in range(depth)]
    update = jax.jit(block)

    # The equations of the paper, a line each, in float32: on no grid, and on the grid.
    def grid(y):
        return jnp.round(y * 2.0**l) / 2.0**l

    def forward(quantize):
        states = [quantize(x), quantize(x)]
        for k in range(depth):
            inner = maps.pre_rounding(states[-1], update(params[k], states[-1], keys[k]), gamma[k])
            s = side(states[-2]) if quantize is grid else 0
            states.append(gamma[k] * (states[-2] + s) + quantize(inner))
        return states

    def backward(states, quantize, keep_side):
        x_next, x_now, errors = states[-1], states[-2], []
        for k in reversed(range(1, depth)):
            inner = maps.pre_rounding(x_now, update(params[k], x_now, keys[k]), gamma[k])
            s = side(states[k]) if keep_side else 0
            x_next, x_now = x_now, (x_next - quantize(inner)) / gamma[k] - s
            errors.append(float(jnp.max(jnp.abs(x_now - states[k]))))
        return np.array(errors[::-1])

    def side(x):
        return jnp.mod(x * 2.0**l, 2) / 2.0**l

    floats, on_grid = forward(lambda y: y), forward(grid)
    return {
        "float BDIA, no grid": backward(floats, lambda y: y, False),
        "on the grid, without side bits": backward(on_grid, grid, False),
        "on the grid, with side bits (ours)": backward(on_grid, grid, True),
    }


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its columns aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells):
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def figure(path: pathlib.Path, xlabel: str, ylabel: str):
    """A figure with one pair of axes, and the function that labels and saves it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(6.4, 4.6))

    def save(legend):
        axis.set_xlabel(xlabel, fontsize=13)
        axis.set_ylabel(ylabel, fontsize=13)
        axis.tick_params(labelsize=11)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=11, loc=legend)
        fig.tight_layout()
        fig.savefig(path, dpi=120)
        plt.close(fig)

    return axis, save


STYLE = functools.partial(dict, linewidth=2, markersize=6)


def plot_memory(peaks: dict[str, list[int]], path: pathlib.Path) -> None:
    """Peak temporaries over depth."""
    axis, save = figure(path, "blocks", "peak temporaries in MB")
    for method, colour, marker in zip(METHODS, metrics.COLOURS, "os^"):
        megabytes = [p / 1e6 for p in peaks[method]]
        axis.plot(DEPTHS, megabytes, **STYLE(color=colour, marker=marker, label=LABELS[method]))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    save("upper left")


def plot_reconstruction(errors: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Error over the blocks; what is exactly 0 lies on the floor of the logarithmic scale."""
    axis, save = figure(path, "block whose input is reconstructed", "largest absolute error")
    for (label, error), colour, marker in zip(errors.items(), metrics.COLOURS, "s^o"):
        blocks = np.arange(1, len(error) + 1)
        if not error.any():
            label += ": 0 everywhere"
        axis.plot(blocks, error, **STYLE(color=colour, marker=marker, label=label))
    axis.set_yscale("symlog", linthresh=1e-8)
    axis.set_ylim(bottom=-2e-9)
    axis.invert_xaxis()
    save("upper left")


if __name__ == "__main__":
    logging.getLogger("absl").setLevel(logging.ERROR)
    main(tyro.cli(Demo, description=__doc__))
