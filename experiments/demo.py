"""The promise on one page: a deep network, trained with checkpoints and with BDIA, in minutes.

    python experiments/demo.py --out demo

Trains a deep vision transformer on scikit-learn's digits: as the standard network with
checkpointed blocks, and as BDIA. Both hand back the same kind of network; the first keeps the input
of every block, the second a few bits per activation. Prints accuracy, memory, time and exactness
side by side, and draws accuracy and memory over depth.

In a network as deep, and trained as briefly, γ = 1/2 with a sign per block (``--gamma 0.5 --signs
block``) is noise that it does not learn against. A small γ leaves it be.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
from flax import nnx
from measure import cost_tables, memory, records
from measure.networks import Network

from bdia_jax import files
from bdia_jax.data import load_images
from bdia_jax.nn import ViT, ViTConfig
from bdia_jax.planning.ways import WAYS
from bdia_jax.steps import Signs
from bdia_jax.train import ImageClassification, TrainSettings, command, figures, train
from bdia_jax.train.wording import per_step

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
    """Folder for figures, the table and the runs, which are made anew."""
    steps: int = 300
    """Optimizer steps of each run."""
    batch_size: int = 64
    """Samples per step."""
    gamma: float = 1 / 16
    """Magnitude of γ, 2^-m: m bits per activation and step."""
    signs: Signs = "sample"
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
    rows = []
    for found in peaks:
        way, shallow, deep = found["way"], found["peaks"][0], found["peaks"][-1]
        slope = (deep - shallow) / (DEPTHS[-1] - DEPTHS[0]) / network.elements
        row = {
            "": way,
            f"activations, {DEPTHS[0]} blocks": f"{shallow / 1e6:.1f} MB",
            f"{DEPTHS[-1]} blocks": f"{deep / 1e6:.1f} MB",
            "bytes per activation and block": f"{slope:.3f}",
        }
        rows.append(row)
        if way in TRAINED:
            trained = ViT(WAYS[way].config(model), rngs=nnx.Rngs(0))
            result = train(trained, task, settings, runs / way)
            row["validation accuracy"] = f"{result.last('eval', 'accuracy'):.2%}"
            row["time"] = per_step(result.seconds_per_step)
        if way.startswith("BDIA"):
            mismatched = sum(r["mismatched"] for r in result.history if r["split"] == "train")
            taken_back = trained.blocks.depth * len(trained.blocks.parts) - 1
            compared = network.elements * taken_back * demo.steps
            row["integers mismatched, of those reconstructed"] = f"{mismatched:.0f} of {compared:,}"
    mean, std = task.data.statistics
    images = jnp.asarray((task.data.eval_images[:32] - mean) / std, jnp.float32)
    x = trained.embedding(images, key=jax.random.key(1))
    audit = trained.blocks.check_reversible(x, key=jax.random.key(2))
    table = records.as_they_are(rows)
    table += f"\n\nAudit of the trained network, integer by integer: {audit}"
    files.write_text(demo.out / "table.md", table + "\n")
    figures.plot_curves({way: runs / way for way in TRAINED}, demo.out / "accuracy.png")
    cost_tables.draw(peaks, demo.out / "memory.png")
    print(f"\n{table}\n\nFigures: {demo.out}/accuracy.png, memory.png")
    return table


if __name__ == "__main__":
    command.run(main, Demo, __doc__, told=logging.WARNING)
