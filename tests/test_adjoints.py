"""Adjoints as objects: second derivatives, updates in the backward pass, rounded checkpoints."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _rows import fast

from bdia_jax import (
    BDIA,
    BackwardReport,
    Checkpoint,
    Direct,
    Euler,
    Midpoint,
    Online,
    Update,
    from_grid,
    quantize,
    reversible_scan,
    to_grid,
)
from bdia_jax.checkpoint import GROUP, restored, rounded
from bdia_jax.nn import ReversibleSettings, ViTConfig

KEY = jax.random.key(7, impl="unsafe_rbg")
ONCE = {"online": Online(), "checkpoint": Checkpoint()}
once = pytest.mark.parametrize("adjoint", ONCE.values(), ids=ONCE)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tanh_block(w, x, key):
    return jnp.tanh(x @ w)


def scalar(adjoint=Direct(), step=BDIA(), block=tanh_block):  # noqa: B008
    """A scalar function of the parameters and the input of a stack."""

    def function(params, x):
        y = reversible_scan(block, params, x, key=KEY, step=step, adjoint=adjoint)
        return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    return function


# ---------------------------------------------------------------------------------------------
# Second derivatives
# ---------------------------------------------------------------------------------------------


def penalty(function):
    """The gradient by the parameters of the size of the gradient by the input."""

    def size(params, x):
        return jnp.sum(jax.grad(function, 1)(params, x) ** 2)

    return jax.grad(size)


def forward_over_reverse(function):
    gradient = jax.grad(function, 1)
    return lambda params, x: jax.jvp(lambda x: gradient(params, x), (x,), (jnp.cos(x),))[1]


def mixed(function):
    """The derivative by the parameters of the gradient by the input."""
    return jax.jacrev(jax.grad(function, 1))


SECOND = {
    "hessian": lambda function: jax.hessian(function, 1),
    "penalty": penalty,
    "forward over reverse": forward_over_reverse,
    "reverse over reverse": mixed,
}


def in_a_scan(function):
    """The sum of three calls, in a loop."""

    def summed(params, x):
        def body(x, _):
            return x / 2, function(params, x)

        return jnp.sum(jax.lax.scan(body, x, None, length=3)[1])

    return summed


def under_vmap(function):
    return lambda params, x: jnp.sum(jax.vmap(function, (None, 0))(params, x[None]))


AROUND = {
    "alone": lambda function: function,
    "jit": jax.jit,
    "scan": in_a_scan,
    "vmap": under_vmap,
    "checkpoint": jax.checkpoint,
    "cond": lambda function: (
        lambda *given: jax.lax.cond(given[1][0, 0] > 0, function, function, *given)
    ),
}


@once
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("derivative", SECOND)
def test_differentiating_twice_is_an_error(adjoint, around, derivative):
    function = SECOND[derivative](AROUND[around](scalar(adjoint)))
    with pytest.raises(TypeError, match=r"differentiated once.*use adjoint=Direct\(\)"):
        jax.eval_shape(function, draw(2, 3, 3), draw(2, 3))


@once
def test_so_is_differentiating_by_what_a_block_closes_over(adjoint):
    def function(scale):
        block = lambda w, x, key: jnp.tanh(x @ w) * scale  # noqa: E731
        return scalar(adjoint, block=block)(draw(2, 3, 3), draw(2, 3))

    with pytest.raises(TypeError, match="differentiated once"):
        jax.eval_shape(jax.grad(jax.grad(function)), 1.0)


@once
def test_a_loop_over_gradients_may_not_be_differentiated(adjoint):
    """Steps of gradient descent, inside a scan, differentiated from outside."""
    gradient = jax.grad(scalar(adjoint))

    def trained(params, x):
        def descend(params, _):
            return params - 0.1 * gradient(params, x), None

        return jnp.sum(jax.lax.scan(descend, params, None, length=2)[0])

    arguments = draw(2, 3, 3), draw(2, 3)
    jax.eval_shape(trained, *arguments)
    with pytest.raises(TypeError, match="differentiated once"):
        jax.eval_shape(jax.grad(trained), *arguments)


@once
def test_forward_mode_is_an_error(adjoint):
    x = draw(2, 3)
    with pytest.raises(TypeError, match=r"forward-mode.*custom_vjp"):
        jax.jvp(lambda x: scalar(adjoint)(draw(2, 3, 3), x), (x,), (x,))


@once
def test_a_backward_pass_is_linear_in_the_cotangent(adjoint):
    """By which, alone, it may be differentiated: two transposes are forward mode."""
    params, x, v = jnp.asarray(draw(3, 4, 4)), jnp.asarray(draw(2, 4)), jnp.asarray(draw(2, 4))

    def output(adjoint, x):
        return reversible_scan(tanh_block, params, x, key=KEY, adjoint=adjoint)

    @jax.jit
    def run(x, v):
        _, vjp = jax.vjp(lambda x: output(adjoint, x), x)
        (twice,) = jax.vjp(lambda u: vjp(u)[0], jnp.zeros_like(x))[1](v)
        return twice, jax.jvp(lambda x: output(Direct(), x), (x,), (v,))[1]

    twice, tangent = run(x, v)
    np.testing.assert_allclose(twice, tangent, rtol=1e-5, atol=1e-6)


def test_quantizing_twice_in_a_scan():
    """(x^2)^2, whose second derivative is 12 x^2."""

    def function(x):
        return jax.lax.scan(lambda c, _: (quantize(c, 8) ** 2, None), x, None, length=2)[0]

    assert jax.grad(function)(1.0) == 4
    assert jax.grad(jax.grad(function))(1.0) == 12
    assert jax.jit(jax.hessian(function))(1.0) == 12
    assert jax.jvp(jax.grad(function), (1.0,), (1.0,))[1] == 12
    assert jax.grad(jax.grad(jax.grad(function)))(1.0) == 24


@pytest.mark.parametrize(
    ("step", "parts"),
    fast(
        2,
        [
            (BDIA(0.25, "sample", 5), 2),
            (Euler(5), 2),
            (BDIA(), 1),
            (BDIA(0.6, "minus", 5), 1),
            (BDIA(0.6, "minus", None), 1),
        ],
    ),
    ids=str,
)
def test_direct_is_right_to_second_order(step, parts):
    """Against a smooth network without a grid, which reaches the same states by what it adds.

    What rounding adds to a state is a constant for a straight-through derivative of any order.
    """
    depth, bits = 2, step.frac_bits
    with jax.enable_x64(True):
        params, x = jnp.asarray(draw(depth, 3, 3), float), jnp.asarray(draw(2, 3), float)
        block = (tanh_block, lambda w, x, key: jnp.sin(x) * w[0])[:parts]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(depth * parts))
        of_scan = jax.random.fold_in(KEY, np.uint32(2**32 - 1))
        signs = [step.sign(jax.random.split(key)[0], of_scan, 2) for key in keys]
        signs[0] *= 0

        def on_grid(x_prev, x, h, sign, y):
            if not step.exact:
                return y if bits is None else quantize(y, bits)
            n_next, _ = step.up(to_grid(x_prev, bits), to_grid(x, bits), h, sign)
            return from_grid(n_next, bits, y.dtype)

        def loop(params, x, added=None):
            """The last state, and what rounding added to each; ``added``: no rounding, but this."""
            found = []

            def land(y, rounded):
                found.append(rounded(y) - y if added is None else added[len(found)])
                return y + found[-1]

            x_prev = x = land(x, lambda x: x if bits is None else quantize(x, bits))
            for i, sign in enumerate(signs):
                h = block[i % parts](params[i // parts], x, None)
                before = x_prev, x, h, sign
                x_prev, x = x, land(step.real(*before), functools.partial(on_grid, *before))
            return x, found

        output, added = jax.device_get(loop(params, x))

        def weighted(y):
            return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape))

        def smooth(params, x):
            return weighted(loop(params, x, added)[0])

        @jax.jit
        def run(params, x):
            direct = scalar(step=step, block=block)
            return [
                [derivative(function)(params, x) for derivative in SECOND.values()]
                for function in (direct, smooth)
            ]

        y = reversible_scan(block, params, x, key=KEY, step=step, adjoint=Direct())
        np.testing.assert_allclose(y, output, rtol=1e-14)
        found, expected = run(params, x)
        assert all(np.any(leaf) for leaf in expected)
        chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------------------------------------
# Updates in the backward pass
# ---------------------------------------------------------------------------------------------


def first_part(p, x, key, shift):
    keep = jax.random.bernoulli(key, 0.8, x.shape)
    return jnp.tanh(x @ p["up"] + shift) @ p["down"] * keep * p["mask"]


def second_part(p, x, key, shift):
    return jnp.sin(x) * p["scale"] + p["frozen"]


BLOCKS, WIDTH, HIDDEN = 4, 6, 7
TRAINED = ("up", "down", "scale")


def stacked():
    shapes = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH), "scale": (WIDTH,), "frozen": (WIDTH,)}
    params = {
        name: jnp.asarray(draw(BLOCKS, *shape, seed=i)) / 3
        for i, (name, shape) in enumerate(shapes.items())
    }
    return params | {"mask": jnp.arange(BLOCKS * WIDTH).reshape(BLOCKS, WIDTH) % 3}


def momentum(params, grads, state):
    """New momenta, and parameters by them; leaves that are not trained are None."""
    state = {name: 0.9 * state[name] + grads[name] for name in TRAINED}
    trained = {name: params[name] - 0.1 * state[name] for name in TRAINED}
    return dict.fromkeys(params) | trained, state


WAYS = {
    "online-bdia": (BDIA(), Online()),
    "online-sample-r": (BDIA(0.25, "sample", 9, 1), Online()),
    "online-midpoint": (Midpoint(), Online()),
    "checkpoint-bdia": (BDIA(), Checkpoint()),
    "checkpoint-midpoint": (Midpoint(), Checkpoint()),
    "checkpoint-euler": (Euler(), Checkpoint()),
    "checkpoint-4-bits": (Euler(), Checkpoint(bits=4)),
}


def loss(params, x, shift, step, adjoint, parts=2):
    block = (
        (first_part, second_part)
        if parts == 2
        else lambda p, x, key, shift: first_part(p, x, key, shift) + second_part(p, x, key, shift)
    )
    settings = {"key": KEY, "consts": (shift,), "step": step, "adjoint": adjoint}
    return jnp.sum(jnp.sin(reversible_scan(block, params, x, **settings)))


@pytest.mark.parametrize(
    ("way", "parts"), fast(4, [*((way, 2) for way in WAYS), ("online-bdia", 1)])
)
def test_an_update_is_the_ordinary_gradient_and_then_the_function(way, parts):
    step, adjoint = WAYS[way]
    params, x, shift = stacked(), jnp.asarray(draw(3, WIDTH)), jnp.asarray(draw(HIDDEN)) / 5
    trained = {name: p if name in TRAINED else None for name, p in params.items()}
    state = {name: jnp.cos(params[name]) for name in TRAINED}

    @jax.jit
    def ordinary(params, state, x, shift):
        gradients = jax.grad(loss, (0, 1, 2), allow_int=True)
        d_params, d_x, d_shift = gradients(params, x, shift, step, adjoint, parts)
        return *momentum(params, d_params, state), d_params["frozen"], d_x, d_shift

    @jax.jit
    def in_backward(trained, state, params, x, shift):
        def updated(trained, state, params, x, shift, probe):
            update = Update(momentum, trained, state)
            own = dataclasses.replace(adjoint, update=update, probe=probe)
            return loss(params, x, shift, step, own, parts)

        arguments = trained, state, params, x, shift, BackwardReport.zeros(BLOCKS)
        return jax.grad(updated, tuple(range(6)), allow_int=True)(*arguments)

    expected = ordinary(params, state, x, shift)
    *found, report = in_backward(trained, state, params, x, shift)
    # What is read is update.params: the gradient by these parameters themselves is 0.
    by_params = found[2]
    assert by_params["mask"].dtype == jax.dtypes.float0
    assert not any(np.any(by_params[name]) for name in TRAINED)
    found[2] = by_params["frozen"]
    assert np.any(found[2])
    chex.assert_trees_all_close(tuple(found), expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(report, BackwardReport.zeros(BLOCKS))
    assert all(np.any(found[0][name] != params[name]) for name in TRAINED)


@pytest.mark.slow
@once
def test_every_block_gets_its_own_state_and_gradient(adjoint):
    """The function is called with what belongs together, and its results go where they belong."""
    for blocks in (1, 2, 5):
        params, x = jnp.asarray(draw(blocks, 3, 3)), jnp.asarray(draw(2, 3))
        seen = {"index": jnp.arange(blocks, dtype=jnp.float32), "calls": jnp.zeros((blocks, 2))}

        def label(w, d_w, state):
            calls = state["calls"] + jnp.stack([jnp.float32(1), jnp.sum(d_w)])
            return 100 * state["index"] + 0 * w + w[0, 0], state | {"calls": calls}

        @jax.jit
        def run(params, state, x, label=label):
            def updated(params, state):
                own = dataclasses.replace(adjoint, update=Update(label, params, state))
                return scalar(own)(params, x)

            return jax.grad(updated, (0, 1))(params, state), jax.grad(scalar(adjoint))(params, x)

        (new, state), gradient = run(params, seen, x)
        expected = 100 * np.arange(blocks)[:, None, None] + np.asarray(params)[:, :1, :1]
        np.testing.assert_allclose(new, np.broadcast_to(expected, new.shape), rtol=1e-6)
        np.testing.assert_array_equal(state["index"], np.arange(blocks))
        np.testing.assert_array_equal(state["calls"][:, 0], 1)
        np.testing.assert_allclose(state["calls"][:, 1], gradient.sum((1, 2)), rtol=1e-4, atol=1e-5)


def temporaries(function, *shapes, donate=()):
    """Bytes that a compiled program needs beside its arguments and results."""
    compiled = jax.jit(function, donate_argnums=donate).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.buffers
@pytest.mark.parametrize("way", ["online-bdia", "checkpoint-bdia", "checkpoint-euler"])
def test_no_gradient_of_all_blocks_and_no_copy_of_them(way):
    """Temporaries grow with the number of blocks by what is kept, and not by the parameters."""
    step, adjoint = WAYS[way]
    width, hidden = 64, 256

    def block(p, x, key):
        z = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-5)
        return jnp.tanh(z @ p["up"]) @ p["down"]

    def descend(params, grads, state):
        state = jax.tree.map(lambda m, d: 0.9 * m + d, state, grads)
        return jax.tree.map(lambda p, m: p - 0.1 * m, params, state), state

    def in_backward(params, state, x):
        def updated(params, state):
            own = dataclasses.replace(adjoint, update=Update(descend, params, state))
            y = reversible_scan(block, params, x, key=KEY, step=step, adjoint=own)
            return jnp.mean(y**2)

        return jax.grad(updated, (0, 1))(params, state)

    def ordinary(params, state, x):
        def loss(params):
            y = reversible_scan(block, params, x, key=KEY, step=step, adjoint=adjoint)
            return jnp.mean(y**2)

        return descend(params, jax.grad(loss)(params), state)

    x = jax.ShapeDtypeStruct((2, 4, width), jnp.float32)
    grown = {}
    for train in (in_backward, ordinary) if way == "online-bdia" else (in_backward,):
        needed = []
        for blocks in (8, 24):
            shapes = {"up": (blocks, width, hidden), "down": (blocks, hidden, width)}
            params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
            needed.append(temporaries(train, params, params, x, donate=(0, 1)))
        grown[train] = (needed[1] - needed[0]) / 16
    one_block = 4 * 2 * width * hidden
    # Side bits and checksums, or the block's input; and some words: its number, key, report.
    kept = x.size // 8 + 2 * 4 if isinstance(adjoint, Online) else 4 * x.size
    assert grown[in_backward] < kept + 64 < one_block / 10
    if ordinary in grown:
        assert grown[ordinary] > one_block


@once
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"state": jnp.ones((2, 3))}, ValueError, r"update\.state needs.*3 blocks.*\(2, 3\)"),
        ({"state": {"m": jnp.ones(())}}, ValueError, r"update\.state\['m'\].*3 blocks.*\(\)"),
        ({"state": jnp.ones(3, jnp.int32)}, TypeError, r"update\.state must be.*float.*int32"),
        (
            {"params": jnp.ones((2, 4, 4))},
            ValueError,
            r"update\.params needs.*3 blocks.*\(2, 4, 4\)",
        ),
        (
            {"params": jnp.ones((3, 4, 5))},
            ValueError,
            r"dtype of its leaf.*float32\[3, 4, 4\]; got float32\[3, 4, 5\]",
        ),
        (
            {"params": jnp.ones((3, 4, 4), jnp.bfloat16)},
            ValueError,
            r"dtype of its leaf.*float32\[3, 4, 4\]; got bfloat16",
        ),
        ({"params": jnp.ones((3, 4, 4), jnp.int8)}, TypeError, r"update\.params must be.*int8"),
        ({"params": {"w": jnp.ones((3, 4, 4))}}, ValueError, r"structure of stacked_params"),
        (
            {"function": lambda p, d, s: (p, s[:0])},
            ValueError,
            "shapes and dtypes that it was given",
        ),
        ({"function": lambda p, d, s: (p.astype(jnp.bfloat16), s)}, ValueError, "bfloat16"),
        ({"function": None}, TypeError, r"update must be Update\(function, params, state\)"),
    ],
)
def test_updates_that_cannot_be(adjoint, change, error, says):
    update = Update(lambda p, d, s: (p, s), jnp.ones((3, 4, 4)), jnp.ones((3, 2)))._replace(
        **change
    )
    own = dataclasses.replace(adjoint, update=update)
    with pytest.raises(error, match=says):
        jax.eval_shape(jax.grad(scalar(own), 1), jnp.ones((3, 4, 4)), jnp.ones((2, 4)))


@once
def test_an_update_of_parameters_among_which_is_none(adjoint):
    """As of a layer without a bias; None, or what is not trained, may come before what is."""
    weights = jnp.asarray(draw(2, BLOCKS, WIDTH, WIDTH)) / 3
    params = {"bias": None, "fixed": weights[0], "v": 2 * weights[0], "w": weights[1]}
    x = jnp.asarray(draw(3, WIDTH))

    def own(params, adjoint):
        def block(p, x, key):
            return jnp.tanh(x @ p["v"] + x @ p["fixed"]) @ p["w"]

        return jnp.sum(
            reversible_scan(block, params, x, step=BDIA(signs="minus"), adjoint=adjoint) ** 2
        )

    def descend(params, gradients, state):
        return jax.tree.map(lambda p, d: p - d / 10, params, gradients), state

    def updated(trained):
        update = Update(descend, trained, {"none": jnp.zeros((BLOCKS, 1))})
        return own(params, dataclasses.replace(adjoint, update=update))

    trained = params | {"fixed": None}
    found = jax.jit(jax.grad(updated))(trained)
    gradients = jax.jit(jax.grad(own), static_argnums=1)(params, adjoint)
    expected, _ = descend(trained, gradients | {"fixed": None}, None)
    assert updated(trained) == pytest.approx(own(params, adjoint))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for name in ("v", "w"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------
# Checkpoints in fewer bits
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("features", [1, 64, 100])
def test_rounded_checkpoints(bits, features):
    """Off by half a level at most, of 2^bits - 1 levels between the extremes of 64 features."""
    x = np.array(draw(3, features)) * np.float32([[1e-3], [1], [300]])
    x[0, -1] = 0
    kept = rounded(jnp.asarray(x), bits)
    found = restored(kept, bits, features, jnp.float32)
    assert found.shape == x.shape
    levels = 2 ** (bits - 1) - 1
    for start in range(0, features, GROUP):
        group = np.s_[:, start : start + GROUP]
        largest = np.abs(x[group]).max(-1, keepdims=True)
        # The scale is rounded to bfloat16: by 2^-9 of itself, at the extremes by as much of x.
        assert (np.abs(found[group] - x[group]) <= largest * (0.5 / levels + 2**-8)).all()
    groups = -(-features // GROUP)
    per_word = (8 if 8 % bits == 0 else 32) // bits
    assert kept[0].nbytes == 3 * -(-groups * GROUP // per_word) * kept[0].itemsize
    assert kept[1].nbytes == 3 * groups * 2
    zeros = rounded(jnp.zeros((2, features)), bits)
    np.testing.assert_array_equal(restored(zeros, bits, features, jnp.bfloat16), 0)


def test_rounded_checkpoints_of_what_is_not_finite_are_not_finite():
    x = jnp.ones((1, 64)).at[0, 3].set(jnp.nan)
    assert np.isnan(restored(rounded(x, 4), 4, 64, jnp.float32)).any()


@pytest.mark.parametrize("parts", [1, 2])
def test_the_gradient_is_that_at_the_rounded_inputs(parts):
    """The forward pass is exact; every block is differentiated at what its checkpoint holds."""
    params, x = jnp.asarray(draw(3, 70, 70)) / 9, jnp.asarray(draw(2, 70))
    block = (tanh_block, lambda w, x, key: jnp.sin(x) * w[0])[:parts]

    at_rounded = jax.custom_vjp(lambda p, w, x: block[p](w, x, None), nondiff_argnums=(0,))
    at_rounded.defvjp(
        lambda p, w, x: (block[p](w, x, None), (w, restored(rounded(x, 4), 4, 70, x.dtype))),
        lambda p, kept, g: jax.vjp(lambda w, x: block[p](w, x, None), *kept)[1](g),
    )

    def loop(params, x):
        for k in range(3):
            for p in range(parts):
                x = x + at_rounded(p, params[k], x)
        return jnp.sum(jnp.sin(x)), x

    def ours(params, x):
        settings = {"step": Euler(), "adjoint": Checkpoint(bits=4)}
        y = reversible_scan(block, params, x, **settings)
        return jnp.sum(jnp.sin(y)), y

    @jax.jit
    def run(*given):
        return [jax.grad(function, (0, 1), has_aux=True)(*given) for function in (ours, loop)]

    (found, y), (expected, expected_y) = run(params, x)
    np.testing.assert_allclose(y, expected_y, rtol=1e-6)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    exact = jax.grad(lambda p: scalar(step=Euler(), block=block)(p, x))(params)
    assert np.abs(exact - found[0]).max() > 1e-3


# ---------------------------------------------------------------------------------------------
# Memory over depth, and the report
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.buffers
@pytest.mark.parametrize(
    ("step", "adjoint", "bits"),
    [
        (BDIA(), Online(), 1),
        (BDIA(0.125, "sample"), Online(), 3.2),
        (Midpoint(), Online(), 0),
        (Euler(), Checkpoint(), 32),
        (Euler(), Checkpoint(bits=4), 4.25),
    ],
    ids=str,
)
def test_what_is_kept_per_element_and_block(step, adjoint, bits):
    """In a program as compiled; 3 bits are packed ten to a word, a scale is 16 bits for 64."""

    def train(params, x):
        def loss(params):
            block = lambda w, x, key: jnp.tanh(x * w)  # noqa: E731
            y = reversible_scan(block, params, x, key=KEY, step=step, adjoint=adjoint)
            return jnp.mean(y**2)

        return jax.grad(loss)(params)

    x = jax.ShapeDtypeStruct((2, 64, 320), jnp.float32)
    needed = [
        temporaries(train, jax.ShapeDtypeStruct((blocks, 320), jnp.float32), x)
        for blocks in (16, 48)
    ]
    slope = (needed[1] - needed[0]) / 32
    own = 320 * 4 + 2 * 4 + 64
    assert bits * x.size / 8 <= slope <= bits * x.size / 8 + own


@pytest.mark.parametrize(
    ("step", "adjoint"),
    [(BDIA(), Online()), (BDIA(), Checkpoint()), (Euler(), Checkpoint(bits=8))],
    ids=str,
)
def test_what_waits_in_the_memory_of_the_host_is_the_same(step, adjoint):
    params, x = 0.3 * draw(5, 8, 8), draw(2, 3, 8, seed=1)
    expected, found = (
        jax.jit(jax.grad(scalar(dataclasses.replace(adjoint, keep_in=memory), step), (0, 1)))(
            params, x
        )
        for memory in ("device", "host")
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_narrow_cotangents():
    """States are as exact; the gradient is that of wide ones, rounded once more per block."""
    params, x = 0.3 * draw(12, 8, 8), draw(2, 3, 8, seed=1)

    def gradients(narrow, dtype):
        def function(probe, params, x):
            adjoint = Online(probe, narrow_cotangents=narrow)
            return scalar(adjoint, BDIA())(params.astype(dtype), x.astype(dtype))

        return jax.jit(jax.grad(function, (0, 1)))(BackwardReport.zeros(12), params, x)

    (report, narrow), (_, wide) = (gradients(narrow, jnp.bfloat16) for narrow in (True, False))
    assert not report.mismatched.any()
    assert not np.array_equal(narrow, wide)
    # A bfloat16 is right to 2^-9; each of 12 blocks rounds two cotangents, by chance.
    difference = jnp.linalg.norm(jnp.float32(narrow) - jnp.float32(wide))
    assert difference < 2**-9 * 24**0.5 * jnp.linalg.norm(jnp.float32(wide))
    # Where the blocks compute in float32, nothing is rounded.
    for found, expected in zip(gradients(True, jnp.float32), gradients(False, jnp.float32)):
        chex.assert_trees_all_equal(found, expected)


def test_another_memory():
    for adjoint in (Online, Checkpoint):
        with pytest.raises(ValueError, match="keep_in must be one of device, host; got 'disk'"):
            adjoint(keep_in="disk")
    with pytest.raises(ValueError, match=r"keep_in='host' is for .*; got method='standard'"):
        ReversibleSettings(method="standard", keep_in="host")
    assert ReversibleSettings(keep_in="host").adjoint() == Online(keep_in="host")
    for method in ("bdia-checkpoint", "standard", "coupled"):
        with pytest.raises(
            ValueError, match=rf"narrow_cotangents is for .*; got method='{method}'"
        ):
            ViTConfig(method=method, narrow_cotangents=True)


@once
def test_report_of_the_backward_pass(adjoint):
    """Zeros where all is well; and for checkpoints, of which none is taken back."""
    params, x = jnp.asarray(draw(4, 3, 3)), jnp.asarray(draw(2, 3))

    @jax.jit
    def reports(probe, params):
        def loss(probe, params, step):
            own = dataclasses.replace(adjoint, probe=probe)
            return scalar(own, step, (tanh_block, lambda w, x, key: jnp.sin(x)))(params, x)

        steps = BDIA(), BDIA(0.25, "sample", 5, 2)
        return [jax.grad(loss, (0, 1))(probe, params, step)[0] for step in steps]

    for report in reports(BackwardReport.zeros(4), params):
        chex.assert_trees_all_equal(report, BackwardReport.zeros(4))


@pytest.mark.slow
@pytest.mark.optimized
def test_a_thousand_blocks():
    """One bit per element and block; no integer is wrong, and the program does not grow."""

    def block(params, x, key):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    x = jnp.asarray(draw(2, 4, 64))
    texts, needed = [], {}
    for depth in (500, 1000):
        params = {
            "up": jnp.asarray(draw(depth, 64, 16)) / 20,
            "down": jnp.asarray(draw(depth, 16, 64, seed=1)) / 20,
        }

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1))
        def gradient(params, probe):
            y = reversible_scan(block, params, x, key=jax.random.key(2), adjoint=Online(probe))
            return jnp.mean(y**2)

        probe = BackwardReport.zeros(depth)
        lowered = gradient.lower(params, probe)
        texts.append(len(lowered.as_text().splitlines()))
        compiled = lowered.compile()
        needed[depth] = compiled.memory_analysis().temp_size_in_bytes
        for _ in range(2):
            d_params, report = compiled(params, probe)
            assert not report.mismatched.any()
            assert all(jnp.isfinite(d).all() and d.any() for d in d_params.values())
            params = jax.tree.map(lambda p, d: p - 0.1 * d, params, d_params)
    assert texts[0] == texts[1]
    # A bit per element, 4 bytes of checksum per sample; the block's number and key.
    assert (needed[1000] - needed[500]) / 500 < x.size / 8 + 2 * 4 + 64
