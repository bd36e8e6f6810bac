"""Online back-propagation against automatic differentiation, and against the paper's equations."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _blocks import BATCH, case, covering, names, pairs

import bdia_jax
from bdia_jax import BackwardReport, reversible_scan, reversible_scan_pair

FACTORS = {
    "kind": ["mlp", "conv", "attention"],
    "m": [1, 0, 2],
    "frac_bits": [9, 5, 0, -2],
    "depth": [6, 2, 1],
    "dropout": [0.0, 0.1],
    "tolerance_bits": [0, 2],
}
ROWS = covering(**FACTORS)


def key_of(seed):
    # Cheap to compile; the other tests use JAX's default generator.
    return jax.random.key(seed, impl="unsafe_rbg")


def relative(a, b):
    """The largest difference, relative to the largest element of ``b``, over a tree's leaves."""

    def of(a, b):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = (np.asarray(leaf, np.float64) for leaf in (a, b))
        return np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30)

    return max(jax.tree.leaves(jax.tree.map(of, a, b)))


def value_and_gradients(forward):
    """The output, and the gradients of a scalar function of it by every argument."""

    def loss(*arguments):
        y = forward(*arguments)
        weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        return jnp.sum(jnp.sin(y) * weights), y

    def run(*arguments):
        gradients, y = jax.grad(loss, tuple(range(len(arguments))), has_aux=True)(*arguments)
        return y, gradients

    return run


def transcription(block, params, x, shift, mask, *, key, m, frac_bits):
    """The paper's equations, line by line: floats and a Python loop, no integers, no scan."""
    signs, keys = signs_and_keys(key, len(params["scale"]), len(x))

    def quantized(v):
        q = jax.lax.stop_gradient(jnp.round(v * 2.0**frac_bits) / 2.0**frac_bits)
        return q + (v - jax.lax.stop_gradient(v))

    x_k = quantized(x)
    for k, (sign, key_k) in enumerate(zip(signs, keys, strict=True)):
        theta = {name: p[k] for name, p in params.items()}
        h = block(theta, x_k, key_k, shift, mask)
        if k == 0:
            x_next = x_k + quantized(h)
        else:
            gamma = sign.reshape(-1, *[1] * (x.ndim - 1)) * 2.0**-m
            s = jnp.mod(-x_prev * 2.0**frac_bits, 2**m)
            side = jax.lax.stop_gradient(s * 2.0**-frac_bits)
            x_next = gamma * (x_prev + side) + quantized((1 - gamma) * x_k + (1 + gamma) * h)
        x_prev, x_k = x_k, x_next  # noqa: F841
    return x_k


def signs_and_keys(key, depth, batch):
    """What a scan draws from its key: γ's signs, and a key per block."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(depth))
    pairs = [jax.random.split(key) for key in keys]
    signs = [2 * jax.random.bernoulli(pair[0], 0.5, (batch,)).astype(int) - 1 for pair in pairs]
    return signs, [pair[1] for pair in pairs]


def test_the_settings_cover_all_pairs():
    everything = [
        {name: setting, other: with_}
        for name, settings in FACTORS.items()
        for setting in settings
        for other, others in FACTORS.items()
        if other != name
        for with_ in others
    ]
    met = set().union(*map(pairs, ROWS))
    assert all(pairs(row) & met or pairs(dict(reversed(row.items()))) & met for row in everything)


@pytest.mark.parametrize("row", ROWS, ids=names(ROWS))
def test_gradients_are_those_of_the_forward_pass_that_was_run(row):
    """Online = stored = the paper's equations in float64; online = stored in float32."""
    row = dict(row)
    kind, depth, dropout = row.pop("kind"), row.pop("depth"), row.pop("dropout")
    m = row.pop("m")

    def run(backprop, dtype):
        block, params, x, (shift, mask) = case(kind, depth, dropout=dropout, dtype=dtype)
        if backprop == "paper":
            forward = functools.partial(
                transcription, jax.jit(block), key=key_of(5), m=m, frac_bits=row["frac_bits"]
            )
            compile_ = lambda f: f  # noqa: E731
        else:
            forward = functools.partial(scan, block, gamma=2.0**-m, backprop=backprop)
            compile_ = jax.jit
        run = compile_(
            value_and_gradients(lambda params, x, shift: forward(params, x, shift, mask))
        )
        return run(params, x, shift)

    def scan(block, params, x, shift, mask, **settings):
        return reversible_scan(
            block, params, x, key=key_of(5), consts=(shift, mask), **settings, **row
        )

    with jax.enable_x64(True):
        online, stored, paper = (run(how, jnp.float64) for how in ("online", "stored", "paper"))
        for output, gradients in (online, stored):
            np.testing.assert_array_equal(output, paper[0])
            assert relative(gradients, paper[1]) < 1e-10
        assert relative(online[1], stored[1]) < 1e-10
    online, stored = (run(how, jnp.float32) for how in ("online", "stored"))
    np.testing.assert_array_equal(online[0], stored[0])
    assert relative(online[1], stored[1]) < 1e-5


# ---------------------------------------------------------------------------------------------
# The networks that are not taken back
# ---------------------------------------------------------------------------------------------


def standard(block, params, x, shift, mask, *, key, update):
    """A residual network of which ``update(x_{k-1}, x_k, h, sign)`` says how to go on."""
    signs, keys = signs_and_keys(key, len(params["scale"]), len(x))
    x_prev = x
    for k in range(len(signs)):
        theta = {name: p[k] for name, p in params.items()}
        h = block(theta, x, keys[k], shift, mask)
        gamma = (signs[k] if k else 0 * signs[k]).reshape(-1, *[1] * (x.ndim - 1))
        x_prev, x = x, update(x_prev, x, h, gamma)
    return x


@pytest.mark.parametrize(
    ("gamma", "frac_bits", "update"),
    [
        (0.0, None, lambda x_prev, x, h, sign: x + h),
        (0.0, 5, lambda x_prev, x, h, sign: bdia_jax.quantize(x + h, 5)),
        (
            0.6,
            None,
            lambda x_prev, x, h, sign: (
                0.6 * sign * x_prev + (1 - 0.6 * sign) * x + (1 + 0.6 * sign) * h
            ),
        ),
        (
            0.6,
            5,
            lambda x_prev, x, h, sign: bdia_jax.quantize(
                0.6 * sign * x_prev + (1 - 0.6 * sign) * x + (1 + 0.6 * sign) * h, 5
            ),
        ),
    ],
    ids=["standard", "standard-on-the-grid", "gamma-0.6", "gamma-0.6-on-the-grid"],
)
def test_other_gammas_are_plain_networks(gamma, frac_bits, update):
    key = jax.random.key(2)
    with jax.enable_x64(True):
        block, params, x, (shift, mask) = case("mlp", 4, dropout=0.1, dtype=jnp.float64)
        if frac_bits is not None:
            x = bdia_jax.quantize(x, frac_bits)
        settings = {"gamma": gamma, "frac_bits": frac_bits, "key": key, "backprop": "stored"}

        def ours(params, x, shift):
            return reversible_scan(block, params, x, consts=(shift, mask), **settings)

        def theirs(params, x, shift):
            return standard(block, params, x, shift, mask, key=key, update=update)

        y, gradients = jax.jit(value_and_gradients(ours))(params, x, shift)
        expected_y, expected = jax.jit(value_and_gradients(theirs))(params, x, shift)
        assert relative(y, expected_y) < 1e-13
        assert relative(gradients, expected) < 1e-11


def test_online_with_gamma_zero_needs_no_key_and_no_grid():
    block, params, x, _ = simple(3)
    plain = x
    for k in range(3):
        plain = plain + block(params[k], plain, None)
    for backprop in ("online", "stored"):
        settings = {"gamma": 0.0, "frac_bits": None, "backprop": backprop}
        chex.assert_trees_all_close(reversible_scan(block, params, x, **settings), plain, rtol=1e-6)


# ---------------------------------------------------------------------------------------------
# Composition. One small block, and float32: that online is right is shown above.
# ---------------------------------------------------------------------------------------------

KEY = key_of(7)


def simple_block(w, x, key, *consts):
    del key
    return jnp.tanh(x @ w + sum(consts))


def simple(depth, width=5):
    """A block, its parameters, an input and a target."""
    rng = np.random.default_rng(3)
    params, x, target = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((depth, width, width), (BATCH, width), (BATCH, width))
    )
    return simple_block, params / 2, x, target


def both(function):
    """``function(scan)`` with online and with stored back-propagation, jitted."""
    return [
        jax.jit(function(functools.partial(reversible_scan, backprop=backprop, key=KEY)))
        for backprop in ("online", "stored")
    ]


def assert_alike(function, *arguments, tolerance=1e-5):
    """Online and stored agree; something is not zero, and all is finite."""
    online, stored = (run(*arguments) for run in both(function))
    chex.assert_tree_all_finite(stored)
    assert relative(online, stored) < tolerance
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(stored))
    return stored


def test_value_and_grad_has_aux():
    block, params, x, target = simple(3)

    def function(scan):
        def loss(params):
            y = scan(block, params, x)
            return jnp.mean((y - target) ** 2), y

        return jax.value_and_grad(loss, has_aux=True)

    (value, y), _ = assert_alike(function, params)
    np.testing.assert_allclose(value, np.mean((y - target) ** 2), rtol=1e-6)


def test_without_jit():
    block, params, x, _ = simple(2)
    eager, jitted = (
        transform(jax.grad(lambda p: jnp.sum(reversible_scan(block, p, x, key=KEY) ** 2)))(params)
        for transform in (lambda f: f, jax.jit)
    )
    chex.assert_trees_all_close(eager, jitted, rtol=1e-5)


def test_jacobian():
    """vmap over cotangents: the backward pass is mapped, and the forward pass is not."""
    block, params, x, _ = simple(3)
    assert_alike(lambda scan: jax.jacrev(lambda p: scan(block, p, x)), params)


def test_a_block_with_control_flow():
    """A scan, a branch, a checkpoint, and a derivative rule of its own."""
    _, params, x, _ = simple(3)

    @jax.custom_vjp
    def doubled_gradient(x):
        return jnp.sin(x)

    doubled_gradient.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))

    def block(w, x, key):
        x, sums = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), jnp.sum(c)), x, None, length=3)
        x = jax.checkpoint(lambda x: doubled_gradient(jnp.tanh(x @ w)))(x)
        x = jax.lax.cond(sums[0] > 0, lambda x: 1.5 * x, lambda x: jnp.exp(-x), x)
        return jnp.sort(x) + jax.random.normal(key, x.shape)

    assert_alike(lambda scan: jax.grad(lambda p, x: jnp.sum(scan(block, p, x)), (0, 1)), params, x)


def test_inside_scan_cond_and_checkpoint_with_integers_and_keys():
    """All of them at once, differentiated from outside."""
    _, params, x, _ = simple(3)
    others = {"scale": jnp.arange(3), "key": jax.random.split(KEY, 3)}
    masks = jnp.array([[1, 0, 1, 1, 1], [0, 1, 1, 1, 0]])

    def block(p, x, key, mask):
        noise = jax.random.normal(p["key"], x.shape)
        return jnp.where(mask > 0, jnp.tanh(x @ p["w"]) * p["scale"] + noise, 0)

    def function(scan):
        def loss(params, x):
            def run(x, mask):
                return scan(block, others | {"w": params}, x, consts=(mask,))

            def step(x, mask):
                x = jax.checkpoint(run)(x, mask)
                return jax.lax.cond(mask[0] > 0, run, lambda x, mask: x, x, mask) / 3, None

            return jnp.sum(jax.lax.scan(step, x, masks)[0] ** 2)

        return jax.grad(loss, (0, 1))

    assert_alike(function, params, x)


@pytest.fixture(params=["several devices", "one CPU", "one accelerator"])
def fences(request, monkeypatch):
    """What is around the blocks: barriers; and on an accelerator, constraints of layouts."""
    if request.param == "several devices":
        return
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    if request.param == "one accelerator":
        forced = lambda *arrays, cpu, default: default(*arrays)  # noqa: E731
        monkeypatch.setattr(jax.lax, "platform_dependent", forced)


@pytest.mark.usefixtures("fences")
def test_vmap_over_inputs_and_keys():
    """As a loop over them: each with signs of its own."""
    block, params, x, _ = simple(3)
    # Not with the cheap generator: what it draws depends on the size of the batch.
    xs, keys = jnp.stack([x, -x, 2 * x]), jax.random.split(jax.random.key(0), 3)

    def gradients(params, x, key):
        def loss(params, x):
            return jnp.sum(jnp.sin(reversible_scan(block, params, x, key=key)))

        return jax.grad(loss, (0, 1))(params, x)

    mapped = jax.jit(jax.vmap(gradients, (None, 0, 0)))(params, xs, keys)
    one = jax.jit(gradients)
    looped = [one(params, x, key) for x, key in zip(xs, keys)]
    chex.assert_trees_all_close(mapped, jax.tree.map(lambda *g: jnp.stack(g), *looped), rtol=1e-5)


def test_vmap_over_parameters():
    """An ensemble: the same input through several networks."""
    block, params, x, _ = simple(3)
    ensemble = jnp.stack([params, params[::-1], -params])

    def function(scan):
        return jax.vmap(jax.grad(lambda params: jnp.sum(scan(block, params, x) ** 2)))

    assert_alike(function, ensemble)


@pytest.mark.usefixtures("fences")
def test_gradient_accumulation_in_a_scan():
    block, params, x, _ = simple(3)
    keys = jax.random.split(KEY, 4)
    micro_batches = jnp.stack([x, -x, 2 * x, x / 2])

    def gradient(params, x, key):
        return jax.grad(lambda p: jnp.sum(reversible_scan(block, p, x, key=key) ** 2))(params)

    def accumulated(params):
        def add(total, batch):
            return total + gradient(params, *batch), None

        return jax.lax.scan(add, jnp.zeros_like(params), (micro_batches, keys))[0]

    one = jax.jit(gradient)
    expected = sum(one(params, x, key) for x, key in zip(micro_batches, keys))
    assert relative(jax.jit(accumulated)(params), expected) < 1e-5


@pytest.mark.usefixtures("fences")
def test_inside_checkpoint():
    block, params, x, _ = simple(3)

    def function(scan):
        @jax.checkpoint
        def forward(params, x):
            return jnp.sin(scan(block, params, jnp.cos(x)))

        return jax.grad(lambda params, x: jnp.sum(forward(params, x) ** 2), (0, 1))

    assert_alike(function, params, x)


def test_two_stacks_of_different_width_in_a_row():
    block, narrow, x, _ = simple(2)
    wide, between = simple(3, width=8)[1], jnp.asarray(np.eye(5, 8), jnp.float32)

    def function(scan):
        def loss(narrow, between, wide, x):
            x = scan(block, narrow, x)
            return jnp.sum(scan(block, wide, jnp.tanh(x @ between)) ** 2)

        return jax.grad(loss, (0, 1, 2, 3))

    assert_alike(function, narrow, between, wide, x)


@pytest.mark.parametrize("inner", ["online", "stored"])
def test_a_stack_inside_a_block_of_another(inner):
    _, params, x, _ = simple(2)
    nested = jnp.stack([params, params[::-1], -params])

    def function(scan):
        def outer_block(params, x, key):
            return reversible_scan(simple_block, params, x / 2, key=key, backprop=inner)

        return jax.grad(lambda p, x: jnp.sum(scan(outer_block, p, x) ** 2), (0, 1))

    assert_alike(function, nested, x)


def test_closed_over_values():
    """Constants, values traced by jit, and values that a gradient is asked for; floats and ints."""
    _, params, x, shift = simple(3)
    constant = jnp.arange(5.0) / 10

    def function(scan):
        def loss(params, shift, order, scale):
            def block(w, x, key):
                return simple_block(w, x, key, shift[:, order], constant) * scale

            return jnp.sum(scan(block, params, x) ** 2)

        return jax.grad(loss, (0, 1, 3))

    order = jnp.array([4, 0, 3, 1, 2])
    closed = assert_alike(function, params, shift, order, jnp.float32(0.7))

    def explicit(params, shift, order, scale):
        def block(w, x, key, shift, order, scale):
            return simple_block(w, x, key, shift[:, order], constant) * scale

        y = reversible_scan(block, params, x, key=KEY, consts=(shift, order, scale))
        return jnp.sum(y**2)

    given = jax.jit(jax.grad(explicit, (0, 1, 3)))(params, shift, order, jnp.float32(0.7))
    assert relative(given, closed) < 1e-5


def test_integer_and_key_leaves():
    """In the parameters and in the consts: given to the block, and without a gradient."""
    _, params, x, shift = simple(3)
    stacked = {
        "w": params,
        "order": jnp.stack([jnp.roll(jnp.arange(5), k) for k in range(3)]),
        "key": jax.random.split(jax.random.key(1), 3),
        "use": jnp.array([True, False, True]),
    }

    def block(p, x, key, shift, mask, lengths):
        noise = jax.random.normal(p["key"], x.shape) / 10
        h = simple_block(p["w"], x[:, p["order"]], key, shift) + noise
        return jnp.where(mask & (jnp.arange(5) < lengths[:, None]), h, 0) * p["use"]

    mask, lengths = jnp.array([True, True, False, True, True]), jnp.array([5, 3, 4])

    def function(scan):
        def loss(w, shift):
            consts = (shift, mask, lengths)
            return jnp.sum(scan(block, stacked | {"w": w}, x, consts=consts) ** 2)

        return jax.grad(loss, (0, 1))

    d_w, _ = assert_alike(function, params, shift)
    assert not np.any(np.asarray(d_w[1]))

    def loss(stacked, lengths):
        y = reversible_scan(block, stacked, x, key=KEY, consts=(shift, mask, lengths))
        return jnp.sum(y**2)

    gradient = jax.jit(jax.grad(loss, (0, 1), allow_int=True))(stacked, lengths)
    assert gradient[0]["order"].dtype == gradient[1].dtype == jax.dtypes.float0
    np.testing.assert_allclose(gradient[0]["w"], d_w, rtol=1e-5, atol=1e-6)


def test_frozen_parameters_and_mixed_types():
    """Some parameters get no gradient; each of the others one of its own dtype."""
    _, params, x, shift = simple(3)
    stacked = {"frozen": params, "half": params.astype(jnp.bfloat16), "full": params[:, 0]}

    def block(p, x, key, shift):
        y = (x.astype(jnp.bfloat16) @ p["half"]).astype(jnp.float32)
        return simple_block(p["frozen"], x, key, shift) + jnp.tanh(y + p["full"])

    def function(scan):
        def loss(some, shift):
            stacked_params = some | {"frozen": jax.lax.stop_gradient(stacked["frozen"])}
            return jnp.sum(scan(block, stacked_params, x, consts=(shift,)) ** 2)

        return jax.grad(loss, (0, 1))

    some = {name: stacked[name] for name in ("half", "full")}
    # One rounding of a bfloat16 product is 2^-8 of it.
    gradient, _ = assert_alike(function, some, shift, tolerance=2**-7)
    assert {name: g.dtype.name for name, g in gradient.items()} == {
        "half": "bfloat16",
        "full": "float32",
    }


def test_no_gradient_by_the_parameters_is_asked_for():
    block, params, x, _ = simple(3)
    assert_alike(lambda scan: jax.grad(lambda x: jnp.sum(scan(block, params, x) ** 2)), x)


# ---------------------------------------------------------------------------------------------
# From state to state
# ---------------------------------------------------------------------------------------------


def cut(block, params, state, at, *, start=0, key=KEY, **settings):
    """A stack, cut into parts before the blocks ``at``."""
    for begin, end in zip((0, *at), (*at, len(params))):
        state = reversible_scan_pair(
            block,
            params[begin:end],
            state,
            start=start + begin,
            key=key,
            **settings,
        )
    return state


@pytest.mark.parametrize(("dtype", "generator"), [("float32", "threefry2x32"), ("bfloat16", "rbg")])
def test_a_stack_cut_into_parts_is_the_same_to_the_bit(dtype, generator):
    """Output and gradients: what crosses a cut are grid values and float32 cotangents."""
    block, params, x, _ = simple(5)
    x, key = x.astype(dtype), jax.random.key(7, impl=generator)

    def gradients(at):
        def loss(params, x):
            state = cut(block, params, (x, x), at, key=key, compute_dtype=x.dtype)
            assert state[0].dtype == state[1].dtype == jnp.float32
            return jnp.sum(jnp.sin(state[1])) + jnp.sum(jnp.cos(state[0])), state

        gradients, state = jax.grad(loss, (0, 1), has_aux=True)(params.astype(dtype), x)
        return state, gradients

    whole, parts = (jax.jit(functools.partial(gradients, at))() for at in ((), (1, 3)))
    chex.assert_trees_all_equal(whole, parts)


def test_gradients_by_both_states():
    block, params, x, other = simple(3)

    def function(scan):
        backprop = scan.keywords["backprop"]

        def loss(params, x_prev, x):
            state = cut(block, params, (x_prev, x), (), start=2, backprop=backprop)
            return jnp.sum(jnp.sin(state[0])) + jnp.sum(jnp.cos(state[1]))

        return jax.grad(loss, (0, 1, 2))

    assert_alike(function, params, other, x)


def test_block_zero_ignores_the_state_before_it():
    block, params, x, other = simple(2)

    def loss(x_prev, x):
        return jnp.sum(cut(block, params, (x_prev, x), ())[1] ** 2)

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    (value, (d_prev, d_x)), (same_value, (_, same_d_x)) = run(other, x), run(jnp.nan * x, x)
    assert not np.any(np.asarray(d_prev))
    assert value == same_value
    chex.assert_trees_all_equal(d_x, same_d_x)


# ---------------------------------------------------------------------------------------------
# Forward mode and second derivatives; the report; what is not finite
# ---------------------------------------------------------------------------------------------


def test_forward_mode_with_stored_is_the_transpose_of_reverse_mode():
    block, params, x, v = simple(3)
    with jax.enable_x64(True):
        params, x, v = (jnp.asarray(np.asarray(a), jnp.float64) for a in (params, x, v))

        def forward(x):
            return reversible_scan(block, params, x, key=KEY, backprop="stored")

        _, tangent = jax.jvp(forward, (x,), (v,))
        _, vjp = jax.vjp(forward, x)
        # <u, J v> = <Jᵀ u, v>
        u = jnp.cos(x)
        np.testing.assert_allclose(jnp.vdot(u, tangent), jnp.vdot(vjp(u)[0], v), rtol=1e-12)


def test_second_derivatives_with_stored():
    """Without the grid, the Hessian of the network written as a loop."""
    block, params, x, direction = simple(2)
    with jax.enable_x64(True):
        params, x, direction = (
            jnp.asarray(np.asarray(a), jnp.float64) for a in (params, x, direction)
        )

        def product(forward):
            gradient = jax.grad(lambda x: jnp.sum(jnp.sin(forward(x))))
            return jax.jvp(gradient, (x,), (direction,))[1]

        def loop(x):
            (_, signs), _ = signs_and_keys(KEY, 2, BATCH)
            gamma = signs[:, None] / 2
            y = x + block(params[0], x, None)
            return gamma * x + (1 - gamma) * y + (1 + gamma) * block(params[1], y, None)

        settings = {"key": KEY, "frac_bits": None, "backprop": "stored"}
        ours = product(lambda x: reversible_scan(block, params, x, **settings))
        np.testing.assert_allclose(ours, product(loop), rtol=1e-11)


def test_forward_mode_through_online_is_an_error():
    block, params, x, v = simple(2)
    with pytest.raises(TypeError, match=r"forward-mode.*custom_vjp"):
        jax.jvp(lambda x: reversible_scan(block, params, x, key=KEY), (x,), (v,))


@pytest.mark.parametrize("tolerance_bits", [0, 2])
def test_report_of_the_backward_pass(tolerance_bits):
    block, params, x, _ = simple(4)

    @jax.jit
    def report(probe, params):
        def loss(probe, params):
            settings = {"key": KEY, "tolerance_bits": tolerance_bits, "probe": probe}
            return jnp.sum(reversible_scan(block, params, x, **settings))

        return jax.grad(loss, (0, 1))(probe, params)

    seen, _ = report(BackwardReport.zeros(4), params)
    chex.assert_trees_all_equal(seen, BackwardReport.zeros(4))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 1e9])
@pytest.mark.parametrize("where", ["x", "block"])
def test_what_is_not_finite_or_out_of_range_becomes_nan_for_that_sample(where, bad):
    """And for no other: the rest of the batch is trained as if it were alone."""
    block, params, x, _ = simple(3)
    spoilt = jnp.zeros_like(x).at[1, 2].set(bad)

    def run(backprop):
        def loss(x, spoilt):
            y = reversible_scan(
                lambda *a: block(*a[:-1]) + a[-1],
                params,
                x,
                key=KEY,
                consts=(spoilt,),
                backprop=backprop,
            )
            return jnp.sum(y[::2] ** 2), y

        return jax.jit(jax.grad(loss, has_aux=True))

    for backprop in ("online", "stored"):
        compiled = run(backprop)
        if where == "x":
            gradient, y = compiled(x + spoilt, 0 * spoilt.at[1, 2].set(0))
        else:
            gradient, y = compiled(x, spoilt)
        clean_gradient, clean = compiled(x, jnp.zeros_like(x))
        assert np.isnan(y[1]).all()
        np.testing.assert_array_equal(y[::2], clean[::2])
        np.testing.assert_array_equal(gradient[::2], clean_gradient[::2])
