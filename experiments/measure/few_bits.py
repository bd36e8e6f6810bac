"""Fine-tuning a real pretrained decoder with few bits: of a base, and of checkpoints over seeds.

    python experiments/measure/few_bits.py --data e2e-dataset.zip

The model, the data and the budget are those of gamma.py's fine-tuning. Parts:

base         SmolLM2's blocks in float32, int8, int4 and nf4 (groups of 64): the loss before any
             training; and with low-rank updates of all linear layers trained on top, by
             checkpoints and by BDIA, whose integers are compared (20 minutes on one core)
checkpoints  more seeds of checkpoints rounded to 4 bits and of BDIA at as many, which gamma.py
             trains from one seed (half an hour on one core)

Writes few-bits-PART-DEVICE.jsonl.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import sys
from typing import Any

import numpy as np
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import command

from bdia_jax import BDIA, Adjoint, Checkpoint, Euler, Online, Step
from bdia_jax.data import Tokenizer, completion, pack
from bdia_jax.nn import add_lora
from bdia_jax.nn.quantized import Kind
from bdia_jax.train import PackedTexts, eval_batch_size, evaluate, train
from measure import finetune_e2e, gamma, records
from measure.runs import Run, plain, run_all

DEPENDS = (*gamma.TRAINS, "bdia_jax/nn/quantized.py", "experiments/measure/few_bits.py")
RANK, TARGETS = 8, ("q", "k", "v", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class FewBits:
    """Fine-tuning a real pretrained decoder with few bits."""

    data: pathlib.Path
    """e2e-dataset.zip."""
    parts: tuple[str, ...] = ("base", "checkpoints")
    """Of the measurement."""
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

    def __post_init__(self):
        if unknown := set(self.parts) - {"base", "checkpoints"}:
            raise ValueError(f"parts must be base or checkpoints; got {', '.join(sorted(unknown))}")


@dataclasses.dataclass(frozen=True)
class Way:
    """How a model is fine-tuned."""

    step: Step
    adjoint: Adjoint
    base: Kind | None = None
    """Of the frozen kernels; None for float32."""
    lora: bool = False


def main(f: FewBits) -> None:
    """Runs the parts."""
    task = e2e(f, gamma.smollm2()[1])
    if "base" in f.parts:
        base(f, task)
    if "checkpoints" in f.parts:
        checkpoints(f, task)


def base(f: FewBits, task: PackedTexts) -> None:
    """Losses with a base of few bits, before and after training low-rank updates."""
    rows = [{"base": kind or "float32", "way": "untrained"} | loss(kind, task) for kind in BASES]
    ways = {
        "checkpointed, LoRA": (Euler(), Checkpoint()),
        "BDIA, γ = 1/16, LoRA": (BDIA(1 / 16, "sample"), Online()),
    }
    runs, about = [], {}
    for kind in (None, "nf4"):
        for name, (step, adjoint) in ways.items():
            run = run_of(f, f"{kind or 'float32'}, {name}", Way(step, adjoint, kind, True), 0, task)
            runs.append(run)
            about[run.name] = {"base": kind or "float32", "way": name}
    found = run_all(runs, f.work, DEPENDS, gamma.told)
    rows += [about[name] | record for name, record in found.items()]
    records.write("few-bits-base", rows, DEPENDS, settings=f, out=f.out)


BASES: tuple[Kind | None, ...] = (None, "int8", "int4", "nf4")


def loss(kind: Kind | None, task: PackedTexts) -> dict[str, float]:
    """Of the model with such a base, as it is."""
    network, _ = gamma.smollm2(quantize=kind)
    network.eval()
    size = eval_batch_size(task, gamma.SOME)
    return evaluate(network, task, eval_batch_size=size)


def checkpoints(f: FewBits, task: PackedTexts) -> None:
    """Losses after equal budgets, by what is kept of an activation."""
    runs, about = [], {}
    for bits in f.bits:
        ways = {
            f"BDIA, γ = 1/{2**bits}, sample": Way(BDIA(2.0**-bits, "sample"), Online()),
            f"checkpoints of {bits} bits": Way(Euler(), Checkpoint(bits)),
        }
        for name, way in ways.items():
            for seed in f.seeds:
                run = run_of(f, name, way, seed, task)
                runs.append(run)
                about[run.name] = {"way": name, "seed": seed}

    def write(found: dict[str, dict[str, Any]]) -> None:
        rows = [about[name] | record for name, record in found.items()]
        missing = len(runs) - len(found)
        note = f"{missing} of {len(runs)} runs are missing." if missing else None
        records.write("few-bits-checkpoints", rows, DEPENDS, settings=f, out=f.out, note=note)

    write(run_all(runs, f.work, DEPENDS, gamma.told, so_far=write))


def e2e(f: FewBits, tokenizer: Tokenizer) -> PackedTexts:
    """The same texts that gamma.py takes."""
    pairs, dev = (finetune_e2e.read(f.data, name) for name in ("trainset.csv", "devset.csv"))
    shuffled = np.random.default_rng(0).permutation(len(pairs))[:4000]
    texts = [pairs[i] for i in shuffled], dev[: f.validation]
    training, validation = (
        pack([completion(tokenizer, *pair) for pair in some], f.length) for some in texts
    )
    return PackedTexts("e2e", training, validation)


def run_of(f: FewBits, name: str, way: Way, seed: int, task: PackedTexts) -> Run:
    """A model fine-tuned in one way from one seed."""

    def trained(place: pathlib.Path) -> dict[str, Any]:
        network, _ = gamma.smollm2(quantize=way.base)
        settings = dataclasses.replace(gamma.SOME, seed=seed)
        if way.lora:
            add_lora(network, RANK, None, TARGETS, rngs=nnx.Rngs(seed))
            settings = dataclasses.replace(settings, learning_rate=1e-3)
        gamma.Way(way.step, way.adjoint).install(network)
        result = train(network, task, settings, place / "run", resume=True, progress=False)
        return {
            "loss": result.last("eval", "loss"),
            "accuracy": result.last("eval", "accuracy"),
            "training loss": result.last("train", "loss"),
            "mismatched": sum(r.get("mismatched", 0) for r in result.history),
            "seconds per step": result.seconds_per_step,
        }

    settings = {"way": str(way), "seed": seed, "train": plain(gamma.SOME)}
    settings |= {"validation": f.validation, "length": f.length}
    slug = "".join(c if c.isalnum() else "-" for c in name)
    return Run(f"{slug}-seed{seed}", settings, trained)


if __name__ == "__main__":
    command.run(main, FewBits, __doc__, told=logging.WARNING)
