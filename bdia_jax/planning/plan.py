"""Will it fit? The memory of a training step, from its settings alone.

    python -m bdia_jax.plan --model gpt2-medium                          # an example by name
    python -m bdia_jax.plan --model ./Llama-3.2-1B --length 2048 --fit 24GiB
    python -m bdia_jax.plan --model llama-8b --length 4096 --batch 1 --param-dtype bfloat16
    python -m bdia_jax.plan --model llama-1b --device rtx-4090           # on a machine without one
    python -m bdia_jax.plan --model llama-1b --device v5e:2x2 --mesh fsdp=4

Every way to train (:mod:`.ways`) is compiled, for the shapes only: no weights are made, and
nothing is run. What the compiler then says is what the step will need on the device it is compiled
for: the one that is there, or one that is not (:mod:`.targets`: GPUs with ``jax[cuda]``, TPUs with
``libtpu``, on any machine). Compiled on a CPU, it is an estimate for an accelerator, rather too
high in bfloat16, because matrix products give float32 there. (Two things that only a CPU's
compiler does are left out; ``--here`` counts them, for training on that CPU.)
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import sys
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from bdia_jax import Online, pack_bits
from bdia_jax.data.text import TextData
from bdia_jax.nn import (
    Decoder,
    DecoderConfig,
    ReversibleStack,
    add_lora,
    llama,
    quantize_base,
)
from bdia_jax.nn.attention.kernels import fusible
from bdia_jax.nn.quantized import Kind
from bdia_jax.nn.settings import DTYPES
from bdia_jax.planning import memory, targets
from bdia_jax.planning.ways import WAYS, check_ways
from bdia_jax.steps import Signs
from bdia_jax.train import LanguageModelling, TrainSettings, evaluation_memory, step_memory
from bdia_jax.train.figures import COLOURS, figure
from bdia_jax.train.optimizers import Optimizer

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

LENGTHS = 128
"""Long sequences are tried in steps of so many tokens."""

CUSTOMARY = tuple(
    name for name, way in WAYS.items() if not {"gamma", "tolerance_bits"} & {*way.settings}
)
"""The ways that are planned if none are named: γ and tolerance bits are settings of a plan."""


def fitting(ways: Iterable[str], lora: int) -> tuple[str, ...]:
    """Some ways, but for low-rank updates without those that only spare gradients of weights."""
    return tuple(name for name in ways if not lora or not WAYS[name].update_in_backward)


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of a training step and of an evaluation, per device."""

    way: str
    parameters: int
    """Trained weights."""
    frozen: int
    """Weights that are not trained."""
    optimizer: int
    """The optimizer's state."""
    gradients: int
    """Of all weights that are not updated in the backward pass; some of the temporaries."""
    side: int
    """Side information, m + r bits per element and step, and checksums; some of the temporaries.
    0 where nothing is taken back."""
    temporaries: int
    """All that lies beside weights and optimizer state at the peak of a step."""
    total: int
    """The peak of a step."""
    evaluation: int
    """The peak of an evaluation batch, with the optimizer's state, which waits meanwhile."""

    @property
    def run(self) -> int:
        """The peak of a run."""
        return max(self.total, self.evaluation)


def plan(
    config: DecoderConfig,
    batch: int,
    length: int,
    *,
    lora: int = 0,
    quantize: Kind | None = None,
    optimizer: Optimizer = "adamw",
    mesh: str | None = None,
    eval_batch: int | None = None,
    ways: Iterable[str] | None = None,
    here: bool = True,
    device: str | None = None,
) -> list[Need]:
    """What training a decoder needs, in each way to train, without running anything.

    Step and evaluation are the training loop's own: the totals are what ``memory_analysis()`` says.

    Args:
      config: of the network; what a way sets is set here.
      batch: sequences per step.
      length: tokens per sequence.
      lora: rank of low-rank updates of q and v, with everything else frozen; 0 trains all.
      quantize: of the frozen kernels of linear layers, as in :func:`bdia_jax.nn.quantize_base`.
      optimizer, mesh: as in :class:`bdia_jax.train.TrainSettings`.
      eval_batch: sequences per evaluation batch; None for as many as in a step.
      ways: names of :data:`.ways.WAYS`; None for the customary ones that fit ``lora``.
      here: for this device; False for a better estimate of an accelerator, from a CPU.
      device: to compile for, as in :func:`targets.devices`; None for what is there.

    Raises:
      ValueError: for unknown ways, a length above ``max_length``, a mesh without its devices, and
        quantized weights without low-rank updates.
    """
    if quantize is not None and not lora:
        raise ValueError(
            f"quantized weights are not trained: lora, the rank of updates, must be at least 1 "
            f"with quantize={quantize!r}; got {lora}"
        )
    names = fitting(CUSTOMARY, lora) if ways is None else tuple(ways)
    check_ways(names)
    if not 1 <= length <= config.max_length or batch < 1:
        raise ValueError(
            f"length must lie in [1, {config.max_length}], the model's max_length, and batch be at "
            f"least 1; got {length} and {batch}"
        )
    eval_batch = batch if eval_batch is None else eval_batch
    nothing = np.zeros(length + 2, np.int32), np.zeros(length * eval_batch + 1, np.int32)
    text = TextData("nothing", *nothing, config.vocab_size)
    task = LanguageModelling(text, length)
    settings = TrainSettings(
        batch_size=batch, eval_batch_size=eval_batch, optimizer=optimizer, mesh=mesh
    )
    compiler: dict[str, Any] = {"devices": None if device is None else targets.devices(device)}
    if device is None and not here and jax.default_backend() == "cpu":
        compiler["compiler_options"] = LIKE_AN_ACCELERATOR
    fused = (
        config.attention == "auto"
        and not config.dropout
        and fusible(DTYPES[config.dtype], config.size_of_head)
    )
    if targets.is_gpu(device) and fused:
        # What it would choose there.
        config = dataclasses.replace(config, attention="cudnn")
    return [_need(name, config, task, settings, (lora, quantize), compiler) for name in names]


def _need(name, config: DecoderConfig, task, settings: TrainSettings, updates, compiler) -> Need:
    way, (lora, quantize) = WAYS[name], updates
    config = way.config(config, task.length)

    def make():
        model = Decoder(config, rngs=nnx.Rngs(0))
        way.install(model)
        if quantize is not None:
            quantize_base(model, quantize)
        if lora:
            add_lora(model, lora, rngs=nnx.Rngs(0))
        return model

    model = nnx.eval_shape(make)
    found = step_memory(model, task, way.train(settings), **compiler)
    evaluation = evaluation_memory(model, task, way.train(settings), **compiler)
    return Need(
        name,
        found.parameters,
        found.frozen,
        found.optimizer,
        found.gradients,
        side_information(model.blocks, settings.batch_size, task.length, config.width)
        // found.batch_shards,
        found.memory.results + found.memory.temporaries,
        found.memory.total,
        evaluation.total + found.optimizer,
    )


def side_information(stack: ReversibleStack, batch: int, length: int, width: int) -> int:
    """Bytes of the side information and the checksums that a stack keeps for its backward pass."""
    if not isinstance(stack.adjoint, Online):
        return 0
    bits, checksum = stack.step.bits, 4
    row = jax.eval_shape(lambda x: pack_bits(x, bits), jax.ShapeDtypeStruct((width,), jnp.uint32))
    packed = length * row.size * row.dtype.itemsize if bits else 0
    return stack.depth * len(stack.parts or (None,)) * batch * (packed + checksum)


def largest_batch(config: DecoderConfig, length: int, limit: int, way: str, **options) -> int:
    """The most sequences with which a run stays within ``limit`` bytes; 0 if there are none."""
    # A mesh splits batches.
    devices = _devices(options.get("mesh"))

    def size(count: int) -> int:
        return plan(config, count * devices, length, ways=[way], **options)[0].run

    return devices * memory.largest_by_line(size, limit, 2**20)


def longest(config: DecoderConfig, limit: int, way: str, **options) -> int:
    """The most tokens of a sequence, one per batch and device, with which a run stays within bytes.

    A multiple of :data:`LENGTHS`, or of any number up to ``max_length`` where that is small; 0 if
    not even the shortest fits.
    """
    unit = LENGTHS if config.max_length > 8 * LENGTHS else 1
    batch = _devices(options.get("mesh"))

    def size(count: int) -> int:
        return plan(config, batch, unit * count, ways=[way], **options)[0].run

    return unit * memory.largest_by_line(size, limit, config.max_length // unit)


def _devices(mesh: str | None) -> int:
    return math.prod(int(n) for n in re.findall(r"=(\d+)", mesh or ""))


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
    """gpt2, gpt2-medium, llama-1b, llama-8b; or a Hugging Face folder or name."""
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
    optimizer: str = "adamw"
    """adam, adamw, set-adam or sgd."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the blocks compute in."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the weights are kept in."""
    gamma: float = 0.5
    """Of BDIA: 2^-m, at m bits of side information per activation and step."""
    signs: Signs = "block"
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
    """What to compile for, which need not be there: h100, a100-80, a100-40, l4, rtx-4090, rtx-3090
    (or h100:8), with jax[cuda]; v5e:2x2, for instance, with libtpu. With a mesh it is of all of
    them, otherwise one is used."""
    fit: str | None = None
    """A memory, such as 24GiB, per device: the largest batch and the longest sequence that fit in
    it are searched for, each by a few more compilations."""
    figure: pathlib.Path | None = None
    """A PNG with a bar per way."""

    def __post_init__(self):
        check_ways(self.ways)

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
            gamma=self.gamma,
            signs=self.signs,
            tolerance_bits=self.tolerance_bits,
        )


def main(p: Plan) -> list[Need]:
    """Prints the plan."""
    limit = None if p.fit is None else parse_size(p.fit)
    if p.mesh and not p.device:
        # Before the first use of a device; where there are accelerators, it changes nothing.
        jax.config.update("jax_num_cpu_devices", _devices(p.mesh))
    config, needs = p.config(), []
    for rank in p.lora:
        if p.quantize is not None and not rank:
            continue
        options = {
            "lora": rank,
            "quantize": p.quantize,
            "optimizer": p.optimizer,
            "mesh": p.mesh,
            "eval_batch": p.eval_batch,
            "here": p.here,
            "device": p.device,
        }
        names = fitting(p.ways or CUSTOMARY, rank)
        for need in plan(config, p.batch, p.length, ways=names, **options):
            name = f"{need.way}, LoRA {rank}" if rank else need.way
            name += f" on {p.quantize}" if p.quantize else ""
            needs.append(dataclasses.replace(need, way=name))
            if limit is not None:
                batch = largest_batch(config, p.length, limit, need.way, **options)
                tokens = longest(config, limit, need.way, **options)
                print(
                    f"{name}: {batch or 'no'} sequences of {p.length} tokens fit in {p.fit}; one "
                    f"sequence of {tokens:,} tokens" + " per device" * bool(p.mesh),
                    flush=True,
                )
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
