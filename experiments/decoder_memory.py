"""What it takes to fine-tune well-known decoders, by each method: compiled, not run.

    python experiments/decoder_memory.py                    # two minutes, on any machine

Whole training steps (AdamW) of GPT-2 medium's shape, of one like Llama 3.2 1B's and of one like
Llama 3 8B's, all weights or low-rank updates only, with blocks in bfloat16. On a CPU, estimates for
an accelerator: see :mod:`bdia_jax.plan`.

Writes results/decoder_memory-DEVICE.json, .md and a figure per model.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from typing import Any

import command
import results

from bdia_jax import files, plan


@dataclasses.dataclass(frozen=True)
class DecoderMemory:
    """What it takes to fine-tune well-known decoders, by each method: compiled, not run."""

    models: tuple[str, ...] = ("gpt2-medium", "llama-1b", "llama-8b")
    """Of bdia_jax.plan.EXAMPLES."""
    batches: tuple[int, ...] = (8, 8, 1)
    """Sequences per step, of each model."""
    lengths: tuple[int, ...] = (1024, 1024, 4096)
    """Tokens per sequence, of each model."""
    param_dtypes: tuple[str, ...] = ("float32", "float32", "bfloat16")
    """What the weights are kept in, of each model."""
    lora: tuple[int, ...] = (0, 8)
    """Ranks of low-rank updates of q and v; 0 trains all weights."""
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
    path = (d.out or results.FOLDER) / f"decoder_memory-{results.device_slug()}.json"
    for name, batch, length, dtype in zip(d.models, d.batches, d.lengths, d.param_dtypes):
        config = dataclasses.replace(plan.EXAMPLES[name], dtype="bfloat16", param_dtype=dtype)
        needs = []
        for rank in d.lora:
            for need in plan.plan(config, batch, length, lora=rank, here=False):
                what = f"{need.method}, LoRA {rank}" if rank else need.method
                needs.append(dataclasses.replace(need, method=what))
        title = f"{name}, {batch} × {length} tokens, weights in {dtype}"
        found += [{"model": name, **dataclasses.asdict(need)} for need in needs]
        parts.append(f"## {title}\n\n{plan.table(needs)}")
        print(f"\n{parts[-1]}", flush=True)
        plan.draw(needs, path.with_name(f"{path.stem}-{name}.png"), title)
    results.write("decoder_memory", d, {"found": found}, d.out)
    text = "\n\n".join(parts)
    files.write_text(path.with_suffix(".md"), f"# Memory of a training step\n\n{text}\n")
    return text


if __name__ == "__main__":
    command.run(main, DecoderMemory, __doc__, told=logging.WARNING)
