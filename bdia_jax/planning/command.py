"""Will it fit? The memory of a training step, from its settings alone.

    python -m bdia_jax.plan --model gpt2-medium                          # an example by name
    python -m bdia_jax.plan --model ./Llama-3.2-1B --length 2048 --fit 24GiB
    python -m bdia_jax.plan --model llama-8b --length 4096 --batch 1 --param-dtype bfloat16
    python -m bdia_jax.plan --model llama-1b --device rtx-4090           # on a machine without one
    python -m bdia_jax.plan --model llama-1b --device v5e:2x2 --mesh fsdp=4

Every way to train is compiled, for the shapes only: no weights are made, and nothing is run. What
the compiler then says is what the step will need on the device it is compiled for: the one that is
there, or one that is not (GPUs with jax[cuda], TPUs with libtpu, on any machine). Compiled on a
CPU, it is an estimate for an accelerator, rather too high in bfloat16, because matrix products give
float32 there. (Two things that only a CPU's compiler does are left out; --here counts them, for
training on that CPU.)
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
from typing import Literal

import jax
import numpy as np
from tqdm import tqdm

from bdia_jax import command_line
from bdia_jax.nn import DecoderConfig
from bdia_jax.nn.quantized import Kind
from bdia_jax.planning import targets
from bdia_jax.planning.plan import (
    Need,
    customary,
    devices_of,
    fitting,
    largest_batch,
    longest,
    plan,
)
from bdia_jax.planning.shapes import SHAPES
from bdia_jax.planning.ways import check_ways
from bdia_jax.steps import Signs
from bdia_jax.train.figures import COLOURS, figure
from bdia_jax.train.optimizers import Optimizer


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
        lines.append(f"| {need.way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(needs: list[Need], path: pathlib.Path, title: str) -> None:
    """A bar per way, of what the memory goes to."""
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
        axis.set_yticks(range(len(needs)), [need.way for need in needs])
        axis.invert_yaxis()
        axis.set_xlabel("GB per device")
        axis.set_title(title)
        beside.legend(*axis.get_legend_handles_labels(), loc="center left", frameon=False)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Will it fit? The memory of a training step, from its settings alone."""

    model: str = "gpt2-medium"
    """gpt2, gpt2-medium, llama-1b, llama-8b, llama-deep (64 blocks of width 2048); or a Hugging
    Face folder or name."""
    batch: int = 8
    """Sequences per step."""
    length: int = 1024
    """Tokens per sequence."""
    eval_batch: int | None = None
    """Sequences per evaluation batch; by default as many as in a step."""
    lora: tuple[int, ...] = (0, 8)
    """Ranks of low-rank updates of q and v; 0 trains all weights."""
    quantize: Kind | None = None
    """nf4, int4 or int8: keep the frozen kernels of linear layers in so few bits; of plans with
    low-rank updates only."""
    optimizer: Optimizer = "adamw"
    """By its name."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the blocks compute in."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the weights are kept in."""
    gamma: float = 1 / 16
    """Of BDIA: 2^-m, at m bits of side information per activation and step. Pretrained networks
    tolerate 1/16 or 1/32; the paper trains from scratch with 1/2."""
    signs: Signs = "sample"
    """Of γ: block, sample, minus or plus."""
    tolerance_bits: int = 0
    """More bits of side information, for hardware that is not deterministic."""
    ways: tuple[str, ...] = ()
    """Ways to train, such as "checkpointed" "BDIA, parts"; by default the customary ones."""
    mesh: str | None = None
    """Devices, such as data=4,fsdp=2; on a CPU, as many virtual ones are made."""
    here: bool = False
    """For training on this device, if it is a CPU; not an estimate of an accelerator."""
    device: str | None = None
    """Device to compile for, which you need not have: h100, a100-80, a100-40, l4, rtx-4090 or
    rtx-3090 (or h100:8), with jax[cuda]; v5e:2x2, for instance, with libtpu. With a mesh, all of
    them are used, otherwise one."""
    fit: str | None = None
    """Memory per device, such as 24GiB: find the largest batch and the longest sequence that fit in
    it. Each takes a few more compilations."""
    figure: pathlib.Path | None = None
    """A PNG with a bar per way."""

    def __post_init__(self):
        check_ways(self.ways)

    def config(self) -> DecoderConfig:
        """The network."""
        config = SHAPES.get(self.model)
        if config is None:
            from bdia_jax import interop

            config = interop.read_config(interop.resolve(self.model))
        return dataclasses.replace(
            config,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            gamma=self.gamma,
            signs=self.signs,
            tolerance_bits=self.tolerance_bits,
        )


def main(p: Plan) -> list[Need]:
    """Prints the plan."""
    limit = None if p.fit is None else parse_size(p.fit)
    if p.mesh and not p.device:
        # Before the first use of a device; where there are accelerators, it changes nothing.
        jax.config.update("jax_num_cpu_devices", devices_of(p.mesh))
    config, needs = p.config(), []
    asked = [
        (rank, name)
        for rank in p.lora
        if rank or p.quantize is None
        for name in fitting(p.ways or customary(config), rank)
    ]
    for rank, way in (bar := tqdm(asked, unit="way", disable=None, leave=False)):
        options = {
            "lora": rank,
            "quantize": p.quantize,
            "optimizer": p.optimizer,
            "mesh": p.mesh,
            "eval_batch": p.eval_batch,
            "here": p.here,
            "device": p.device,
        }
        name = f"{way}, LoRA {rank}" if rank else way
        name += f" on {p.quantize}" if p.quantize else ""
        bar.set_postfix_str(name)
        (need,) = plan(config, p.batch, p.length, ways=[way], **options)
        needs.append(dataclasses.replace(need, way=name))
        told = f"{name}: {need.run / 1e9:.2f} GB"
        if limit is not None:
            batch = largest_batch(config, p.length, limit, way, **options)
            tokens = longest(config, limit, way, **options)
            told += (
                f"; {batch or 'no'} sequences of {p.length} tokens fit in {p.fit}; one sequence of "
                f"{tokens:,} tokens" + " per device" * bool(p.mesh)
            )
        tqdm.write(told)
    title = f"{p.model}, {p.batch} × {p.length} tokens, {p.dtype}"
    kind = (targets.devices(p.device) if p.device else jax.devices())[0].device_kind
    print(f"\n{title}; compiled for {kind}\n\n{table(needs)}")
    if p.figure is not None:
        draw(needs, p.figure, title)
    return needs


def command() -> None:
    """Runs :func:`main` from the command line; what the user can mend is told in a line."""
    try:
        main(command_line.parse(Plan, None, __doc__))
    except (ValueError, OSError, ImportError, jax.errors.JaxRuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
