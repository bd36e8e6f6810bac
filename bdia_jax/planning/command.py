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
import functools
import pathlib
import re
import sys
from typing import Literal

import jax
import numpy as np
from tqdm import tqdm

from bdia_jax import command_line
from bdia_jax.maps import gamma_shift
from bdia_jax.nn import DecoderConfig
from bdia_jax.nn.quantized import Kind
from bdia_jax.planning import targets
from bdia_jax.planning.plan import (
    Need,
    abstract_model,
    customary,
    devices_of,
    fitting,
    is_too_large,
    largest_batch,
    longest,
    plan,
    table,
)
from bdia_jax.planning.shapes import SHAPES
from bdia_jax.planning.ways import WAYS, check_ways
from bdia_jax.steps import Signs
from bdia_jax.train.figures import COLOURS, figure
from bdia_jax.train.optimizers import Optimizer


def parse_size(text: str) -> int:
    """Bytes of a size such as ``24GiB`` or ``80GB``."""
    units = {"m": 10**6, "g": 10**9, "t": 10**12, "mi": 2**20, "gi": 2**30, "ti": 2**40}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mgt]i?)b?", text.strip().lower())
    if match is None or not float(match[1]):
        raise ValueError(f"a size must be a number above 0 with MB, GB, MiB or GiB; got {text!r}")
    return int(float(match[1]) * units[match[2]])


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
    """gpt2, gpt2-medium, llama-1b, llama-8b, llama-deep (64 blocks of width 2048); smollm2; or a
    Hugging Face folder or name, or a GGUF file."""
    batch: int = 8
    """Sequences per step."""
    accumulate: int = 1
    """Micro-batches of a step, which are computed one after the other."""
    length: int | None = None
    """Tokens per sequence; by default 1024, or the model's max_length if that is less."""
    packed: bool = True
    """Whether sequences hold many texts, as those of finetune.py do, each of which attends to
    itself only."""
    eval_batch: int | None = None
    """Sequences per evaluation batch; by default as many as in a micro-batch."""
    lora: tuple[int, ...] = (0, 8)
    """Ranks of low-rank updates of q and v; 0 trains all weights."""
    quantize: Kind | None = None
    """nf4, int4 or int8: keep the frozen kernels of linear layers in so few bits; of plans with
    low-rank updates only."""
    optimizer: Optimizer = "adamw"
    """By its name."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the blocks compute in."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """What the weights are kept in. By default as finetune.py keeps them: float32; but frozen ones,
    of which there are low-rank updates, bfloat16 if they are so in the folder (as Llama's are)."""
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
    """Device to compile for, which you need not have: h100, h200, a100-80, a100-40, a10g, l4, l40s,
    rtx-4090 or rtx-3090 (or h100:8), with jax[cuda]; v5e:2x2, for instance, with libtpu. With a
    mesh, all of them are used, otherwise one."""
    fit: str | None = None
    """Memory per device, such as 24GiB: find the largest batch, not accumulated, and the longest
    sequence that fit in it. Each takes some five compilations more, for every way: name some."""
    figure: pathlib.Path | None = None
    """A PNG with a bar per way."""

    def __post_init__(self):
        check_ways(self.ways)
        if self.fit is not None:
            parse_size(self.fit)
        if self.figure is not None:
            check_figure(self.figure)
        if "bdia" in {WAYS[name].method for name in self.ways or WAYS}:
            gamma_shift(self.gamma)

    def config(self, rank: int = 0) -> DecoderConfig:
        """The network, with low-rank updates of some rank; 0 for none."""
        config, stored = _network(self.model)
        half = rank and stored == "bfloat16"
        return dataclasses.replace(
            config,
            dtype=self.dtype,
            param_dtype=self.param_dtype or ("bfloat16" if half else "float32"),
            gamma=self.gamma,
            signs=self.signs,
            tolerance_bits=self.tolerance_bits,
        )

    def asked(self, config: DecoderConfig) -> list[tuple[int, str]]:
        """What is planned: ranks of low-rank updates, and ways to train; tells what is left out.

        Raises:
          ValueError: if it is nothing.
        """
        ranks = [rank for rank in self.lora if rank or self.quantize is None]
        named = self.ways or customary(config)
        on_host = [name for name in named if WAYS[name].settings.get("keep_in") == "host"]
        found = [
            (rank, name)
            for rank in ranks
            for name in fitting(named, rank, self.accumulate)
            if name in self.ways or name not in on_host or not self._on_cpu
        ]
        left_out = [name for name in named if name not in {name for _, name in found}]
        if not found:
            raise ValueError(
                f"nothing is left to plan: quantize = {self.quantize} is for low-rank updates, and "
                "ways with updates in the backward pass are for all weights, and for batches that "
                f"are not accumulated; got lora = {self.lora}, accumulate = {self.accumulate}, "
                f"ways = {named}"
            )
        if self._on_cpu and on_host:
            print("for a CPU, whose memory is the host's, nothing can be kept elsewhere")
        if left_out:
            print(f"left out: {'; '.join(left_out)}")
        return found

    @property
    def _on_cpu(self) -> bool:
        return self.device is None and jax.default_backend() == "cpu"


@functools.lru_cache(maxsize=1)
def _network(name: str) -> tuple[DecoderConfig, str | None]:
    """A network by its name, and what its folder keeps weights in."""
    if (config := SHAPES.get(name)) is not None:
        return config, "bfloat16" if name.startswith("llama") else "float32"
    from bdia_jax import interop

    try:
        path = interop.packaged_model() if name == "smollm2" else interop.resolve(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; shapes that are known by name are {', '.join(SHAPES)}"
        ) from error
    return interop.read_config(path), interop.stored_dtype(path)


def check_figure(path: pathlib.Path) -> None:
    """A ``ValueError`` for a figure that could not be written."""
    if path.suffix.lower() != ".png" or not path.absolute().parent.is_dir():
        raise ValueError(f"a figure must be a .png in a folder that exists; got {path}")


def main(p: Plan) -> list[Need]:
    """Prints the plan."""
    limit = None if p.fit is None else parse_size(p.fit)
    if p.mesh and not p.device:
        # Before the first use of a device; where there are accelerators, it changes nothing.
        jax.config.update("jax_num_cpu_devices", devices_of(p.mesh))
    count = len(targets.devices(p.device)) if p.device else jax.device_count()
    if p.mesh and count != devices_of(p.mesh):
        more = f": give {p.device}:{devices_of(p.mesh)}" if targets.is_gpu(p.device) else ""
        raise ValueError(
            f"mesh {p.mesh!r} is of {devices_of(p.mesh)} devices; there are {count}{more}"
        )
    length = min(1024, p.config().max_length) if p.length is None else p.length
    needs: list[Need] = []
    asked = p.asked(p.config())
    for rank, way in asked:
        # Those that cannot be are refused before any is compiled.
        abstract_model(WAYS[way].config(p.config(rank), length), rank, p.quantize, WAYS[way])
    title = f"{p.model}, {p.batch} × {length} tokens, {p.dtype}"
    try:
        for rank, way in (bar := tqdm(asked, unit="way", disable=None, leave=False)):
            name = f"{way}, LoRA {rank}" if rank else way
            name += f" on {p.quantize}" if p.quantize else ""
            bar.set_postfix_str(name)
            told = _planned(p, rank, way, name, length, limit, needs)
            tqdm.write(f"{name}: {told}")
    finally:
        kind = (targets.devices(p.device) if p.device else jax.devices())[0].device_kind
        if needs:
            print(f"\n{title}; compiled for {kind}\n\n{table(needs)}")
    if p.figure is not None and needs:
        draw(needs, p.figure, title)
    return needs


def _planned(
    p: Plan, rank: int, way: str, name: str, length: int, limit: int | None, needs: list[Need]
) -> str:
    """Plans a way to train, and adds what it needs; what is told of it."""
    config = p.config(rank)
    options = {
        "lora": rank,
        "quantize": p.quantize,
        "optimizer": p.optimizer,
        "packed": p.packed,
        "mesh": p.mesh,
        "eval_batch": p.eval_batch,
        "here": p.here,
        "device": p.device,
    }
    try:
        (need,) = plan(config, p.batch, length, ways=[way], accumulate=p.accumulate, **options)
        needs.append(dataclasses.replace(need, way=name))
        told = f"{need.run / 1e9:.2f} GB"
    except jax.errors.JaxRuntimeError as error:
        if not is_too_large(error):
            raise
        told = f"does not fit: {str(error).splitlines()[0]}"
    if limit is None:
        return told
    batch = largest_batch(config, length, limit, way, **options)
    tokens = longest(config, limit, way, **options)
    alone = f"one sequence of {tokens:,} tokens" if tokens else "not one short sequence"
    return (
        f"{told}; {batch or 'no'} sequences of {length} tokens fit in {p.fit}; {alone}"
        + " per device" * bool(p.mesh)
    )


def command() -> None:
    """Runs :func:`main` from the command line; what the user can mend is told in a line."""
    try:
        main(command_line.parse(Plan, None, __doc__))
    except (ValueError, OSError, ImportError, jax.errors.JaxRuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
