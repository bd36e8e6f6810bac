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
- *steps*: time and peak of whole training steps.
- *in-use*: what the device itself says it had in use, every way in a process of its own.
- *besides*: time of all that BDIA's loops do besides the blocks.
- *equal*: the largest batch of every way that fits a memory, and the throughput there.
- *plans*: whole training steps of well-known decoders, as ``python -m bdia_jax.plan`` has them.

Times are of rounds in which everything runs once (:mod:`measure.timing`). BDIA computes one matrix
product per part that checkpointing need not: its last one, whose result only the inverse needs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import pathlib
import sys
from collections.abc import Callable
from typing import Literal

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


from bdia_jax.planning import plan, targets
from bdia_jax.planning.shapes import SHAPES
from bdia_jax.planning.ways import Way
from bdia_jax.train import command
from measure import cost_times, records, sources
from measure import memory as peaks
from measure.cost_tables import TABLES, Rows, memory_table
from measure.networks import NETWORKS, Axis, Network, Stack
from measure.side_by_side import in_threads
from measure.ways import WAYS, ways_for

DEPENDS = (
    *sources.CORE,
    *sources.COUPLED,
    *sources.MODELS,
    *sources.STEP,
    "bdia_jax/planning/*.py",
    "bdia_jax/train/mesh.py",
    *(
        f"experiments/measure/{n}.py"
        for n in ("costs", "cost_times", "ways", "networks", "memory", "timing", "side_by_side")
    ),
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


def over_axis(c: Costs, name: str, *, peak: Callable[..., int], gradient: bool) -> Rows:
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


def plans(c: Costs, name: str) -> Rows:
    """Of a well-known decoder."""
    i = c.models.index(name)
    rows = []
    for rank in c.lora:
        dtype = "bfloat16" if rank else c.param_dtypes[i]
        config = dataclasses.replace(SHAPES[name], dtype="bfloat16", param_dtype=dtype)
        names = plan.fitting(c.ways or plan.customary(SHAPES[name]), rank)
        size = {"lora": rank, "ways": names, "here": False, "device": c.device, "mesh": c.mesh}
        for need in plan.plan(config, c.batches[i], c.lengths[i], **size):
            rows.append({"LoRA rank": rank} | dataclasses.asdict(need))
    return rows


MEASURES: dict[str, Callable[[Costs, str], Rows]] = {
    "activations": functools.partial(over_axis, peak=peaks.activations, gradient=True),
    "totals": functools.partial(over_axis, peak=peaks.training_step, gradient=False),
    "steps": cost_times.steps,
    "in-use": cost_times.in_use,
    "besides": cost_times.besides,
    "equal": cost_times.equal,
    "plans": plans,
}
Part = Literal[tuple(MEASURES)]


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
