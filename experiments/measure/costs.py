"""What each way to train costs: memory over depth, width or tokens; time; what fits.

    python experiments/measure/costs.py --part activations --networks vit     # compiles only
    python experiments/measure/costs.py --part activations --networks stack --values 8 16 32 64
    python experiments/measure/costs.py --part steps --networks vit gpt2 llama
    python experiments/measure/costs.py --part plans --device h100            # on any machine

Several commands at a time can get ready, and take times in turns: ``--turn runs/turn --workers 4``.

Parts:

- *activations*: what lies beside weights, gradients and data at the peak of loss and gradient, as
  compiled, along an axis; over the depth also its slope, in bytes per element and block.
- *totals*: the peak of whole training steps (AdamW), along an axis.
- *gradients*: time of loss and gradient of a stack of blocks, without an optimizer.
- *steps*: time and peak of whole training steps.
- *in-use*: what the device itself says it had in use, every way in a process of its own.
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
from bdia_jax.planning.shapes import SHAPES
from bdia_jax.planning.ways import Way
from bdia_jax.states import checksum, in_range
from bdia_jax.train.programs import Programs
from bdia_jax.train.step import State
from measure import memory as peaks
from measure import records, sources, timing
from measure.cost_tables import TABLES, Rows, memory_table, time_table
from measure.networks import NETWORKS, Axis, Network, Stack
from measure.side_by_side import Turn, in_processes, in_threads
from measure.ways import BASES, WAYS, ways_for

Part = Literal["activations", "totals", "gradients", "steps", "in-use", "besides", "equal", "plans"]

DEPENDS = (
    *sources.CORE,
    *sources.COUPLED,
    *sources.MODELS,
    *sources.STEP,
    "bdia_jax/planning/*.py",
    *(f"experiments/measure/{n}.py" for n in ("costs", "ways", "networks", "memory", "timing")),
    "experiments/measure/side_by_side.py",
)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What each way to train costs: memory, time, what fits."""

    part: Part = "activations"
    """What is measured."""
    networks: tuple[str, ...] = ("vit",)
    """Of those of measure.networks: stack, vit, vit-24, gpt2, gpt2-medium, llama, translation."""
    ways: tuple[str, ...] = ()
    """Of those of bdia_jax.planning.ways and measure.ways; all by default."""
    dtypes: tuple[str, ...] = ("float32",)
    """What the blocks compute in."""
    axis: Axis = "depth"
    """Of activations and totals."""
    values: tuple[int, ...] = (6, 12, 24, 48)
    """Along the axis."""
    device_sized: bool = False
    """Of whole steps: the batches of real training, not such as 2 cores can do."""
    rounds: int = 5
    """In each, every way runs once."""
    workers: int = 1
    """Programs compiled side by side; of in-use, processes."""
    turn: pathlib.Path | None = None
    """A file that commands have in common which get ready side by side, and take times in turns."""
    widths: tuple[int, ...] = (256, 512)
    """Of gradients."""
    fit: float = 1.0
    """Of equal: GB per device."""
    models: tuple[str, ...] = ("gpt2-medium", "llama-1b", "llama-8b")
    """Of plans: those of bdia_jax.planning.shapes.SHAPES."""
    batches: tuple[int, ...] = (8, 8, 1)
    """Of plans: sequences per step, of each model."""
    lengths: tuple[int, ...] = (1024, 1024, 4096)
    """Of plans: tokens per sequence, of each model."""
    param_dtypes: tuple[str, ...] = ("float32", "float32", "bfloat16")
    """Of plans: what trained weights are kept in, of each model; frozen ones in bfloat16."""
    lora: tuple[int, ...] = (0, 8)
    """Of plans: ranks of low-rank updates of q and v; 0 trains all weights."""
    device: str | None = None
    """Of plans: what to compile for, which need not be there, such as h100, or h100:8."""
    mesh: str | None = None
    """Of plans: of several devices, such as fsdp=8."""
    out: pathlib.Path | None = None
    """Folder of the results; by default runs/results."""

    def __post_init__(self):
        for what, given, known in (
            ("networks", self.networks, NETWORKS),
            ("ways", self.ways, WAYS),
            ("models", self.models, SHAPES),
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
        ways = c.chosen(network, gradient=gradient)

        def peaks_of(job, network=network, ways=ways):
            return peaks.along(peak, network, ways[job[0]], c.axis, job[1:])

        found = in_threads(peaks_of, itertools.product(ways, c.values), c.workers)
        for i, way in enumerate(ways):
            some = [*itertools.chain(*found[i * len(c.values) : (i + 1) * len(c.values)])]
            row = {"dtype": dtype, "way": way, "axis": c.axis, "values": c.values, "peaks": some}
            if c.axis == "depth" and None not in some and len(some) > 1:
                slope = np.polyfit(c.values, some, 1)[0] / network.elements
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
        config = dataclasses.replace(SHAPES[name], dtype="bfloat16", param_dtype=dtype)
        names = plan.fitting(c.ways or plan.CUSTOMARY, rank, SHAPES[name])
        size = {"lora": rank, "ways": names, "here": False, "device": c.device, "mesh": c.mesh}
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
    """Every way, in turns; of each type of number."""
    sized = {}
    for dtype in c.dtypes:
        network = NETWORKS[name](dtype, c.device_sized)
        sized[dtype] = {n: (network, way) for n, way in c.chosen(network).items()}
    return timed(c, sized)


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
    return timed(c, {c.dtypes[0]: sized})


def timed(c: Costs, sized: dict[str, dict[str, tuple[Network, Way]]]) -> Rows:
    """Seconds per step, in turns, and peak memory; by type of number and way."""
    turn, states, rows = Turn(c.turn), {}, []
    ready = {dtype: all_prepared(c, some, states) for dtype, some in sized.items()}
    with turn:
        samples = {
            dtype: timing.in_turns({n: s for n, (_, s) in some.items() if s is not None}, c.rounds)
            for dtype, some in ready.items()
        }
    for dtype, some in ready.items():
        found = timing.summary(samples[dtype], BASES)
        for name, (told, _) in some.items():
            network, _ = sized[dtype][name]
            row = {"dtype": dtype, "way": name, "batch": network.batch, "length": network.length}
            rows.append(row | told | found.get(name, {}))
            if name in found:
                per_second = network.batch * network.length / found[name]["seconds"]
                rows[-1]["per second"] = per_second
    return rows


Prepared = tuple[dict[str, Any], Callable[[], Any] | None]
"""The peak of a step, and what takes one; or the error, and nothing, of a way that this device has
not, or has no room for."""


def all_prepared(
    c: Costs, sized: dict[str, tuple[Network, Way]], states: dict[Any, State]
) -> dict[str, Prepared]:
    """Compiled, side by side, and tried, one after the other."""

    def compiled(name: str) -> Prepared:
        try:
            peak, step = prepared(*sized[name], states)
        except jax.errors.JaxRuntimeError as error:
            return {"error": _first_line(error)}, None
        return {"peak": peak}, step

    found = dict(zip(sized, in_threads(compiled, sized, c.workers), strict=True))
    for name, (told, step) in found.items():
        try:
            jax.block_until_ready(step and step())
        except jax.errors.JaxRuntimeError as error:
            found[name] = told | {"error": _first_line(error)}, None
    return found


def prepared(network: Network, way: Way, states: dict[Any, State]) -> tuple[int, Callable[[], Any]]:
    """The peak of a step, which is compiled for it; and a function that takes a step.

    Ways whose states are alike go on from each other's, in ``states``: a device has room for one.
    """
    make, task, settings = network.prepared(way)
    programs = Programs(make(), task, settings)
    alike, peak = jax.tree.structure(programs.abstract_state()), peaks.of_step(programs)

    def run():
        # Where it was compiled for, or it would be compiled again.
        state = states.pop(alike, None) or jax.device_put(
            programs.first_state(make()), jax.devices()[0]
        )
        states[alike], report = programs.step(state)
        return report

    return peak, run


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def in_use(c: Costs, name: str) -> Rows:
    """What the device itself had in use at most: a process per way, since it counts for each."""
    asked = [
        dataclasses.replace(c, networks=(name,), dtypes=(dtype,), ways=(way,))
        for dtype in c.dtypes
        for way in c.chosen(NETWORKS[name](dtype, c.device_sized))
    ]
    return [*in_processes(most_in_use, asked, c.workers, fresh=True)]


def most_in_use(c: Costs) -> dict[str, Any]:
    """A row: of the one way that is asked for, after some steps."""
    network = NETWORKS[c.networks[0]](c.dtypes[0], c.device_sized)
    row: dict[str, Any] = {"dtype": c.dtypes[0], "way": c.ways[0], "batch": network.batch}
    row["length"] = network.length
    try:
        row["peak"], step = prepared(network, WAYS[c.ways[0]], {})
        for _ in range(3):
            jax.block_until_ready(step())
    except jax.errors.JaxRuntimeError as error:
        return row | {"error": _first_line(error)}
    # A CPU does not count.
    found = jax.devices()[0].memory_stats() or {}
    return row | {"in use": found.get("peak_bytes_in_use")}


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
            "step, by blocks": prepared(network, how, {})[1],
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
    "in-use": in_use,
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
        axis += f"-{c.mesh}".replace("=", "-") if c.mesh else ""
        path = records.write(
            f"{c.part}-{name}{axis}", rows, DEPENDS, settings=c, out=c.out, device=kind
        )
        print(f"\n{TABLES[c.part](rows)}\n\nSee {path}", flush=True)
    return found


if __name__ == "__main__":
    command.run(main, Costs, __doc__, told=logging.WARNING)
