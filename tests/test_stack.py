"""Stacks as modules: settings, keys, variables that are written to, updates of blocks."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _models import CONFIGS, build, inputs, loss_of
from flax import nnx

from bdia_jax import BDIA, Checkpoint, Direct, Euler, Midpoint, Online, Update
from bdia_jax.nn import (
    METHODS,
    CoupledStack,
    Decoder,
    DecoderConfig,
    ResNet,
    ResNetConfig,
    ReversibleSettings,
    ReversibleStack,
    ViTConfig,
)
from bdia_jax.nn.settings import COUPLED, MEANINGS, CoupledMethod

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(5), (4, 6))


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


def test_a_block_is_no_function_that_makes_blocks():
    with pytest.raises(TypeError, match="got a block itself, of Linear"):
        ReversibleStack(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), 2, rngs=nnx.Rngs(0))


def test_a_method_is_a_step_and_an_adjoint():
    assert (*MEANINGS,) == METHODS
    assert typing.get_args(CoupledMethod) == (*COUPLED,)
    settings = {"gamma": 1 / 8, "signs": "sample", "frac_bits": 7, "tolerance_bits": 2}
    expected = {
        "bdia": (BDIA(1 / 8, "sample", 7, 2), Online()),
        "bdia-checkpoint": (BDIA(1 / 8, "sample", 7, 2), Checkpoint()),
        "bdia-direct": (BDIA(1 / 8, "sample", 7, 2), Direct()),
        "standard": (Euler(), Direct()),
        "standard-checkpoint": (Euler(), Checkpoint()),
        "midpoint": (Midpoint(7, 2), Online()),
        "midpoint-direct": (Midpoint(7, 2), Direct()),
    }
    for method, (step, adjoint) in expected.items():
        found = ReversibleSettings(method=method, **settings).of_stack(3, ("a", "b"))
        assert found == {"depth": 3, "step": step, "adjoint": adjoint, "parts": None}
    found = ReversibleSettings("standard", quantize_standard=True, parts_as_steps=True)
    assert found.of_stack(3, ("a", "b"))["parts"] == ("a", "b")
    with pytest.raises(ValueError, match="no parts"):
        found.of_stack(3)
    assert found.step() == Euler(9)


def test_evaluation_is_of_the_network_that_is_handed_back():
    """Whatever the step: its network, which for BDIA is the standard one on its grid."""
    make = lambda **options: ReversibleStack(Dense, 3, rngs=nnx.Rngs(0), **options)  # noqa: E731
    networks = {
        BDIA(1 / 8): Euler(9),
        BDIA(frac_bits=12): Euler(12),
        Midpoint(): Midpoint(),
        Euler(): Euler(),
    }
    for step, network in networks.items():
        stack = make(step=step, adjoint=Direct())
        stack.eval()
        trained = make(step=network, adjoint=Direct())
        np.testing.assert_array_equal(stack(X), trained(X))


class Dense(nnx.Module):
    """A block without dropout, or with."""

    def __init__(self, rngs, rate=0.0):
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.dropout(jnp.tanh(self.linear(x)))

    attend = feed_forward = __call__


# ---------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"step": Euler(), "adjoint": Direct()},
        {"step": Euler(), "adjoint": Checkpoint()},
        {"step": BDIA(signs="minus")},
        {"step": Midpoint()},
    ],
)
def test_a_key_is_needed_only_where_something_draws(options):
    stack = ReversibleStack(Dense, 2, rngs=nnx.Rngs(0), **options)
    assert jax.tree.leaves(nnx.state(stack, nnx.RngKey)), "there is a stream, which nobody asks"
    np.testing.assert_array_equal(stack(X), stack(X, key=KEY))
    dropping = ReversibleStack(lambda rngs: Dense(rngs, 0.5), 2, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match=r"draws random numbers.*got key=None"):
        dropping(X)
    dropping.eval()
    dropping(X)


def test_signs_need_a_key():
    with pytest.raises(ValueError, match=r"draws a sign per sample.*got key=None"):
        ReversibleStack(Dense, 2, rngs=nnx.Rngs(0))(X)


def test_streams_need_a_key_for_dropout_only():
    stack = CoupledStack(Dense, 2, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(stack(X), stack(X, key=KEY))
    stack = CoupledStack(lambda rngs: Dense(rngs, 0.5), 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"blocks draw random numbers.*got key=None"):
        stack(X)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "resnet", "gpt2", "llama", "encoder-decoder"])
def test_models_ask_for_a_key_for_dropout_only(name):
    config = dataclasses.replace(CONFIGS[name], method="standard")
    with pytest.raises(ValueError, match=r"draws? random numbers.*got key=None"):
        build(config, nnx.Rngs(0))(*inputs(type(config)))
    model = build(dataclasses.replace(config, dropout=0.0), nnx.Rngs(0))
    assert jax.eval_shape(lambda: loss_of(model)).shape == ()


# ---------------------------------------------------------------------------------------------
# Variables that a block writes to
# ---------------------------------------------------------------------------------------------


class Writer(nnx.Module):
    """A block with a counter and a normalization by the batch; what it does is an option."""

    def __init__(self, rngs, does):
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.does = does

    def __call__(self, x):
        return getattr(self, self.does)(x)

    def nothing(self, x):
        return self.linear(x)

    def count(self, x):
        self.calls[...] += 1
        return self.linear(x)

    def normalize(self, x):
        return self.linear(self.norm(x))

    def remember(self, x):
        self.seen = nnx.Intermediate(x)
        return self.linear(x)

    def train_itself(self, x):
        self.linear.kernel[...] *= 2
        return self.linear(x)

    def checkpoint(self, x):
        return nnx.remat(lambda block, x: block.linear(x))(self, x)

    def count_in_checkpoint(self, x):
        return nnx.remat(lambda block, x: block.count(x))(self, x)

    def compile(self, x):
        return nnx.jit(lambda block, x: block.linear(x))(self, x)


def stack_of(does, **options):
    return ReversibleStack(lambda rngs: Writer(rngs, does), 2, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(
    ("does", "names"),
    [
        ("count", "calls"),
        ("normalize", "norm.mean, norm.var"),
        ("remember", "seen"),
        ("train_itself", "linear.kernel"),
        ("count_in_checkpoint", "calls"),
    ],
)
@pytest.mark.parametrize("adjoint", [Online(), Direct()])
def test_blocks_that_write_are_refused_by_name(does, names, adjoint):
    with pytest.raises(ValueError, match=rf"writes to {names}\. .*group or RMS"):
        stack_of(does, adjoint=adjoint)(X, key=KEY)


@pytest.mark.parametrize("does", ["checkpoint", "compile"])
def test_blocks_that_only_read_are_not(does):
    """Flax's transforms replace every variable, by itself."""
    found, expected = (stack_of(d, step=Euler(), adjoint=Direct())(X) for d in (does, "nothing"))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_statistics_that_are_only_read_are_not():
    stack = stack_of("normalize", step=Euler(), adjoint=Checkpoint())
    stack.eval()
    assert stack(X).shape == X.shape


# ---------------------------------------------------------------------------------------------
# Updates in the backward pass
# ---------------------------------------------------------------------------------------------


def descend(params, grads, state):
    """A step of gradient descent; the state counts."""
    return jax.tree.map(lambda p, d: p - 0.1 * d, params, grads), state + 1


def split_stack(adjoint=Online(), depth=3, **options):  # noqa: B008
    stack = ReversibleStack(Dense, depth, adjoint=adjoint, rngs=nnx.Rngs(0), **options)
    return nnx.split(stack, nnx.Param, ...)


def updated(graph, params, rest, call=lambda stack: stack(X, key=KEY)):
    """New parameters and state, by the "gradients"."""
    count = jnp.zeros(rest["probe"].get_value().mismatched.shape)

    @jax.jit
    @jax.grad
    def run(slots):
        stack = nnx.merge(graph, params, rest)
        stack.updates(Update(descend, slots[0], slots[1]))
        return jnp.sum(jnp.sin(call(stack)))

    return run((params["stacked"], count))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [None, ("attend", "feed_forward")])
@pytest.mark.parametrize("adjoint", [Online(), Checkpoint()])
def test_an_update_is_the_ordinary_one(adjoint, parts):
    graph, params, rest = split_stack(adjoint, parts=parts)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(jnp.sin(nnx.merge(graph, params, rest)(X, key=KEY)))

    expected = descend(params, gradient(params), 0)[0]["stacked"]
    found, count = updated(graph, params, rest)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(count, 1)


def twice(stack):
    return stack(X, key=KEY) + stack(X, key=jax.random.key(1))


def scanned(stack):
    return jax.lax.scan(lambda x, _: (stack(x, key=KEY), None), X, None, 2)[0]


def mapped(stack):
    return jax.vmap(lambda x: stack(x, key=KEY))(X[None])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (twice, "called a second time.*summed as if they were gradients"),
        (scanned, "called in another trace"),
        (mapped, "called in another trace"),
        (lambda stack: jax.checkpoint(lambda x: stack(x, key=KEY))(X), "called in another trace"),
        (lambda stack: (stack.eval(), stack(X))[1], "in training mode"),
    ],
)
def test_calls_that_would_sum_new_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        updated(*split_stack(), call)


def test_updates_need_an_adjoint_that_finishes_blocks():
    with pytest.raises(ValueError, match=r"Online\(\) or Checkpoint\(\); got Direct"):
        updated(*split_stack(Direct()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(ResNetConfig(parts_as_steps=True), rngs=nnx.Rngs(0)), "no parts"),
        (
            lambda: Decoder(
                DecoderConfig(vocab_size=9, parallel=True, parts_as_steps=True), rngs=nnx.Rngs(0)
            ),
            "no parts",
        ),
        (lambda: ViTConfig(method="coupled", parts_as_steps=True), "two streams"),
    ],
)
def test_parts_that_there_are_not_are_no_steps(make, message):
    with pytest.raises(ValueError, match=message):
        make()
