"""What each way of training costs: step time, throughput and peak memory of whole training steps.

    python experiments/benchmark.py                          # half an hour on 2 cores
    python experiments/benchmark.py --parts budget --shapes vit
    python experiments/benchmark.py --device-sized           # the published and customary batches

Networks: the paper's ViT, GPT-2 small, and one of Llama's kind. Ways: plain, checkpointed blocks,
√K groups of them, checkpoints in the host's memory, RevNet coupling, and BDIA: with one bit, with a
tolerance bit, with half of the blocks stored, with the optimizer in the backward pass. AdamW. The
steps are those of the training loop, taken in turns, so that what else a machine does meets all of
them alike.

- *steps*: time per step, and peak memory as compiled.
- *depth*: peak memory over the number of blocks.
- *budget*: time and memory over the number of blocks that BDIA stores.
- *besides*: time of all that BDIA's loops do besides the blocks: rounding, stepping, packing bits,
  checksums, comparing, and adding up cotangents.
- *equal*: the largest batch that fits a memory, and the throughput there.

Writes results/benchmark-DEVICE.json, .md and figures. What other parts found earlier stays.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import command
import jax
import jax.numpy as jnp
import numpy as np
import results
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from bdia_jax import coupling, files, grid, maps, reversible, side_bits
from bdia_jax._arguments import prepare
from bdia_jax.data import ImageData, TextData
from bdia_jax.nn import Decoder, DecoderConfig, ReversibleStack, ViT, ViTConfig, llama
from bdia_jax.nn.decoder import rotary_angles
from bdia_jax.planning import memory
from bdia_jax.train import (
    ImageClassification,
    LanguageModelling,
    TrainSettings,
    step_memory,
    training_step,
)
from bdia_jax.train.figures import figure, style

Part = Literal["steps", "depth", "budget", "besides", "equal"]
Shape = Literal["vit", "gpt2", "llama"]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What each way of training costs: step time, throughput and peak memory of whole steps."""

    parts: tuple[Part, ...] = ("steps", "depth", "budget", "besides")
    """What is measured; equal takes longest."""
    shapes: tuple[Shape, ...] = ("vit", "gpt2", "llama")
    """Which networks."""
    device_sized: bool = False
    """The batches of real training, rather than those that 2 cores can do."""
    dtype: str | None = None
    """What the blocks compute in; by default float32 on a CPU, bfloat16 elsewhere."""
    rounds: int = 5
    """In each, every way runs once."""
    depths: tuple[int, ...] = (6, 12, 24, 48)
    """Of the part depth."""
    fit: float = 1.0
    """Of the part equal: GB per device."""
    out: pathlib.Path | None = None
    """Folder for the results; by default experiments/results."""

    def __post_init__(self):
        if self.rounds < 1 or not self.shapes or self.fit <= 0:
            raise ValueError(
                "rounds must be at least 1, shapes name a network, and fit be positive; got "
                f"{self.rounds}, {self.shapes} and {self.fit}"
            )


# ---------------------------------------------------------------------------------------------
# Ways of training
# ---------------------------------------------------------------------------------------------


class GroupedCheckpoints(nnx.Module):
    """√K groups: the states between groups are kept; a group is run again, then its blocks."""

    def __init__(self, stack: ReversibleStack):
        self.stack = stack

    def __call__(self, x, *consts, key):
        block, params = self.stack.functional()
        depth = self.stack.depth
        size = next(s for s in range(math.isqrt(depth), 0, -1) if depth % s == 0)
        groups = jax.tree.map(
            lambda p: p.reshape(depth // size, size, *p.shape[1:]),
            (params, jax.random.split(key, depth)),
        )

        @jax.checkpoint
        def step(x, inputs):
            params, key = inputs
            return x + block(params, x, key, *consts), None

        @jax.checkpoint
        def group(x, inputs):
            return lax.scan(step, x, inputs)

        return lax.scan(group, x, groups)[0]


class OffloadedCheckpoints(nnx.Module):
    """Checkpointed blocks, their inputs kept in the memory of the host."""

    def __init__(self, stack: ReversibleStack):
        self.stack = stack

    def __call__(self, x, *consts, key):
        block, params = self.stack.functional()
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["input"],
            offload_src="device",
            offload_dst="pinned_host",
        )

        def step(x, inputs):
            params, key = inputs
            x = checkpoint_name(x, "input")
            return x + block(params, x, key, *consts), None

        step = jax.checkpoint(step, policy=policy, prevent_cse=False)
        return lax.scan(step, x, (params, jax.random.split(key, self.stack.depth)))[0]


class Coupled(nnx.Module):
    """The halves of a decoder's blocks update two streams in turns (RevNet); their mean goes on."""

    def __init__(self, stack: ReversibleStack, config: DecoderConfig):
        self.stack, self.config = stack, config

    def __call__(self, x, *_, key):
        def attend(block, x):
            angles = None
            if self.config.positions == "rotary":
                positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
                angles = rotary_angles(self.config, positions)
            x = x.astype(self.config.dtype)
            return block.dropout(block.attention(block.attention_norm(x), angles))

        def feed_forward(block, x):
            x = x.astype(self.config.dtype)
            return block.dropout(block.ffn(block.ffn_norm(x)))

        first, params = self.stack._pure(attend)
        second, _ = self.stack._pure(feed_forward)
        streams = (x.astype(jnp.float32),) * 2
        a, b = coupling.coupled_scan(first, second, params, streams, key=key)
        return ((a + b) / 2).astype(x.dtype)


class Way(NamedTuple):
    """How to train."""

    method: str
    """Of the network."""
    wrap: str | None = None
    """What runs its blocks instead of itself."""
    tolerance_bits: int = 0
    stored: float = 0.0
    """Share of the blocks."""
    update_in_backward: bool = False
    ffn_chunks: int = 1
    """How many chunks of positions the feed-forward network goes in; of decoders only."""


WAYS = {
    "plain": Way("standard"),
    "checkpointed blocks": Way("standard-checkpoint"),
    "checkpointed blocks, 4 chunks": Way("standard-checkpoint", ffn_chunks=4),
    "√K groups of them": Way("standard", "grouped"),
    "checkpoints on the host": Way("standard", "offloaded"),
    "RevNet coupling": Way("coupled"),
    "BDIA": Way("bdia"),
    "BDIA, 4 chunks": Way("bdia", ffn_chunks=4),
    "BDIA, r = 1": Way("bdia", tolerance_bits=1),
    "BDIA, half stored": Way("bdia", stored=0.5),
    "BDIA, updated in backward": Way("bdia", update_in_backward=True),
}


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """A network, and what a step of it sees."""

    config: ViTConfig | DecoderConfig
    batch: int
    length: int
    """Tokens per sequence; 1 for images."""


def size(b: Benchmark, shape: Shape) -> Size:
    """As asked for."""
    dtype = b.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    large = b.device_sized
    if shape == "vit":
        return Size(ViTConfig(dtype=dtype), 128 if large else 16, 1)
    length = 1024 if large else 128
    common = {"width": 768, "depth": 12, "heads": 12, "max_length": length, "dtype": dtype}
    if shape == "gpt2":
        return Size(DecoderConfig(vocab_size=50257, **common), 8 if large else 1, length)
    config = llama(vocab_size=32_000, kv_heads=4, hidden=2048, tied_head=True, **common)
    return Size(config, 8 if large else 1, length)


def prepared(s: Size, way: Way):
    """Settings of the network, those of training, a function that makes the network, and a task."""
    c = s.config
    coupled = way.method == "coupled"
    decoder = isinstance(c, DecoderConfig)
    config = dataclasses.replace(
        c,
        method="standard" if coupled and decoder else way.method,
        tolerance_bits=way.tolerance_bits,
        stored_blocks=round(way.stored * c.depth),
    )
    if decoder and way.ffn_chunks > 1:
        config = dataclasses.replace(config, ffn_chunk=-(-s.length // way.ffn_chunks))

    def make():
        model = (Decoder if decoder else ViT)(config, rngs=nnx.Rngs(0))
        if way.wrap is not None:
            kind = {"grouped": GroupedCheckpoints, "offloaded": OffloadedCheckpoints}[way.wrap]
            model.blocks = kind(model.blocks)
        elif coupled and decoder:
            model.blocks = Coupled(model.blocks, config)
        return model

    settings = TrainSettings(batch_size=s.batch, update_in_backward=way.update_in_backward)
    rng = np.random.default_rng(0)
    if decoder:
        text = rng.integers(0, c.vocab_size, 4 * s.length + 2).astype(np.int32)
        data = TextData("random", text, text, c.vocab_size)
        return make, LanguageModelling(data, s.length), settings
    images = rng.integers(0, 256, (2 * s.batch, 32, 32, 3)).astype(np.uint8)
    labels = rng.integers(0, 10, len(images)).astype(np.int32)
    data = ImageData("random", images, labels, images[:8], labels[:8], 10)
    return make, ImageClassification(data), settings


def ways_for(s: Size) -> dict[str, Way]:
    """Those that the network can be trained in."""
    decoder = isinstance(s.config, DecoderConfig)
    return {name: way for name, way in WAYS.items() if decoder or way.ffn_chunks == 1}


def total_memory(s: Size, way: Way) -> int:
    """Bytes of a whole training step at its peak, from compilation alone."""
    make, task, settings = prepared(s, way)
    return step_memory(nnx.eval_shape(make), task, settings).memory.total


# ---------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------


def timed(sizes: dict[str, tuple[Size, Way]], rounds: int) -> list[dict[str, Any]]:
    """Seconds per step, in turns, and peak memory."""
    runs: dict[str, Callable[[], None]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, (s, way) in sizes.items():
        row: dict[str, Any] = {"way": name, "batch": s.batch}
        rows[name] = row
        try:
            make, task, settings = prepared(s, way)
            row["memory"] = step_memory(nnx.eval_shape(make), task, settings).memory.total
            runs[name] = stepper(make(), task, settings)
        except jax.errors.JaxRuntimeError as error:
            # A way that this device has not: there is nothing to measure.
            row["error"] = str(error).splitlines()[0][:200]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    turns = list(runs)
    for _ in range(rounds):
        for name in turns:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
        turns = turns[1:] + turns[:1]
    for name, samples in seconds.items():
        s, _ = sizes[name]
        median = float(np.median(samples))
        rows[name] |= {
            "seconds": median,
            "per_second": s.batch * s.length / median,
            "rounds": samples,
        }
        for base in ("plain", "checkpointed blocks", "BDIA"):
            if base in seconds:
                ratios = np.array(samples) / np.array(seconds[base])
                rows[name][f"over {base}"] = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return [*rows.values()]


def stepper(model: nnx.Module, task, settings: TrainSettings) -> Callable[[], None]:
    """A function that takes a step, and waits for it; the first two are taken already."""
    step, state = training_step(model, task, settings)

    def run() -> None:
        nonlocal state
        state, _ = step(state)
        jax.block_until_ready(state)

    run(), run()
    return run


def steps(b: Benchmark, shape: Shape) -> list[dict[str, Any]]:
    """Every way."""
    s = size(b, shape)
    return timed({name: (s, way) for name, way in ways_for(s).items()}, b.rounds)


def over_depth(b: Benchmark, shape: Shape) -> list[dict[str, Any]]:
    """Peak memory of every way."""
    s, rows = size(b, shape), []
    for name, way in ways_for(s).items():
        peaks = []
        for depth in b.depths:
            deep = s._replace(config=dataclasses.replace(s.config, depth=depth))
            try:
                peaks.append(total_memory(deep, way))
            except jax.errors.JaxRuntimeError:
                peaks.append(None)
        rows.append({"way": name, "depths": list(b.depths), "memory": peaks})
    return rows


def budget(b: Benchmark, shape: Shape) -> list[dict[str, Any]]:
    """Time and memory over the number of stored blocks; and of the other ways."""
    s = size(b, shape)
    s = s._replace(config=dataclasses.replace(s.config, depth=12))
    ways = {name: WAYS[name] for name in ("plain", "checkpointed blocks", "√K groups of them")}
    ways |= {f"BDIA, {n} stored": Way("bdia", stored=n / 12) for n in (0, 3, 6, 9, 12)}
    return timed({name: (s, way) for name, way in ways.items()}, b.rounds)


def besides(b: Benchmark, shape: Shape) -> list[dict[str, Any]]:
    """What both loops do besides a block, apart from it; and a whole step, per block."""
    s = size(b, shape)
    make, task, settings = prepared(s, WAYS["BDIA"])
    model = make()
    positions = s.config.length if shape == "vit" else s.length
    x = jax.random.normal(jax.random.key(0), (s.batch, positions, s.config.width), s.config.dtype)
    block, params = model.blocks.functional()
    consts = (
        ()
        if shape == "vit"
        else (model._angles(jnp.broadcast_to(jnp.arange(positions), x.shape[:2])), None)
    )
    scan, _ = prepare(
        block,
        params,
        (x, x),
        0,
        jax.random.key(0),
        consts,
        s.config.gamma,
        "random",
        s.config.frac_bits,
        0,
        "online",
        0,
        None,
        None,
        None,
    )
    n = grid.to_grid(x.astype(scan.wide), scan.frac_bits)
    sign = maps.sample_signs(jax.random.key(1), (s.batch,))

    @jax.jit
    def up(n_prev, n, h):
        x = grid.from_grid(n, scan.frac_bits, scan.dtype)
        _, y, q = reversible._update(scan, n, h, sign)
        n_next = maps.bdia_step(n_prev, q, reversible._per_sample(sign, n), scan.m)
        side = side_bits.pack_bits(maps.side_information(n_prev, scan.m, 0), scan.bits)
        return x, n_next, side, reversible.checksum(n_prev), reversible._in_range(y, n_next)

    @jax.jit
    def down(n_next, n, h, side, expected, a_next, a, d_x):
        x = grid.from_grid(n, scan.frac_bits, scan.dtype)
        gamma, _, q = reversible._update(scan, n, h, sign)
        unpacked = side_bits.unpack_bits(side, scan.bits, n.shape[-1])
        n_prev = maps.bdia_inverse(n_next, q, unpacked, reversible._per_sample(sign, n), scan.m)
        a_next = reversible._nan_unless(reversible.checksum(n_prev) == expected, a_next)
        a += (a_next - gamma * a_next) + d_x.astype(scan.wide)
        return x, n_prev, (a_next + gamma * a_next).astype(h.dtype), a, gamma * a_next

    _, n_next, side, expected, _ = up(n, n, x)
    cotangent = x.astype(scan.wide)
    step = stepper(model, task, settings)
    runs = {
        "forward, besides a block": lambda: up(n, n, x),
        "backward, besides a block": lambda: down(
            n_next, n, x, side, expected, cotangent, cotangent, x
        ),
        "step, by blocks": step,
    }
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(b.rounds + 1):
        for name, run in runs.items():
            repeats = 1 if run is step else 20
            start = time.perf_counter()
            for _ in range(repeats):
                jax.block_until_ready(run())
            samples[name].append((time.perf_counter() - start) / repeats)
    samples["step, by blocks"] = [t / s.config.depth for t in samples["step, by blocks"]]
    whole = np.median(samples["step, by blocks"][1:])
    return [
        {
            "way": name,
            "batch": s.batch,
            "seconds": float(np.median(t[1:])),
            "rounds": t[1:],
            "share": float(np.median(t[1:]) / whole),
        }
        for name, t in samples.items()
    ]


def equal(b: Benchmark, shape: Shape) -> list[dict[str, Any]]:
    """The largest batch of every way that fits, and its throughput."""
    s, sizes = size(b, shape), {}
    for name, way in ways_for(s).items():

        def fits(batch: int, way=way) -> bool:
            return total_memory(s._replace(batch=batch), way) <= b.fit * 1e9

        try:
            if batch := memory.largest(fits):
                sizes[name] = s._replace(batch=batch), way
        except jax.errors.JaxRuntimeError:
            continue
    return timed(sizes, max(2, b.rounds // 2))


# ---------------------------------------------------------------------------------------------
# Tables and figures
# ---------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Of what was timed."""
    header = [
        "way",
        "batch",
        "peak in GB",
        "s per step",
        "per second",
        "over plain",
        "over checkpointed",
        "over BDIA",
    ]
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([row["way"], str(row["batch"]), f"not here: {row['error']}", *[""] * 5])
            continue
        ratios = [row.get(f"over {base}") for base in ("plain", "checkpointed blocks", "BDIA")]
        lines.append(
            [
                row["way"],
                str(row["batch"]),
                f"{row['memory'] / 1e9:.2f}",
                f"{row['seconds']:.3f}",
                f"{row['per_second']:.3g}",
                *("" if r is None else f"{r[1]:.2f} [{r[0]:.2f}, {r[2]:.2f}]" for r in ratios),
            ]
        )
    return results.markdown(header, lines)


def depth_table(rows: list[dict[str, Any]]) -> str:
    """Of peaks over depth."""
    header = ["peak in GB, by blocks", *map(str, rows[0]["depths"])]
    return results.markdown(
        header,
        [
            [row["way"], *("" if m is None else f"{m / 1e9:.2f}" for m in row["memory"])]
            for row in rows
        ],
    )


def besides_table(rows: list[dict[str, Any]]) -> str:
    """Of what the loops do besides the blocks."""
    return results.markdown(
        ["per block", "milliseconds", "of the step"],
        [[row["way"], f"{row['seconds'] * 1e3:.2f}", f"{row['share']:.1%}"] for row in rows],
    )


def draw_depth(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Peak memory over depth."""
    with figure(path, 2) as (axis, beside):
        beside.set_axis_off()
        for i, row in enumerate(rows):
            axis.plot(
                row["depths"],
                [m and m / 1e9 for m in row["memory"]],
                label=row["way"],
                linestyle="--" if i >= 7 else "-",
                **style(i),
            )
        axis.set_xticks(rows[0]["depths"])
        axis.set_xlabel("blocks")
        axis.set_ylabel("peak memory in GB")
        axis.set_ylim(bottom=0)
        beside.legend(*axis.get_legend_handles_labels(), loc="center left", frameon=False)


def draw_budget(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Time over memory."""
    with figure(path) as (axis,):
        bdia = [row for row in rows if row["way"].startswith("BDIA")]
        others = [row for row in rows if row not in bdia]
        axis.plot(
            [r["memory"] / 1e9 for r in bdia],
            [r["seconds"] for r in bdia],
            label="BDIA, blocks stored",
            **style(0),
        )
        for row in bdia:
            axis.annotate(
                row["way"].split()[1],
                (row["memory"] / 1e9, row["seconds"]),
                xytext=(6, 6),
                textcoords="offset points",
            )
        for i, row in enumerate(others, 1):
            axis.plot(
                row["memory"] / 1e9,
                row["seconds"],
                linestyle="",
                markersize=9,
                label=row["way"],
                **style(i),
            )
        axis.set_xlabel("peak memory in GB")
        axis.set_ylabel("seconds per step")
        axis.set_ylim(0, 1.15 * max(row["seconds"] for row in rows))
        axis.legend()


def draw_equal(rows: list[dict[str, Any]], path: pathlib.Path, fit: float) -> None:
    """Throughput at the largest batch that fits."""
    with figure(path) as (axis,):
        rows = [row for row in rows if "error" not in row]
        axis.barh(range(len(rows)), [row["per_second"] for row in rows], color=style(0)["color"])
        axis.set_yticks(range(len(rows)), [f"{row['way']} ({row['batch']})" for row in rows])
        axis.invert_yaxis()
        axis.set_xlabel(f"per second, at the largest batch in {fit:g} GB")


MEASURES = {
    "steps": steps,
    "depth": over_depth,
    "budget": budget,
    "besides": besides,
    "equal": equal,
}
TABLES = {"depth": depth_table, "besides": besides_table}


def main(b: Benchmark) -> dict[str, Any]:
    """Runs it; what is written."""
    path = (b.out or results.FOLDER) / f"benchmark-{results.device_slug()}.json"
    found: dict[str, Any] = json.loads(path.read_text())["found"] if path.exists() else {}
    for shape in b.shapes:
        for part in b.parts:
            rows = MEASURES[part](b, shape)
            s = size(b, shape)
            what = {"batch": s.batch, "length": s.length, "dtype": s.config.dtype}
            found.setdefault(shape, {})[part] = {**what, "rows": rows}
            print(f"\n{shape}, {part}\n{TABLES.get(part, table)(rows)}", flush=True)
            results.write("benchmark", b, {"found": found}, b.out)
    texts = []
    for shape, parts in found.items():
        for part, kept in parts.items():
            rows = kept["rows"]
            place = path.with_stem(f"{path.stem}-{shape}-{part}").with_suffix(".png")
            title = f"{shape}: {part} ({kept['batch']} × {kept['length']}, {kept['dtype']})"
            texts.append(f"## {title}\n\n{TABLES.get(part, table)(rows)}")
            if part == "depth":
                draw_depth(rows, place)
            elif part == "budget":
                draw_budget(rows, place)
            elif part == "equal":
                draw_equal(rows, place, b.fit)
    files.write_text(
        path.with_suffix(".md"), "# Costs of training steps\n\n" + "\n\n".join(texts) + "\n"
    )
    print(f"\nSee {path}")
    return found


if __name__ == "__main__":
    command.run(main, Benchmark, __doc__, told=logging.WARNING)
