"""The memory of a training step of a decoder, in each way to train, from its settings alone.

Every way (:mod:`.ways`) is compiled, for the shapes only: no weights are made, and nothing is run.
What the compiler then says is what the step will need on the device it is compiled for: the one
that is there, or one that is not (:mod:`.targets`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdia_jax import Online, pack_bits
from bdia_jax.data.packing import Packed
from bdia_jax.data.text import TextData
from bdia_jax.nn import Decoder, DecoderConfig, ReversibleStack, add_lora, quantize_base
from bdia_jax.nn.attention.kernels import fusible
from bdia_jax.nn.gamma import reversible_stacks
from bdia_jax.nn.quantized import Kind
from bdia_jax.nn.settings import DTYPES
from bdia_jax.planning import memory, targets
from bdia_jax.planning.ways import WAYS, Way, check_ways
from bdia_jax.train import (
    LanguageModelling,
    PackedTexts,
    Task,
    TrainSettings,
    evaluation_memory,
    step_memory,
)
from bdia_jax.train.mesh import mesh_shape
from bdia_jax.train.optimizers import Optimizer

LIKE_AN_ACCELERATOR = {
    # Writes broadcast arrays out.
    "xla_cpu_experimental_ynn_fusion_type": "",
    # Moves the conversion of bfloat16 weights to float32 out of the loop: all blocks at once.
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
}
"""Of a CPU's compiler, without what only a CPU does."""

LENGTHS = 128
"""Long sequences are tried in steps of so many tokens."""

CUSTOMARY = (
    "standard",
    "checkpointed",
    "checkpointed, chunks",
    "checkpointed, nested, chunks",
    "checkpointed, 8 bits",
    "checkpointed, in host memory, chunks",
    "checkpointed, chunks, updated in backward",
    "BDIA",
    "BDIA, chunks",
    "BDIA, chunks, bits in host memory",
    "BDIA, parts, chunks",
    "BDIA, parts, chunks, updated in backward",
)
"""The ways that are planned if none are named."""


def customary(config: DecoderConfig) -> tuple[str, ...]:
    """The customary ways that a network has: parts are no steps where they are side by side."""
    return tuple(
        name
        for name in CUSTOMARY
        if not (config.parallel and WAYS[name].settings.get("parts_as_steps"))
    )


def fitting(ways: Iterable[str], lora: int, accumulate: int = 1) -> tuple[str, ...]:
    """Some ways, without those that make no sense.

    For low-rank updates, those that only spare gradients of weights; where batches are accumulated,
    those that update blocks at once.
    """
    at_once = not lora and accumulate == 1
    return tuple(name for name in ways if at_once or not WAYS[name].update_in_backward)


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
    """Of all weights that are not updated in the backward pass; part of the temporaries."""
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


def table(needs: list[Need]) -> str:
    """Markdown, in GB (10^9 bytes)."""
    columns = [*[field.name for field in dataclasses.fields(Need)][1:], "run"]
    lines = ["| GB per device | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for need in needs:
        cells = (f"{getattr(need, column) / 1e9:.2f}" for column in columns)
        lines.append(f"| {need.way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plan(
    config: DecoderConfig,
    batch: int,
    length: int,
    *,
    lora: int = 0,
    quantize: Kind | None = None,
    optimizer: Optimizer = "adamw",
    accumulate: int = 1,
    packed: bool = False,
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
      optimizer, accumulate, mesh: as in :class:`bdia_jax.train.TrainSettings`.
      packed: whether a sequence holds many texts, each of which attends to itself only.
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
    names = fitting(customary(config), lora, accumulate) if ways is None else tuple(ways)
    check_ways(names)
    if not 1 <= length <= config.max_length or batch < 1:
        raise ValueError(
            f"length must lie in [1, {config.max_length}], the model's max_length, and batch be at "
            f"least 1; got {length} and {batch}"
        )
    settings = TrainSettings(
        batch_size=batch,
        accumulate=accumulate,
        eval_batch_size=batch // accumulate if eval_batch is None else eval_batch,
        optimizer=optimizer,
        mesh=mesh,
    )
    config = as_on(device, config, length, packed)
    options = {} if here or device is not None else LIKE_AN_ACCELERATOR
    options = options if jax.default_backend() == "cpu" else {}
    planned = _Planned(length, settings, lora, quantize, packed, device, (*options.items(),))
    # What cannot be is refused before anything is compiled.
    models = [
        abstract_model(WAYS[name].config(config, length), lora, quantize, WAYS[name])
        for name in names
    ]
    return [_need(name, model, planned) for name, model in zip(names, models)]


def as_on(device: str | None, config: DecoderConfig, length: int, packed: bool) -> DecoderConfig:
    """A network as it would choose its attention on a device; arguments as above."""
    dtype, head, cap = DTYPES[config.dtype], config.size_of_head, config.attention_cap
    masked = packed or config.window is not None
    fused = fusible(dtype, head, (length,), config.dropout, cap, masked=masked)
    if targets.is_gpu(device) and config.attention == "auto" and fused:
        return dataclasses.replace(config, attention="cudnn")
    return config


@dataclasses.dataclass(frozen=True)
class _Planned:
    """What all ways of a plan have in common."""

    length: int
    settings: TrainSettings
    lora: int
    quantize: Kind | None
    packed: bool
    device: str | None
    options: tuple[tuple[str, str], ...]

    @property
    def compiler(self) -> dict[str, Any]:
        devices = None if self.device is None else targets.devices(self.device)
        return {"devices": devices, "compiler_options": dict(self.options) or None}

    def task(self, vocab_size: int) -> Any:
        """With data that are nothing but shapes."""
        samples = self.settings.eval_batch_size or 1
        if self.packed:
            train, evaluation = (
                Packed(*(np.ones((rows, self.length), kind) for kind in _OF_PACKED))
                for rows in (self.settings.batch_size, samples)
            )
            return PackedTexts("nothing", train, evaluation)
        nothing = np.zeros(self.length + 2, np.int32), np.zeros(self.length * samples + 1, np.int32)
        return LanguageModelling(TextData("nothing", *nothing, vocab_size), self.length)

    def model(self, config: DecoderConfig) -> Decoder:
        """Without arrays."""
        return abstract_model(config, self.lora, self.quantize)


def abstract_model(
    config: DecoderConfig, lora: int, quantize: Kind | None, way: Way | None = None
) -> Decoder:
    """A model without arrays, such as a way trains it; an error for one that cannot be."""

    def make():
        model = Decoder(config, rngs=nnx.Rngs(0))
        if way is not None:
            way.install(model)
        if quantize is not None:
            quantize_base(model, quantize)
        if lora:
            add_lora(model, lora, rngs=nnx.Rngs(0))
        return model

    return nnx.eval_shape(make)


_OF_PACKED = (np.int32, np.int32, np.float32, np.int32, np.int32)
"""Types of the arrays of :class:`bdia_jax.data.Packed`."""


def need_of(
    name: str,
    model: Any,
    task: Task,
    settings: TrainSettings,
    length: int,
    *,
    evaluation: int | None = None,
    **compiler: Any,
) -> Need:
    """What it needs to train a model, which may be abstract.

    Args:
      name: of the way.
      model: with one reversible stack, and its config.
      task, settings: as of :func:`bdia_jax.train.step_memory`.
      length: positions that blocks see of a sample.
      evaluation: bytes of the evaluation of a batch, if they are known.
      **compiler: more of :func:`bdia_jax.train.step_memory`.
    """
    found = step_memory(model, task, settings, **compiler)
    if evaluation is None:
        evaluation = evaluation_memory(model, task, settings, **compiler).total
    (stack,) = reversible_stacks(model)
    micro_batch = settings.batch_size // settings.accumulate
    return Need(
        name,
        found.parameters,
        found.frozen,
        found.optimizer,
        found.gradients,
        side_information(stack, micro_batch, length, model.config.width) // found.batch_shards,
        found.memory.results + found.memory.temporaries,
        found.memory.total,
        evaluation + found.optimizer,
    )


def _need(name: str, model: Decoder, p: _Planned) -> Need:
    config = model.config
    (stack,) = reversible_stacks(model)
    # Networks that are evaluated alike share what is found.
    on_grid = stack.step.network.frac_bits is not None
    alike = {"method": "standard", "quantize_standard": on_grid, "gamma": 0.5, "signs": "block"}
    alike |= {"tolerance_bits": 0, "keep_in": "device", "narrow_cotangents": False}
    return need_of(
        name,
        model,
        p.task(config.vocab_size),
        WAYS[name].train(p.settings),
        p.length,
        evaluation=_evaluation(dataclasses.replace(config, **alike), p),
        **p.compiler,
    )


@functools.lru_cache
def _evaluation(config: DecoderConfig, p: _Planned) -> int:
    """Bytes of a program that evaluates a batch."""
    model, task = p.model(config), p.task(config.vocab_size)
    return evaluation_memory(model, task, p.settings, **p.compiler).total


def side_information(stack: ReversibleStack, batch: int, length: int, width: int) -> int:
    """Bytes of the side information and the checksums that a stack keeps on the device."""
    if not isinstance(stack.adjoint, Online):
        return 0
    bits, packed = stack.step.bits, 0
    if bits and stack.adjoint.keep_in == "device":
        values = jax.ShapeDtypeStruct((width,), jnp.uint32)
        row = jax.eval_shape(lambda x: pack_bits(x, bits), values)
        packed = length * row.size * row.dtype.itemsize
    checksum = 4
    return stack.depth * len(stack.parts or (None,)) * batch * (packed + checksum)


def largest_batch(config: DecoderConfig, length: int, limit: int, way: str, **options) -> int:
    """So many sequences that a run stays within ``limit`` bytes; 0 if there are none.

    With a hundredth more it does not (:func:`.memory.largest_by_line`).
    """
    # A mesh splits batches.
    devices = devices_of(options.get("mesh"))

    def size(count: int) -> float:
        return _run(config, count * devices, length, way, options)

    return devices * memory.largest_by_line(size, limit, 2**20)


def longest(config: DecoderConfig, limit: int, way: str, **options) -> int:
    """So many tokens of a sequence, one per batch and device, that a run stays within ``limit``.

    With a hundredth more it does not. A multiple of :data:`LENGTHS`, or of any number up to
    ``max_length`` where that is small; 0 if not even the shortest fits.
    """
    unit = LENGTHS if config.max_length > 8 * LENGTHS else 1
    batch = devices_of(options.get("mesh"))

    def size(count: int) -> float:
        return _run(config, batch, unit * count, way, options)

    return unit * memory.largest_by_line(size, limit, config.max_length // unit)


def _run(config: DecoderConfig, batch: int, length: int, way: str, options: Any) -> float:
    """The peak of a run; infinite for one that the compiler refuses because it does not fit."""
    try:
        return plan(config, batch, length, ways=[way], **options)[0].run
    except jax.errors.JaxRuntimeError as error:
        if not is_too_large(error):
            raise
        return math.inf


def is_too_large(error: Exception) -> bool:
    """Whether a compiler refused a program that needs more memory than the device has (a TPU's)."""
    return "RESOURCE_EXHAUSTED" in str(error)


def devices_of(mesh: str | None) -> int:
    """How many a mesh has, such as 4 for ``data=2,fsdp=2``; 1 without one."""
    return math.prod(mesh_shape(mesh)) if mesh else 1
