"""What it takes to fine-tune well-known decoders, by each method: compiled, not run.

    python experiments/decoder_memory.py --device h100          # on any machine, with jax[cuda]
    python experiments/decoder_memory.py --device v5p:2x2x1     # on any machine, with libtpu
    python experiments/decoder_memory.py                        # for this device

Whole training steps (AdamW) of GPT-2 medium's shape, of one like Llama 3.2 1B's and of one like
Llama 3 8B's, with blocks in bfloat16: all weights, or low-rank updates only, of weights that are
kept in bfloat16. On a CPU, estimates for an accelerator: see :mod:`bdia_jax.planning.plan`.

Writes results/decoder_memory-DEVICE.json, .md and a figure per model.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from typing import Any

import command
import jax
import results

from bdia_jax import files, plan, targets


@dataclasses.dataclass(frozen=True)
class DecoderMemory:
    """What it takes to fine-tune well-known decoders, by each method: compiled, not run."""

    models: tuple[str, ...] = ("gpt2-medium", "llama-1b", "llama-8b")
    """Of bdia_jax.planning.plan.EXAMPLES."""
    batches: tuple[int, ...] = (8, 8, 1)
    """Sequences per step, of each model."""
    lengths: tuple[int, ...] = (1024, 1024, 4096)
    """Tokens per sequence, of each model."""
    param_dtypes: tuple[str, ...] = ("float32", "float32", "bfloat16")
    """What weights that are trained are kept in, of each model; frozen ones in bfloat16."""
    lora: tuple[int, ...] = (0, 8)
    """Ranks of low-rank updates of q and v; 0 trains all weights."""
    device: str | None = None
    """What to compile for, which need not be there, such as h100; None for this device."""
    out: pathlib.Path | None = None
    """Folder for the results; by default experiments/results."""

    def __post_init__(self):
        sizes = [len(values) for values in (self.batches, self.lengths, self.param_dtypes)]
        if sizes != [len(self.models)] * 3:
            raise ValueError(
                "batches, lengths and param_dtypes need a value for each of "
                f"{', '.join(self.models)}; got {sizes}"
            )
        if unknown := [m for m in self.models if m not in plan.EXAMPLES]:
            raise ValueError(f"models must be of {', '.join(plan.EXAMPLES)}; got {unknown}")


def main(d: DecoderMemory) -> str:
    """Compiles everything; the tables."""
    found: list[dict[str, Any]] = []
    parts = []
    folder = d.out or results.FOLDER
    kind = (targets.devices(d.device) if d.device else jax.devices())[0].device_kind
    for model, batch, length, dtype in zip(d.models, d.batches, d.lengths, d.param_dtypes):
        needs = []
        for rank in d.lora:
            config = dataclasses.replace(
                plan.EXAMPLES[model], dtype="bfloat16", param_dtype="bfloat16" if rank else dtype
            )
            for need in plan.plan(config, batch, length, lora=rank, here=False, device=d.device):
                what = f"{need.method}, LoRA {rank}" if rank else need.method
                needs.append(dataclasses.replace(need, method=what))
        title = f"{model}, {batch} × {length} tokens, {dtype} weights, {kind}"
        found += [{"model": model, **dataclasses.asdict(need)} for need in needs]
        parts.append(f"## {title}\n\n{plan.table(needs)}")
        print(f"\n{parts[-1]}", flush=True)
        plan.draw(needs, folder / f"decoder_memory-{results.slug(kind)}-{model}.png", title)
    path = results.write("decoder_memory", d, {"compiled for": kind, "found": found}, folder, kind)
    text = "\n\n".join(parts)
    about = "Frozen weights, of which there are low-rank updates, are in bfloat16."
    files.write_text(path.with_suffix(".md"), f"# Memory of a training step\n\n{about}\n\n{text}\n")
    return text


if __name__ == "__main__":
    command.run(main, DecoderMemory, __doc__, told=logging.WARNING)
