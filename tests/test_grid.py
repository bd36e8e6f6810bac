"""The grid: round trips, ties, what has no place on it, and the straight-through gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import bdia_jax
from bdia_jax import grid

pytestmark = pytest.mark.optimized

FLOATS = hnp.arrays(np.float32, 16, elements=st.floats(-1000, 1000, width=32))
FRAC_BITS = st.integers(grid.MIN_FRAC_BITS, grid.MAX_FRAC_BITS)
HALVES = {"float16": 11, "bfloat16": 8, "float32": 24}
"""Floating-point types, and how many bits their integers have before they are rounded."""


@given(x=FLOATS, frac_bits=FRAC_BITS)
def test_to_grid_rounds_half_to_even(x, frac_bits):
    expected = np.clip(np.rint(x.astype(np.float64) * 2.0**frac_bits), -(2**30), 2**30)
    np.testing.assert_array_equal(bdia_jax.to_grid(x, frac_bits), expected.astype(np.int32))


@pytest.mark.parametrize("frac_bits", [9, 5, 0, -2])
def test_ties_go_to_the_even_neighbour(frac_bits):
    steps = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5], np.float32)
    n = bdia_jax.to_grid(steps * 2.0**-frac_bits, frac_bits)
    np.testing.assert_array_equal(n, [-2, -2, 0, 0, 2, 2, 4])


@given(
    n=hnp.arrays(np.int32, 16, elements=st.integers(-(2**24), 2**24)),
    frac_bits=FRAC_BITS,
)
def test_integers_survive_the_round_trip(n, frac_bits):
    np.testing.assert_array_equal(bdia_jax.to_grid(bdia_jax.from_grid(n, frac_bits), frac_bits), n)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("frac_bits", [9, 0, -2])
def test_integers_survive_in_low_precision_as_far_as_it_reaches(dtype, frac_bits):
    reach = 2 ** HALVES[dtype]
    n = np.unique(np.linspace(-reach, reach, 4097).astype(np.int32))
    x = bdia_jax.from_grid(n, frac_bits, jnp.dtype(dtype))
    chex.assert_type(x, jnp.dtype(dtype))
    np.testing.assert_array_equal(bdia_jax.to_grid(x, frac_bits), n)


def test_float64_holds_the_whole_range():
    n = np.array([2**30 - 1, -(2**30) + 1, 2**29 + 1, 3], np.int32)
    with jax.enable_x64(True):
        x = bdia_jax.from_grid(jnp.asarray(n), 9, jnp.float64)
        np.testing.assert_array_equal(x, n / 512)
        np.testing.assert_array_equal(bdia_jax.to_grid(x, 9), n)


@given(x=FLOATS, frac_bits=st.sampled_from([9, 5, 0, -2]))
def test_quantize_is_the_nearest_grid_value_and_stays_there(x, frac_bits):
    q = bdia_jax.quantize(x, frac_bits)
    assert np.all(np.abs(q - x) <= 2.0**-frac_bits / 2)
    chex.assert_trees_all_equal(bdia_jax.quantize(q, frac_bits), q)
    chex.assert_trees_all_equal(
        bdia_jax.from_grid(bdia_jax.to_grid(x, frac_bits), frac_bits, q.dtype), q
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**35])
def test_what_has_no_place_on_the_grid_becomes_nan(dtype, bad):
    x = jnp.array([1.0, bad, -2.0]).astype(dtype)
    np.testing.assert_array_equal(bdia_jax.on_grid(x, -2), [True, False, True])
    np.testing.assert_array_equal(jnp.isnan(bdia_jax.quantize(x, -2)), [False, True, False])
    # Integers have no NaN: 0, and the ends of the range.
    n = int(bdia_jax.to_grid(x, -2)[1])
    assert n == (0 if np.isnan(bad) else np.sign(bad) * 2**30)


@pytest.mark.parametrize("frac_bits", [-16, -2, 0, 9, 24])
def test_the_range_ends_at_2_to_the_30_steps(frac_bits):
    edge = np.float32(2.0 ** (30 - frac_bits))
    inside = np.nextafter(edge, np.float32(0))
    x = np.array([inside, edge, -inside, -edge])
    np.testing.assert_array_equal(bdia_jax.on_grid(x, frac_bits), [True, False, True, False])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gradient_is_straight_through_in_both_modes(dtype):
    x = jnp.array([0.3, -1.75, 5.25], jnp.dtype(dtype))
    weights = jnp.array([1.0, 2.0, 3.0], x.dtype)
    gradient = jax.grad(lambda x: jnp.sum(bdia_jax.quantize(x, 0) * weights))(x)
    chex.assert_trees_all_equal(gradient, weights)
    _, tangent = jax.jvp(lambda x: bdia_jax.quantize(x, 0), (x,), (weights,))
    chex.assert_trees_all_equal(tangent, weights)


def test_under_jit_and_vmap_nothing_changes():
    x = jax.random.normal(jax.random.key(0), (4, 8)) * 10

    def both(x):
        return bdia_jax.to_grid(x, 3), bdia_jax.quantize(x, 3)

    chex.assert_trees_all_equal(both(x), jax.jit(both)(x), jax.vmap(both)(x))
