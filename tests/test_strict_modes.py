"""The core under the settings with which careful users run JAX."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bdia_jax
from bdia_jax import (
    BDIA,
    BackwardReport,
    Checkpoint,
    Direct,
    Euler,
    Midpoint,
    Online,
    Update,
    check_reversible,
    reversible_scan,
    reversible_scan_pair,
)

pytestmark = pytest.mark.slow

MODES = {
    "dtype promotion": {"jax_numpy_dtype_promotion": "strict"},
    "rank promotion": {"jax_numpy_rank_promotion": "raise"},
    "NaN and infinity": {"jax_debug_nans": True, "jax_debug_infs": True},
    "checks": {"jax_enable_checks": True},
    "tracer leaks": {"jax_check_tracer_leaks": True},
}
BLOCKS = 3


@pytest.fixture(params=MODES, scope="module")
def mode(request):
    """One setting, also of what was compiled before; the tests of a mode go together."""
    before = {name: getattr(jax.config, name) for name in MODES[request.param]}
    with contextlib.ExitStack() as stack:
        for name, value in MODES[request.param].items():
            stack.callback(jax.config.update, name, before[name])
            jax.config.update(name, value)
        stack.callback(jax.clear_caches)
        yield request.param


def first_part(p, x, key, shift):
    keep = jax.random.bernoulli(key, 0.8, x.shape).astype(x.dtype)
    return jnp.tanh(x @ p["w"].astype(x.dtype)) * keep + shift.astype(x.dtype)[None, None]


def second_part(p, x, key, shift):
    return jnp.sin(x) * p["scale"].astype(x.dtype)[None, None]


def arguments(dtype):
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(BLOCKS, 5, 5)) / 2, jnp.float32),
        "scale": jnp.asarray(rng.normal(size=(BLOCKS, 5)), jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(2, 3, 5)), dtype)
    return params, x, jnp.full(5, 0.1, jnp.float32)


def descend(params, grads, state):
    return jax.tree.map(lambda p, d: p - 0.1 * d, params, grads), state + 1


WAYS = {
    "tolerance bits": (BDIA(0.25, "sample", 9, 2), Online(), "bfloat16"),
    "checkpoint": (BDIA(0.25, "sample", 9), Checkpoint(), "bfloat16"),
    "rounded checkpoint": (Euler(), Checkpoint(bits=3), "bfloat16"),
    "direct": (BDIA(), Direct(), "bfloat16"),
}


@pytest.mark.parametrize("way", WAYS)
def test_scans(mode, way):
    """Gradients of a scan of two parts, with a report and an update where there can be one."""
    step, adjoint, dtype = WAYS[way]
    params, x, shift = arguments(dtype)

    def loss(params, x, shift, probe, state):
        own = adjoint
        if not isinstance(adjoint, Direct):
            update = Update(descend, params, state)
            own = dataclasses.replace(adjoint, probe=probe, update=update)
        settings = {"key": jax.random.key(1), "consts": (shift,), "step": step, "adjoint": own}
        y = reversible_scan((first_part, second_part), params, x, **settings)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    given = params, x, shift, BackwardReport.zeros(BLOCKS), jnp.zeros(BLOCKS, jnp.float32)
    gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4)))
    if mode == "NaN and infinity":
        for leaf in jax.tree.leaves(gradients(*given)):
            assert np.isfinite(leaf.astype(jnp.float32)).all()
    else:
        # What these look at is in the program.
        gradients.lower(*given)


def test_an_audit_and_a_cut_stack(mode):
    params, x, shift = arguments("bfloat16")
    settings = {"key": jax.random.key(1), "consts": (shift,)}
    parts = first_part, second_part
    assert check_reversible(parts, params, x, step=BDIA(0.25, "sample"), **settings).exact

    @jax.jit
    def gradient(params, x):
        def loss(params, x):
            pair = (x, x)
            for k in range(BLOCKS):
                head = jax.tree.map(lambda p, k=k: p[k : k + 1], params)
                pair = reversible_scan_pair(
                    parts, head, pair, start=k, compute_dtype=x.dtype, **settings
                )
            return jnp.sum(jnp.sin(pair[0])) + jnp.sum(jnp.sin(pair[1]))

        return jax.grad(loss)(params, x)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(params, x)))


def test_functions_of_the_grid(mode):
    """Called as they are, without a compiled program around them."""
    x = jnp.asarray(np.linspace(-2, 2, 12).reshape(3, 4), jnp.bfloat16)
    n = bdia_jax.to_grid(x, 9)
    assert bdia_jax.from_grid(n, 9, jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(bdia_jax.on_grid(x, 9), True)
    gradient = jax.grad(lambda x: jnp.sum(bdia_jax.quantize(x, 2).astype(jnp.float32)))(x)
    np.testing.assert_array_equal(gradient, 1)
    assert jax.grad(jax.grad(lambda x: bdia_jax.quantize(x, 2) ** 2))(1.0) == 2
    for step in (BDIA(0.25, tolerance_bits=1), Midpoint(tolerance_bits=2), BDIA()):
        sign, h = jnp.array([1, -1, 1], jnp.int32), x.astype(jnp.float32)
        n_next, _ = step.up(n, n, h, sign)
        found = step.down(n_next, n, h, sign, step.keep(n))
        np.testing.assert_array_equal(found.n_prev, n)
    packed = bdia_jax.pack_bits(n.astype(jnp.uint32) & jnp.uint32(7), 3)
    np.testing.assert_array_equal(bdia_jax.unpack_bits(packed, 3, 4), np.asarray(n) & 7)
