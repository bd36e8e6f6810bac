"""The weights of a model: held once, given back, of dtypes that learn, and the best of a run."""

import collections
import gc
import math

import _toy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bdia_jax.nn import freeze
from bdia_jax.train import CheckpointError, loop, restore_best, training_step
from bdia_jax.train.checkpoints import Checkpoints
from bdia_jax.train.rounding import stochastic_round
from bdia_jax.train.weights import check_trained_dtypes

# ---------------------------------------------------------------------------------------------
# Held once
# ---------------------------------------------------------------------------------------------


def live() -> collections.Counter:
    """Bytes of all arrays on all devices, by shape and dtype of their shards; buffers counted
    once."""
    found, seen = collections.Counter(), set()
    for array in jax.live_arrays():
        for shard in [] if array.is_deleted() else array.addressable_shards:
            buffer = shard.data.unsafe_buffer_pointer()
            if buffer not in seen:
                seen.add(buffer)
                found[shard.data.shape, str(shard.data.dtype)] += shard.data.nbytes
    return found


@pytest.fixture
def at_a_step(monkeypatch):
    """What was alive when a step had been taken, and when the last had been."""
    found = []
    gc.collect()
    before = live()
    take_step = loop.Run._take_step

    def counting(self, **arguments):
        take_step(self, **arguments)
        jax.block_until_ready(self.state)
        found.append(live() - before)

    monkeypatch.setattr(loop.Run, "_take_step", counting)
    return found


class Wide(_toy.Block):
    """With a matrix of a shape that nothing else has."""

    def __init__(self, width, dropout, rngs):
        super().__init__(width, dropout, rngs)
        self.wide = nnx.Linear(width, 24, rngs=rngs)
        self.back = nnx.Linear(24, width, rngs=rngs)

    def __call__(self, x):
        return super().__call__(x + self.back(jnp.tanh(self.wide(x))))


MATRIX = 4 * 3 * 16 * 24


@pytest.mark.slow
def test_every_weight_is_held_once(tmp_path, at_a_step):
    """Also after a checkpoint was restored."""
    # While a checkpoint is written (as after a best evaluation), there is a copy of it on the host,
    # which here is the device.
    changes = {"checkpoint_every": 8, "eval_every": 8}
    _toy.run(tmp_path / "run", model=_toy.Toy(block=Wide), stop_at=2, **changes)
    model = _toy.Toy(block=Wide)
    _toy.run(tmp_path / "run", model=model, resume=True, **changes)
    assert len(at_a_step) == 2 + 6
    for alive in at_a_step:
        # The weights and two moments.
        assert alive[(3, 16, 24), "float32"] == 3 * MATRIX
    assert all(np.isfinite(value).all() for value in _toy.parameters(model).values())


@pytest.mark.slow
def test_on_a_mesh_every_shard_is_held_once(tmp_path, at_a_step):
    _toy.run(tmp_path / "run", model=_toy.Toy(block=Wide), mesh="fsdp=8", steps=3)
    for alive in at_a_step:
        assert alive[(3, 16, 24), "float32"] == 0
        assert alive[(3, 16, 3), "float32"] == 3 * MATRIX


@pytest.mark.slow
def test_frozen_weights_are_held_once(tmp_path, at_a_step):
    model = _toy.Toy(block=Wide)
    freeze(model, "wide")
    _toy.run(tmp_path / "run", model=model, steps=2, mesh="fsdp=8")
    for alive in at_a_step:
        assert alive[(3, 16, 3), "float32"] == MATRIX
        assert alive[(3, 16, 24), "float32"] == 0


def test_a_weight_that_two_parameters_share():
    """A step writes into both: they are parted before."""
    model = _toy.Toy()
    shared = model.embed.bias.get_value()
    model.stack_bias = nnx.Param(shared)
    step, state = training_step(model, _toy.Regression(), _toy.settings())
    state, _ = step(state)
    state, report = step(state)
    assert np.isfinite(report.grad_norm)


def test_an_optimizer_that_keeps_the_first_weights():
    """Its state begins as the weights themselves."""
    keeps = optax.GradientTransformation(
        lambda params: params, lambda updates, state, params=None: (updates, state)
    )
    model = _toy.Toy()
    step, state = training_step(
        model, _toy.Regression(), _toy.settings(), optax.chain(keeps, optax.sgd(0.1))
    )
    for _ in range(2):
        state, _ = step(state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


# ---------------------------------------------------------------------------------------------
# Given back
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_an_error_on_the_way_leaves_the_weights_of_the_last_step(resume, tmp_path, monkeypatch):
    changes = {"eval_every": 8, "checkpoint_every": 8, "log_every": 1}
    if resume:
        _toy.run(tmp_path / "run", stop_at=1, **changes)
    _, expected = _toy.run(tmp_path / "expected", stop_at=3, **changes)

    def broken(self):
        if self.step == 3:
            raise OSError("no more metrics")
        return 0.0

    monkeypatch.setattr(loop.Run, "_log", broken)
    model = _toy.Toy()
    with pytest.raises(OSError, match="no more metrics"):
        _toy.run(tmp_path / "run", model=model, resume=resume, **changes)
    assert _toy.digest(model) == _toy.digest(expected)


def test_a_refused_run_leaves_the_weights(tmp_path):
    model = _toy.Toy()
    before = _toy.digest(model)
    _toy.run(tmp_path / "run", stop_at=1)
    with pytest.raises(FileExistsError):
        _toy.run(tmp_path / "run", model=model)
    with pytest.raises(ValueError, match="another one"):
        _toy.run(tmp_path / "run", model=model, resume=True, seed=5)
    assert _toy.digest(model) == before


# ---------------------------------------------------------------------------------------------
# Dtypes that learn
# ---------------------------------------------------------------------------------------------


def in_dtype(dtype):
    model = _toy.Toy()
    nnx.update(model, jax.tree.map(lambda p: p.astype(dtype), nnx.state(model, nnx.Param)))
    return model


@pytest.mark.slow
def test_trained_weights_of_too_few_bits(tmp_path):
    message = (
        r"must be float32, float64 or bfloat16; got float16 for embed.bias, embed.kernel, "
        r"head.bias and 5 more. Set param_dtype to one of these"
    )
    with pytest.raises(ValueError, match=message):
        _toy.run(tmp_path / "run", model=in_dtype("float16"))
    assert not (tmp_path / "run").exists()
    # Frozen ones may have as few as they like.
    model = in_dtype("float16")
    freeze(model, "^(embed|norm|stack)")
    nnx.update(model.head, jax.tree.map(jnp.float32, nnx.state(model.head)))
    check_trained_dtypes(model)
    # And who brings an optimizer knows what it does.
    result, _ = _toy.run(
        tmp_path / "run", model=in_dtype("float16"), own_optimizer=optax.sgd(0.1), steps=1
    )
    assert result.step == 1


@pytest.mark.slow
def test_bfloat16_learns_what_float32_does():
    """At a learning rate of which plain rounding to bfloat16 loses nearly every step."""

    def moved(dtype, optimizer=None, **changes):
        model = in_dtype(dtype)
        # A copy: a step uses the model's arrays up.
        before = jax.tree.map(lambda p: jnp.array(p, jnp.float32), nnx.state(model, nnx.Param))
        settings = _toy.settings(
            learning_rate=2e-5, optimizer="adam", schedule="constant", clip_norm=None, **changes
        )
        step, state = training_step(model, _toy.Regression(), settings, optimizer)
        for _ in range(30):
            state, _ = step(state)
        return jax.tree.map(lambda a, b: a - b, state.params, before)

    expected = moved("float32")
    squares = optax.tree.norm(expected) ** 2

    def share(found):
        """How far they went in the direction of float32's weights.

        What is right on average is noisy in every weight, and right over all of them.
        """
        return optax.tree.vdot(expected, found) / squares

    for by_block in (False, True):
        found = moved("bfloat16", update_in_backward=by_block)
        assert 0.7 < share(found) < 1.3
    assert share(moved("bfloat16", optax.adam(2e-5))) < 0.3


def test_stochastic_rounding_is_right_on_average():
    x = jnp.float32(np.random.default_rng(0).normal(size=200))
    x = jnp.concatenate([x, jnp.array([0.0, -0.0, 1.0, jnp.inf, -jnp.inf, jnp.nan, 3e38])])
    keys = jax.random.split(jax.random.key(0), 4000)
    found = jax.vmap(lambda key: stochastic_round(x, key))(keys)
    # Of bfloat16, and one of the two around x, which is itself where it is one.
    np.testing.assert_array_equal(found, jnp.float32(jnp.bfloat16(found)))
    finite = jnp.isfinite(x)
    gap = np.ldexp(1.0, np.frexp(np.where(finite, x, 1))[1] - 8)
    some = jnp.where(finite, x, 0)
    assert jnp.all(jnp.abs(jnp.where(finite, found, 0) - some) < gap)
    np.testing.assert_array_equal(found[:, -7:-1], jnp.tile(x[-7:-1], (4000, 1)))
    # The mean of 4000 draws, whose deviation is at most half a gap: five of its own deviations.
    mean = np.where(finite, found, 0).mean(0, dtype=np.float64)
    assert np.all(np.abs(mean - some) < 5 * gap / 2 / 4000**0.5)


def test_why_bfloat16_is_not_rounded_to_the_nearest():
    """What would come of it: steps that are lost; a second moment that never decays."""
    w = jnp.asarray(np.linspace(0.01, 1, 100), jnp.bfloat16)
    adam = optax.adam(5e-5)
    state = adam.init(w)
    updates, state = adam.update(jnp.ones_like(w), state)
    assert np.mean(np.asarray(optax.apply_updates(w, updates) == w)) > 0.95
    _, state = adam.update(jnp.full_like(w, 100.0), state)
    peak = float(state[0].nu[0])
    for _ in range(50):
        _, state = adam.update(jnp.zeros_like(w), state)
    assert float(state[0].nu[0]) == peak
    assert peak * 0.999**50 < 0.96 * peak


# ---------------------------------------------------------------------------------------------
# The best of a run
# ---------------------------------------------------------------------------------------------

RISING = {
    # The rate is such that the loss rises: the last is not the best.
    "schedule": "constant",
    "optimizer": "sgd",
    "learning_rate": 0.7,
    "clip_norm": 5.0,
    "keep_last": 1,
    "eval_every": 1,
    "checkpoint_every": 1,
}


@pytest.mark.slow
def test_the_best_is_restored(tmp_path):
    result, model = _toy.run(tmp_path / "run", **RISING)
    evals = {r["step"]: r["loss"] for r in result.history if r["split"] == "eval"}
    best = min(evals, key=evals.get)
    assert result.best_step == best < 8, "this test wants a best before the end"
    _, expected = _toy.run(tmp_path / "expected", stop_at=best, **RISING)
    assert restore_best(tmp_path / "run", model) == best
    assert _toy.digest(model) == _toy.digest(expected)
    # The folder is as it was.
    again, _ = _toy.run(tmp_path / "run", resume=True, **RISING)
    assert (again.step, again.best_step) == (8, best)


@pytest.mark.slow
def test_the_best_goes_where_the_model_is(tmp_path):
    _, model = _toy.run(tmp_path / "run", mesh="fsdp=8", steps=4)
    expected = _toy.digest(model)
    assert restore_best(str(tmp_path / "run"), model) == 4
    kernel = model.stack.stacked.inner.kernel.get_value()
    assert kernel.addressable_shards[0].data.shape != kernel.shape
    other = _toy.Toy(seed=7)
    restore_best(tmp_path / "run", other)
    assert _toy.digest(model) == _toy.digest(other) == expected


def test_reading_the_best_disturbs_no_run(tmp_path, caplog):
    """What seems to be left over may be what the run is writing, or deleting, just now."""
    _, model = _toy.run(tmp_path / "run", steps=4)
    folder = tmp_path / "run/checkpoints"
    for name in ("6.orbax-checkpoint-tmp", "deleting/1", "2/state"):
        (folder / name).mkdir(parents=True)
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    caplog.clear()
    assert restore_best(tmp_path / "run", model) == 4
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    assert not [r.getMessage() for r in caplog.records if "read_only" in r.getMessage()]


def test_no_best(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run in"):
        restore_best(tmp_path / "nothing", _toy.Toy())
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, "-loss")
    assert checkpoints.best_step() is None
    checkpoints.close()
    _, model = _toy.run(tmp_path / "run", steps=4)
    with pytest.raises(ValueError, match=r"head.kernel: float32\[16, 1\] there, float32\[12, 1\]"):
        restore_best(tmp_path / "run", _toy.Toy(width=12))
    for file in (tmp_path / "run/checkpoints/4/state/d").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    before = _toy.digest(model)
    with pytest.raises(CheckpointError, match=r"checkpoint 4|checksum"):
        restore_best(tmp_path / "run", model)
    assert _toy.digest(model) == before


def test_a_best_between_checkpoints(tmp_path):
    result, _ = _toy.run(tmp_path / "run", steps=9, eval_every=4, checkpoint_every=3, stop_at=6)
    assert result.best_step == 6
    assert math.isfinite(result.best)
