"""Blocks of several parts: each an update and a step of its own, in one loop body."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _blocks import case

from bdia_jax import (
    BDIA,
    BackwardReport,
    Checkpoint,
    Direct,
    Euler,
    Online,
    Update,
    check_reversible,
    online,
    reversible_scan,
)
from bdia_jax.arguments import prepare

KEY = jax.random.key(7, impl="unsafe_rbg")
ADJOINTS = {"online": Online(), "checkpoint": Checkpoint(), "direct": Direct()}
every_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
DEPTH = 3


@pytest.mark.slow
@pytest.mark.parametrize("signs", ["block", "sample"])
@every_adjoint
def test_three_parts_are_three_times_as_many_blocks(adjoint, signs):
    """Of which each is told by an integer what to do: the same states, keys and gradients."""
    with jax.enable_x64(True):
        parts, params, x, consts = case("mlp", DEPTH, parts=3, dropout=0.1, dtype=jnp.float64)
        settings = {"key": KEY, "step": BDIA(0.25, signs), "adjoint": adjoint, "consts": consts}

        def one_of_three(p, x, key, shift, mask):
            return jax.lax.switch(p["part"], parts, p["params"], x, key, shift, mask)

        def as_parts(params, x):
            y = reversible_scan(parts, params, x, **settings)
            return jnp.sum(jnp.sin(y)), y

        def as_blocks(params, x):
            stacked = {
                "params": jax.tree.map(lambda p: jnp.repeat(p, 3, axis=0), params),
                "part": jnp.tile(jnp.arange(3), DEPTH),
            }
            y = reversible_scan(one_of_three, stacked, x, **settings)
            return jnp.sum(jnp.sin(y)), y

        @jax.jit
        def run(*given):
            return [jax.grad(f, (0, 1), has_aux=True)(*given) for f in (as_parts, as_blocks)]

        (found, y), (expected, expected_y) = run(params, x)
        np.testing.assert_array_equal(y, expected_y)
        chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-12)


def test_one_part_is_a_block():
    block, params, x, consts = case("mlp", DEPTH, dropout=0.1)
    for adjoint in ADJOINTS.values():

        def loss(block, params, adjoint=adjoint):
            settings = {"key": KEY, "consts": consts, "adjoint": adjoint}
            return jnp.sum(reversible_scan(block, params, x, **settings))

        programs = [
            str(jax.make_jaxpr(jax.grad(functools.partial(loss, given)))(params))
            for given in (block, (block,))
        ]
        assert programs[0] == programs[1]


class Scaled(NamedTuple):
    """A block that is a tuple, and can be called."""

    factor: float

    def __call__(self, w, x, key):
        return self.factor * jnp.tanh(x @ w)


def test_a_tuple_that_can_be_called_is_one_block():
    w, x = 0.1 * jax.random.normal(KEY, (DEPTH, 4, 4)), jnp.ones((2, 4))
    settings = {"key": KEY, "step": BDIA(0.25)}
    found = reversible_scan(Scaled(0.5), w, x, **settings)
    np.testing.assert_array_equal(
        found, reversible_scan(lambda w, x, key: 0.5 * jnp.tanh(x @ w), w, x, **settings)
    )


@jax.tree_util.register_pytree_node_class
class Square:
    """A node that refuses to hold anything but matrices."""

    def __init__(self, w):
        assert w.shape[-1] == w.shape[-2], "no matrix"
        self.w = w

    def tree_flatten(self):
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


def test_nodes_that_look_at_what_they_hold():
    """They are rebuilt with arrays only: in blocks, in gradients, in an update."""
    params = Square(jax.random.normal(KEY, (3, 4, 4))), jnp.ones((3, 4))
    x = jax.random.normal(KEY, (2, 4))

    def block(params, x, key):
        return jnp.tanh(x @ params[0].w) * params[1]

    def gradient(adjoint, params):
        def loss(params):
            return jnp.sum(reversible_scan(block, params, x, key=KEY, adjoint=adjoint) ** 2)

        return jax.grad(loss)(params)

    online, checkpointed, direct = (
        jax.jit(functools.partial(gradient, adjoint))(params)
        for adjoint in (Online(), Checkpoint(), Direct())
    )
    for found in (online, checkpointed):
        chex.assert_trees_all_close(found[0].w, direct[0].w, rtol=1e-5)
        chex.assert_trees_all_close(found[1], direct[1], rtol=1e-5)

    def step(params, d_params, state):
        return jax.tree.map(lambda p, d: p - d, params, d_params), state

    def updated(slots):
        adjoint = Online(update=Update(step, (slots, None), {}))
        return jnp.sum(reversible_scan(block, params, x, key=KEY, adjoint=adjoint) ** 2)

    found = jax.jit(jax.grad(updated))(params[0])
    np.testing.assert_allclose(found.w, params[0].w - direct[0].w, rtol=1e-4, atol=1e-5)


def test_what_a_part_reads_is_known():
    parts, params, x, (shift, mask) = case("mlp", DEPTH, parts=3)
    other = jnp.ones(5)

    def closing(p, x, key, shift, mask):
        return x * other

    scan, inputs = prepare(
        (*parts, closing), params, (x, x), 0, KEY, (shift, mask), BDIA(), Online()
    )
    names = sorted(params)
    read = [{names[i] for i in part.params} for part in scan.parts]
    assert read == [set(names), {"scale"}, set(), set()]
    # The user's two, and what the last part closes over.
    assert [set(part.consts) for part in scan.parts] == [{0, 1}, set(), {0}, {2}]
    np.testing.assert_array_equal(inputs.consts[2], other)


@pytest.mark.slow
@every_adjoint
def test_gradients_of_what_no_part_reads_are_zero(adjoint):
    """Of a parameter, and of a constant; and what each part closes over gets its own."""
    params = {"used": jnp.full((DEPTH, 4), 0.5), "unused": jnp.ones((DEPTH, 2))}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)

    def loss(params, consts, first, second):
        parts = (
            lambda p, x, key, a, b: jnp.tanh(x) * p["used"] * first,
            lambda p, x, key, a, b: jnp.sin(x) * a * second,
        )
        settings = {"key": KEY, "consts": consts, "adjoint": adjoint}
        return jnp.sum(reversible_scan(parts, params, x, **settings) ** 2)

    def by_hand(params, consts, first, second):
        both = lambda p, x, key, a, b, first, second, part: jax.lax.switch(  # noqa: E731
            part["part"],
            [
                lambda: jnp.tanh(x) * p["used"] * first,
                lambda: jnp.sin(x) * a * second,
            ],
        )
        stacked = jax.tree.map(lambda p: jnp.repeat(p, 2, axis=0), params)
        stacked = {"p": stacked, "part": jnp.tile(jnp.arange(2), DEPTH)}
        y = reversible_scan(
            lambda p, x, key, *rest: both(p["p"], x, key, *rest, p),
            stacked,
            x,
            key=KEY,
            consts=(*consts, first, second),
            adjoint=Direct(),
        )
        return jnp.sum(y**2)

    arguments = params, (jnp.float32(0.7), jnp.ones(3)), jnp.float32(0.9), jnp.float32(1.1)
    run = jax.jit(lambda *given: [jax.grad(f, (0, 1, 2, 3))(*given) for f in (loss, by_hand)])
    found, expected = run(*arguments)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    d_params, (d_a, d_b), *d_closed = found
    assert not np.any(d_params["unused"])
    assert not np.any(d_b)
    assert all(map(np.all, (d_params["used"], d_a, *d_closed)))


def test_every_part_draws_with_a_key_of_its_own():
    """No two parts, and no two blocks, see the same noise; the signs are drawn with other keys."""
    drawn = []

    def noise(w, x, key):
        return jax.random.normal(key, x.shape)

    x = jnp.zeros((2, 4))
    for parts in range(1, 4):
        settings = {"key": KEY, "step": Euler(), "adjoint": Direct()}
        drawn.append(reversible_scan((noise,) * parts, jnp.ones((1, 1)), x, **settings))
    # What each further part adds.
    added = np.diff(np.stack([x, *drawn]), axis=0)
    assert len(np.unique(added.round(4))) == added.size
    numbers = []

    def told(w, x, key):
        jax.debug.callback(lambda data: numbers.append(data.tobytes()), jax.random.key_data(key))
        return jax.random.normal(key, x.shape)

    settings = {"key": jax.random.key(0), "step": Euler(), "adjoint": Direct()}
    jax.block_until_ready(reversible_scan((told, told), jnp.ones((DEPTH, 1)), x, **settings))
    jax.effects_barrier()
    assert len(set(numbers)) == 2 * DEPTH


@pytest.mark.slow
@pytest.mark.optimized
def test_the_audit_and_the_report_count_every_part():
    parts, params, x, consts = case("mlp", DEPTH, parts=3)
    found = check_reversible(parts, params, x, key=KEY, consts=consts)
    assert found.exact
    assert found.compared == 3 * DEPTH * x.size
    # A part that gives another value each time that it runs is seen in the report of its block.
    state = np.random.default_rng(0)

    def random(p, x, key, shift, mask):
        noise = lambda: state.normal(size=x.shape).astype(np.float32)  # noqa: E731
        return jax.pure_callback(noise, jax.typeof(x))

    def report(parts, step):
        def loss(probe):
            settings = {"key": KEY, "consts": consts, "step": step, "adjoint": Online(probe)}
            return jnp.sum(reversible_scan(parts, params, x, **settings))

        return jax.jit(jax.grad(loss))(BackwardReport.zeros(DEPTH))

    wrong = report((parts[0], random, parts[2]), BDIA())
    # From the first part that is not reconstructed down, every one is off.
    np.testing.assert_array_equal(wrong.mismatched[:-1], 3 * len(x))
    assert wrong.mismatched[-1] >= 2 * len(x)
    corrected = report((parts[0], random, random), BDIA(tolerance_bits=2, frac_bits=0))
    assert corrected.corrected.sum() > 0
    assert corrected.deviation.max() >= 1


def test_the_report_of_a_block_counts_its_parts_and_has_the_largest_deviation():
    some = [BackwardReport(*map(jnp.int32, values)) for values in ((1, 2, 3), (4, 0, 2), (0, 5, 1))]
    assert online.of_parts(some) == (5, 7, 3)


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


def attend(p, x, key):
    q, k, v = ((x @ p[name]).reshape(*x.shape[:2], 2, -1) for name in ("q", "k", "v"))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ p["out"]


def feed_forward(p, x, key):
    return jax.nn.gelu(x @ p["up"]) @ p["down"]


def whole(p, x, key):
    a = attend(p, x, key)
    return a + feed_forward(p, x + a, key)


@pytest.mark.slow
@pytest.mark.buffers
@pytest.mark.parametrize(
    ("step", "adjoint"),
    [(BDIA(), Online()), (BDIA(), Checkpoint()), (Euler(), Checkpoint())],
    ids=str,
)
def test_the_peak_is_that_of_a_part(step, adjoint):
    """Residuals of attention and of the feed-forward network are never alive at once."""
    batch, length, width, hidden, blocks = 4, 128, 32, 256, 2

    def temporaries(block):
        def loss(params, x):
            y = reversible_scan(block, params, x, key=KEY, step=step, adjoint=adjoint)
            return jnp.mean(y**2)

        shapes = {name: (blocks, width, width) for name in ("q", "k", "v", "out")}
        shapes |= {"up": (blocks, width, hidden), "down": (blocks, hidden, width)}
        params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
        x = jax.ShapeDtypeStruct((batch, length, width), jnp.float32)
        compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    parts, block = temporaries((attend, feed_forward)), temporaries(whole)
    # Attention holds 2 · length numbers per position and a few of its width; the other 2 · hidden.
    smaller = 4 * batch * length * min(2 * length, hidden)
    assert parts < block - 0.7 * smaller, (parts, block)
