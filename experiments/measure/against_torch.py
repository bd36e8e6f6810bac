"""Time of a training step against PyTorch's, side by side: what a user would pick instead.

    python experiments/measure/against_torch.py                     # 15 minutes, two idle cores
    taskset -c 0 python experiments/measure/against_torch.py        # on one core

Two networks, in float32, on the CPU, all weights trained by AdamW without clipping:

smollm2   SmolLM2-135M, 6 × 128 tokens: ``transformers``' model with its attention by SDPA
vit       6 blocks of width 512, 128 images of 64 patches: PyTorch's own encoder layers

PyTorch takes its fused AdamW; "checkpointed" is one checkpoint per block in both. Every way takes a
step in turns, in one process, on as many threads.

Writes torch-NETWORK-DEVICE.jsonl.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, Literal

# Threads that wait for work must not take the cores from those of the other library.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
from flax import nnx

from bdia_jax import interop
from bdia_jax.data import TextData
from bdia_jax.nn import ReversibleSettings, ViT, ViTConfig
from bdia_jax.planning.ways import WAYS
from bdia_jax.train import LanguageModelling, TrainSettings, command
from measure import records, sources, timing
from measure.networks import Network

DEPENDS = (
    *sources.CORE,
    *sources.MODELS,
    *sources.ORDINARY_STEP,
    "experiments/measure/against_torch.py",
    "experiments/measure/timing.py",
)
OURS = {
    "standard": ("standard", 1 / 2),
    "checkpointed": ("checkpointed", 1 / 2),
    "BDIA, γ = 1/2": ("BDIA", 1 / 2),
    "BDIA, γ = 1/16": ("BDIA", 1 / 16),
}
"""Names of rows: a way of :data:`bdia_jax.planning.ways.WAYS`, and γ."""
BASES = ("PyTorch, standard", "PyTorch, checkpointed", "checkpointed")
ROWS, LENGTH, IMAGES = 6, 128, 128


@dataclasses.dataclass(frozen=True)
class AgainstTorch:
    """Time of a training step against PyTorch's."""

    networks: tuple[Name, ...] = ()
    """Which; all by default."""
    rounds: int = 7
    """In each, every way takes a step."""
    out: pathlib.Path | None = None
    """Folder of the results; by default runs/results."""


Steps = dict[str, Callable[[], Any]]


def main(a: AgainstTorch) -> None:
    """Takes the times."""
    import torch

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    for name in a.networks or NETWORKS:
        samples = timing.in_turns(NETWORKS[name](), a.rounds)
        rows = [{"way": way} | row for way, row in timing.summary(samples, BASES).items()]
        note = f"PyTorch {torch.__version__.partition('+')[0]}."
        path = records.write(f"torch-{name}", rows, DEPENDS, settings=a, out=a.out, note=note)
        print(f"\n{table(rows)}\n\nsaved to {path}", flush=True)


def smollm2() -> Steps:
    """Of SmolLM2-135M, with its weights here, and untrained ones there."""
    import torch
    import transformers

    path = interop.packaged_model()
    tokens = np.random.default_rng(0).integers(0, 49_152, 8 * LENGTH * ROWS).astype(np.int32)

    def made(settings: ReversibleSettings):
        return interop.load(path, **dataclasses.asdict(settings))

    task = LanguageModelling(TextData("random", tokens, tokens, 49_152), LENGTH)
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.use_cache = False
    model = transformers.LlamaForCausalLM(config)
    batch = torch.tensor(tokens[: ROWS * LENGTH].reshape(ROWS, LENGTH).astype(np.int64))

    def step(optimizer, checkpointed: bool):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return of_torch(model, step) | ours(made, task, ROWS)


def vit() -> Steps:
    """Of a ViT like that of the paper's experiments, with the usual patches and attention."""
    import torch

    config = ViTConfig(attention="full", shifted_patches=False)
    network = Network(config, IMAGES)

    class Twin(torch.nn.Module):
        """The same network."""

        def __init__(self, c: ViTConfig):
            super().__init__()
            self.patches = torch.nn.Conv2d(c.channels, c.width, c.patch_size, c.patch_size)
            self.token = torch.nn.Parameter(torch.zeros(1, 1, c.width))
            self.positions = torch.nn.Parameter(0.02 * torch.randn(1, c.length, c.width))
            self.dropout = torch.nn.Dropout(c.dropout)
            self.blocks = torch.nn.ModuleList(
                torch.nn.TransformerEncoderLayer(
                    c.width, c.heads, c.hidden, c.dropout, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(c.depth)
            )
            self.norm = torch.nn.LayerNorm(c.width)
            self.head = torch.nn.Linear(c.width, c.num_classes)

        def forward(self, images, checkpointed):
            x = self.patches(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
            x = self.dropout(x + self.positions)
            for block in self.blocks:
                if checkpointed:
                    x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            return self.head(self.norm(x[:, 0]))

    model = Twin(config)
    images = torch.randn(IMAGES, config.channels, config.image_size, config.image_size)
    labels = torch.arange(IMAGES) % config.num_classes

    def step(optimizer, checkpointed: bool):
        torch.nn.functional.cross_entropy(model(images, checkpointed), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def made(settings: Any):
        return ViT(settings, rngs=nnx.Rngs(0))

    return of_torch(model, step) | ours(made, network.task(), IMAGES, config)


def of_torch(model: Any, step: Callable[[Any, bool], None]) -> Steps:
    """PyTorch's steps of a model."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return {
        "PyTorch, standard": lambda: step(optimizer, False),
        "PyTorch, checkpointed": lambda: step(optimizer, True),
    }


def ours(
    made: Callable[[Any], Any], task: Any, batch: int, config: ReversibleSettings | None = None
) -> Steps:
    """Ours. All go on from one state, whose weights are alike: memory has room for one."""
    config, states = config or ReversibleSettings(), {}
    settings = TrainSettings(batch_size=batch, optimizer="adamw", weight_decay=0.01, clip_norm=None)

    def way(name: str) -> Callable[[], Any]:
        of, gamma = OURS[name]
        asked = WAYS[of].config(dataclasses.replace(config, gamma=gamma))
        return timing.step_of(lambda: made(asked), task, settings, states)[1]

    return {name: way(name) for name in OURS}


NETWORKS: dict[str, Callable[[], Steps]] = {"smollm2": smollm2, "vit": vit}
Name = Literal[tuple(NETWORKS)]


def table(rows: list[dict[str, Any]]) -> str:
    """Seconds, and ratios with quartiles."""
    lines = [
        [row["way"], f"{row['seconds']:.2f}", *(timing.ratio(row[f"over {b}"]) for b in BASES)]
        for row in rows
    ]
    return records.markdown(["way", "s per step", *(f"over {base}" for base in BASES)], lines)


if __name__ == "__main__":
    command.run(main, AgainstTorch, __doc__, told=logging.WARNING)
