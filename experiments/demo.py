"""The promise on one page: the same network trained three ways, in a few minutes on 2 cores.

    python experiments/demo.py --out demo

Trains a 12-block vision transformer on scikit-learn's digits with BDIA, in the standard way, and
in the standard way with per-block checkpointing, from the same seeds. Prints accuracy, memory,
time and exactness side by side, and draws accuracy, memory over depth, and the reconstruction
error over the blocks.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import results
import tyro
from flax import nnx

from bdia_jax import files, maps, memory
from bdia_jax.data import load_images
from bdia_jax.nn import ViT, ViTConfig
from bdia_jax.train import ImageClassification, TrainSettings, figures, train

METHODS = ("bdia", "standard", "standard-checkpoint")
LABELS = {
    "bdia": "BDIA-ViT",
    "standard": "ViT",
    "standard-checkpoint": "ViT, checkpointed blocks",
}
DEPTHS = (6, 12, 24, 48)
MODEL = ViTConfig(
    image_size=8,
    channels=1,
    patch_size=4,
    width=48,
    depth=12,
    heads=4,
    head_dim=12,
    hidden=96,
    pool="mean",
    dropout=0.0,
)


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
        steps=demo.steps,
        batch_size=demo.batch_size,
        learning_rate=2e-3,
        warmup_steps=min(30, demo.steps),
        log_every=25,
        eval_every=100,
        checkpoint_every=demo.steps,
    )
    rows, models = [], {}
    peaks = {
        method: [
            peak(dataclasses.replace(MODEL, method=method, depth=depth), demo.batch_size)
            for depth in DEPTHS
        ]
        for method in METHODS
    }
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
                f"{peaks[method][-1] / 1e6:.1f} MB",
                f"{slope:.3f}",
                f"{result.seconds_per_step * 1e3:.0f} ms",
                f"{mismatched:.0f} of {elements * (MODEL.depth - 1) * demo.steps:,}"
                if method == "bdia"
                else "-",
            ]
        )
    x, key = stream(models["bdia"], task)
    errors = reconstruction_errors(models["bdia"], x, key)
    audit = models["bdia"].blocks.check_reversible(x, key=key)
    table = results.markdown(
        [
            "",
            "validation accuracy",
            "peak temporaries",
            f"at {DEPTHS[-1]} blocks",
            "bytes per activation and block",
            "time per step",
            "integers mismatched, of those reconstructed",
        ],
        rows,
    )
    table += f"\n\nAudit of the trained BDIA-ViT, integer by integer: {audit}"
    files.write_text(demo.out / "table.md", table + "\n")
    figures.plot_curves({LABELS[m]: runs / m for m in METHODS}, demo.out / "accuracy.png")
    plot_memory(peaks, demo.out / "memory.png")
    plot_reconstruction(errors, demo.out / "inverse.png")
    print(f"\n{table}\n\nFigures: {demo.out}/accuracy.png, memory.png, inverse.png")
    return table


def peak(config: ViTConfig, batch: int) -> int:
    """Peak temporaries, in bytes, of the gradient of a ViT; nothing is allocated."""
    model = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, images, key):
        return nnx.merge(graph, params, rest)(images, key=key).sum()

    shape = (batch, config.image_size, config.image_size, config.channels)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return memory.temporaries(jax.grad(loss), params, rest, images, key)


def stream(model: ViT, task: ImageClassification) -> tuple[jax.Array, jax.Array]:
    """What the first block of a model is given, for 32 images; and a key."""
    mean, std = task.data.statistics
    images = (task.data.eval_images[:32].astype(np.float32) - mean) / std
    model.train()
    return model.embedding(jnp.asarray(images), key=jax.random.key(1)), jax.random.key(2)


def reconstruction_errors(model: ViT, x: jax.Array, key: jax.Array) -> dict[str, np.ndarray]:
    """Largest error of each state, reconstructed from the last two, by three inverses.

    The equations of the paper, a line each, in float32; ``x`` is the input of the first block.
    For the mid-point network γ is 1, and there is no side information.
    """
    block, stacked = model.blocks.functional()
    depth, l = model.config.depth, model.config.frac_bits  # noqa: E741
    keys = jax.random.split(key, depth)
    if model.config.method.startswith("midpoint"):
        gamma = jnp.ones((depth, 1, 1, 1))
    else:
        signs = jax.random.bernoulli(key, 0.5, (depth, len(x), 1, 1)) * 2 - 1
        gamma = model.config.gamma * signs
    modulus = float(1 / jnp.max(jnp.abs(gamma)))
    gamma = gamma.at[0].set(0)
    params = [jax.tree.map(operator.itemgetter(k), stacked) for k in range(depth)]
    update = jax.jit(block)

    def grid(y):
        return jnp.round(y * 2.0**l) / 2.0**l

    def side(x):
        return jnp.mod(x * 2.0**l, modulus) / 2.0**l

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

    floats, on_grid = forward(lambda y: y), forward(grid)
    return {
        "floats": backward(floats, lambda y: y, False),
        "on the grid, without side bits": backward(on_grid, grid, False),
        "on the grid, with side bits": backward(on_grid, grid, True),
    }


def plot_memory(peaks: dict[str, list[int]], path: pathlib.Path) -> None:
    """Peak temporaries over depth."""
    with figures.figure(path) as (axis,):
        for i, method in enumerate(METHODS):
            axis.plot(
                DEPTHS, [p / 1e6 for p in peaks[method]], label=LABELS[method], **figures.style(i)
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
        figures.plain_logarithms(axis)
        axis.set_xlabel("blocks")
        axis.set_ylabel("peak temporaries in MB")
        axis.legend()


def plot_reconstruction(errors: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Error over the blocks; what is exactly 0 lies on the floor of the logarithmic scale."""
    with figures.figure(path) as (axis,):
        for i, (label, error) in enumerate(errors.items()):
            if not error.any():
                label += ": 0 everywhere"
            axis.plot(np.arange(1, len(error) + 1), error, label=label, **figures.style(i))
        axis.set_yscale("symlog", linthresh=1e-8)
        # Room for the legend above.
        highest = max(float(error.max()) for error in errors.values())
        axis.set_ylim(-2e-9, highest * 10 ** (len(errors) + 1))
        axis.invert_xaxis()
        axis.set_xlabel("block whose input is reconstructed")
        axis.set_ylabel("largest absolute error")
        axis.legend(loc="upper left")


if __name__ == "__main__":
    logging.getLogger("absl").setLevel(logging.ERROR)
    main(tyro.cli(Demo, description=__doc__))
