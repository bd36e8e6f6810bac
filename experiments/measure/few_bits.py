"""Fine-tuning a real pretrained decoder with few bits: of a base, and of checkpoints over seeds.

    python experiments/measure/few_bits.py --data e2e-dataset.zip

The model, the data and the budget are those of gamma.py's fine-tuning. Parts:

base         SmolLM2's blocks in float32, int8, int4 and nf4 (groups of 64): the loss before any
             training; and with low-rank updates of all linear layers trained on top, by
             checkpoints and by BDIA, whose integers are compared (50 minutes on two cores)
checkpoints  more seeds of checkpoints rounded to 4 bits and of BDIA at as many, which gamma.py
             trains from one seed (40 minutes)

Writes few-bits-PART-DEVICE.jsonl.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import sys
from collections.abc import Callable
from typing import Literal

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


from bdia_jax import BDIA, Checkpoint, Euler, Online
from bdia_jax.nn.quantized import Kind
from bdia_jax.train import PackedTexts, command, eval_batch_size, evaluate
from measure import gamma
from measure.runs import Run, run_and_write
from measure.smollm2 import SOME, Way, e2e, run_of, smollm2, told

DEPENDS = (*gamma.TRAINS, "bdia_jax/nn/quantized.py", "experiments/measure/few_bits.py")
LINEAR = ("q", "k", "v", "out", "gate", "up", "down")
BASES: tuple[Kind | None, ...] = (None, "int8", "int4", "nf4")


@dataclasses.dataclass(frozen=True)
class FewBits:
    """Fine-tuning a real pretrained decoder with few bits."""

    data: pathlib.Path
    """e2e-dataset.zip."""
    parts: tuple[Part, ...] = ()
    """Of the measurement; all by default."""
    bits: tuple[int, ...] = (4,)
    """Of a checkpoint, and of BDIA."""
    seeds: tuple[int, ...] = (1, 2)
    """Of rounded checkpoints; gamma.py has seed 0."""
    validation: int = 200
    """Texts that models are validated on."""
    length: int = 128
    """Tokens of a sequence."""
    work: pathlib.Path = pathlib.Path("runs/few_bits")
    """Folder of the runs."""
    out: pathlib.Path | None = None
    """Folder of the results; by default runs/results."""


def main(f: FewBits) -> None:
    """Runs the parts, on the texts that gamma.py takes."""
    task = e2e(f.data, smollm2()[1], f.length, f.validation)
    for part in f.parts or PARTS:
        PARTS[part](f, task)


def base(f: FewBits, task: PackedTexts) -> None:
    """Losses with a base of few bits, before and after training low-rank updates."""
    first = [{"base": kind or "float32", "way": "untrained"} | loss(kind, task) for kind in BASES]
    ways = {
        "checkpointed, LoRA": Way(Euler(), Checkpoint(), lora=LINEAR),
        "BDIA, γ = 1/16, LoRA": Way(BDIA(1 / 16, "sample"), Online(), lora=LINEAR),
    }
    runs = []
    for kind in (None, "nf4"):
        for name, way in ways.items():
            row = {"base": kind or "float32", "way": name}
            runs.append(
                run(f, ", ".join(row.values()), dataclasses.replace(way, base=kind), 0, task, row)
            )
    run_and_write("few-bits-base", runs, f.work, DEPENDS, told, settings=f, first=first)


def loss(kind: Kind | None, task: PackedTexts) -> dict[str, float]:
    """Of the model with such a base, as it is."""
    network, _ = smollm2(quantize=kind)
    network.eval()
    return evaluate(network, task, eval_batch_size=eval_batch_size(task, SOME))


def checkpoints(f: FewBits, task: PackedTexts) -> None:
    """Losses after equal budgets, by what is kept of an activation."""
    ways = {}
    for bits in f.bits:
        ways[f"BDIA, γ = 1/{2**bits}, sample"] = Way(BDIA(2.0**-bits, "sample"), Online())
        ways[f"checkpoints of {bits} bits"] = Way(Euler(), Checkpoint(bits))
    runs = [
        run(f, name, way, seed, task, {"way": name, "seed": seed})
        for name, way in ways.items()
        for seed in f.seeds
    ]
    run_and_write("few-bits-checkpoints", runs, f.work, DEPENDS, told, settings=f)


def run(
    f: FewBits, name: str, way: Way, seed: int, task: PackedTexts, row: dict[str, str | int]
) -> Run:
    """A model fine-tuned in one way from one seed."""
    about = {"validation": f.validation, "length": f.length}
    return run_of(name, way, seed, task, SOME, about, row)


PARTS: dict[str, Callable[[FewBits, PackedTexts], None]] = {
    "base": base,
    "checkpoints": checkpoints,
}
Part = Literal[tuple(PARTS)]

if __name__ == "__main__":
    command.run(main, FewBits, __doc__, told=logging.WARNING)
