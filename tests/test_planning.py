"""Plans: what a training step needs in every way to train, on devices that need not be there."""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import unittest.mock

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bdia_jax import BDIA, Online, interop, online, reversible_scan
from bdia_jax.arguments import prepare
from bdia_jax.data.text import TextData
from bdia_jax.nn import Decoder, DecoderConfig, llama
from bdia_jax.nn.attention import kernels
from bdia_jax.nn.gamma import reversible_stacks
from bdia_jax.planning import command, memory, plan, shapes, targets
from bdia_jax.planning.ways import WAYS
from bdia_jax.train import LanguageModelling, TrainSettings, evaluation_memory, step_memory

TINY = DecoderConfig(vocab_size=50, max_length=8, width=16, depth=3, heads=2)


@pytest.mark.slow
def test_a_plan_is_of_the_real_training_step():
    config = dataclasses.replace(TINY, gamma=1 / 8, signs="sample", tolerance_bits=1)
    whole, parts, checkpointed = plan.plan(
        config, 4, 8, ways=["BDIA", "BDIA, parts", "checkpointed, updated in backward"]
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    real = step_memory(model, task(), TrainSettings(batch_size=4))
    assert whole.total == real.memory.total
    evaluation = evaluation_memory(model, task(), TrainSettings(batch_size=4))
    assert whole.evaluation == evaluation.total + real.optimizer
    weights = sum(p.nbytes for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert whole.parameters == whole.gradients == weights
    # Two moments, and counts of steps.
    assert 2 * weights <= whole.optimizer <= 2 * weights + 16
    # 3 blocks, 4 × 8 positions of 16 features; checksums of 4 samples. 4 bits are packed into
    # bytes.
    assert whole.side == 3 * (4 * 8 * 16 * 4 // 8 + 4 * 4)
    assert parts.side == 2 * whole.side
    assert checkpointed.side == 0
    assert 0 < checkpointed.gradients < weights


def task():
    text = TextData("nothing", np.zeros(10, np.int32), np.zeros(33, np.int32), 50)
    return LanguageModelling(text, 8)


def test_what_is_kept_is_what_the_plan_says():
    """The side information and checksums of a backward pass, as they come out of a scan up."""
    config = dataclasses.replace(TINY, gamma=1 / 8, parts_as_steps=True)
    stack = Decoder(config, rngs=nnx.Rngs(0)).blocks
    block, params = stack.functional()
    x, key = jnp.ones((4, 8, 16)), jax.random.key(0)
    scan, inputs = prepare(block, params, (x, x), 0, key, (None, None), stack.step, stack.adjoint)
    wanted = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating), inputs)
    kept = jax.eval_shape(lambda: online.up(scan, inputs, wanted)[1].kept)
    found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    assert plan.side_information(stack, 4, 8, 16) == found


def test_every_way_is_one_network_with_its_settings():
    for name, way in WAYS.items():
        config = way.config(TINY, 8)
        assert config.step() == way.step, name
        model = nnx.eval_shape(lambda c=config, w=way: made(c, w))
        (stack,) = reversible_stacks(model)
        assert (stack is model.blocks) == (way.by is None)
        assert stack.step == way.step, name
        assert stack.adjoint == way.adjoint, name
        assert (stack.parts is not None) == way.settings.get("parts_as_steps", False)
        assert config.ffn_chunk == (2 if way.chunks else None)


def made(config, way):
    model = Decoder(config, rngs=nnx.Rngs(0))
    way.install(model)
    return model


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("device", "needs"), [("v5e:2x2", "libtpu"), ("rtx-4090:4", "jax_cuda13_plugin")]
)
def test_a_plan_for_devices_that_are_not_there(device, needs):
    pytest.importorskip(needs, reason=f"to compile for {device} needs {needs}")
    (one,) = plan.plan(TINY, 4, 8, ways=["BDIA"], device=device)
    (each,) = plan.plan(TINY, 4, 8, ways=["BDIA"], device=device, mesh="fsdp=4")
    assert each.parameters < one.parameters == plan.plan(TINY, 4, 8, ways=["BDIA"])[0].parameters
    assert one.temporaries > 0
    assert one.total >= one.parameters + one.optimizer + one.temporaries
    with pytest.raises(ValueError, match="there are 4"):
        plan.plan(TINY, 4, 8, device=device, mesh="fsdp=2")


@pytest.mark.slow
@pytest.mark.optimized
def test_parts_are_not_alive_at_once_on_a_gpu_that_is_not_there():
    """A CPU's compiler takes one part after the other by itself; a GPU's only if it is made to."""
    pytest.importorskip("jax_cuda13_plugin", reason="to compile for a GPU needs jax[cuda]")
    config = DecoderConfig(
        vocab_size=1000, max_length=512, width=256, depth=6, heads=4, dtype="bfloat16"
    )
    whole, parts = plan.plan(config, 8, 512, ways=["BDIA", "BDIA, parts"], device="h100")
    # The hidden layer of the feed-forward network is not there beside what attention keeps.
    hidden = 8 * 512 * (4 * 256) * 2
    assert whole.temporaries - parts.temporaries > hidden


@pytest.mark.optimized
@pytest.mark.parametrize(("narrow", "held"), [(False, 16), (True, 12)])
def test_what_the_pass_down_holds_on_a_gpu_that_is_not_there(narrow, held):
    """Two states and two cotangents, each in its place; beside them, what the block needs."""
    pytest.importorskip("jax_cuda13_plugin", reason="to compile for a GPU needs jax[cuda]")
    (device,) = targets.devices("rtx-4090")
    placed = functools.partial(
        jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    adjoint = Online(keep_in="host", narrow_cotangents=narrow)

    def block(params, x, key):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    def loss(params, x):
        y = reversible_scan(block, params, x, step=BDIA(1 / 16, "minus"), adjoint=adjoint)
        return jnp.mean(y.astype(jnp.float32) ** 2)

    kernels = placed((8, 256, 256), jnp.bfloat16)
    x = placed((4, 1024, 256), jnp.bfloat16)
    needed = memory.temporaries(jax.grad(loss), {"a": kernels, "b": kernels}, x)
    # Of the block: x, tanh, its derivative, and the cotangents of h and of tanh, in bfloat16.
    of_block = 5 * 2
    assert needed < (held + of_block + 0.5) * x.size


def test_gpus_that_are_not_there_need_no_setting():
    """Where there is no GPU, JAX leaves its CUDA packages aside once it has looked for one."""
    pytest.importorskip("jax_cuda13_plugin", reason="to compile for a GPU needs jax[cuda]")
    if any(map(os.path.exists, targets.DRIVERS)):
        pytest.skip("there is a GPU")
    late = (
        "from bdia_jax.planning import targets\nimport jax\n{}print(len(targets.devices('h100:2')))"
    )
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}

    def run(first):
        command = [sys.executable, "-c", late.format(first)]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    assert run("").stdout.split() == ["2"]
    assert "set JAX_PLATFORMS=cpu" in run("jax.devices()\n").stderr


def test_a_plan_for_devices_that_nobody_knows(monkeypatch):
    with pytest.raises(ValueError, match=r"number of GPUs must be an int >= 1.*got 'h100:2x2'"):
        targets.devices("h100:2x2")
    if importlib.util.find_spec("libtpu"):
        with pytest.raises(ValueError, match=r"'v0:2x2' is none of the GPUs h100.*no such TPU"):
            targets.devices("v0:2x2")
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ImportError, match=r"none of the GPUs.*pip install libtpu"):
        plan.plan(TINY, 4, 8, device="v5e:2x2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "bdia_jax\[cuda\]"'):
        plan.plan(TINY, 4, 8, device="h100")


@pytest.mark.slow
def test_a_large_evaluation_decides_what_fits():
    """A batch of 64 has more logits than a step of one sequence has of everything."""
    config = dataclasses.replace(TINY, vocab_size=5000)
    small, large = (
        plan.plan(config, 1, 8, ways=["BDIA"], optimizer="sgd", eval_batch=size)[0]
        for size in (None, 64)
    )
    assert small.run == small.total == large.total
    assert large.run == large.evaluation > large.total
    limit = (large.total + large.evaluation) // 2
    assert plan.largest_batch(config, 8, limit, "BDIA", optimizer="sgd", eval_batch=64) == 0


@pytest.mark.slow
def test_the_command_plans(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    given = command.Plan(
        model="tiny",
        batch=2,
        length=8,
        lora=(2,),
        gamma=1 / 16,
        signs="sample",
        ways=("BDIA", "BDIA, updated in backward"),
        figure=tmp_path / "plan.png",
        dtype="float32",
        fit="0.001MB",
    )
    (need,) = command.main(given)
    # 4 bits; low-rank updates have no gradients of weights to spare.
    assert need.side == 3 * (2 * 8 * 16 * 4 // 8 + 2 * 4)
    assert 0 < need.parameters < need.frozen
    out = capsys.readouterr().out
    assert "GB; no sequences of 8 tokens fit in 0.001MB; not one short sequence" in out
    assert "left out: BDIA, updated in backward" in out
    assert "| BDIA, LoRA 2 |" in out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_bisection():
    for most in (0, 1, 2, 3, 7, 8, 100):
        fits = unittest.mock.Mock(side_effect=most.__ge__)
        assert memory.largest(fits) == most
        assert fits.call_count <= 2 * most.bit_length() + 2
    assert memory.largest(lambda n: True, limit=100) == 100


@hypothesis.given(st.integers(1, 500), st.floats(0, 50), st.integers(0, 99), st.floats(0, 3000))
def test_largest_by_line(most, slope, seed, limit):
    """Of sizes that grow, by whatever steps; of a line, by few trials."""
    steps = np.random.default_rng(seed).exponential(size=500) ** 3
    sizes = [slope * i + s for i, s in enumerate(np.cumsum(steps))]
    expected = sum(size <= limit for size in sizes[:most])
    assert memory.largest_by_line(lambda n: sizes[n - 1], limit, most) == expected
    line = unittest.mock.Mock(side_effect=lambda n: 7 + 2.5 * n)
    found = memory.largest_by_line(line, 7 + 2.5 * (expected + 0.5), most)
    assert found == expected
    assert line.call_count <= 5


@pytest.mark.slow
def test_the_longest_sequence_and_the_largest_batch(monkeypatch):
    """In steps of 128 tokens where sequences may be long; with a mesh, of all its devices."""

    def planned(config, batch, length, *, ways, mesh=None):
        assert ways == ["BDIA"]
        per_device = batch // (4 if mesh else 1)
        return [unittest.mock.Mock(run=1000 + 10 * per_device * length)]

    monkeypatch.setattr(plan, "plan", planned)
    short, long = (dataclasses.replace(TINY, max_length=n) for n in (40, 5000))
    assert plan.longest(short, 1245, "BDIA") == 24
    assert plan.longest(short, 10**6, "BDIA") == 40
    assert plan.longest(short, 1000, "BDIA") == 0
    assert plan.longest(long, 1000 + 10 * 400, "BDIA") == 3 * 128
    assert plan.longest(long, 1000 + 10 * 400, "BDIA", mesh="data=2,fsdp=2") == 3 * 128
    assert plan.largest_batch(short, 8, 1000 + 10 * 8 * 5, "BDIA") == 5
    assert plan.largest_batch(short, 8, 1000 + 10 * 8 * 5, "BDIA", mesh="data=2,fsdp=2") == 20


def test_plans_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"ways must be of standard;.*got magic"):
        plan.plan(TINY, 1, 8, ways=["magic"])
    with pytest.raises(ValueError, match=r"ways must be of standard;.*got magic"):
        command.Plan(ways=("magic",))
    with pytest.raises(ValueError, match=r"length must lie in \[1, 8\].*got 9 and 1"):
        plan.plan(TINY, 1, 9)
    for text in ("much", "0GiB", "24", "-1GB"):
        with pytest.raises(ValueError, match="a number above 0 with MB, GB, MiB or GiB; got"):
            command.Plan(fit=text)
    assert command.parse_size("1.5 GiB") == command.parse_size("1.5gi") == 3 * 2**29
    for path in ("plan.xyz", tmp_path / "no" / "plan.png"):
        with pytest.raises(ValueError, match=r"a figure must be a \.png in a folder"):
            command.Plan(figure=pathlib.Path(path))
    for options in (
        {"lora": (0,), "quantize": "nf4"},
        {"lora": (8,), "ways": ("BDIA, updated in backward",)},
        {"lora": (0,), "ways": ("BDIA, updated in backward",), "accumulate": 2},
    ):
        with pytest.raises(ValueError, match=r"nothing is left to plan: .*; got lora = "):
            command.main(command.Plan(model="gpt2", **options))
    for mesh, message in (("data=0", "must be 1 or more"), ("data=x", "must look like")):
        with pytest.raises(ValueError, match=message):
            command.main(command.Plan(model="gpt2", mesh=mesh))
    with pytest.raises(FileNotFoundError, match="known by name are gpt2, gpt2-medium, llama-1b"):
        command.Plan(model="./llama-3b").config()
    # Before anything is compiled, also of another rank.
    with (
        unittest.mock.patch.object(command, "plan", side_effect=AssertionError),
        pytest.raises(ValueError, match="rank must lie in"),
    ):
        command.main(command.Plan(model="gpt2", lora=(8, 10_000), ways=("BDIA",)))
    with pytest.raises(ValueError, match=r"rank must lie in \[1, 16\]"):
        plan.plan(TINY, 1, 8, lora=99, ways=["BDIA"])
    with pytest.raises(ValueError, match="eval_batch_size"):
        plan.plan(TINY, 1, 8, eval_batch=0, ways=["BDIA"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type must be one of gpt2"):
        command.Plan(model=str(tmp_path)).config()


def test_weights_are_kept_as_a_run_keeps_them(tmp_path):
    """Frozen ones of a folder in bfloat16 stay so; those that are trained are float32."""
    written = interop.families.write(llama(vocab_size=50, width=16, depth=3, heads=2)) | {
        "dtype": "bfloat16"
    }
    (tmp_path / "config.json").write_text(json.dumps(written))
    given = command.Plan(model=str(tmp_path))
    assert [given.config(rank).param_dtype for rank in (0, 8)] == ["float32", "bfloat16"]
    assert command.Plan(model="gpt2").config(8).param_dtype == "float32"
    given = dataclasses.replace(given, param_dtype="float32")
    assert given.config(8).param_dtype == "float32"


def test_of_long_packed_sequences_there_is_no_mask():
    """Which would be a matrix: cuDNN takes no other."""
    common = jnp.bfloat16, 64, (4096,), 0.0, None
    assert kernels.fusible(*common)
    assert not kernels.fusible(*common, masked=True)
    assert kernels.fusible(jnp.bfloat16, 64, (kernels.MASKED,), 0.0, None, masked=True)


@pytest.mark.slow
def test_packed_and_accumulated():
    """The task that a run of finetune.py has; and the float32 sum of gradients."""
    config = dataclasses.replace(TINY, max_length=64, param_dtype="bfloat16")
    alone, packed, accumulated = (
        plan.plan(config, batch, 64, ways=["BDIA"], **options)[0]
        for batch, options in (
            (2, {}),
            (2, {"packed": True}),
            (8, {"packed": True, "accumulate": 4}),
        )
    )
    assert packed.temporaries > alone.temporaries
    assert accumulated.side == packed.side
    weights = packed.parameters // 2
    # A sum in float32 in place of a gradient in bfloat16; with what the loop over parts holds.
    assert 2 * weights < accumulated.temporaries - packed.temporaries < 7 * weights


def test_programs_that_a_compiler_refuses(monkeypatch, capsys):
    """A TPU's, where they do not fit: the others are planned, and a search goes on."""

    def planned(config, batch, length, **options):
        if batch * length > 40:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 64G exceeds 16G")
        return [unittest.mock.Mock(run=10 * batch * length)]

    monkeypatch.setattr(plan, "plan", planned)
    assert plan.longest(TINY, 10**6, "BDIA") == TINY.max_length
    assert plan.largest_batch(TINY, 8, 10**6, "BDIA") == 5
    monkeypatch.setattr(command, "plan", planned)
    assert command.main(command.Plan(model="gpt2", lora=(0,), ways=("BDIA",))) == []
    assert "BDIA: does not fit: RESOURCE_EXHAUSTED: 64G exceeds 16G" in capsys.readouterr().out


def test_ways_that_were_asked_for_are_not_left_out():
    parallel = DecoderConfig(vocab_size=9, parallel=True)
    assert not any("parts" in way for way in plan.customary(parallel))
    assert plan.customary(DecoderConfig(vocab_size=9)) == plan.CUSTOMARY
    with pytest.raises(ValueError, match="no parts"):
        plan.plan(parallel, 1, 8, ways=["BDIA, parts"])
