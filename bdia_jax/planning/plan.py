"""Will it fit? The memory of a training step, from its settings alone.

    python -m bdia_jax.plan --model gpt2-medium                          # an example by name
    python -m bdia_jax.plan --model ./Llama-3.2-1B --length 2048 --fit 24GiB
    python -m bdia_jax.plan --model llama-8b --length 4096 --batch 1 --param-dtype bfloat16
    python -m bdia_jax.plan --model llama-1b --device rtx-4090           # on a machine without one
    python -m bdia_jax.plan --model llama-1b --device v5e:2x2 --mesh fsdp=4

Every training method is compiled, for the shapes only: no weights are made, and nothing is run.
What the compiler then says is what the step will need on the device it is compiled for: the one
that is there, or one that is not (:mod:`.targets`: GPUs with ``jax[cuda]``, TPUs with
``libtpu``, on any machine). Compiled on a CPU, it is an estimate for an accelerator, rather too
high in bfloat16, because matrix products give float32 there. (Two things that only a CPU's
compiler does are left out; ``--here`` counts them, for training on that CPU.)
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
from collections.abc import Iterable
from typing import Any, Literal

import jax
import numpy as np
import tyro
from flax import nnx

from bdia_jax.data.text import TextData
from bdia_jax.nn.decoder import Decoder, DecoderConfig, fusible, llama
from bdia_jax.nn.lora import add_lora
from bdia_jax.planning import memory, targets
from bdia_jax.train.figures import COLOURS, figure
from bdia_jax.train.loop import TrainSettings, step_memory
from bdia_jax.train.tasks import LanguageModelling

EXAMPLES = {
    "gpt2": DecoderConfig(vocab_size=50257, max_length=1024, width=768, depth=12, heads=12),
    "gpt2-medium": DecoderConfig(vocab_size=50257, max_length=1024, width=1024, depth=24, heads=16),
    "llama-1b": llama(
        vocab_size=128_256,
        max_length=131_072,
        width=2048,
        depth=16,
        heads=32,
        kv_heads=8,
        hidden=8192,
        tied_head=True,
    ),
    "llama-8b": llama(
        vocab_size=128_256,
        max_length=131_072,
        width=4096,
        depth=32,
        heads=32,
        kv_heads=8,
        hidden=14_336,
    ),
}
"""Shapes of well-known models."""

LIKE_AN_ACCELERATOR = {
    # Writes broadcast arrays out.
    "xla_cpu_experimental_ynn_fusion_type": "",
    # Takes the conversion of bfloat16 weights to float32 out of the loop over blocks: of all.
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
}
"""Of a CPU's compiler, without what only a CPU does."""

FFN_CHUNK = 128
"""Positions of a chunk, where the feed-forward network goes in chunks."""

METHODS: dict[str, dict[str, Any]] = {
    "standard": {"method": "standard"},
    "checkpointed blocks": {"method": "standard-checkpoint"},
    "checkpointed blocks, chunks": {"method": "standard-checkpoint", "ffn_chunk": FFN_CHUNK},
    "BDIA": {"method": "bdia"},
    "BDIA, chunks": {"method": "bdia", "ffn_chunk": FFN_CHUNK},
    "BDIA, updated in the backward pass": {"method": "bdia"},
    "BDIA, chunks, updated in the backward pass": {"method": "bdia", "ffn_chunk": FFN_CHUNK},
}
"""Settings of the network; "chunks" are those of the feed-forward network's positions."""


def methods_for(lora: int) -> tuple[str, ...]:
    """All methods, but for low-rank updates without those that differ by gradients of weights."""
    return tuple(name for name in METHODS if not lora or not name.endswith("backward pass"))


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of a training step, per device."""

    method: str
    parameters: int
    """Trained weights."""
    frozen: int
    """Weights that are not trained."""
    optimizer: int
    """The optimizer's state."""
    gradients: int
    """Of all weights that are not updated in the backward pass; some of the temporaries."""
    side: int
    """Side bits and checksums; some of the temporaries."""
    temporaries: int
    """All that lies beside weights and optimizer state at the peak."""
    total: int
    """The peak."""


def plan(
    config: DecoderConfig,
    batch: int,
    length: int,
    *,
    lora: int = 0,
    optimizer: str = "adamw",
    mesh: str | None = None,
    methods: Iterable[str] | None = None,
    here: bool = True,
    device: str | None = None,
) -> list[Need]:
    """What a training step of a decoder needs by each method, without running anything.

    The step is the training loop's own: the totals are what ``memory_analysis()`` says of it.

    Args:
      config: of the network; its ``method`` is set here.
      batch: sequences per step.
      length: tokens per sequence.
      lora: rank of low-rank updates of q and v, with everything else frozen; 0 trains all.
      optimizer, mesh: as in :class:`bdia_jax.train.TrainSettings`.
      methods: some of those in :data:`METHODS`; None for :func:`methods_for`.
      here: for this device; False for a better estimate of an accelerator, from a CPU.
      device: to compile for, as in :func:`targets.devices`; None for what is there.

    Raises:
      ValueError: for unknown methods, a length above ``max_length``, a mesh without its devices.
    """
    methods = methods_for(lora) if methods is None else tuple(methods)
    if unknown := [name for name in methods if name not in METHODS]:
        raise ValueError(f"methods must be of {', '.join(METHODS)}; got {', '.join(unknown)}")
    if not 1 <= length <= config.max_length or batch < 1:
        raise ValueError(
            f"length must lie in [1, {config.max_length}], the model's max_length, and batch be at "
            f"least 1; got {length} and {batch}"
        )
    text = TextData("nothing", *(np.zeros(length + 2, np.int32),) * 2, config.vocab_size)
    task = LanguageModelling(text, length)
    settings = TrainSettings(batch_size=batch, optimizer=optimizer, mesh=mesh)
    compiler = {"devices": None if device is None else targets.devices(device)}
    if device is None and not here and jax.default_backend() == "cpu":
        compiler["compiler_options"] = LIKE_AN_ACCELERATOR
    fused = config.attention == "auto" and not config.dropout and fusible(config)
    if targets.is_gpu(device) and fused:
        # What it would choose there.
        config = dataclasses.replace(config, attention="cudnn")
    return [_need(name, config, task, settings, lora, compiler) for name in methods]


def _need(name, config: DecoderConfig, task, settings: TrainSettings, lora, compiler) -> Need:
    config = dataclasses.replace(config, **METHODS[name])
    in_backward = name.endswith("updated in the backward pass")
    settings = dataclasses.replace(settings, update_in_backward=in_backward)

    def make():
        model = Decoder(config, rngs=nnx.Rngs(0))
        if lora:
            add_lora(model, lora, rngs=nnx.Rngs(0))
        return model

    found = step_memory(nnx.eval_shape(make), task, settings, **compiler)
    side = 0
    if config.method == "bdia":
        tokens = settings.batch_size * task.length
        taken_back = config.depth - config.stored_blocks
        bits = taken_back * tokens * config.width * (1 + config.tolerance_bits)
        side = (bits // 8 + taken_back * settings.batch_size * 4) // found.batch_shards
    return Need(
        name,
        found.parameters,
        found.frozen,
        found.optimizer,
        found.gradients,
        side,
        found.memory.results + found.memory.temporaries,
        found.memory.total,
    )


def largest_batch(config: DecoderConfig, length: int, limit: int, method: str, **options) -> int:
    """The most sequences whose training step stays within ``limit`` bytes; 0 if none does."""

    def fits(batch: int) -> bool:
        return plan(config, batch, length, methods=[method], **options)[0].total <= limit

    return memory.largest(fits)


def most_stored_blocks(
    config: DecoderConfig, batch: int, length: int, limit: int, method: str, **options
) -> int | None:
    """How many blocks may keep their activations within ``limit`` bytes; None if not even 0.

    The more, the faster: as many as fit are the best use of a memory that is there.
    """

    def fits(stored: int) -> bool:
        some = dataclasses.replace(config, stored_blocks=stored)
        return plan(some, batch, length, methods=[method], **options)[0].total <= limit

    if not fits(0):
        return None
    return memory.largest(fits, config.depth)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``24GiB`` or ``80GB``."""
    units = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG]i?B)", text.strip())
    if match is None:
        raise ValueError(f"a size must be a number with MB, GB, MiB or GiB; got {text!r}")
    return int(float(match[1]) * units[match[2]])


def table(needs: list[Need]) -> str:
    """Markdown, in GB (10^9 bytes)."""
    columns = [field.name for field in dataclasses.fields(Need)][1:]
    lines = ["| GB per device | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for need in needs:
        cells = (f"{getattr(need, column) / 1e9:.2f}" for column in columns)
        lines.append(f"| {need.method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(needs: list[Need], path: pathlib.Path, title: str) -> None:
    """A bar per method, of what the memory goes to."""
    parts = {
        "weights": lambda n: n.parameters + n.frozen,
        "optimizer state": lambda n: n.optimizer,
        "gradients": lambda n: n.gradients,
        "side bits": lambda n: n.side,
        "activations and the rest": lambda n: max(0, n.temporaries - n.gradients - n.side),
    }
    with figure(path, 2) as (axis, beside):
        beside.set_axis_off()
        start = np.zeros(len(needs))
        for colour, (label, size) in zip(COLOURS, parts.items()):
            sizes = np.array([size(need) / 1e9 for need in needs])
            axis.barh(range(len(needs)), sizes, left=start, color=colour, label=label)
            start += sizes
        axis.set_yticks(range(len(needs)), [need.method for need in needs])
        axis.invert_yaxis()
        axis.set_xlabel("GB per device")
        axis.set_title(title)
        beside.legend(*axis.get_legend_handles_labels(), loc="center left", frameon=False)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Will it fit? The memory of a training step, from its settings alone."""

    model: str = "gpt2-medium"
    """gpt2, gpt2-medium, llama-1b, llama-8b; or a Hugging Face folder or name."""
    batch: int = 8
    """Sequences per step."""
    length: int = 1024
    """Tokens per sequence."""
    lora: tuple[int, ...] = (0, 8)
    """Ranks of low-rank updates of q and v; 0 trains all weights."""
    optimizer: str = "adamw"
    """adam, adamw, set-adam or sgd."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the blocks compute in."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the weights are kept in."""
    tolerance_bits: int = 0
    """More bits of side information, for hardware that is not deterministic."""
    mesh: str | None = None
    """Devices, such as data=4,fsdp=2; on a CPU, as many virtual ones are made."""
    here: bool = False
    """For training on this device, if it is a CPU; not an estimate of an accelerator."""
    device: str | None = None
    """What to compile for, which need not be there: h100, a100-80, a100-40, l4, rtx-4090, rtx-3090
    (or h100:8), with jax[cuda]; v5e:2x2, for instance, with libtpu. With a mesh it is of all of
    them, otherwise one is used."""
    fit: str | None = None
    """A memory, such as 24GiB: the largest batch that fits in it is searched for, and how many
    blocks may keep their activations at the batch that was given (stored_blocks: the faster)."""
    figure: pathlib.Path | None = None
    """A PNG with a bar per method."""

    def config(self) -> DecoderConfig:
        """The network."""
        config = EXAMPLES.get(self.model)
        if config is None:
            from bdia_jax import interop

            config = interop.read_config(interop.resolve(self.model))
        return dataclasses.replace(
            config,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            tolerance_bits=self.tolerance_bits,
        )


def main(p: Plan) -> list[Need]:
    """Prints the plan."""
    limit = None if p.fit is None else parse_size(p.fit)
    if p.mesh and not p.device:
        devices = np.prod([int(n) for n in re.findall(r"=(\d+)", p.mesh)], dtype=int)
        # Before the first use of a device; where there are accelerators, it changes nothing.
        jax.config.update("jax_num_cpu_devices", max(1, int(devices)))
    config, needs = p.config(), []
    for rank in p.lora:
        options = {
            "lora": rank,
            "optimizer": p.optimizer,
            "mesh": p.mesh,
            "here": p.here,
            "device": p.device,
        }
        for need in plan(config, p.batch, p.length, **options):
            name = f"{need.method}, LoRA {rank}" if rank else need.method
            needs.append(dataclasses.replace(need, method=name))
            if limit is not None:
                batch = largest_batch(config, p.length, limit, need.method, **options)
                line = f"{name}: {batch or 'no'} sequences of {p.length} tokens fit in {p.fit}"
                if METHODS[need.method]["method"] == "bdia" and p.batch <= batch:
                    stored = most_stored_blocks(
                        config, p.batch, p.length, limit, need.method, **options
                    )
                    line += f"; with {p.batch}, stored_blocks={stored} of {config.depth} do"
                print(line, flush=True)
    title = f"{p.model}, {p.batch} × {p.length} tokens, {p.dtype}"
    kind = (targets.devices(p.device) if p.device else jax.devices())[0].device_kind
    print(f"\n{title}; compiled for {kind}\n\n{table(needs)}")
    if p.figure is not None:
        draw(needs, p.figure, title)
    return needs


def command() -> None:
    """Runs :func:`main` from the command line; what the user can mend is told in a line."""
    try:
        main(tyro.cli(Plan, description=__doc__))
    except (ValueError, OSError, ImportError, jax.errors.JaxRuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
