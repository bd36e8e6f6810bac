"""Adjoints against automatic differentiation, and against the paper's equations."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _blocks import BATCH, case
from _rows import covering, holds, names

import bdia_jax
from bdia_jax import (
    BDIA,
    Checkpoint,
    Direct,
    Euler,
    Midpoint,
    Online,
    reversible_scan,
    reversible_scan_pair,
)

FACTORS = {
    "kind": ["mlp", "conv"],
    "parts": [1, 2, 3],
    "signs": ["block", "sample", "minus", "plus"],
    "m": [1, 0, 2, 3, 4],
    "frac_bits": [9, 5, 0, -2],
    "tolerance_bits": [0, 2],
    "depth": [5, 2, 1],
    "dropout": [0.0, 0.1],
    "adjoint": [Online(), Checkpoint(), Direct()],
}
ROWS = covering(**FACTORS)
IDS = names([row | {"adjoint": type(row["adjoint"]).__name__} for row in ROWS])


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


def drawn(key, signs, steps, batch):
    """What a scan draws from its key: per step the signs of γ, and the key of the part."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(steps))
    keys = [jax.random.split(key) for key in keys]

    def fair(key, count):
        return 2 * jax.random.bernoulli(key, 0.5, (count,)).astype(int) - 1

    coin = fair(jax.random.fold_in(key, np.uint32(2**32 - 1)), 1)
    of = {
        "block": lambda i: fair(keys[i][0], batch),
        "sample": lambda i: coin * np.resize([1, -1], batch),
        "minus": lambda i: -np.ones(batch, int),
        "plus": lambda i: np.ones(batch, int),
    }
    return [of[signs](i) for i in range(steps)], [pair[1] for pair in keys]


def loop(block, params, x, shift, mask, *, key, signs, advance):
    """A network as a Python loop over blocks and their parts.

    ``advance(x_{k-1}, x_k, h, sign)`` says how to go on; the first sign of all is 0.
    """
    parts = block if isinstance(block, tuple) else (block,)
    depth = len(params["scale"])
    signs, keys = drawn(key, signs, depth * len(parts), len(x))
    x_prev = x
    for i, (sign, key) in enumerate(zip(signs, keys, strict=True)):
        theta = {name: p[i // len(parts)] for name, p in params.items()}
        h = parts[i % len(parts)](theta, x, key, shift, mask)
        sign = (sign if i else 0 * sign).reshape(-1, *[1] * (x.ndim - 1))
        x_prev, x = x, advance(x_prev, x, h, sign)
    return x


def paper(m, frac_bits):
    """A step by the paper's equations, line by line: floats, no integers."""

    def quantized(v):
        q = jax.lax.stop_gradient(jnp.round(v * 2.0**frac_bits) / 2.0**frac_bits)
        return q + (v - jax.lax.stop_gradient(v))

    def advance(x_prev, x, h, sign):
        if not sign.any():
            return x + quantized(h)
        gamma = sign * 2.0**-m
        s = jnp.mod(-x_prev * 2.0**frac_bits, 2**m)
        side = jax.lax.stop_gradient(s * 2.0**-frac_bits)
        return gamma * (x_prev + side) + quantized((1 - gamma) * x + (1 + gamma) * h)

    return quantized, advance


def test_the_settings_cover_all_pairs():
    for name, settings in FACTORS.items():
        for other, others in FACTORS.items():
            for pair in ({name: a, other: b} for a in settings for b in others):
                assert len(pair) == 1 or any(holds(row, pair) for row in ROWS), pair


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_gradients_are_those_of_the_forward_pass_that_was_run(row):
    """Every adjoint gives the output and the gradients of the paper's equations, in float64."""
    step = BDIA(2.0 ** -row["m"], row["signs"], row["frac_bits"], row["tolerance_bits"])
    with jax.enable_x64(True):
        block, params, x, (shift, mask) = case(
            row["kind"],
            row["depth"],
            parts=row["parts"],
            dropout=row["dropout"],
            dtype=jnp.float64,
        )

        def scan(params, x, shift):
            settings = {"key": key_of(5), "step": step, "adjoint": row["adjoint"]}
            return reversible_scan(block, params, x, consts=(shift, mask), **settings)

        def transcription(params, x, shift):
            parts = tuple(map(jax.jit, block if isinstance(block, tuple) else (block,)))
            quantized, advance = paper(row["m"], row["frac_bits"])
            settings = {"key": key_of(5), "signs": row["signs"], "advance": advance}
            return loop(parts, params, quantized(x), shift, mask, **settings)

        output, gradients = jax.jit(value_and_gradients(scan))(params, x, shift)
        expected = value_and_gradients(transcription)(params, x, shift)
        np.testing.assert_array_equal(output, expected[0])
        assert relative(gradients, expected[1]) < 1e-10


# ---------------------------------------------------------------------------------------------
# Other steps
# ---------------------------------------------------------------------------------------------


def six_tenths(x_prev, x, h, sign):
    return 0.6 * sign * x_prev + (1 - 0.6 * sign) * x + (1 + 0.6 * sign) * h


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "advance"),
    [
        (Euler(), lambda x_prev, x, h, sign: x + h),
        (Euler(5), lambda x_prev, x, h, sign: bdia_jax.quantize(x + h, 5)),
        (BDIA(0.6, frac_bits=None), six_tenths),
        (BDIA(0.6, "sample", 5), lambda *given: bdia_jax.quantize(six_tenths(*given), 5)),
    ],
    ids=["standard", "standard-on-the-grid", "gamma-0.6", "gamma-0.6-on-the-grid"],
)
def test_steps_that_are_not_taken_back_are_plain_networks(step, advance):
    key = key_of(2)
    with jax.enable_x64(True):
        block, params, x, (shift, mask) = case("mlp", 3, parts=2, dtype=jnp.float64)
        if step.frac_bits is not None:
            x = bdia_jax.quantize(x, step.frac_bits)

        def ours(adjoint, params, x, shift):
            settings = {"key": key, "step": step, "adjoint": adjoint}
            return reversible_scan(block, params, x, consts=(shift, mask), **settings)

        def theirs(params, x, shift):
            settings = {"key": key, "signs": step.signs, "advance": advance}
            return loop(block, params, x, shift, mask, **settings)

        @jax.jit
        def run(*arguments):
            forwards = (theirs, *(functools.partial(ours, a) for a in (Direct(), Checkpoint())))
            return [value_and_gradients(forward)(*arguments) for forward in forwards]

        (expected_y, expected), *found = run(params, x, shift)
        for y, gradients in found:
            assert relative(y, expected_y) < 1e-13
            assert relative(gradients, expected) < 1e-11


def test_midpoint_is_bdia_with_gamma_1_and_plus():
    block, params, x, _ = simple(2)

    def program(step, adjoint):
        gradient = jax.grad(
            lambda p: jnp.sum(reversible_scan(block, p, x, key=KEY, step=step, adjoint=adjoint))
        )
        return str(jax.make_jaxpr(gradient)(params))

    for adjoint in ADJOINTS.values():
        for r in (0, 2):
            plus = BDIA(1, "plus", tolerance_bits=r)
            assert program(Midpoint(tolerance_bits=r), adjoint) == program(plus, adjoint)


# ---------------------------------------------------------------------------------------------
# Composition. One small block, and float32: that each adjoint is right is shown above.
# ---------------------------------------------------------------------------------------------

KEY = key_of(7)
ADJOINTS = {"online": Online(), "checkpoint": Checkpoint(), "direct": Direct()}
ONLINE = ("online", "direct")
every_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)


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


def assert_alike(function, *arguments, tolerance=1e-5, adjoints=ADJOINTS, **settings):
    """``function(scan)`` gives the same with all adjoints; nothing is zero, and all is finite."""
    settings = {"key": KEY} | settings

    @jax.jit
    def run(*arguments):
        scans = (
            functools.partial(reversible_scan, adjoint=ADJOINTS[name], **settings)
            for name in adjoints
        )
        return [function(scan)(*arguments) for scan in scans]

    *found, direct = run(*arguments)
    chex.assert_tree_all_finite(direct)
    for result in found:
        assert relative(result, direct) < tolerance
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(direct))
    return direct


def test_value_and_grad_has_aux():
    block, params, x, target = simple(3)

    def function(scan):
        def loss(params):
            y = scan(block, params, x)
            return jnp.mean((y - target) ** 2), y

        return jax.value_and_grad(loss, has_aux=True)

    (value, y), _ = assert_alike(function, params, adjoints=ONLINE)
    np.testing.assert_allclose(value, np.mean((y - target) ** 2), rtol=1e-6)


@pytest.mark.slow
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
    assert_alike(lambda scan: jax.jacrev(lambda p: scan((block, block), p, x)), params)


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

    def function(scan):
        return jax.grad(lambda p, x: jnp.sum(scan(block, p, x)), (0, 1))

    assert_alike(function, params, x, adjoints=ONLINE)


def test_a_block_with_complex_values():
    """A Fourier transform, whose residuals are complex."""
    _, params, x, _ = simple(3)

    def block(w, x, key):
        spectrum = jnp.fft.rfft(x) * jnp.exp(1j * w[0, :3])
        return jnp.fft.irfft(spectrum * jnp.abs(spectrum), 5) / 4

    def function(scan):
        return jax.grad(lambda p, x: jnp.sum(scan(block, p, x) ** 2), (0, 1))

    assert_alike(function, params, x, adjoints=ONLINE)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signs", "adjoint"), [("block", Online()), ("sample", Online()), ("sample", Checkpoint())]
)
def test_vmap_over_inputs_and_keys(signs, adjoint):
    """As a loop over them: each with signs of its own."""
    block, params, x, _ = simple(3)
    # Not with the cheap generator: what it draws depends on the size of the batch.
    xs, keys = jnp.stack([x, -x, 2 * x]), jax.random.split(jax.random.key(0), 3)

    def gradients(params, x, key):
        def loss(params, x):
            y = reversible_scan(block, params, x, key=key, step=BDIA(signs=signs), adjoint=adjoint)
            return jnp.sum(jnp.sin(y))

        return jax.grad(loss, (0, 1))(params, x)

    mapped = jax.jit(jax.vmap(gradients, (None, 0, 0)))(params, xs, keys)
    one = jax.jit(gradients)
    looped = [one(params, x, key) for x, key in zip(xs, keys)]
    # Products of batches may be summed in another order: a few units in the last place of what is
    # summed, whatever is left of it.
    for found, *each in zip(*map(jax.tree.leaves, (mapped, *looped)), strict=True):
        expected = np.stack(each)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_vmap_over_parameters():
    """An ensemble: the same input through several networks."""
    block, params, x, _ = simple(3)
    ensemble = jnp.stack([params, params[::-1], -params])

    def function(scan):
        return jax.vmap(jax.grad(lambda params: jnp.sum(scan(block, params, x) ** 2)))

    assert_alike(function, ensemble, adjoints=ONLINE, step=BDIA(signs="sample"))


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", [Online(), Checkpoint()], ids=["online", "checkpoint"])
def test_gradient_accumulation_in_a_scan(adjoint):
    block, params, x, _ = simple(3)
    keys = jax.random.split(KEY, 4)
    micro_batches = jnp.stack([x, -x, 2 * x, x / 2])

    def gradient(params, x, key):
        def loss(params):
            settings = {"key": key, "step": BDIA(signs="sample"), "adjoint": adjoint}
            return jnp.sum(reversible_scan(block, params, x, **settings) ** 2)

        return jax.grad(loss)(params)

    def accumulated(params):
        def add(total, batch):
            return total + gradient(params, *batch), None

        return jax.lax.scan(add, jnp.zeros_like(params), (micro_batches, keys))[0]

    one = jax.jit(gradient)
    expected = sum(one(params, x, key) for x, key in zip(micro_batches, keys))
    assert relative(jax.jit(accumulated)(params), expected) < 1e-5


@pytest.mark.slow
def test_inside_checkpoint():
    block, params, x, _ = simple(3)

    def function(scan):
        @jax.checkpoint
        def forward(params, x):
            return jnp.sin(scan((block, block), params, jnp.cos(x)))

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

    assert_alike(function, narrow, between, wide, x, adjoints=ONLINE)


@pytest.mark.slow
@pytest.mark.parametrize("inner", ADJOINTS)
def test_a_stack_inside_a_block_of_another(inner):
    _, params, x, _ = simple(2)
    nested = jnp.stack([params, params[::-1], -params])

    def function(scan):
        def outer_block(params, x, key):
            settings = {"key": key, "adjoint": ADJOINTS[inner]}
            return reversible_scan(simple_block, params, x / 2, **settings)

        return jax.grad(lambda p, x: jnp.sum(scan(outer_block, p, x) ** 2), (0, 1))

    assert_alike(function, nested, x, adjoints=ADJOINTS if inner == "online" else ONLINE)


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


@pytest.mark.slow
def test_integer_and_key_leaves():
    """In the parameters and in the consts: given to the block, and without a gradient."""
    _, params, x, shift = simple(3)
    stacked = {
        "w": params,
        "order": jnp.stack([jnp.roll(jnp.arange(5), k) for k in range(3)]),
        "key": jax.random.split(key_of(1), 3),
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
    stacked = {
        "frozen": params,
        "half": params.astype(jnp.bfloat16),
        "full": params[:, 0],
        "tiny": params[:, 1].astype(jnp.float8_e4m3fn),
    }

    def block(p, x, key, shift):
        y = (x.astype(jnp.bfloat16) @ p["half"]).astype(jnp.float32)
        z = simple_block(p["frozen"], x, key, shift + p["tiny"].astype(jnp.float32))
        return z + jnp.tanh(y + p["full"])

    def function(scan):
        def loss(some, shift):
            frozen = {name: jax.lax.stop_gradient(stacked[name]) for name in ("frozen", "tiny")}
            return jnp.sum(scan(block, some | frozen, x, consts=(shift,)) ** 2)

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
    """A stack, cut into pieces before the blocks ``at``."""
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


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(
    ("signs", "parts", "adjoint", "dtype", "generator"),
    [
        ("sample", 2, Online(), "bfloat16", "rbg"),
        ("minus", 1, Checkpoint(), "float32", "threefry2x32"),
    ],
)
def test_a_stack_cut_into_pieces_is_the_same_to_the_bit(signs, parts, adjoint, dtype, generator):
    """Output and gradients: what crosses a cut are grid values and float32 cotangents.

    A sample has its sign in all pieces, where it has one for all blocks.
    """
    _, params, x, _ = simple(5)
    x, key = x.astype(dtype), jax.random.key(7, impl=generator)

    def block(w, x, key):
        return jnp.tanh(x @ w) + jax.random.normal(key, x.shape, x.dtype)

    blocks = (block, lambda w, x, key: jnp.sin(x) * w[0])[:parts]
    settings = {"step": BDIA(signs=signs), "adjoint": adjoint, "compute_dtype": x.dtype}

    def gradients(at):
        def loss(params, x):
            state = cut(blocks, params, (x, x), at, key=key, **settings)
            assert state[0].dtype == state[1].dtype == jnp.float32
            return jnp.sum(jnp.sin(state[1])) + jnp.sum(jnp.cos(state[0])), state

        gradients, state = jax.grad(loss, (0, 1), has_aux=True)(params.astype(dtype), x)
        return state, gradients

    whole, pieces = (jax.jit(functools.partial(gradients, at))() for at in ((), (1, 3)))
    chex.assert_trees_all_equal(whole, pieces)


@every_adjoint
@pytest.mark.parametrize(("state", "computed"), [("float64", "float32"), ("float32", "float64")])
def test_states_keep_their_dtype_whatever_blocks_compute_in(adjoint, state, computed):
    with jax.enable_x64(True):
        block, params, x, _ = simple(4)
        x = x.astype(state)
        settings = {"step": BDIA(frac_bits=18), "adjoint": adjoint, "compute_dtype": computed}

        def of(x, at):
            pair = cut(block, params, (x, x), at, key=jax.random.key(3), **settings)
            assert [a.dtype for a in pair] == [state, state]
            return jnp.sum(jnp.sin(pair[1])), pair

        gradient = jax.jit(jax.grad(of, has_aux=True), static_argnums=1)
        (d, whole), (d_cut, pieces) = (gradient(x, at) for at in ((), (2,)))
        assert d.dtype == d_cut.dtype == state
        chex.assert_trees_all_equal(whole, pieces)
        np.testing.assert_array_equal(d, d_cut)


@pytest.mark.parametrize("step", [BDIA(), Euler(), Euler(9)], ids=str)
@pytest.mark.parametrize(("start", "read"), [(0, "both"), (2, "both"), (2, "x_prev"), (2, "x")])
def test_gradients_by_both_states(step, start, read):
    """Of both, and of each alone: the cotangent of the other is then known to be zero."""
    block, params, x, other = simple(2)
    adjoints = [a for name, a in ADJOINTS.items() if step.gamma or name != "online"]

    def gradient(adjoint, params, x_prev, x):
        def loss(params, x_prev, x):
            settings = {"start": start, "step": step, "adjoint": adjoint}
            last_prev, last = cut(block, params, (x_prev, x), (), **settings)
            sums = {"x_prev": jnp.sum(jnp.sin(last_prev)), "x": jnp.sum(jnp.cos(last))}
            return sums.get(read, sum(sums.values()))

        return jax.grad(loss, (0, 1, 2))(params, x_prev, x)

    run = jax.jit(lambda *given: [gradient(adjoint, *given) for adjoint in adjoints])
    *found, direct = run(params, other, x)
    for gradients in found:
        assert relative(gradients, direct) < 1e-5
    # An Euler step reads one state; the first block of a network is one.
    assert np.any(direct[1]) == bool(step.gamma and start)
    assert np.any(direct[2])


@every_adjoint
def test_block_zero_ignores_the_state_before_it(adjoint):
    block, params, x, other = simple(2)

    def loss(x_prev, x):
        return jnp.sum(cut(block, params, (x_prev, x), (), adjoint=adjoint)[1] ** 2)

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, (d_prev, d_x) = run(other, x)
    same_value, (same_d_prev, same_d_x) = run(jnp.nan * x, x)
    assert not np.any(d_prev)
    assert not np.any(same_d_prev)
    assert value == same_value
    chex.assert_trees_all_equal(d_x, same_d_x)


# ---------------------------------------------------------------------------------------------
# What is not finite
# ---------------------------------------------------------------------------------------------


@every_adjoint
def test_what_is_not_finite_or_out_of_range_becomes_nan_for_that_sample(adjoint):
    """And for no other: the gradients by the rest of the batch are as if it were alone."""
    block, params, x, _ = simple(3)

    def loss(x, spoilt):
        def spoilt_block(*arguments):
            return block(*arguments[:-1]) + arguments[-1]

        settings = {"key": KEY, "consts": (spoilt,), "adjoint": adjoint}
        y = reversible_scan(spoilt_block, params, x, **settings)
        return jnp.sum(y[::2] ** 2), y

    compiled, zeros = jax.jit(jax.grad(loss, has_aux=True)), jnp.zeros_like(x)
    clean_gradient, clean = compiled(x, zeros)
    for bad in (jnp.nan, jnp.inf, 1e9):
        spoilt = zeros.at[1, 2].set(bad)
        for gradient, y in (compiled(x + spoilt, zeros), compiled(x, spoilt)):
            assert np.isnan(y[1]).all()
            np.testing.assert_array_equal(y[::2], clean[::2])
            np.testing.assert_array_equal(gradient[::2], clean_gradient[::2])


@every_adjoint
def test_where_the_output_is_nan_so_is_the_gradient(adjoint):
    """Also where the derivative of the loss does not depend on the output."""
    block, params, x, _ = simple(3)

    def loss(params, x):
        return jnp.sum(reversible_scan(block, params, x, key=KEY, adjoint=adjoint))

    compiled = jax.jit(jax.grad(loss, (0, 1)))
    for bad in (jnp.nan, jnp.inf, 1e9):
        d_params, d_x = compiled(params, x.at[1, 2].set(bad))
        assert np.isnan(d_params).any()
        assert np.isnan(d_x[1]).any()
        assert np.isfinite(d_x[::2]).all()


def test_a_sample_that_the_loss_leaves_out_spoils_nothing():
    block, params, x, _ = simple(3)

    def loss(params, x):
        return jnp.sum(reversible_scan(block, params, x, key=KEY)[::2] ** 2)

    compiled = jax.jit(jax.grad(loss))
    clean = compiled(params, x.at[1].set(0))
    np.testing.assert_allclose(compiled(params, x.at[1, 2].set(jnp.nan)), clean, rtol=1e-5)
