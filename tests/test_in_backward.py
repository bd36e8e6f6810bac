"""The optimizer in the backward pass: the ordinary step, in place, or an error."""

import dataclasses

import _toy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bdia_jax
from bdia_jax import BDIA, Checkpoint, Direct, Euler, Midpoint, Online, Update
from bdia_jax.data import TextData
from bdia_jax.nn import Decoder, DecoderConfig, add_lora, freeze
from bdia_jax.planning import memory
from bdia_jax.train import LanguageModelling, Sums, TrainSettings, step_memory, train, training_step
from bdia_jax.train.blockwise import joined, stack_name, stack_paths
from bdia_jax.train.optimizers import OPTIMIZERS
from bdia_jax.train.programs import Programs

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
    update_in_backward=True,
)
WIDE = {"dtype": "float64", "param_dtype": "float64"}
WAYS = [
    (BDIA(), Online()),
    (BDIA(0.25, "sample"), Online()),
    (Midpoint(), Online()),
    (BDIA(), Checkpoint()),
    (Euler(), Checkpoint()),
    (Euler(), Checkpoint(bits=8)),
]


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


def split_off(params):
    return {name: params.pop(name) for name in ("up", "down")}, params


def momentum(params, grads, state):
    state = jax.tree.map(lambda m, d: 0.9 * m + d, state, grads)
    return jax.tree.map(lambda p, m: p - 0.1 * m, params, state), state


def loss(params, fixed, x, way, update=None):
    step, adjoint = way
    if update is not None:
        adjoint = dataclasses.replace(adjoint, update=update)
    y = bdia_jax.reversible_scan(block, params | fixed, x, key=KEY, step=step, adjoint=adjoint)
    return jnp.mean(y**2)


def ordinary(params, state, fixed, x, way):
    return momentum(params, jax.grad(loss)(params, fixed, x, way), state)


def in_backward(params, state, fixed, x, way):
    def updated(params, state):
        update = Update(momentum, params | {"mask": None}, state | {"mask": None})
        # What is given as stacked parameters is not read, and gets no gradient.
        other = jax.tree.map(jnp.zeros_like, params)
        return loss(other, fixed, x, way, update)

    return jax.grad(updated, argnums=(0, 1))(params, state)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_step_in_the_backward_pass_is_the_ordinary_one(way):
    params, fixed = split_off(stacked(5, 16, 32))
    state = jax.tree.map(jnp.ones_like, params)
    x = jax.random.normal(KEY, (3, 4, 16))
    expected = jax.jit(ordinary, static_argnums=4)(params, state, fixed, x, way)
    found = jax.jit(in_backward, static_argnums=4)(params, state, fixed, x, way)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


@pytest.mark.slow
@pytest.mark.buffers
@pytest.mark.parametrize("way", [WAYS[0], WAYS[4]], ids=str)
def test_no_gradient_of_all_blocks_and_no_copy_of_them(way):
    """Beside what the adjoint keeps, temporaries do not grow with the number of blocks."""
    found = {}
    for blocks in (8, 24):
        params, fixed = split_off(jax.eval_shape(lambda blocks=blocks: stacked(blocks, 64, 256)))
        x = jax.ShapeDtypeStruct((2, 4, 64), jnp.float32)
        for step in (ordinary, in_backward):

            def of_way(*arguments, step=step):
                return step(*arguments, way)

            needed = memory.measure(of_way, params, params, fixed, x, donate=(0, 1))
            assert needed.results < 1000
            found[step, blocks] = needed.temporaries
    one_block = 4 * 2 * 64 * 256
    side, input_of_a_block = 2 * 4 * 64 // 8 + 2 * 4, 4 * 2 * 4 * 64
    kept = side if isinstance(way[1], Online) else input_of_a_block
    grown = {step: (found[step, 24] - found[step, 8]) / 16 for step in (ordinary, in_backward)}
    assert grown[ordinary] > one_block
    # What a loop keeps beside (numbers of blocks, keys, reports) is some words per block.
    assert grown[in_backward] < kept + 64


def test_the_stacked_parameters_get_no_gradient():
    params, fixed = split_off(stacked(3, 8, 8))
    update = Update(momentum, params | {"mask": None}, params | {"mask": None})
    for way in (WAYS[0], WAYS[4]):
        grads = jax.grad(loss)(params, fixed, jnp.ones((1, 2, 8)), way, update)
        assert not any(map(np.any, jax.tree.leaves(grads)))


# ---------------------------------------------------------------------------------------------
# A step of training
# ---------------------------------------------------------------------------------------------


def decoder(lora=0, **changes):
    model = Decoder(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(0))
    if lora:
        add_lora(model, lora, rngs=nnx.Rngs(1))
    return model


def after(steps, model, **changes):
    """Weights and optimizer's state after some steps."""
    task = TASK if isinstance(model, Decoder) else _toy.Regression()
    step, state = training_step(model, task, dataclasses.replace(FEW, **changes))
    for _ in range(steps):
        state, report = step(state)
    assert all(not np.any(b.mismatched) for b in report.backward.values())
    return jax.device_get((state.params, state.opt_state))


def in_one_form(found, like):
    """Weights and state, with every moment as the weights are, if it is so in ``like``."""
    params, state = found
    if jax.tree.structure(found) == jax.tree.structure(like):
        return found

    def states(tree):
        leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.State))
        return [leaf for leaf in leaves if isinstance(leaf, nnx.State)]

    of_stacks = {path: states(state["stacks"][stack_name(path)]) for path in stack_paths(params)}
    whole = iter(
        joined(node, {path: some[i] for path, some in of_stacks.items()})
        for i, node in enumerate(states(state["others"]))
    )
    # Every stack has counted as what is in none.
    counts = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == np.int32]
    (count,) = set(map(int, counts))
    return params, jax.tree.map(
        lambda node: next(whole) if isinstance(node, nnx.State) else np.int32(count),
        like[1],
        is_leaf=lambda node: isinstance(node, nnx.State),
    )


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        ("adamw", lambda: decoder(method="bdia", **WIDE)),
        ("adamw", lambda: decoder(method="bdia", lora=2, dropout=0.0, **WIDE)),
        ("adam", lambda: decoder(method="midpoint", **WIDE)),
    ],
)
def test_training_is_the_same(optimizer, make):
    """But for roundings of float64: a compiler fuses two programs in two ways."""
    decay = {"weight_decay": 0.1} if OPTIMIZERS[optimizer].decays else {}
    with jax.enable_x64(True):
        expected, found = (
            after(3, make(), optimizer=optimizer, update_in_backward=way, **decay)
            for way in (False, True)
        )
    found = in_one_form(found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # A step is of 1e-2.
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10)


def test_an_optimizer_that_is_given_clips_by_itself():
    settings = dataclasses.replace(FEW, clip_norm=1e-3)
    changed = []
    for way in (False, True):
        model = decoder(dropout=0.0)
        some = dataclasses.replace(settings, update_in_backward=way)
        programs = Programs(model, TASK, some, optax.sgd(1.0))
        state = programs.first_state(model)
        before = jax.device_get(state.params)
        state, report = programs.step(state)
        change = jax.tree.map(np.subtract, jax.device_get(state.params), before)
        assert float(optax.tree.norm(change)) == pytest.approx(float(report.grad_norm), rel=1e-4)
        changed.append(change)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *changed)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_step_in_float64(clip_norm):
    """Of 64 bits are the weights; what is told of blocks and kept of a norm has 32 as ever."""
    with jax.enable_x64(True):
        model = decoder(dtype="float64", param_dtype="float64", method="standard-checkpoint")
        settings = dataclasses.replace(FEW, clip_norm=clip_norm)
        step, state = training_step(model, TASK, settings)
        kinds = jax.tree.map(lambda a: a.dtype, state)
        for _ in range(2):
            state, report = step(state)
        assert np.isfinite(report.grad_norm)
        assert jax.tree.map(lambda a: a.dtype, state) == kinds


@pytest.mark.parametrize("method", ["bdia", "standard-checkpoint"])
def test_a_gradient_that_is_not_finite_changes_nothing(method):
    model = _toy.Toy(method=method, dropout=0.0)
    settings = dataclasses.replace(FEW, update_in_backward=True)
    step, state = training_step(model, _toy.Regression(poison=0), settings)
    before = jax.device_get(state)
    state, report = step(state)
    assert not np.isfinite(report.grad_norm)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adafactor", "muon", "set-adam"])
def test_optimizers_whose_steps_differ_between_blocks(optimizer):
    """What a whole tree, a matrix or its rows have in common is a block's own here."""
    expected, found = (
        after(3, _toy.Toy(), optimizer=optimizer, update_in_backward=way) for way in (False, True)
    )
    found = in_one_form(found, expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # A last bit may turn a rounding to the grid. A step is of 1e-2.
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.buffers
@pytest.mark.parametrize("method", ["bdia", "standard-checkpoint"])
def test_a_step_of_training_is_in_place(method):
    """Its temporaries have neither a gradient nor a copy of the blocks' weights."""
    found = {}
    for depth in (4, 12):
        model = nnx.eval_shape(lambda depth=depth: _toy.Toy(128, depth, method))
        for way in (False, True):
            settings = dataclasses.replace(FEW, update_in_backward=way)
            needed = step_memory(model, _toy.Regression(), settings)
            found[way, depth] = needed.memory.temporaries
            found["weights", depth] = needed.parameters
            assert needed.memory.results < 2000
    one_block = (found["weights", 12] - found["weights", 4]) / 8
    grown = {way: (found[way, 12] - found[way, 4]) / 8 for way in (False, True)}
    assert grown[False] > 0.9 * one_block
    # The input of a block, where it is kept, has 4 × 128 numbers, 2 kB; a block has 66.
    assert grown[True] < 0.05 * one_block


@pytest.mark.slow
def test_the_first_step_finds_the_norm_that_the_second_is_clipped_by():
    settings = dataclasses.replace(FEW, clip_norm=0.3, optimizer="sgd")
    step, state = training_step(_toy.Toy(method="standard-checkpoint"), _toy.Regression(), settings)
    before = jax.device_get(state.params)
    state, report = step(state)
    first = jax.device_get(state.params)
    assert report.grad_norm > 0.3
    assert jax.tree.all(jax.tree.map(np.array_equal, first, before))
    assert state.opt_state["norm"] == report.grad_norm
    second = jax.device_get(step(state)[0].params)
    moved = jax.tree.map(lambda a, b: a - b, second, first)
    # Of the learning rate times 0.3, as far as this step's norm is the first one's.
    assert 0.5 < optax.tree.norm(moved) / (1e-2 * 0.3) < 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "clip_by"), [("bdia", "previous"), ("standard-checkpoint", "second-pass")]
)
def test_clipping_and_resuming(tmp_path, method, clip_by):
    """By this step's norm, as ordinarily; by the previous one's, as by hand; and cut in two."""
    changes = {
        "optimizer": "sgd",
        "clip_norm": 0.3,
        "clip_by": clip_by,
        "update_in_backward": True,
        "log_every": 1,
        "steps": 4,
    }

    def trained(folder, **others):
        model = _toy.Toy(method=method)
        result, _ = _toy.run(tmp_path / folder, model=model, resume=True, **changes | others)
        return nnx.state(model, nnx.Param), result

    found, result = trained("a")
    norms = [r["grad_norm"] for r in result.history if r["split"] == "train"]
    assert min(norms) > 0.3
    if clip_by == "second-pass":
        expected, _ = trained("b", update_in_backward=False)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            # All steps together are of 4 × 0.3 × 1e-2.
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        return
    trained("c", stop_at=2)
    again, _ = trained("c")
    assert jax.tree.all(jax.tree.map(np.array_equal, found, again))


# ---------------------------------------------------------------------------------------------
# What cannot be
# ---------------------------------------------------------------------------------------------


def test_settings_that_exclude_it(tmp_path):
    with pytest.raises(ValueError, match="cannot accumulate: accumulate must be 1; got 2"):
        dataclasses.replace(FEW, accumulate=2)
    with pytest.raises(ValueError, match="clip_by must be one of previous, second-pass; got 'nev"):
        dataclasses.replace(FEW, clip_by="never")
    for model in (decoder(method="standard"), decoder(method="bdia-direct")):
        with pytest.raises(ValueError, match=r"needs a stack .* taken back or checkpointed"):
            train(model, TASK, FEW, tmp_path / "run")
    model = decoder()
    freeze(model, "blocks")
    with pytest.raises(ValueError, match=r"needs a stack with parameters to train"):
        train(model, TASK, FEW, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Penalty(LanguageModelling):
    """The norm of weights is part of the loss: of all, or of those outside the stacks."""

    def __init__(self, of):
        super().__init__(TASK.data, 8)
        self.of = of

    def loss(self, model, batch, key):
        sums = super().loss(model, batch, key)
        weights = jax.tree.leaves(nnx.state(self.of(model), nnx.Param))
        penalty = 1e-2 * sum(jnp.sum(w**2) for w in weights)
        return sums._replace(loss=sums.loss + sums.weight * penalty)


class Twice(LanguageModelling):
    """The loss of two passes with different dropout."""

    def loss(self, model, batch, key):
        keys = (None, None) if key is None else jax.random.split(key)
        first, second = (super(Twice, self).loss(model, batch, k) for k in keys)
        return Sums(first.loss + second.loss, first.weight + second.weight, first.metrics)


class Around(LanguageModelling):
    """The model is called inside another transformation."""

    def __init__(self, transform):
        super().__init__(TASK.data, 8)
        self.transform = transform

    def loss(self, model, batch, key):
        return self.transform(lambda b: super(Around, self).loss(model, b, key))(batch)


class Apart(LanguageModelling):
    """The loss does not go through the stack."""

    def loss(self, model, batch, key):
        weight = jnp.sum(model.embedding[...] ** 2)
        return Sums(weight, jnp.float32(1), {})


def in_a_scan(function):
    def scanned(batch):
        _, sums = jax.lax.scan(lambda c, _: (c, function(batch)), 0, None, length=1)
        return jax.tree.map(lambda a: a[0], sums)

    return scanned


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Penalty(lambda model: model), "another way than through the call of the stack"),
        (Penalty(lambda model: model.blocks), "depends on the weights of blocks in another way"),
        (Twice(TASK.data, 8), "can be called once"),
        (Around(jax.checkpoint), "called in another trace"),
        (Around(in_a_scan), "called in another trace"),
        (Apart(TASK.data, 8), "the loss does not depend on blocks; freeze its weights"),
    ],
    ids=["penalty", "penalty on the stack", "twice", "checkpoint", "scan", "apart"],
)
def test_losses_that_cannot_be(task, message, tmp_path):
    model = decoder(method="bdia")
    before = jax.device_get(nnx.state(model, nnx.Param))
    with pytest.raises(ValueError, match=message):
        train(model, task, FEW, tmp_path / "run")
    # At trace time: nothing was made, and nothing changed.
    assert not (tmp_path / "run").exists()
    same = jax.tree.map(np.array_equal, before, jax.device_get(nnx.state(model, nnx.Param)))
    assert jax.tree.all(same)
    # The ordinary step takes them all.
    ordinary = dataclasses.replace(FEW, update_in_backward=False)
    Programs(model, task, ordinary).trace()


@pytest.mark.slow
def test_a_penalty_on_other_weights_is_right():
    """On those outside the stacks, whose gradient there is."""

    class Shrinking(_toy.Regression):
        def loss(self, model, batch, key):
            sums = super().loss(model, batch, key)
            return sums._replace(loss=sums.loss + jnp.sum(model.head.kernel[...] ** 2))

    found = {}
    for way in (False, True):
        step, state = training_step(
            _toy.Toy(), Shrinking(), dataclasses.replace(FEW, update_in_backward=way)
        )
        found[way] = jax.tree.leaves(jax.device_get(step(state)[0].params))
    for a, b in zip(found[True], found[False], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_direct_takes_no_update():
    with pytest.raises(TypeError):
        dataclasses.replace(Direct(), update=Update(momentum, {}, {}))
