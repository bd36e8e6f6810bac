"""The optimizer in the backward pass; what a training step will need, and a plan of it."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bdia_jax
from bdia_jax.data import TextData
from bdia_jax.nn import Decoder, DecoderConfig
from bdia_jax.planning import memory, plan, targets
from bdia_jax.train import LanguageModelling, TrainSettings, step_memory, train

KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 50, 600).astype(np.int32)
TASK = LanguageModelling(TextData("random", TOKENS, TOKENS[:100], 50), 8)
TINY = DecoderConfig(vocab_size=50, max_length=8, width=16, depth=3, heads=2, dropout=0.1)
FEW = TrainSettings(
    steps=4,
    batch_size=4,
    learning_rate=1e-2,
    clip_norm=None,
    log_every=1,
    eval_every=4,
    checkpoint_every=2,
)


# ---------------------------------------------------------------------------------------------
# The core
# ---------------------------------------------------------------------------------------------


def block(params, x, key):
    z = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-5)
    return jnp.tanh(z @ params["up"]) @ params["down"] * params["mask"]


def stacked(blocks, width, hidden):
    up, down = jax.random.split(KEY)
    return {
        "up": 0.1 * jax.random.normal(up, (blocks, width, hidden)),
        "down": 0.1 * jax.random.normal(down, (blocks, hidden, width)),
        "mask": jnp.ones((blocks, width), jnp.int32),
    }


def momentum(params, grads, state):
    state = jax.tree.map(lambda m, d: 0.9 * m + d, state, grads)
    return jax.tree.map(lambda p, m: p - 0.1 * m, params, state), state


def loss(params, fixed, x, key, update=None):
    y = bdia_jax.reversible_scan(block, params | fixed, x, key=key, update=update)
    return jnp.mean(y**2)


def split_off(params):
    return {name: params.pop(name) for name in ("up", "down")}, params


def ordinary(params, state, fixed, x):
    grads = jax.grad(loss)(params, fixed, x, KEY)
    return momentum(params, grads, state)


def in_backward(params, state, fixed, x):
    def updated(params, state):
        return loss(params, fixed, x, KEY, bdia_jax.Update(function, state))

    def function(params, grads, state):
        assert params["mask"] is None
        params.pop("mask"), grads.pop("mask")
        params, state = momentum(params, grads, state)
        return params | {"mask": None}, state

    return jax.grad(updated, argnums=(0, 1))(params, state)


def test_a_step_in_the_backward_pass_is_the_ordinary_one():
    params, fixed = split_off(stacked(5, 16, 32))
    state = jax.tree.map(jnp.ones_like, params)
    x = jax.random.normal(KEY, (3, 4, 16))
    expected = jax.jit(ordinary)(params, state, fixed, x)
    found = jax.jit(in_backward)(params, state, fixed, x)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


def test_no_gradient_of_all_blocks_and_no_copy_of_them():
    """Beside side bits and checksums, temporaries do not grow with the number of blocks."""
    found = {}
    for blocks in (8, 24):
        shapes = jax.eval_shape(lambda blocks=blocks: stacked(blocks, 64, 256))
        params, fixed = split_off(shapes)
        x = jax.ShapeDtypeStruct((2, 4, 64), jnp.float32)
        for step in (ordinary, in_backward):
            needed = memory.measure(step, params, params, fixed, x, donate=(0, 1))
            assert needed.results < 1000
            found[step, blocks] = needed.temporaries
    one_block, side = 4 * 2 * 64 * 256, 2 * 4 * 64 // 8 + 2 * 4
    grown = {step: (found[step, 24] - found[step, 8]) / 16 for step in (ordinary, in_backward)}
    assert grown[ordinary] > one_block
    # What a loop keeps beside (numbers of blocks, keys, reports) is some words per block.
    assert grown[in_backward] < side + 64


def test_updates_that_cannot_be():
    params, fixed = split_off(stacked(3, 8, 8))
    x = jnp.ones((1, 2, 8))
    short = bdia_jax.Update(momentum, {"m": jnp.ones((2, 8))})
    with pytest.raises(ValueError, match=r"leading axis of 3 blocks.*\(2, 8\)"):
        loss(params, fixed, x, KEY, short)
    whole = bdia_jax.Update(momentum, {"m": jnp.ones(3, jnp.int32)})
    with pytest.raises(TypeError, match=r"must be a floating-point array.*int32"):
        loss(params, fixed, x, KEY, whole)
    with pytest.raises(ValueError, match="update is for online back-propagation"):
        bdia_jax.reversible_scan(
            block,
            params | fixed,
            x,
            key=KEY,
            backprop="stored",
            update=bdia_jax.Update(momentum, {}),
        )
    wrong = bdia_jax.Update(lambda p, d, s: (p, jnp.float32(0)), jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"of the shapes and dtypes that it was given"):
        jax.grad(lambda p: loss(p, fixed, x, KEY, wrong))(params)


# ---------------------------------------------------------------------------------------------
# In training
# ---------------------------------------------------------------------------------------------


def trained(folder, **changes):
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    result = train(model, TASK, dataclasses.replace(FEW, **changes), folder, progress=False)
    return nnx.state(model, nnx.Param), result


def test_training_is_the_same_to_the_bit(tmp_path):
    expected, _ = trained(tmp_path / "a", optimizer="adamw", weight_decay=0.1)
    found, result = trained(
        tmp_path / "b", optimizer="adamw", weight_decay=0.1, update_in_backward=True
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    assert all(r["mismatched"] == 0 for r in result.history if r["split"] == "train")


@pytest.mark.parametrize("clip_by", ["previous", "second-pass"])
def test_clipping_and_resuming(tmp_path, clip_by):
    """By this step's norm, as ordinarily; by the previous one's, as by hand; and cut in two."""
    options = {"optimizer": "sgd", "update_in_backward": True, "clip_norm": 0.3, "clip_by": clip_by}
    found, result = trained(tmp_path / "a", **options)
    norms = [r["grad_norm"] for r in result.history if r["split"] == "train"]
    assert min(norms) > 0.3
    if clip_by == "second-pass":
        expected, _ = trained(tmp_path / "b", optimizer="sgd", clip_norm=0.3)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
        return
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    settings = dataclasses.replace(FEW, **options)
    train(model, TASK, dataclasses.replace(settings, stop_at=2), tmp_path / "c", progress=False)
    train(model, TASK, settings, tmp_path / "c", resume=True, progress=False)
    again = nnx.state(model, nnx.Param)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, again))


def test_settings_that_exclude_it(tmp_path):
    with pytest.raises(ValueError, match="cannot accumulate: allowed is accumulate=1; got 2"):
        dataclasses.replace(FEW, update_in_backward=True, accumulate=2)
    with pytest.raises(ValueError, match="clip_by must be previous or second-pass; got 'never'"):
        dataclasses.replace(FEW, clip_by="never")
    model = Decoder(dataclasses.replace(TINY, method="standard"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="needs reversible blocks"):
        train(model, TASK, dataclasses.replace(FEW, update_in_backward=True), tmp_path / "run")


# ---------------------------------------------------------------------------------------------
# What will be needed
# ---------------------------------------------------------------------------------------------


def test_a_plan_is_of_the_real_training_step(monkeypatch):
    needs = plan.plan(TINY, 4, 8, methods=["BDIA"])
    model = Decoder(dataclasses.replace(TINY, method="bdia"), rngs=nnx.Rngs(0))
    text = TextData("nothing", *(np.zeros(10, np.int32),) * 2, 50)
    task = LanguageModelling(text, 8)
    real = step_memory(model, task, TrainSettings(batch_size=4))
    assert needs[0].total == real.memory.total
    weights = sum(p.nbytes for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert needs[0].parameters == needs[0].gradients == weights
    # Two moments, and counts of steps.
    assert 2 * weights <= needs[0].optimizer <= 2 * weights + 16
    # 3 blocks, 4 × 8 positions of 16 features, a bit each; a checksum of 4 samples.
    assert needs[0].side == 3 * (4 * 8 * 16 // 8 + 4 * 4)


@pytest.mark.parametrize(
    ("device", "needs"), [("v5e:2x2", "libtpu"), ("rtx-4090:4", "jax_cuda13_plugin")]
)
def test_a_plan_for_devices_that_are_not_there(device, needs):
    pytest.importorskip(needs, reason=f"to compile for {device} needs {needs}")
    (one,) = plan.plan(TINY, 4, 8, methods=["BDIA"], device=device)
    (each,) = plan.plan(TINY, 4, 8, methods=["BDIA"], device=device, mesh="fsdp=4")
    assert each.parameters < one.parameters == plan.plan(TINY, 4, 8, methods=["BDIA"])[0].parameters
    assert one.temporaries > one.gradients
    with pytest.raises(ValueError, match="there are 4"):
        plan.plan(TINY, 4, 8, device=device, mesh="fsdp=2")


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


@pytest.mark.usefixtures("quick_compiles")
def test_the_command_plans(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(plan.EXAMPLES, "tiny", TINY)
    monkeypatch.setattr(plan, "METHODS", {"BDIA": {"method": "bdia"}})
    given = plan.Plan(
        model="tiny",
        batch=2,
        length=8,
        lora=(2,),
        figure=tmp_path / "plan.png",
        dtype="float32",
        fit="0.001MB",
    )
    (need,) = plan.main(given)
    assert 0 < need.parameters < need.frozen
    out = capsys.readouterr().out
    assert "BDIA, LoRA 2: no sequences of 8 tokens fit in 0.001MB" in out
    assert "| BDIA, LoRA 2 |" in out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_bisection():
    for most in (0, 1, 2, 3, 7, 8, 100):
        fits = unittest.mock.Mock(side_effect=most.__ge__)
        assert memory.largest(fits) == most
        assert fits.call_count <= 2 * most.bit_length() + 2
    assert memory.largest(lambda n: True, limit=100) == 100


@pytest.mark.usefixtures("quick_compiles")
def test_as_many_blocks_are_stored_as_fit(monkeypatch):
    planned = plan.plan

    @functools.cache
    def need(config):
        return planned(config, 4, 8, methods=["BDIA"])

    def total(stored):
        return need(dataclasses.replace(TINY, stored_blocks=stored))[0].total

    # A compilation for each number is enough.
    monkeypatch.setattr(plan, "plan", lambda config, *_, **__: need(config))
    none, two = total(0), total(2)
    assert none < two
    options = TINY, 4, 8
    most = plan.most_stored_blocks(*options, two, "BDIA")
    assert total(most) <= two
    assert most == TINY.depth or total(most + 1) > two
    assert plan.most_stored_blocks(*options, none, "BDIA") == 0
    assert plan.most_stored_blocks(*options, none - 1, "BDIA") is None


def test_plans_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"methods must be of standard.*got magic"):
        plan.plan(TINY, 1, 8, methods=["magic"])
    with pytest.raises(ValueError, match=r"length must lie in \[1, 8\].*got 9 and 1"):
        plan.plan(TINY, 1, 9)
    with pytest.raises(ValueError, match="a number with MB, GB, MiB or GiB; got 'much'"):
        plan.parse_size("much")
    assert plan.parse_size("1.5 GiB") == 3 * 2**29
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type must be one of gpt2"):
        plan.Plan(model=str(tmp_path)).config()
