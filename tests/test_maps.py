"""The integer maps and the tolerance rule, on random inputs (``test_proofs.py`` has all inputs)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import bdia_jax
from bdia_jax import grid, maps

pytestmark = pytest.mark.optimized

INTS = hnp.arrays(np.int32, 32, elements=st.integers(-(2**31), 2**31 - 1))
SIGNS = hnp.arrays(np.int32, 32, elements=st.sampled_from([-1, 1]))


@given(n_prev=INTS, q=INTS, sign=SIGNS, m=st.integers(0, 8), r=st.integers(0, 4))
def test_inverse_takes_the_step_back(n_prev, q, sign, m, r):
    side = bdia_jax.side_information(n_prev, m, r)
    n_next = bdia_jax.bdia_step(n_prev, q, sign, m)
    np.testing.assert_array_equal(bdia_jax.bdia_inverse(n_next, q, side, sign, m), n_prev)


@given(n_prev=INTS, m=st.integers(0, 16))
def test_side_information_rounds_up_to_a_multiple(n_prev, m):
    side = np.asarray(bdia_jax.side_information(n_prev, m)).astype(np.int64)
    assert ((side >= 0) & (side < 2**m)).all()
    assert ((n_prev.astype(np.int64) + side) % 2**m == 0).all()


@given(
    n_prev=hnp.arrays(np.int32, 16, elements=st.integers(-(2**20), 2**20)),
    x=hnp.arrays(np.int32, 16, elements=st.integers(-(2**20), 2**20)),
    h=hnp.arrays(np.float32, 16, elements=st.floats(-8, 8, width=32)),
    sign=st.sampled_from([-1, 0, 1]),
    m=st.integers(0, 3),
    l=st.sampled_from([9, 5, 0, -2]),
)
def test_step_is_the_paper_s_equation(n_prev, x, h, sign, m, l):  # noqa: E741
    """x_{k+1} = γ (x_{k-1} + s 2^-l) + Q[(1 - γ) x_k + (1 + γ) h], in float64."""
    spacing, gamma = 2.0**-l, sign * 2.0**-m
    s = np.mod(-n_prev, 2**m).astype(np.float64)
    inner = (1 - gamma) * x * spacing + (1 + gamma) * h.astype(np.float64)
    expected = gamma * (n_prev + s) * spacing + np.rint(inner / spacing) * spacing
    with jax.enable_x64(True):
        y = maps.pre_rounding(jnp.asarray(x * spacing), jnp.asarray(h, jnp.float64), gamma)
        q = bdia_jax.to_grid(y, l)
    got = bdia_jax.bdia_step(n_prev, q, sign, m)
    np.testing.assert_array_equal(np.asarray(got) * spacing, expected)


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


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("m", [0, 1, 2])
@pytest.mark.parametrize("r", [1, 2, 3, 4])
def test_the_bound_on_the_deviation_is_sharp(m, r, sign):
    """At the bound there are two true values for the same recomputed one: no rule tells them."""
    half = 2 ** (r - 1)
    bound = 0.5 if r == 1 else half - 0.5
    # Half-way values are rounded to even, away from the recomputed one.
    recomputed = np.full(2, 1.0 if r == 1 else 0.0)
    true = recomputed + np.array([bound, -bound])
    found, errors = _find_errors(true, recomputed, m, r, sign, np.random.default_rng(0))
    np.testing.assert_array_equal(errors, [-half, half])
    assert (found == errors).sum() == 1


@pytest.mark.parametrize("r", [1, 2, 3])
def test_an_error_out_of_reach_is_never_found(r):
    """Beyond the bound the answer is wrong, never right by luck for |e| > 2^(r-1)."""
    errors = np.array([e for e in range(-40, 41) if abs(e) > 2 ** (r - 1)])
    y = np.zeros(len(errors))
    found, true = _find_errors(y, y + errors, 1, r, 1, np.random.default_rng(0))
    np.testing.assert_array_equal(true, errors)
    assert (found != true).all()


def _find_errors(y, recomputed, m, r, sign, rng):
    q, q_recomputed = np.rint(y).astype(np.int32), np.rint(recomputed).astype(np.int32)
    n_prev = rng.integers(-(2**20), 2**20, len(y)).astype(np.int32)
    n_next = maps.bdia_step(n_prev, q, sign, m)
    side = maps.side_information(n_prev, m, r)
    remainder = jnp.asarray(recomputed - q_recomputed, jnp.float32)
    found = maps.rounding_error(n_next, q_recomputed, remainder, side, sign, m, r)
    return np.asarray(found), q_recomputed - q


def test_signs_are_fair_and_a_function_of_the_key():
    signs = bdia_jax.sample_signs(jax.random.key(0), 20_000)
    assert set(np.unique(signs)) == {-1, 1}
    # 5 standard deviations of a fair coin.
    assert abs(float(signs.mean())) < 5 / np.sqrt(20_000)
    np.testing.assert_array_equal(signs, bdia_jax.sample_signs(jax.random.key(0), 20_000))
    others = bdia_jax.sample_signs(jax.random.key(1), 20_000)
    # Independent of the first: as often equal as different.
    assert abs(float((signs * others).mean())) < 5 / np.sqrt(20_000)


def test_alternating_signs_cancel_within_a_batch_and_are_fair():
    """Half of a batch has each sign, whatever the coin; and the coin is fair."""
    for batch in (1, 2, 7):
        signs = np.asarray(maps.alternating_signs(jax.random.key(0), batch))
        assert signs.shape == (batch,)
        assert signs.dtype == np.int32
        np.testing.assert_array_equal(signs * signs[0], np.resize([1, -1], batch))
    keys = jax.random.split(jax.random.key(0), 5_000)
    coins = jax.vmap(lambda key: maps.alternating_signs(key, 2)[0])(keys)
    assert abs(float(coins.mean())) < 5 / np.sqrt(5_000)


def test_limit_leaves_room_for_the_sum():
    """Two terms within the limit, γ = ±1 included, do not wrap around unnoticed."""
    largest = np.int32(grid.LIMIT - 1)
    assert int(bdia_jax.bdia_step(largest, largest, 1, 0)) == 2 * (grid.LIMIT - 1)
