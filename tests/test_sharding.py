"""Many devices: the same results, 0 mismatches, and neither integers nor bits cross devices.

The reference is always the same computation on one device. It is compared at 18 fractional bits,
where a rounding that comes out otherwise moves nothing by more than float32 does; exactness is
checked there and, by ``check_reversible``, at the 9 bits of everyday use.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _rows import fast
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bdia_jax
from bdia_jax.data import TextData
from bdia_jax.nn import (
    Decoder,
    DecoderConfig,
    Probe,
    ReversibleStack,
    SelfAttention,
    TransformerBlock,
    chunked_attention,
    cross_entropy,
)
from bdia_jax.nn.blocks import FeedForward
from bdia_jax.nn.chunks import by_chunks
from bdia_jax.nn.losses import logits
from bdia_jax.planning import targets
from bdia_jax.train import LanguageModelling, TrainSettings
from bdia_jax.train.programs import Programs

BLOCKS, BATCH, LENGTH, WIDTH, HEADS, HEAD_DIM, HIDDEN = 4, 16, 8, 32, 4, 8, 64
FRAC_BITS = 18
QUICK = {"xla_backend_optimization_level": 0}
"""Compiler options for programs that are not themselves under test."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference from one device, relative to the largest element of an array."""


# ---------------------------------------------------------------------------------------------
# A network, its loss, and the programs compiled for it
# ---------------------------------------------------------------------------------------------


def transformer(attend=None, stream=None, gather=False, reduce_axis=None):
    """A pre-norm transformer block with dropout.

    Args:
      attend, stream: over explicit mesh axes, the shardings of what attention and feed-forward
        network read, and of the residual stream.
      gather: whether the block gathers its parameters (fully sharded, explicit mesh axes).
      reduce_axis: under ``shard_map``, the mesh axis over which the matrices are split.
    """

    def project(equation, x, matrix):
        x = jnp.einsum(equation, x, matrix, **({} if stream is None else {"out_sharding": stream}))
        return x if reduce_axis is None else jax.lax.psum(x, reduce_axis)

    def norm(x, scale):
        x = x.astype(jnp.float32)
        x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
        x = (x * scale).astype(scale.dtype)
        return x if attend is None else jax.sharding.reshard(x, attend)

    def block(params, x, key):
        params = {name: p.astype(x.dtype) for name, p in params.items()}
        if gather:
            params = {name: jax.sharding.reshard(p, P()) for name, p in params.items()}
        qkv = jnp.einsum("blw,wchd->blchd", norm(x, params["norm1"]), params["qkv"])
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * HEAD_DIM**-0.5).astype(x.dtype)
        a = project("bqhd,hdw->bqw", jnp.einsum("bhqk,bkhd->bqhd", weights, v), params["out"])
        a = a * jax.random.bernoulli(key, 0.9, a.shape, out_sharding=stream).astype(a.dtype)
        hidden = jax.nn.gelu(jnp.einsum("blw,wf->blf", norm(x + a, params["norm2"]), params["up"]))
        return a + project("blf,fw->blw", hidden, params["down"])

    return block


SHAPES = {
    "norm1": (WIDTH,),
    "norm2": (WIDTH,),
    "qkv": (WIDTH, 3, HEADS, HEAD_DIM),
    "out": (HEADS, HEAD_DIM, WIDTH),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}
REPLICATED = dict.fromkeys(SHAPES, P())
SPLIT = REPLICATED | {  # tensor parallel: heads and hidden features
    "qkv": P(None, None, None, "model", None),
    "out": P(None, "model", None, None),
    "up": P(None, None, "model"),
    "down": P(None, "model", None),
}
FULLY_SHARDED = {name: P(None, "fsdp") for name in SHAPES}


@functools.cache
def problem():
    """Parameters, input, target, key; the same in every process."""
    keys = dict(zip(SHAPES, jax.random.split(jax.random.key(0), len(SHAPES))))
    params = {
        name: 0.2 * jax.random.normal(keys[name], (BLOCKS, *shape)) + name.startswith("norm")
        for name, shape in SHAPES.items()
    }
    x, target = jax.random.normal(jax.random.key(1), (2, BATCH, LENGTH, WIDTH))
    return *jax.device_get((params, x, target)), jax.random.key(2)


def loss_of(block, dtype="float32", step=bdia_jax.BDIA, adjoint=bdia_jax.Online, **options):
    """Mean squared error of the scan as a function of ``(params, x, probe, target, key)``.

    ``options`` are those of the step.
    """

    def loss(params, x, probe, target, key):
        y = bdia_jax.reversible_scan(
            block,
            params,
            x.astype(dtype),
            key=key,
            step=step(**{"frac_bits": FRAC_BITS} | options),
            adjoint=adjoint(probe=probe),
        )
        return jnp.mean((y.astype(jnp.float32) - target) ** 2)

    return loss


def gradients(loss):
    """``(loss, gradients by parameters, input and probe)``."""
    return jax.value_and_grad(loss, (0, 1, 2))


@functools.cache
def one_device(dtype="float32", tolerance_bits=0):
    """Loss and gradients on one device."""
    params, x, target, key = problem()
    probe = bdia_jax.BackwardReport.zeros(BLOCKS)
    loss = loss_of(transformer(), dtype, tolerance_bits=tolerance_bits)
    return jax.device_get(
        jax.jit(gradients(loss), compiler_options=QUICK)(params, x, probe, target, key)
    )


def make_mesh(explicit: bool, **axes: int):
    """A mesh of the given axes, all of one type."""
    kind = AxisType.Explicit if explicit else AxisType.Auto
    devices = jax.devices()[: math.prod(axes.values())]
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes), devices=devices
    )


# ---------------------------------------------------------------------------------------------
# What is asserted
# ---------------------------------------------------------------------------------------------


def difference(tree, reference) -> float:
    """The largest difference, relative to the largest element of each array."""
    pairs = zip(jax.tree.leaves(jax.device_get(tree)), jax.tree.leaves(reference), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


def agrees(value, reference, record, dtype="float32"):
    """Asserts that loss and gradients are those of the reference, and exactly reversible."""
    (loss, (d_params, d_x, report)), (loss_1, (d_params_1, d_x_1, _)) = value, reference
    found = {
        "loss": difference(loss, loss_1),
        "gradients": difference((d_params, d_x), (d_params_1, d_x_1)),
        "mismatched": float(np.sum(report.mismatched)),
        "corrected": float(np.sum(report.corrected)),
    }
    for name, number in found.items():
        record(name, number)
    assert found["mismatched"] == found["corrected"] == 0, found
    assert max(found["loss"], found["gradients"]) < TOLERANCE[dtype], found


COLLECTIVE = re.compile(
    r"= (?P<types>.*?) (?P<name>all-gather|all-reduce|reduce-scatter|all-to-all|"
    r"ragged-all-to-all|collective-permute|collective-broadcast)(-start)?\("
)
TYPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """All array types in a piece of HLO: ``("f32", (16, 8))``."""
    return [
        (kind, tuple(map(int, filter(None, dims.split(","))))) for kind, dims in TYPE.findall(text)
    ]


def collectives(compiled) -> collections.Counter:
    """``{("all-reduce", "f32", (16, 8)): how many}`` of a compiled program."""
    found = collections.Counter()
    for line in compiled.as_text().splitlines():
        # A type's tuple index is written /*index=5*/: no reason to stop at its "=".
        if match := COLLECTIVE.search(line.replace("/*index=", "/*")):
            found.update((match["name"], *array) for array in arrays(match["types"]))
    return found


def crosses_only(compiled, floats: list[tuple[int, ...]], record, cut_samples: int = 0):
    """Asserts that nothing but such floats, and scalars, goes from device to device.

    Not the integers of a state (s32), not its packed bits (u8, u32), no residual. A shape counts
    as one of ``floats`` in whatever order of its axes, and with axes of length 1. Where a sample
    lies on several devices, its checksum (u32) and whether it is finite (pred) may cross: one
    of each for every one of ``cut_samples``.
    """
    allowed = {(kind, _plain(shape)) for kind in ("f32", "bf16") for shape in floats}
    allowed |= {(kind, (cut_samples,)) for kind in ("u32", "pred")}
    found = collectives(compiled)
    for name, kind, shape in found:
        assert math.prod(shape) == 1 or (kind, _plain(shape)) in allowed, (
            f"{name} of {kind}{list(shape)} crosses devices; allowed are {allowed}"
        )
    listed = [f"{n} {name} {kind}{list(shape)}" for (name, kind, shape), n in sorted(found.items())]
    record("collectives", "; ".join(listed))


def _plain(shape):
    return tuple(sorted(n for n in shape if n != 1))


def parts(shape: tuple[int, ...], spec: P, mesh) -> tuple[int, ...]:
    """The shape of one device's part."""
    return NamedSharding(mesh, spec).shard_shape(shape)


def bits_are_sharded(compiled, shards: int, bits: int, record):
    """Asserts that a device holds its part of the side bits, and one integer state at a time."""
    kinds = collections.defaultdict(int)
    for kind, shape in arrays(compiled.as_text()):
        stacked = kind == "u8" and len(shape) == 4
        kind = "packed" if stacked else kind
        kinds[kind] = max(kinds[kind], math.prod(shape))
    state = BATCH * LENGTH * WIDTH // shards
    assert kinds["packed"] == BLOCKS * state * bits // 8, (kinds, state)
    assert max(kinds["u8"], kinds["s32"]) <= state, (kinds, state)
    record("side bytes per device", kinds["packed"])


# ---------------------------------------------------------------------------------------------
# Shardings under jit
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """How parameters and activations lie on a mesh."""

    axes: dict[str, int]
    params: dict[str, P]
    stream: P
    attend: P | None = None
    """What attention reads, where that differs from the stream (explicit mesh axes)."""

    def block(self, explicit: bool):
        """The block, with the shardings that explicit mesh axes want to be told."""
        if not explicit:
            return transformer()
        return transformer(self.attend or self.stream, self.stream, gather="fsdp" in self.axes)

    @property
    def shards(self) -> int:
        """Into how many parts the residual stream is cut."""
        names = [() if a is None else (a,) if isinstance(a, str) else a for a in self.stream]
        return math.prod(self.axes[name] for axis in names for name in axis)

    def floats(self, mesh) -> list[tuple[int, ...]]:
        """What may cross devices: gradients, gathered parameters, tensor-parallel sums."""
        shapes = {name: (BLOCKS, *shape) for name, shape in SHAPES.items()}
        found = [parts(shapes[name], spec, mesh)[1:] for name, spec in self.params.items()]
        if "fsdp" in self.axes:
            found += SHAPES.values()
        if "model" in self.axes:
            stream = (BATCH, LENGTH, WIDTH)
            found += [parts(stream, spec, mesh) for spec in (self.stream, P("data"))]
        return found


DATA = Layout({"data": 8}, REPLICATED, P("data", None, None))
FSDP = Layout({"data": 4, "fsdp": 2}, FULLY_SHARDED, P(("data", "fsdp"), None, None))
TENSOR = Layout({"data": 4, "model": 2}, SPLIT, P("data", None, None))
SEQUENCE = dataclasses.replace(
    TENSOR, stream=P("data", "model", None), attend=P("data", None, None)
)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("layout", "explicit", "dtype", "tolerance_bits"),
    [
        pytest.param(FSDP, False, "float32", 1, id="fully-sharded-auto-r1"),
        pytest.param(
            TENSOR, True, "bfloat16", 1, id="tensor-explicit-bfloat16-r1", marks=pytest.mark.slow
        ),
        # Where nothing is explicit, the partitioner decides what the sequence axis makes travel.
        pytest.param(
            SEQUENCE, True, "float32", 0, id="tensor-and-sequence-explicit", marks=pytest.mark.slow
        ),
    ],
)
def test_under_jit(layout, explicit, dtype, tolerance_bits, record_property):
    """Loss and gradients equal one device's; 0 mismatched; only floats cross devices."""
    mesh = make_mesh(explicit, **layout.axes)
    block = layout.block(explicit)
    params, x, target, key = problem()
    placed = {name: NamedSharding(mesh, spec) for name, spec in layout.params.items()}
    stream, everywhere = NamedSharding(mesh, layout.stream), NamedSharding(mesh, P())
    loss = gradients(loss_of(block, dtype, tolerance_bits=tolerance_bits))
    with jax.set_mesh(mesh):
        probe = bdia_jax.BackwardReport.zeros(BLOCKS)
        params = jax.device_put(params, placed)
        x, target = jax.device_put((x, target), stream)
        out = None if explicit else (everywhere, (placed, stream, everywhere))
        step = jax.jit(loss, out_shardings=out)
        compiled = step.lower(params, x, probe, target, key).compile()
        value = compiled(params, x, probe, target, key)
    agrees(value, one_device(dtype, tolerance_bits), record_property, dtype)
    for name, d in value[1][0].items():
        assert d.sharding.is_equivalent_to(placed[name], d.ndim), (name, d.sharding)
    cut_samples = BATCH // 4 if layout is SEQUENCE else 0
    crosses_only(compiled, layout.floats(mesh), record_property, cut_samples)
    bits_are_sharded(compiled, layout.shards, 1 + tolerance_bits, record_property)


def test_features_whose_bits_cannot_be_shared():
    """Of 8 features, 4 devices share the words of 4 bits each, and not the one word of 1 bit."""
    mesh = jax.make_mesh(
        (4,), ("model",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4]
    )
    params, x = jnp.ones(2), jnp.ones((2, 8))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P(None, "model")))

        def loss(x, m):
            step = bdia_jax.BDIA(2.0**-m, "minus")
            return jnp.sum(
                bdia_jax.reversible_scan(lambda p, x, key: p * x / 9, params, x, step=step)
            )

        assert np.isfinite(jax.jit(jax.grad(loss), static_argnums=1)(x, 4)).all()
        with pytest.raises(
            ValueError, match=r"into 1 words, which 4 devices.*features that 32 div"
        ):
            jax.jit(jax.grad(loss), static_argnums=1)(x, 1)


OTHERS = {
    "a sign per sample": {"gamma": 1 / 16, "signs": "sample"},
    "checkpoints": {"adjoint": bdia_jax.Checkpoint},
    "checkpoints, standard": {"step": bdia_jax.Euler, "adjoint": bdia_jax.Checkpoint},
    "checkpoints of 8 bits": {
        "step": bdia_jax.Euler,
        "adjoint": functools.partial(bdia_jax.Checkpoint, 8),
        "frac_bits": None,
    },
}


@pytest.mark.parametrize("name", fast(1, OTHERS))
def test_steps_and_adjoints(name, record_property):
    """The same for every kind of step and adjoint."""
    mesh = make_mesh(False, **FSDP.axes)
    params, x, target, key = problem()
    probe = bdia_jax.BackwardReport.zeros(BLOCKS)
    program = jax.jit(gradients(loss_of(transformer(), **OTHERS[name])), compiler_options=QUICK)
    reference = jax.device_get(program(params, x, probe, target, key))
    with jax.set_mesh(mesh):
        placed = {leaf: NamedSharding(mesh, spec) for leaf, spec in FSDP.params.items()}
        params = jax.device_put(params, placed)
        x, target = jax.device_put((x, target), NamedSharding(mesh, FSDP.stream))
        agrees(program(params, x, probe, target, key), reference, record_property)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", ["a sign per sample", "checkpoints"])
def test_steps_and_adjoints_under_shard_map(name):
    """Every device, with a key of its own, sees its samples as if there were no others."""
    params, x, target, key = problem()
    probe = bdia_jax.BackwardReport.zeros(BLOCKS)
    loss = loss_of(transformer(), **OTHERS[name])

    def local(x, target):
        d_x, report = jax.grad(loss, (1, 2))(params, x, probe, target, key)
        return d_x, jax.tree.map(lambda r: r[None], report)

    mapped = jax.shard_map(
        local, mesh=make_mesh(False, data=2), in_specs=P("data"), out_specs=P("data")
    )
    d_x, report = jax.jit(mapped, compiler_options=QUICK)(x, target)
    alone = jax.jit(local, compiler_options=QUICK)
    halves = [alone(*half)[0] for half in zip(jnp.split(x, 2), jnp.split(target, 2))]
    assert difference(d_x, [np.concatenate(halves)]) < TOLERANCE["float32"]
    assert not np.any(report.mismatched)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "explicit", "dtype"),
    [
        pytest.param(DATA, True, "float32", id="data-explicit"),
        pytest.param(FSDP, False, "bfloat16", id="fully-sharded-auto-bfloat16"),
        pytest.param(TENSOR, False, "float32", id="tensor-auto"),
        pytest.param(TENSOR, True, "bfloat16", id="tensor-explicit-bfloat16"),
    ],
)
def test_check_reversible(layout, explicit, dtype, record_property):
    """An audit of sharded arrays finds every integer of every block reconstructed."""
    mesh = make_mesh(explicit, **layout.axes)
    params, x, _, key = problem()
    with jax.set_mesh(mesh):
        params = {
            name: jax.device_put(p, NamedSharding(mesh, layout.params[name]))
            for name, p in params.items()
        }
        x = jax.device_put(x, NamedSharding(mesh, layout.stream)).astype(dtype)
        checked = bdia_jax.check_reversible(layout.block(explicit), params, x, key=key)
    record_property("compared", checked.compared)
    assert checked.exact, str(checked)
    assert checked.deviation == 0, str(checked)
    assert checked.compared == BLOCKS * BATCH * LENGTH * WIDTH


# ---------------------------------------------------------------------------------------------
# shard_map
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(
    ("split", "check_vma", "tolerance_bits"),
    [
        pytest.param(False, False, 0, id="data-unchecked"),
        pytest.param(True, True, 1, id="tensor-r1"),
    ],
)
def test_under_shard_map(split, check_vma, tolerance_bits, record_property):
    """Each device draws its own γ and dropout; equal to one device that does so part by part."""
    mesh = make_mesh(False, data=4, model=2)
    axes = ("data",) if split else ("data", "model")
    devices, specs, stream = (4, SPLIT, P("data")) if split else (8, REPLICATED, P(axes))
    options = {"tolerance_bits": tolerance_bits}
    loss = loss_of(transformer(reduce_axis="model" if split else None), **options)

    def local(params, x, probe, target, key):
        key = jax.random.fold_in(key, jax.lax.axis_index(axes))
        if check_vma:
            # JAX knows what differs between devices, and sums gradients where it must.
            return gradients(lambda *args: jax.lax.pmean(loss(*args, target, key), axes))(
                params, x, probe
            )
        value, (d_params, d_x, report) = gradients(loss)(params, x, probe, target, key)
        value, d_params = jax.lax.pmean((value, d_params), axes)
        return value, (d_params, d_x / devices, jax.lax.psum(report, axes))

    params, x, target, key = problem()
    probe = bdia_jax.BackwardReport.zeros(BLOCKS)
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, stream, P(), stream, P()),
        out_specs=(P(), (specs, stream, P())),
        check_vma=check_vma,
    )
    compiled = jax.jit(mapped).lower(params, x, probe, target, key).compile()

    def part_by_part(params, x, probe, target, key):
        loss = loss_of(transformer(), **options)
        x, target = (a.reshape(devices, -1, *a.shape[1:]) for a in (x, target))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(devices))
        losses = jax.lax.map(
            lambda part: loss(params, part[0], probe, *part[1:]), (x, target, keys)
        )
        return losses.mean()

    one_device = jax.jit(gradients(part_by_part), compiler_options=QUICK)
    reference = jax.device_get(one_device(params, x, probe, target, key))
    agrees(compiled(params, x, probe, target, key), reference, record_property)
    floats = [parts((BLOCKS, *shape), specs[name], mesh) for name, shape in SHAPES.items()]
    floats += [shape[1:] for shape in floats] + [(BLOCKS,)]
    if split:
        floats.append((BATCH // 4, LENGTH, WIDTH))
    crosses_only(compiled, floats, record_property)
    bits_are_sharded(compiled, devices, 1 + tolerance_bits, record_property)


# ---------------------------------------------------------------------------------------------
# The Flax stack
# ---------------------------------------------------------------------------------------------


@functools.cache
def flax_stack():
    """Loss of a :class:`ReversibleStack` of library blocks, its variables, and the reference."""

    def make_block(rngs):
        attention = functools.partial(SelfAttention, WIDTH, HEADS, HEAD_DIM, dropout=0.1)
        return TransformerBlock(WIDTH, attention, hidden=HIDDEN, dropout=0.1, rngs=rngs)

    step = bdia_jax.BDIA(frac_bits=FRAC_BITS)
    stack = ReversibleStack(make_block, BLOCKS, step=step, rngs=nnx.Rngs(0))
    graph, params, probe, rest = nnx.split(stack, nnx.Param, Probe, ...)

    def loss(params, x, probe, target, key):
        y = nnx.merge(graph, params, probe, rest)(x, key=key)
        return jnp.mean((y - target) ** 2)

    _, x, target, key = problem()
    one_device = jax.jit(gradients(loss), compiler_options=QUICK)
    reference = one_device(params, x, probe, target, key)
    return loss, jax.device_get((params, probe)), jax.device_get(reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("explicit", "fully_sharded"),
    [pytest.param(True, False, id="data-explicit"), pytest.param(False, True, id="fully-sharded")],
)
def test_flax_stack(explicit, fully_sharded, record_property):
    """The Flax stack of library blocks, as any other block."""
    loss, (params, probe), reference = flax_stack()
    _, x, target, key = problem()
    mesh = make_mesh(explicit, **(FSDP if fully_sharded else DATA).axes)
    stream = NamedSharding(mesh, P(tuple(mesh.axis_names)))
    placed = jax.tree.map(
        lambda p: NamedSharding(mesh, P(None, "fsdp") if fully_sharded and p.ndim > 1 else P()),
        params,
    )
    with jax.set_mesh(mesh):
        params = jax.device_put(params, placed)
        x, target = jax.device_put((x, target), stream)
        out = None if explicit else (None, (placed, stream, None))
        step = jax.jit(gradients(loss), out_shardings=out)
        compiled = step.lower(params, x, probe, target, key).compile()
        value, (d_params, d_x, d_probe) = compiled(params, x, probe, target, key)
    report = d_probe["probe"].get_value()
    agrees((value, (d_params, d_x, report)), reference, record_property)
    floats = [p.shape[1:] for p in jax.tree.leaves(params)]
    # The projections of attention are used, and their gradients summed, with heads split off.
    floats += [(WIDTH, HEADS, HEAD_DIM), (WIDTH, 3, HEADS, HEAD_DIM)]
    if fully_sharded:
        halves = [
            (*shape[:i], n // 2, *shape[i + 1 :])
            for shape in floats
            for i, n in enumerate(shape)
            if n > 1
        ]
        floats += halves
    crosses_only(compiled, floats, record_property)
    bits_are_sharded(compiled, 8, 1, record_property)


# ---------------------------------------------------------------------------------------------
# A training step, whose shardings a partitioner works out
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.buffers
@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ("data=8", {}),
        ("fsdp=8", {}),
        ("data=2,fsdp=4", {"update_in_backward": True, "optimizer": "adafactor"}),
        ("fsdp=8", {"accumulate": 3}),
    ],
    ids=str,
)
def test_a_training_step_sends_weights_and_their_gradients(mesh, changes, record_property):
    """Block by block; no state, no bit and no logits, which all have an axis of 24, 10 or 7."""
    config = DecoderConfig(
        vocab_size=48,
        max_length=16,
        width=32,
        depth=7,
        heads=4,
        hidden=64,
        dropout=0.1,
        signs="sample",
        parts_as_steps=True,
    )
    text = np.arange(400, dtype=np.int32) % 48
    task = LanguageModelling(TextData("numbers", text, text[:100], 48), 10)
    settings = TrainSettings(batch_size=24 * changes.get("accumulate", 1), mesh=mesh, **changes)
    programs = Programs(Decoder(config, rngs=nnx.Rngs(0)), task, settings)
    state, report = programs.step(programs.first_state(Decoder(config, rngs=nnx.Rngs(0))))
    assert state.step == 1
    assert not any(stack.mismatched.any() for stack in report.backward.values())
    compiled = programs.compiled_step()
    # Once a step, for the embedding: tokens, and what is added to their rows.
    looked_up = {("all-gather", "s32", (24, 10, 1)), ("all-to-all", "f32", (3, 10, 1, 4))}
    for name, kind, shape in collectives(compiled).keys() - looked_up:
        of_samples = {24, 10, 240, 3, 30, 7} & {*shape}
        assert math.prod(shape) <= 24 or not of_samples, f"{name} of {kind}{list(shape)}"
        assert len(shape) <= 2, f"{name} of {kind}{list(shape)}: of more than one block"
    record_property("collectives", str(collectives(compiled)))


def in_chunks(mesh, devices=None):
    """A compiled training step whose gradients are sums over chunks."""
    config = DecoderConfig(
        vocab_size=96,
        max_length=40,
        width=32,
        depth=7,
        heads=4,
        hidden=64,
        attention="chunked",
        ffn_chunk=8,
        dtype="bfloat16",
        param_dtype="bfloat16",
    )
    text = np.arange(400, dtype=np.int32) % 96
    task = LanguageModelling(TextData("numbers", text, text[:100], 96), 40)

    class InChunks(Decoder):
        def loss(self, *arguments, **options):
            return super().loss(*arguments, **options, chunk=8)

    model = nnx.eval_shape(lambda: InChunks(config, rngs=nnx.Rngs(0)))
    settings = TrainSettings(batch_size=8, mesh=mesh)
    return Programs(model, task, settings, devices=devices).compiled_step(
        QUICK if devices is None else None
    )


@pytest.mark.parametrize("mesh", ["fsdp=8", pytest.param("data=2,fsdp=4", marks=pytest.mark.slow)])
def test_every_device_has_its_own_sums_over_chunks(mesh):
    """And not an eighth of all devices' sums, to which they would send theirs chunk by chunk."""
    sums = set()
    for line in in_chunks(mesh).as_text().replace("/*index=", "/*").splitlines():
        loop = re.search(r"= (\(.*?\)) while\(", line)
        if loop and '"known_trip_count":{"n":"5"}' in line:
            sums |= {shape for kind, shape in arrays(loop[1]) if kind == "f32" and len(shape) == 2}
    assert sums == {(96, 32), (32, 32), (32, 64), (64, 32)}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2,fsdp=4"])
def test_gpus_add_up_their_sums_after_the_loop(mesh):
    """Those of a block once a block; those of the loss once."""
    try:
        devices = targets.devices("h100:8")
    except ImportError as error:
        pytest.skip(str(error))
    name, loops, most = "", collections.defaultdict(list), collections.Counter()
    for line in in_chunks(mesh, devices).as_text().replace("/*index=", "/*").splitlines():
        if heading := re.match(r"(?:ENTRY )?(%[\w.-]+) \(.*{$", line):
            name = heading[1]
        elif loop := re.search(r" while\(.*body=(%[\w.-]+)", line):
            loops[name].append(loop[1])
        elif (match := COLLECTIVE.search(line)) and "reduce" in match["name"]:
            size = max(math.prod(shape) for _, shape in arrays(match["types"]))
            most[name] = max(most[name], size)
    # The last computation is the program.
    inner = [body for outer in loops[name] for body in loops[outer]]
    assert len(inner) >= 4, loops
    assert not any(most[body] for body in inner), most
    assert max(most[body] for body in loops[name]) >= 32 * 64, most
    assert most[name] >= 96 * 32, most


@pytest.mark.buffers
def test_an_evaluation_is_split_over_the_devices():
    """Nobody asks for a batch's sharding there: by itself every device would compute all of it."""
    config = DecoderConfig(vocab_size=48, max_length=16, width=32, depth=2, heads=4, hidden=256)
    text = np.arange(400, dtype=np.int32) % 48
    task = LanguageModelling(TextData("numbers", text, text, 48), 16)
    needed = {}
    for mesh in (None, "data=8"):
        settings = TrainSettings(batch_size=24, mesh=mesh)
        programs = Programs(Decoder(config, rngs=nnx.Rngs(0)), task, settings)
        compiled = programs.compiled_evaluation()
        needed[mesh] = compiled.memory_analysis().temp_size_in_bytes
    assert needed["data=8"] < needed[None] / 3, needed


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.buffers
@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_temporaries_per_device(explicit, record_property):
    """Peak temporaries per device fall as 1/devices, but for the gradients of the parameters.

    Every device holds the gradients of all replicated parameters, and of one block's once more.
    A tenth on top: buffers are padded, and a compiler lays out each program for itself.
    """
    found = {}
    for devices in (1, 8):
        mesh = make_mesh(explicit, data=devices)
        with jax.set_mesh(mesh):

            def array(shape, spec, mesh=mesh):
                sharding = NamedSharding(mesh, spec)
                return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

            x = array((64, 64, WIDTH), DATA.stream)
            params = {name: array((BLOCKS, *shape), P()) for name, shape in SHAPES.items()}
            probe, key = bdia_jax.BackwardReport.zeros(BLOCKS), jax.random.key(0)
            step = jax.jit(gradients(loss_of(DATA.block(explicit))))
            compiled = step.lower(params, x, probe, x, key).compile(QUICK)
        found[devices] = compiled.memory_analysis().temp_size_in_bytes
        record_property(f"temporary bytes per device, {devices} devices", found[devices])
    fixed = 4 * sum(map(math.prod, SHAPES.values())) * (BLOCKS + 1)
    assert found[8] < 1.1 * found[1] / 8 + fixed, (found, fixed)


@pytest.mark.parametrize("check_vma", [True, False])
def test_layers_with_derivatives_of_their_own_under_shard_map(check_vma):
    """Chunks, attention, logits and their loss: gradients are summed over devices."""
    graph, params, rest = nnx.split(FeedForward(8, 16, rngs=nnx.Rngs(0)), nnx.Param, ...)
    keys = jax.random.split(jax.random.key(0), 2)
    x, matrix = jax.random.normal(keys[0], (8, 4, 8)), jax.random.normal(keys[1], (11, 8))
    targets = jnp.arange(32, dtype=jnp.int32).reshape(8, 4) % 11

    def loss(params, matrix, x, targets):
        y = by_chunks(nnx.merge(graph, params, rest), x, size=3)
        # Memory that all devices have, of the same values.
        memory = jnp.broadcast_to(matrix[:, None], (len(x), 11, 1, 8))
        y += chunked_attention(y[:, :, None], memory, memory, chunk=4)[:, :, 0]
        return cross_entropy(y, matrix, targets).loss + jnp.sum(jnp.sin(logits(y, matrix)))

    def gradient(params, matrix, x, targets):
        if check_vma:
            whole = lambda *some: jax.lax.psum(loss(*some, x, targets), "data")  # noqa: E731
            return jax.grad(whole, (0, 1))(params, matrix)
        return jax.lax.psum(jax.grad(loss, (0, 1))(params, matrix, x, targets), "data")

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    of_devices = jax.shard_map(
        gradient,
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    found = jax.jit(of_devices)(params, matrix, x, targets)
    expected = jax.jit(jax.grad(loss, (0, 1)))(params, matrix, x, targets)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
