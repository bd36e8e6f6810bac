"""What each way to train costs: memory over depth, width or tokens; time; what fits.

    python experiments/measure/costs.py --part activations --networks vit     # compiles only
    python experiments/measure/costs.py --part activations --networks stack --values 8 16 32 64
    python experiments/measure/costs.py --part steps --networks vit gpt2 llama
    python experiments/measure/costs.py --part plans --device h100            # on any machine

Parts:

- *activations*: what lies beside weights, gradients and data at the peak of loss and gradient, as
  compiled, along an axis; over the depth also its slope, in bytes per element and block.
- *totals*: the peak of whole training steps (AdamW), along an axis.
- *gradients*: time of loss and gradient of a stack of blocks, without an optimizer.
- *steps*: time and peak of whole training steps.
- *besides*: time of all that BDIA's loops do besides the blocks.
- *equal*: the largest batch of every way that fits a memory, and the throughput there.
- *plans*: whole training steps of well-known decoders, as ``python -m bdia_jax.plan`` has them.

Times are of rounds in which everything runs once (:mod:`measure.timing`). BDIA computes one matrix
product per part that checkpointing need not: its last one, whose result only the inverse needs. So
*gradients* has feed-forward networks as wide as the stream, as in the published experiments on
images, and of four times that width, as in most language models.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import pathlib
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import command

from bdia_jax import grid, maps
from bdia_jax.planning import memory, plan, targets
from bdia_jax.planning.ways import Way
from bdia_jax.states import checksum, in_range
from bdia_jax.train import training_step
from measure import memory as peaks
from measure import records, sources, timing
from measure.cost_tables import TABLES, Rows, memory_table, time_table
from measure.networks import NETWORKS, Axis, Network, Stack
from measure.ways import BASES, WAYS, ways_for

Part = Literal["activations", "totals", "gradients", "steps", "besides", "equal", "plans"]

DEPENDS = (
    *sources.CORE,
    *sources.COUPLED,
    *sources.MODELS,
    *sources.STEP,
    "bdia_jax/planning/*.py",
    *(f"experiments/measure/{n}.py" for n in ("costs", "ways", "networks", "memory", "timing")),
)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What each way to train costs: memory, time, what fits."""

    part: Part = "activations"
    """What is measured."""
    networks: tuple[str, ...] = ("vit",)
    """Of stack, vit, gpt2, llama and translation."""
    ways: tuple[str, ...] = ()
    """Of those of bdia_jax.planning.ways and measure.ways; all by default."""
    dtypes: tuple[str, ...] = ("float32",)
    """What the blocks compute in."""
    axis: Axis = "depth"
    """Of activations and totals."""
    values: tuple[int, ...] = (6, 12, 24, 48)
    """Along the axis."""
    device_sized: bool = False
    """Of steps, besides and equal: the batches of real training, not such as 2 cores can do."""
    rounds: int = 5
    """In each, every way runs once."""
    widths: tuple[int, ...] = (256, 512)
    """Of gradients."""
    fit: float = 1.0
    """Of equal: GB per device."""
    models: tuple[str, ...] = ("gpt2-medium", "llama-1b", "llama-8b")
    """Of plans: those of bdia_jax.planning.plan.EXAMPLES."""
    batches: tuple[int, ...] = (8, 8, 1)
    """Of plans: sequences per step, of each model."""
    lengths: tuple[int, ...] = (1024, 1024, 4096)
    """Of plans: tokens per sequence, of each model."""
    param_dtypes: tuple[str, ...] = ("float32", "float32", "bfloat16")
    """Of plans: what trained weights are kept in, of each model; frozen ones in bfloat16."""
    lora: tuple[int, ...] = (0, 8)
    """Of plans: ranks of low-rank updates of q and v; 0 trains all weights."""
    device: str | None = None
    """Of plans: what to compile for, which need not be there, such as h100."""
    out: pathlib.Path | None = None
    """Folder of the results; by default runs/results."""

    def __post_init__(self):
        for what, given, known in (
            ("networks", self.networks, NETWORKS),
            ("ways", self.ways, WAYS),
            ("models", self.models, plan.EXAMPLES),
        ):
            if not known.keys() >= {*given}:
                raise ValueError(f"{what} must be of {'; '.join(known)}; got {'; '.join(given)}")
        if self.rounds < 1 or not self.networks or self.fit <= 0:
            raise ValueError(
                "rounds must be at least 1, networks name one, and fit be positive; got "
                f"{self.rounds}, {self.networks} and {self.fit}"
            )
        sizes = [len(values) for values in (self.batches, self.lengths, self.param_dtypes)]
        if sizes != [len(self.models)] * 3:
            raise ValueError(
                "batches, lengths and param_dtypes need a value for each of "
                f"{', '.join(self.models)}; got {sizes}"
            )

    def chosen(self, network: Network | Stack, *, gradient: bool = False) -> dict[str, Way]:
        """The ways that were asked for, of those that the network can be trained in."""
        possible = ways_for(network, gradient=gradient)
        return {n: way for n, way in possible.items() if n in self.ways or not self.ways}


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


def over_axis(c: Costs, name: str, peak: Callable[..., int], *, gradient: bool) -> Rows:
    """Peaks along the axis, by type of number and way."""
    rows = []
    for dtype in c.dtypes:
        network = NETWORKS[name](dtype, True)
        for way, how in c.chosen(network, gradient=gradient).items():
            found = peaks.along(peak, network, how, c.axis, c.values)
            row = {"dtype": dtype, "way": way, "axis": c.axis, "values": c.values, "peaks": found}
            if c.axis == "depth" and None not in found and len(found) > 1:
                slope = np.polyfit(c.values, found, 1)[0] / network.elements
                row["bytes per element and block"] = float(slope)
            rows.append(row)
            print(memory_table([row]).splitlines()[-1], flush=True)
    return rows


def activations(c: Costs, name: str) -> Rows:
    """Of loss and gradient."""
    return over_axis(c, name, peaks.activations, gradient=True)


def totals(c: Costs, name: str) -> Rows:
    """Of whole training steps."""
    return over_axis(c, name, peaks.training_step, gradient=False)


def plans(c: Costs, name: str) -> Rows:
    """Of a well-known decoder."""
    i = c.models.index(name)
    rows = []
    for rank in c.lora:
        dtype = "bfloat16" if rank else c.param_dtypes[i]
        config = dataclasses.replace(plan.EXAMPLES[name], dtype="bfloat16", param_dtype=dtype)
        names = plan.fitting(c.ways or plan.CUSTOMARY, rank)
        size = {"lora": rank, "ways": names, "here": False, "device": c.device}
        for need in plan.plan(config, c.batches[i], c.lengths[i], **size):
            rows.append({"LoRA rank": rank} | dataclasses.asdict(need))
    return rows


# ---------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------


def gradients(c: Costs, name: str) -> Rows:
    """Of stacks of 12 blocks, 8 × 128 positions, by type of number, width and hidden layer."""
    rows = []
    for dtype, width, expansion in itertools.product(c.dtypes, c.widths, (1, 4)):
        stack = Stack(dtype, 8, 128, width, expansion * width, 12)
        given, runs = stack.arguments(), {}
        for way, how in c.chosen(stack, gradient=True).items():
            step = jax.jit(jax.value_and_grad(stack.loss(how)[0], (0, 1)))
            runs[way] = functools.partial(step, *given)
        found = timing.summary(timing.in_turns(runs, c.rounds), BASES)
        size = {"dtype": dtype, "width": width, "hidden": stack.hidden}
        some = [size | {"way": way} | row for way, row in found.items()]
        print(time_table(some), flush=True)
        rows += some
    return rows


def steps(c: Costs, name: str) -> Rows:
    """Every way, in turns."""
    rows = []
    for dtype in c.dtypes:
        network = NETWORKS[name](dtype, c.device_sized)
        ways = c.chosen(network)
        rows += [
            {"dtype": dtype} | row for row in timed(c, {n: (network, w) for n, w in ways.items()})
        ]
    return rows


def equal(c: Costs, name: str) -> Rows:
    """The largest batch of every way that fits, and its throughput."""
    network, sized = NETWORKS[name](c.dtypes[0], c.device_sized), {}
    for way, how in c.chosen(network).items():

        def fits(batch: int, how=how) -> bool:
            larger = dataclasses.replace(network, batch=batch)
            return peaks.training_step(larger, how) <= c.fit * 1e9

        try:
            batch = memory.largest(fits)
        except jax.errors.JaxRuntimeError:
            continue
        if batch:
            sized[way] = dataclasses.replace(network, batch=batch), how
    return [{"dtype": c.dtypes[0]} | row for row in timed(c, sized)]


def timed(c: Costs, sized: dict[str, tuple[Network, Way]]) -> Rows:
    """Seconds per step, in turns, and peak memory."""
    runs: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, (network, way) in sized.items():
        rows[name] = {"way": name, "batch": network.batch, "length": network.length}
        try:
            rows[name]["peak"] = peaks.training_step(network, way)
            runs[name] = stepper(network, way)
        except jax.errors.JaxRuntimeError as error:
            # A way that this device has not: there is nothing to measure.
            rows[name]["error"] = str(error).splitlines()[0][:200]
    for name, found in timing.summary(timing.in_turns(runs, c.rounds), BASES).items():
        network, _ = sized[name]
        per_second = network.batch * network.length / found["seconds"]
        rows[name] |= found | {"per second": per_second}
    return [*rows.values()]


def stepper(network: Network, way: Way) -> Callable[[], Any]:
    """A function that takes a step."""
    make, task, settings = network.prepared(way)
    step, state = training_step(make(), task, settings)

    def run():
        nonlocal state
        state, report = step(state)
        return report

    return run


def besides(c: Costs, name: str) -> Rows:
    """What both loops do besides a block, apart from it; and a whole step, per block."""
    network, how = NETWORKS[name](c.dtypes[0], c.device_sized), WAYS["BDIA"]
    step = how.step
    config = network.config
    positions = network.elements // network.batch // config.width
    x = jax.random.normal(jax.random.key(0), (network.batch, positions, config.width), config.dtype)
    wide = grid.accumulator(x.dtype)
    n = grid.to_grid(x.astype(wide), step.frac_bits)
    sign = maps.sample_signs(jax.random.key(1), network.batch)

    @jax.jit
    def up(n_prev, n, h):
        n_next, y = step.up(n_prev, n, h.astype(wide), sign)
        x = grid.from_grid(n_next, step.frac_bits, h.dtype)
        return x, n_next, step.keep(n_prev), checksum(n_prev), in_range(y, n_next)

    @jax.jit
    def down(n_next, n, h, kept, expected, a_next, a, d_x):
        found = step.down(n_next, n, h.astype(wide), sign, kept)
        intact = checksum(found.n_prev) == expected
        d_h, a, a_prev = step.pull(a_next, a + d_x.astype(wide), sign)
        x = grid.from_grid(found.n_prev, step.frac_bits, h.dtype)
        return x, found.n_prev, intact, d_h.astype(h.dtype), a, a_prev

    _, n_next, kept, expected, _ = up(n, n, x)
    a = x.astype(wide)
    samples = timing.in_turns(
        {
            "forward, besides a block": lambda: up(n, n, x),
            "backward, besides a block": lambda: down(n_next, n, x, kept, expected, a, a, x),
            "step, by blocks": stepper(network, how),
        },
        c.rounds,
    )
    samples["step, by blocks"] = [s / config.depth for s in samples["step, by blocks"]]
    whole = np.median(samples["step, by blocks"])
    return [
        {"what": name, "seconds": float(np.median(s)), "share": float(np.median(s) / whole)}
        for name, s in samples.items()
    ]


MEASURES: dict[str, Callable[[Costs, str], Rows]] = {
    "activations": activations,
    "totals": totals,
    "gradients": gradients,
    "steps": steps,
    "besides": besides,
    "equal": equal,
    "plans": plans,
}


def main(c: Costs) -> dict[str, Rows]:
    """Runs it; rows by network."""
    found, kind = {}, None
    if c.device is not None:
        kind = targets.devices(c.device)[0].device_kind
    for name in c.models if c.part == "plans" else c.networks:
        rows = found[name] = MEASURES[c.part](c, name)
        axis = f"-{c.axis}" if c.part in ("activations", "totals") else ""
        path = records.write(
            f"{c.part}-{name}{axis}", rows, DEPENDS, settings=c, out=c.out, device=kind
        )
        print(f"\n{TABLES[c.part](rows)}\n\nSee {path}", flush=True)
    return found


if __name__ == "__main__":
    command.run(main, Costs, __doc__, told=logging.WARNING)
