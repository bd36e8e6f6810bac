"""What the vision systems cost at the published setting: memory, time, reconstruction errors.

    python experiments/vision_costs.py                      # half an hour on 2 cores
    python experiments/vision_costs.py --parts memory       # needs no run; minutes
    python experiments/vision_costs.py --batch-size 8 --depth 2 --depths 2 4 --rounds 2

The network is that of the BDIA experiments on CIFAR: 6 blocks of width 512, 128 images of 32 × 32
pixels in a batch, dropout 0.1.

- *memory*: peak temporaries of loss and gradient over depth, float32 and bfloat16, known from
  compilation. What a block keeps for its own derivative is listed, and what becomes of the peak
  if it keeps less.
- *time*: whole training steps (SET-Adam) in rounds in which each system runs once, in turns:
  median over rounds, ratios within a round with quartiles, and seconds per epoch of 50,000 images.
- *inverse*: networks trained on digits for a few hundred steps, then taken back from their last
  state: the largest error of each state on the way down.

Writes results/vision_costs-DEVICE.json, .md and figures.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pathlib
import tempfile
import time
from typing import Any, Literal

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import results
import tyro
from demo import MODEL as SMALL
from demo import peak, plot_reconstruction, reconstruction_errors, stream
from flax import nnx

from bdia_jax import files, memory, reversible_scan
from bdia_jax.data import load_images
from bdia_jax.nn import ViT, ViTConfig
from bdia_jax.train import ImageClassification, TrainSettings, figures, make_optimizer
from bdia_jax.train import train as train_loop

SYSTEMS = {
    "ViT": "standard",
    "ViT, checkpointed blocks": "standard-checkpoint",
    "BDIA-ViT": "bdia",
    "BDIA-ViT, stored": "bdia-stored",
    "RevViT": "coupled",
    "RevViT, stored": "coupled-stored",
    "mid-point": "midpoint",
    "mid-point, stored": "midpoint-stored",
}
DTYPES = ("float32", "bfloat16")
EPOCH = 50_000
Part = Literal["memory", "time", "inverse"]


@dataclasses.dataclass(frozen=True)
class VisionCosts:
    """What the vision systems cost at the published setting."""

    parts: tuple[Part, ...] = ("memory", "time", "inverse")
    """What is measured; what the other parts found earlier stays."""
    batch_size: int = 128
    """Images per step."""
    depth: int = 6
    """Time: number of blocks."""
    width: int = 512
    """Features of the stream, and of the hidden layer."""
    depths: tuple[int, ...] = (3, 6, 12, 24, 48)
    """Memory: numbers of blocks."""
    rounds: int = 6
    """Time: rounds in which each system runs once."""
    steps: int = 400
    """Inverse: training steps on digits."""
    out: pathlib.Path | None = None
    """Folder for the results; by default experiments/results."""

    def config(self, method: str, depth: int, dtype: str = "float32") -> ViTConfig:
        """The network."""
        return ViTConfig(
            method=method,
            depth=depth,
            dtype=dtype,
            width=self.width,
            hidden=self.width,
            head_dim=self.width // 8,
        )


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


def measure_memory(v: VisionCosts) -> dict[str, Any]:
    """Peaks of every system; what one block keeps; and what keeping less gives."""
    rows = []
    for dtype in DTYPES:
        for name, method in SYSTEMS.items():
            peaks = [peak(v.config(method, depth, dtype), v.batch_size) for depth in v.depths]
            rows.append({"system": name, "dtype": dtype, "temporaries": peaks})
            print(
                f"{dtype:<9} {name:<25}" + "".join(f"{p / 1e6:>10.1f}" for p in peaks), flush=True
            )
    kept = residuals(v)
    print(
        f"a block keeps {sum(r['bytes'] for r in kept) / 1e6:.1f} MB: "
        + ", ".join(f"{r['count']} × {r['type']}" for r in kept)
    )
    less = keeping_less(v)
    for row in less:
        print(f"{row['keeps']:<40} {row['temporaries'] / 1e6:>8.1f} MB", flush=True)
    return {"peaks": rows, "residuals": kept, "keeping_less": less}


def residuals(v: VisionCosts) -> list[dict[str, Any]]:
    """The arrays that one block keeps for its derivative, but for its parameters, by type."""
    block, params, x, key = _block(v)
    one = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), params)

    def derivative(params, x, key):
        return jax.vjp(lambda params, x: block(params, x, key), params, x)[1]

    traced = jax.make_jaxpr(derivative)(one, x, key).jaxpr
    given = set(traced.invars[: len(jax.tree.leaves(one))])
    types: dict[str, list[int]] = {}
    for value in {v for v in traced.outvars if isinstance(v, jax.extend.core.Var)} - given:
        aval = value.aval
        if not jnp.issubdtype(aval.dtype, jax.dtypes.extended):
            types.setdefault(aval.str_short(), []).append(aval.size * aval.dtype.itemsize)
    rows = [{"type": t, "count": len(b), "bytes": sum(b)} for t, b in types.items()]
    return sorted(rows, key=lambda row: -row["bytes"])


def keeping_less(v: VisionCosts) -> list[dict[str, Any]]:
    """Peaks of the gradient of the stack alone, if blocks recompute some of what they keep."""
    block, params, x, key = _block(v)
    halves = nnx.eval_shape(lambda: ViT(v.config("coupled", v.depth), rngs=nnx.Rngs(0)))
    attend, feed_forward, _ = halves.blocks.functional()

    def by_halves(params, x, key):
        attend_key, feed_forward_key = jax.random.split(key)
        a = jax.checkpoint(attend)(params, x, attend_key)
        return a + jax.checkpoint(feed_forward)(params, x + a, feed_forward_key)

    policies = jax.checkpoint_policies
    found = []
    for keeps, function in {
        "everything": block,
        "results of matrix products": jax.checkpoint(block, policy=policies.dots_saveable),
        "nothing": jax.checkpoint(block),
        "the inputs of both halves": by_halves,
    }.items():

        def loss(params, x, key, function=function):
            return jnp.sum(reversible_scan(function, params, x, key=key) ** 2)

        bytes_ = memory.temporaries(jax.grad(loss, (0, 1)), params, x, key)
        found.append({"keeps": keeps, "temporaries": bytes_})
    return found


def _block(v: VisionCosts):
    """A block of BDIA-ViT, and shapes of stacked parameters, of its input, and of a key."""
    config = v.config("bdia", v.depth)
    model = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
    block, params = model.blocks.functional()
    x = jax.ShapeDtypeStruct((v.batch_size, config.length, config.width), jnp.float32)
    return block, params, x, jax.eval_shape(lambda: jax.random.key(0))


# ---------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------


def measure_time(v: VisionCosts) -> list[dict[str, Any]]:
    """Seconds per training step of each system, and ratios within a round."""
    runs = {
        name: training_step(v.config(method, v.depth), v.batch_size)
        for name, method in SYSTEMS.items()
    }
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    turns = list(runs)
    for _ in range(v.rounds):
        for name in turns:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
        turns = turns[1:] + turns[:1]
    rows = []
    for name, samples in seconds.items():
        row = {"system": name, "seconds_per_step": float(np.median(samples)), "rounds": samples}
        for base in ("ViT", "ViT, checkpointed blocks"):
            ratios = np.array(samples) / np.array(seconds[base])
            row[f"over {base}"] = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        row["seconds_per_epoch"] = row["seconds_per_step"] * EPOCH / v.batch_size
        rows.append(row)
        print(f"{name:<25} {row['seconds_per_step']:>8.3f} s", flush=True)
    return rows


def training_step(config: ViTConfig, batch: int):
    """A function that trains for one step, on random images, and waits for it."""
    graph, params, rest = nnx.split(ViT(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    optimizer = make_optimizer("set-adam", optax.constant_schedule(1e-4))
    rng = np.random.default_rng(0)
    shape = (batch, config.image_size, config.image_size, config.channels)
    images = jnp.asarray(rng.normal(size=shape), jnp.float32)
    labels = jnp.asarray(rng.integers(config.num_classes, size=batch))

    def step(params, state, step_number):
        def loss(params):
            logits = nnx.merge(graph, params, rest)(images, key=jax.random.key(step_number))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    state = [params, jax.jit(optimizer.init)(params)]
    count = 0

    def run():
        nonlocal state, count
        state = jax.block_until_ready(compiled(*state, count))
        count += 1

    return run


# ---------------------------------------------------------------------------------------------
# The inverse
# ---------------------------------------------------------------------------------------------


def measure_inverse(v: VisionCosts) -> dict[str, list[float]]:
    """Largest absolute error of the input of each block, taken back from the last state."""
    task = ImageClassification(load_images("digits"))
    settings = TrainSettings(
        steps=v.steps,
        batch_size=64,
        learning_rate=2e-3,
        warmup_steps=min(30, v.steps),
        eval_every=v.steps,
        checkpoint_every=v.steps,
    )

    def trained(method):
        model = ViT(dataclasses.replace(SMALL, method=method), rngs=nnx.Rngs(0))
        with tempfile.TemporaryDirectory() as folder:
            train_loop(model, task, settings, pathlib.Path(folder) / "run", progress=False)
        return model

    bdia, rev, midpoint = (trained(method) for method in ("bdia", "coupled", "midpoint"))
    found = {
        f"BDIA-ViT, {how}": errors.tolist()
        for how, errors in reconstruction_errors(bdia, *stream(bdia, task)).items()
    }
    for how, errors in reconstruction_errors(midpoint, *stream(midpoint, task)).items():
        # Nothing is lost by a factor of 1: there are no side bits.
        if how != "on the grid, without side bits":
            found[f"mid-point, {how.removesuffix(', with side bits')}"] = errors.tolist()
    x, key = stream(rev, task)
    found["RevViT, floats"] = np.asarray(rev.blocks.reconstruction_errors(x, key=key)).tolist()
    return found


# ---------------------------------------------------------------------------------------------
# Tables and figures
# ---------------------------------------------------------------------------------------------


def markdown(v: VisionCosts, found: dict[str, Any]) -> str:
    """All that was found."""
    parts = [
        f"# What the vision systems cost\n\n{found['device']}, {found['cores']} cores, jax "
        f"{found['jax']}. `experiments/vision_costs.py`; {v.batch_size} images of 32 × 32 per "
        f"batch, width {v.width}, dropout 0.1, no seeds but 0."
    ]
    if "memory" in found:
        parts += _memory_tables(v, found["memory"])
    if "time" in found:
        parts += ["## Time of a training step", _time_table(v, found["time"])]
    if "inverse" in found:
        rows = [
            [name] + [f"{errors[k]:.1e}" if errors[k] else "0" for k in (-1, len(errors) // 2, 0)]
            for name, errors in found["inverse"].items()
        ]
        parts += [
            "## Reconstruction error",
            f"Largest absolute error in float32 of the last, the middle and the first input that "
            f"is taken back; {SMALL.depth} blocks of width {SMALL.width}, trained for {v.steps} "
            "steps on digits.",
            results.markdown(["", "last", "middle", "first"], rows),
        ]
    return "\n\n".join(parts)


def _memory_tables(v: VisionCosts, found: dict[str, Any]) -> list[str]:
    peaks = {(r["dtype"], r["system"]): r["temporaries"] for r in found["peaks"]}
    parts = []
    for dtype in DTYPES:
        rows = []
        for name in SYSTEMS:
            mine = peaks[dtype, name]
            bdia = np.array(peaks[dtype, "BDIA-ViT"]) / mine
            rows.append([name, *(f"{p / 1e6:.0f} ({r:.2f})" for p, r in zip(mine, bdia))])
        parts += [
            f"## Peak temporaries in MB, {dtype} (in brackets: BDIA-ViT over it)",
            results.markdown(["blocks", *map(str, v.depths)], rows),
        ]
    kept = found["residuals"]
    total = sum(row["bytes"] for row in kept)
    share = (
        total / peaks["float32", "BDIA-ViT"][v.depths.index(v.depth)]
        if (v.depth in v.depths)
        else math.nan
    )
    parts += [
        "## What remains",
        f"What one block keeps for its derivative, while it is taken back: {total / 1e6:.0f} MB, "
        f"{share:.0%} of BDIA-ViT's peak at {v.depth} blocks in float32 ("
        + ", ".join(f"{row['count']} × {row['type']}" for row in kept)
        + "). Peak of the stack's gradient, if a block keeps:",
        results.markdown(
            ["", "MB"],
            [[row["keeps"], f"{row['temporaries'] / 1e6:.0f}"] for row in found["keeping_less"]],
        ),
    ]
    return parts


def _time_table(v: VisionCosts, rows: list[dict[str, Any]]) -> str:
    bases = ("ViT", "ViT, checkpointed blocks")
    lines = []
    for row in rows:
        ratios = [row[f"over {base}"] for base in bases]
        lines.append(
            [row["system"], f"{row['seconds_per_step']:.2f}", f"{row['seconds_per_epoch']:,.0f}"]
            + [f"{median:.3f} [{low:.3f}, {high:.3f}]" for low, median, high in ratios]
        )
    return results.markdown(
        [f"{v.depth} blocks", "s per step", "s per epoch", *(f"over {base}" for base in bases)],
        lines,
    )


def plot_memory(v: VisionCosts, found: dict[str, Any], path: pathlib.Path) -> None:
    """Peak temporaries over depth, of all systems but for those that store like ViT does."""
    with figures.figure(path, len(DTYPES)) as axes:
        for axis, dtype in zip(axes, DTYPES):
            rows = [
                row
                for row in found["peaks"]
                if row["dtype"] == dtype and not row["system"].endswith("stored")
            ]
            for i, row in enumerate(rows):
                axis.plot(
                    v.depths,
                    [p / 1e9 for p in row["temporaries"]],
                    label=row["system"],
                    **figures.style(i),
                )
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(v.depths, [str(depth) for depth in v.depths])
            figures.plain_logarithms(axis)
            axis.set_xlabel("blocks")
            axis.set_title(dtype)
        axes[0].set_ylabel("peak temporaries in GB")
        axes[0].legend()


def main(v: VisionCosts) -> str:
    """Runs it; the tables."""
    path = (v.out or results.FOLDER) / f"vision_costs-{results.device_slug()}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    measures = {"memory": measure_memory, "time": measure_time, "inverse": measure_inverse}
    for part in v.parts:
        found[part] = measures[part](v)
        results.write("vision_costs", v, {p: found[p] for p in measures if p in found}, v.out)
    text = markdown(v, json.loads(path.read_text()))
    files.write_text(path.with_suffix(".md"), text + "\n")
    if "memory" in found:
        plot_memory(v, found["memory"], path.with_name(f"{path.stem}-memory.png"))
    if "inverse" in found:
        errors = {name: np.array(error) for name, error in found["inverse"].items()}
        plot_reconstruction(errors, path.with_name(f"{path.stem}-inverse.png"))
    print(f"\n{text}\n\n{path}")
    return text


if __name__ == "__main__":
    logging.getLogger("absl").setLevel(logging.ERROR)
    main(tyro.cli(VisionCosts, description=__doc__))
