"""Blocks that keep their residuals: the same states, more memory, no second computation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _blocks import case

from bdia_jax import BackwardReport, Update, memory, reversible_scan, reversible_scan_pair

DEPTH = 5


def scan_gradient(stored, kind="attention", dtype=jnp.float32, r=0, update=None):
    """All gradients, and the output, of a stack whose last ``stored`` blocks are not reversed."""
    block, params, x, (shift, mask) = case(kind, DEPTH, dropout=0.1, dtype=dtype)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2, 3), has_aux=True)
    def gradient(params, x, shift, probe):
        y = reversible_scan(
            block,
            params,
            x,
            key=jax.random.key(3),
            consts=(shift, mask),
            tolerance_bits=r,
            stored_blocks=stored,
            probe=probe,
            update=update,
        )
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    return gradient(params, x, shift, BackwardReport.zeros(DEPTH))


def alike(found, expected, tolerance=1e-5):
    """What is taken back is exact; how the arithmetic of cotangents is rounded may differ."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(leaf, np.float64) for leaf in (a, b))
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("kind", "dtype", "r", "tolerance"),
    [("attention", jnp.bfloat16, 0, 1e-2), ("mlp", jnp.float32, 2, 1e-5)],
)
def test_gradients_do_not_depend_on_their_number(kind, dtype, r, tolerance):
    reference, y = scan_gradient(0, kind, dtype, r)
    assert not reference[3].mismatched.any()
    for stored in (2, DEPTH):
        found, output = scan_gradient(stored, kind, dtype, r)
        np.testing.assert_array_equal(output, y)
        alike(found[:3], reference[:3], tolerance)
        assert not found[3].mismatched.any()


def test_with_an_update_in_the_backward_pass():
    def descend(params, grads, state):
        params = jax.tree.map(
            lambda p, d: None if p is None else p - 0.1 * d,
            params,
            grads,
            is_leaf=lambda p: p is None,
        )
        return params, jax.tree.map(lambda s: s + 1, state)

    update = Update(descend, {"count": jnp.zeros(DEPTH)})
    reference = scan_gradient(0, "mlp", update=update)[0]
    for stored in (2, DEPTH):
        found = scan_gradient(stored, "mlp", update=update)[0]
        alike(found[:3], reference[:3])


def test_in_a_part_of_a_stack():
    """The cotangents that a part hands down do not depend on it either."""
    block, params, x, (shift, mask) = case("mlp", DEPTH)

    def gradient(stored):
        def loss(params, a, b):
            pair = reversible_scan_pair(
                block,
                params,
                (a, b),
                start=3,
                key=jax.random.key(3),
                consts=(shift, mask),
                stored_blocks=stored,
            )
            return sum(jnp.sum(jnp.sin(y)) for y in pair)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(params, x, 2 * x)

    alike(gradient(3), gradient(0))


def block(params, x, key):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def test_memory_is_that_of_their_residuals():
    """What each costs: its own arrays, and no copy of the parameters that it was given."""
    shapes = {"up": (8, 64, 512), "down": (8, 512, 64)}
    params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    x = jax.ShapeDtypeStruct((2, 64), jnp.float32)

    def needs(stored):
        def loss(params, x):
            y = reversible_scan(block, params, x, key=jax.random.key(0), stored_blocks=stored)
            return jnp.sum(jnp.sin(y))

        return memory.temporaries(jax.grad(loss), params, x)

    per_block = (needs(8) - needs(2)) / 6
    # tanh and its argument's derivative at most, the input, and some words.
    assert per_block < 3 * 2 * 512 * 4 + 2 * 64 * 4 + 256
    assert per_block < 0.1 * 2 * 64 * 512 * 4


def test_a_thousand_blocks():
    """One bit per element and block; no integer is wrong, and the program does not grow."""
    x = jax.random.normal(jax.random.key(1), (2, 4, 64))
    texts, needed = [], {}
    for depth in (500, 1000):
        keys = jax.random.split(jax.random.key(0))
        params = {
            "up": 0.05 * jax.random.normal(keys[0], (depth, 64, 16)),
            "down": 0.05 * jax.random.normal(keys[1], (depth, 16, 64)),
        }

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1))
        def gradient(params, probe):
            y = reversible_scan(block, params, x, key=jax.random.key(2), probe=probe)
            return jnp.mean(y**2)

        probe = BackwardReport.zeros(depth)
        lowered = gradient.lower(params, probe)
        texts.append(len(lowered.as_text().splitlines()))
        compiled = lowered.compile()
        needed[depth] = memory.compiled_memory(compiled).temporaries
        for _ in range(2):
            d_params, report = compiled(params, probe)
            assert not report.mismatched.any()
            assert all(jnp.isfinite(d).all() and d.any() for d in d_params.values())
            params = jax.tree.map(lambda p, d: p - 0.1 * d, params, d_params)
    assert texts[0] == texts[1]
    # A bit per element, 4 bytes of checksum per sample; the block's number and key.
    assert (needed[1000] - needed[500]) / 500 < x.size / 8 + 2 * 4 + 64


def test_over_devices():
    """Each with its samples, parameters on all: gradients are those of one device."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": 0.2 * jax.random.normal(keys[0], (4, 16, 32)),
        "down": 0.2 * jax.random.normal(keys[1], (4, 32, 16)),
    }
    x = jax.random.normal(keys[2], (8, 16))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    samples, everywhere = jax.P("data"), jax.P()

    def gradient(stored, params, x):
        def loss(params, x):
            # Positive γ, the same on every device: what is drawn depends on who draws it.
            y = reversible_scan(
                block, params, x, key=jax.random.key(1), signs="positive", stored_blocks=stored
            )
            return jnp.sum(jnp.sin(y))

        return jax.grad(loss, (0, 1))(params, x)

    expected = jax.jit(functools.partial(gradient, 0))(params, x)
    for stored in (1, 4):
        found = jax.jit(
            jax.shard_map(
                functools.partial(gradient, stored),
                mesh=mesh,
                in_specs=(everywhere, samples),
                out_specs=(everywhere, samples),
            )
        )(params, x)
        alike(found, expected)
