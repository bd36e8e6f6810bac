"""The grid, the integer maps, the tolerance rule and the packing, on random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import bdia_jax
from bdia_jax import fixed_point, maps

FLOATS = hnp.arrays(np.float32, 16, elements=st.floats(-1000, 1000, width=32))


@given(x=FLOATS, frac_bits=st.integers(-16, 20))
def test_to_grid_rounds_half_to_even(x, frac_bits):
    expected = np.clip(np.rint(x.astype(np.float64) * 2.0**frac_bits), -(2**30), 2**30)
    np.testing.assert_array_equal(bdia_jax.to_grid(x, frac_bits), expected.astype(np.int32))


@given(
    n=hnp.arrays(np.int32, 16, elements=st.integers(-(2**24), 2**24)),
    frac_bits=st.integers(-16, 24),
)
def test_grid_values_survive_the_round_trip(n, frac_bits):
    np.testing.assert_array_equal(bdia_jax.to_grid(bdia_jax.from_grid(n, frac_bits), frac_bits), n)


@given(x=FLOATS, frac_bits=st.sampled_from([9, 5, 0, -2]))
def test_quantize_is_the_nearest_grid_value_and_stays_there(x, frac_bits):
    q = bdia_jax.quantize(x, frac_bits)
    assert np.all(np.abs(q - x) <= 2.0**-frac_bits / 2)
    np.testing.assert_array_equal(bdia_jax.quantize(q, frac_bits), q)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 2.0**22])
def test_what_has_no_place_on_the_grid_becomes_nan(bad):
    x = jnp.array([1.0, bad])
    np.testing.assert_array_equal(jnp.isnan(bdia_jax.quantize(x, 9)), [False, True])
    np.testing.assert_array_equal(bdia_jax.on_grid(x, 9), [True, False])


def test_gradient_of_quantize_is_straight_through():
    x = jnp.array([0.3, -1.7, 5.25])
    gradient = jax.grad(lambda x: jnp.sum(bdia_jax.quantize(x, 0) * jnp.array([1.0, 2.0, 3.0])))(x)
    np.testing.assert_array_equal(gradient, [1.0, 2.0, 3.0])


INTS = hnp.arrays(np.int32, 32, elements=st.integers(-(2**31), 2**31 - 1))
SIGNS = hnp.arrays(np.int32, 32, elements=st.sampled_from([-1, 1]))


@given(n_prev=INTS, q=INTS, sign=SIGNS, m=st.integers(0, 8), r=st.integers(0, 4))
def test_inverse_takes_the_step_back(n_prev, q, sign, m, r):
    side = bdia_jax.side_information(n_prev, m, r)
    n_next = bdia_jax.bdia_step(n_prev, q, sign, m)
    np.testing.assert_array_equal(bdia_jax.bdia_inverse(n_next, q, side, sign, m), n_prev)


@given(
    n_prev=hnp.arrays(np.int32, 16, elements=st.integers(-(2**20), 2**20)),
    x=hnp.arrays(np.int32, 16, elements=st.integers(-(2**20), 2**20)),
    h=hnp.arrays(np.float32, 16, elements=st.floats(-8, 8, width=32)),
    sign=st.sampled_from([-1, 1]),
    l=st.sampled_from([9, 5, 0, -2]),
)
def test_step_is_the_paper_s_equation(n_prev, x, h, sign, l):  # noqa: E741
    """x_{k+1} = γ (x_{k-1} + s 2^-l) + Q[(1 - γ) x_k + (1 + γ) h], in float64."""
    grid, gamma = 2.0**-l, sign / 2
    s = (n_prev % 2).astype(np.float64)
    inner = (1 - gamma) * x * grid + (1 + gamma) * h.astype(np.float64)
    expected = gamma * (n_prev + s) * grid + np.rint(inner / grid) * grid
    with jax.enable_x64(True):
        y = maps.pre_rounding(jnp.asarray(x * grid), jnp.asarray(h, jnp.float64), gamma)
        q = bdia_jax.to_grid(y, l)
    got = bdia_jax.bdia_step(n_prev, q, sign, 1)
    np.testing.assert_array_equal(np.asarray(got) * grid, expected)


@given(data=st.data(), m=st.integers(0, 3), r=st.integers(1, 4), sign=st.sampled_from([-1, 1]))
def test_tolerance_bits_correct_every_deviation_under_the_bound(data, m, r, sign):
    """|y' - y| < 2^(r-1) - 1/2 (r = 1: < 1/2); values in 1/64 of a grid step, so sums are exact."""
    bound = 32 if r == 1 else 2 ** (r - 1) * 64 - 32
    size = 64
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    y = rng.integers(-(2**14), 2**14, size) / 64
    # Half of them at most one unit under the bound, where it is tightest.
    deviation = rng.integers(-bound + 1, bound, size)
    deviation[::2] = rng.choice([-(bound - 1), bound - 1], size // 2)
    found, true = _find_errors(y, y + deviation / 64, m, r, sign, rng)
    np.testing.assert_array_equal(found, true)


@pytest.mark.parametrize("r", [1, 2, 3, 4])
def test_the_bound_on_the_deviation_is_sharp(r):
    """At the bound there are two true values for the same recomputed one: no rule tells them."""
    half = 2 ** (r - 1)
    bound = 0.5 if r == 1 else half - 0.5
    recomputed = np.zeros(2)
    # Half-way values, rounded to even: 0.5 -> 0 (r = 1 errs only beyond), ±1.5 -> ±2, ±3.5 -> ±4.
    true = np.array([bound, -bound]) if r > 1 else np.array([0.5 + 1 / 64, -0.5 - 1 / 64])
    rng = np.random.default_rng(0)
    found, errors = _find_errors(true, recomputed, 1, r, 1, rng)
    assert abs(errors[0]) == half
    assert errors[0] == -errors[1]
    assert not np.array_equal(found, errors)


def _find_errors(y, recomputed, m, r, sign, rng):
    q, q_recomputed = np.rint(y).astype(np.int32), np.rint(recomputed).astype(np.int32)
    n_prev = rng.integers(-(2**20), 2**20, len(y)).astype(np.int32)
    n_next = maps.bdia_step(n_prev, q, sign, m)
    side = maps.side_information(n_prev, m, r)
    remainder = jnp.asarray(recomputed - q_recomputed, jnp.float32)
    found = maps.rounding_error(n_next, q_recomputed, remainder, side, sign, m, r)
    return np.asarray(found), q_recomputed - q


def test_signs_are_fair_and_a_function_of_the_key():
    signs = bdia_jax.sample_signs(jax.random.key(0), (20_000,))
    assert set(np.unique(signs)) == {-1, 1}
    # 5 standard deviations of a fair coin.
    assert abs(float(signs.mean())) < 5 / np.sqrt(20_000)
    np.testing.assert_array_equal(signs, bdia_jax.sample_signs(jax.random.key(0), (20_000,)))


@given(
    bits=st.sampled_from([1, 2, 3, 4, 5, 8, 16, 32]), width=st.integers(1, 70),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_packed_bits_come_back(bits, width, seed):
    values = np.random.default_rng(seed).integers(0, 2**bits, (2, 3, width), dtype=np.uint32)
    packed = bdia_jax.pack_bits(jnp.asarray(values), bits)
    assert packed.shape == (2, 3, bdia_jax.packed_width(width, bits))
    np.testing.assert_array_equal(bdia_jax.unpack_bits(packed, bits, width), values)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing_wastes_nothing(bits):
    packed = bdia_jax.pack_bits(jnp.zeros((3, 64), jnp.uint32), bits)
    assert packed.size * packed.dtype.itemsize * 8 == 3 * 64 * bits


def test_limit_leaves_room_for_the_sum():
    """Two terms within the limit, γ = ±1 included, do not wrap around unnoticed."""
    largest = np.int32(fixed_point.LIMIT - 1)
    assert int(bdia_jax.bdia_step(largest, largest, 1, 0)) == 2 * (fixed_point.LIMIT - 1)
