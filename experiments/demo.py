"""The promise on one page: a deep network, trained with checkpoints and with BDIA, in minutes.

    python experiments/demo.py --out demo

Trains a deep vision transformer on scikit-learn's digits: as the standard network with
checkpointed blocks, and as BDIA. Both hand back the same kind of network; the first keeps the input
of every block, the second a bit per activation. Prints accuracy, memory, time and exactness side by
side, and draws accuracy, memory over depth, and the reconstruction error over the blocks.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
import pathlib
import shutil

import command
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measure import cost_tables, memory, records
from measure.networks import Network

from bdia_jax import files, maps
from bdia_jax.data import load_images
from bdia_jax.nn import ViT, ViTConfig
from bdia_jax.planning.ways import WAYS
from bdia_jax.steps import Signs
from bdia_jax.train import ImageClassification, TrainSettings, figures, train

COMPARED = ("standard", "checkpointed", "BDIA, parts")
TRAINED = ("checkpointed", "BDIA, parts")
"""The standard network is the checkpointed one, and its accuracy the same."""
DEPTHS = (6, 12, 24, 48, 96)
MODEL = ViTConfig(
    image_size=8,
    channels=1,
    patch_size=2,
    width=32,
    depth=96,
    heads=2,
    head_dim=16,
    hidden=64,
    pool="mean",
    dropout=0.0,
)


@dataclasses.dataclass(frozen=True)
class Demo:
    """A deep network, trained with checkpoints and with BDIA: accuracy, memory, time, exactness."""

    out: pathlib.Path = pathlib.Path("demo")
    """Folder for figures, the table and the runs; emptied first."""
    steps: int = 300
    """Optimizer steps of each run."""
    batch_size: int = 64
    """Samples per step."""
    gamma: float = 0.5
    """Magnitude of γ, 2^-m: m bits per activation and step."""
    signs: Signs = "block"
    """Of γ: drawn per block or per sample, or always minus or plus."""


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
    model = dataclasses.replace(MODEL, gamma=demo.gamma, signs=demo.signs)
    network = Network(model, demo.batch_size)
    peaks = [
        {
            "way": way,
            "axis": "depth",
            "values": DEPTHS,
            "peaks": memory.along(memory.activations, network, WAYS[way], "depth", DEPTHS),
        }
        for way in COMPARED
    ]
    lines, trained = [], None
    for row in peaks:
        way, found = row["way"], row["peaks"]
        slope = (found[-1] - found[0]) / (DEPTHS[-1] - DEPTHS[0]) / network.elements
        line = [way, *(f"{peak / 1e6:.1f} MB" for peak in (found[0], found[-1])), f"{slope:.3f}"]
        if way not in TRAINED:
            lines.append([*line, "", "", ""])
            continue
        trained = ViT(WAYS[way].config(model), rngs=nnx.Rngs(0))
        result = train(trained, task, settings, runs / way)
        line += [
            f"{result.last('eval', 'accuracy'):.2%}",
            f"{result.seconds_per_step * 1e3:.0f} ms",
        ]
        if way.startswith("BDIA"):
            stack = trained.blocks
            steps = stack.depth * len(stack.parts or (None,)) - 1
            mismatched = sum(r["mismatched"] for r in result.history if r["split"] == "train")
            line.append(f"{mismatched:.0f} of {network.elements * steps * demo.steps:,}")
        lines.append([*line, ""][:7])
    header = [
        f"{model.depth} blocks, {demo.batch_size} images",
        f"activations, {DEPTHS[0]} blocks",
        f"{DEPTHS[-1]} blocks",
        "bytes per activation and block",
        "validation accuracy",
        "time per step",
        "integers mismatched, of those reconstructed",
    ]
    x, key = stream(trained, task)
    audit = trained.blocks.check_reversible(x, key=key)
    table = records.markdown(header, lines)
    table += f"\n\nAudit of the trained network, integer by integer: {audit}"
    files.write_text(demo.out / "table.md", table + "\n")
    figures.plot_curves({way: runs / way for way in TRAINED}, demo.out / "accuracy.png")
    cost_tables.draw(peaks, demo.out / "memory.png")
    plot_reconstruction(reconstruction_errors(trained, x, key), demo.out / "inverse.png")
    print(f"\n{table}\n\nFigures: {demo.out}/accuracy.png, memory.png, inverse.png")
    return table


def stream(model: ViT, task: ImageClassification) -> tuple[jax.Array, jax.Array]:
    """What the first block of a model is given, for 32 images; and a key."""
    mean, std = task.data.statistics
    images = (task.data.eval_images[:32].astype(np.float32) - mean) / std
    model.train()
    return model.embedding(jnp.asarray(images), key=jax.random.key(1)), jax.random.key(2)


def reconstruction_errors(model: ViT, x: jax.Array, key: jax.Array) -> dict[str, np.ndarray]:
    """Largest error of each state, reconstructed from the last two, by three inverses.

    The equations of the paper, a line each, in float32; ``x`` is the input of the first block.
    """
    parts, stacked = model.blocks.functional()
    parts = parts if isinstance(parts, tuple) else (parts,)
    step, depth = model.blocks.step, model.config.depth
    # A step per part of each block: its update, and γ by sample, 0 in the first.
    updates = [
        (jax.jit(part), jax.tree.map(operator.itemgetter(k), stacked))
        for k in range(depth)
        for part in parts
    ]
    keys = jax.random.split(key, len(updates))
    gammas = [step.scaled(step.sign(k, key, len(x)), x) for k in keys]
    gammas[0] = jnp.zeros_like(gammas[0])

    def grid(y):
        return jnp.round(y * 2.0**step.grid_bits) / 2.0**step.grid_bits

    def side(x):
        return jnp.mod(x * 2.0**step.grid_bits, 2**step.m) / 2.0**step.grid_bits

    def inner(i, x):
        update, params = updates[i]
        return maps.pre_rounding(x, update(params, x, keys[i]), gammas[i])

    def forward(quantize):
        states = [quantize(x), quantize(x)]
        for i, gamma in enumerate(gammas):
            s = side(states[-2]) if quantize is grid else 0
            states.append(gamma * (states[-2] + s) + quantize(inner(i, states[-1])))
        return states

    def backward(states, quantize, keep_side):
        x_next, x_now, errors = states[-1], states[-2], []
        for i in reversed(range(1, len(gammas))):
            s = side(states[i]) if keep_side else 0
            x_next, x_now = x_now, (x_next - quantize(inner(i, x_now))) / gammas[i] - s
            errors.append(float(jnp.max(jnp.abs(x_now - states[i]))))
        return np.array(errors[::-1])

    floats, on_grid = forward(lambda y: y), forward(grid)
    return {
        "floats": backward(floats, lambda y: y, False),
        "on the grid, without side bits": backward(on_grid, grid, False),
        "on the grid, with side bits": backward(on_grid, grid, True),
    }


def plot_reconstruction(errors: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Error over the steps; what is exactly 0 lies on the floor of the logarithmic scale."""
    with figures.figure(path) as (axis,):
        for i, (label, error) in enumerate(errors.items()):
            if not error.any():
                label += ": 0 everywhere"
            axis.plot(np.arange(1, len(error) + 1), error, label=label, **figures.style(i))
        axis.set_yscale("symlog", linthresh=1e-8)
        # Room for the legend above.
        highest = max(float(np.nanmax(error)) for error in errors.values())
        axis.set_ylim(-2e-9, min(1e38, highest) * 10 ** (len(errors) + 1))
        axis.invert_xaxis()
        axis.set_xlabel("step whose input is reconstructed")
        axis.set_ylabel("largest absolute error")
        axis.legend(loc="upper left")


if __name__ == "__main__":
    command.run(main, Demo, __doc__, told=logging.WARNING)
