"""Steps as objects: what they say of themselves, the signs they draw, and their derivatives."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdia_jax import (
    BDIA,
    Checkpoint,
    Direct,
    Euler,
    Midpoint,
    Online,
    maps,
    reversible_scan,
    reversible_scan_pair,
)
from bdia_jax.steps import SIGNS

KEY, OTHER = jax.random.split(jax.random.key(0))

# Per step: γ, m, bits, whether it draws, whether it is one of integers, and its network.
STEPS = {
    BDIA(): (0.5, 1, 1, True, True, Euler(9)),
    BDIA(0.125, "sample", 5, 2): (0.125, 3, 5, True, True, Euler(5)),
    BDIA(1, "minus"): (1.0, 0, 0, False, True, Euler(9)),
    BDIA(0.25, "plus", tolerance_bits=1): (0.25, 2, 3, False, True, Euler(9)),
    BDIA(0.5, frac_bits=None): (0.5, 1, 1, True, False, Euler(None)),
    Midpoint(): (1.0, 0, 0, False, True, Midpoint()),
    Midpoint(5, 2): (1.0, 0, 2, False, True, Midpoint(5, 2)),
    Euler(): (0.0, 0, 0, False, False, Euler()),
    Euler(9): (0.0, 0, 0, False, True, Euler(9)),
}
ALL = [*STEPS, BDIA(0.6, frac_bits=7), BDIA(0.6, frac_bits=None)]


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_what_a_step_says_of_itself(step):
    found = step.gamma, step.m, step.bits, step.draws, step.exact, step.network
    assert found == STEPS[step]
    assert type(step.gamma) is float


def test_other_magnitudes_have_no_bits():
    step = BDIA(0.6, frac_bits=9)
    assert not step.exact
    assert step.network == Euler(9)
    with pytest.raises(ValueError, match="power of two"):
        _ = step.bits


@pytest.mark.parametrize("integer", [np.uint8, jnp.int32])
def test_integers_of_other_types_are_those_of_python(integer):
    """Of an unsigned one, -9 would be 247."""
    for step in (BDIA(0.25, "block", integer(9), integer(2)), Midpoint(integer(9), integer(2))):
        assert (type(step.frac_bits), type(step.tolerance_bits)) == (int, int)
    assert BDIA(0.5, "minus", integer(9)) == BDIA(0.5, "minus", 9)
    assert type(Checkpoint(integer(8)).bits) is int
    params, pair = jnp.ones(2), (jnp.ones((2, 3)), jnp.ones((2, 3)))
    found = [
        reversible_scan_pair(
            lambda p, x, key: jax.random.normal(key, x.shape), params, pair, start=start, key=KEY
        )
        for start in (200, integer(200))
    ]
    chex.assert_trees_all_equal(*found)


def test_steps_are_values():
    """Equal where their settings are, so that they are static arguments of compiled programs."""
    assert BDIA(1) == BDIA(1.0)
    assert hash(BDIA(np.float32(0.5))) == hash(BDIA())
    assert BDIA(1, "plus") != Midpoint()
    with pytest.raises(dataclasses.FrozenInstanceError):
        BDIA().gamma = 0.25
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def traced(step, x):
        traces.append(step)
        return x * step.gamma

    for step in (BDIA(), BDIA(0.5), BDIA(0.25)):
        traced(step, 1.0)
    assert traces == [BDIA(), BDIA(0.25)]


# ---------------------------------------------------------------------------------------------
# Signs
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIGNS)
def test_signs_are_minus_and_plus_one(kind):
    """Which is all that the proofs assume."""
    step, batch = BDIA(signs=kind), 64
    keys = jax.random.split(KEY, 50)
    signs = jax.vmap(lambda key: step.sign(key, jax.random.fold_in(key, 1), batch))(keys)
    assert signs.shape == (50, batch)
    assert signs.dtype == jnp.int32
    expected = {"minus": {-1}, "plus": {1}}.get(kind, {-1, 1})
    assert set(np.unique(signs)) == expected


def test_signs_per_block_and_per_sample_come_from_different_keys():
    block, sample = (BDIA(signs=kind).sign(KEY, OTHER, 6) for kind in ("block", "sample"))
    np.testing.assert_array_equal(block, maps.sample_signs(KEY, 6))
    np.testing.assert_array_equal(sample, maps.alternating_signs(OTHER, 6))
    # No key of a block's is needed, and none of the scan's.
    np.testing.assert_array_equal(BDIA(signs="sample").sign(None, OTHER, 6), sample)
    np.testing.assert_array_equal(BDIA(signs="block").sign(KEY, None, 6), block)


def test_steps_that_draw_nothing_need_no_key():
    for step, sign in ((BDIA(signs="minus"), -1), (BDIA(signs="plus"), 1), (Midpoint(), 1)):
        np.testing.assert_array_equal(step.sign(None, None, 3), [sign] * 3)
    for step in (Euler(), Euler(9)):
        np.testing.assert_array_equal(step.sign(None, None, 3), [0] * 3)


@functools.partial(jax.jit, static_argnums=0)
def signs_of_a_scan(step, key):
    """σ of every block and sample, told by the states: [blocks, batch]."""
    depth, batch = 6, 8
    # Powers of 4, so that an update less the last difference is never 0.
    updates = 4.0 ** jnp.arange(depth)
    pair, signs = (jnp.zeros((batch, 1)), jnp.zeros((batch, 1))), []
    for k in range(depth):
        settings = {"key": key, "step": step, "adjoint": Direct()}
        new = reversible_scan_pair(
            lambda w, x, key: jnp.full_like(x, w), updates[k : k + 1], pair, start=k, **settings
        )
        # x_{k+1} - x_k = h + γ σ (h - (x_k - x_{k-1}))
        last, difference = pair[1] - pair[0], new[1] - new[0]
        signs.append((difference - updates[k]) / (updates[k] - last) / step.gamma)
        pair = new
    return jnp.stack(signs)[..., 0]


def test_a_sample_has_a_sign_per_block_or_one_for_all():
    per_block, per_sample = (
        signs_of_a_scan(BDIA(0.5, kind, frac_bits=None), KEY) for kind in ("block", "sample")
    )
    for signs in (per_block, per_sample):
        np.testing.assert_array_equal(signs[0], 0)
        assert set(np.unique(signs[1:])) == {-1, 1}
    np.testing.assert_array_equal(per_sample[1:], np.broadcast_to(per_sample[1], (5, 8)))
    np.testing.assert_array_equal(per_sample[1] * per_sample[1, 0], np.resize([1, -1], 8))
    # No two blocks, and no two samples, draw alike.
    assert len(np.unique(per_block[1:], axis=0)) == 5
    assert len(np.unique(per_block, axis=1).T) > 4


# ---------------------------------------------------------------------------------------------
# In floats, and the derivative
# ---------------------------------------------------------------------------------------------


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("step", ALL, ids=str)
def test_real_is_the_equation_and_pull_its_transpose(step):
    sign = jnp.array([-1, 0, 1], jnp.int32)
    x_prev, x, h, a_next, a = draw(5, 3, 2, 4)
    gamma = np.asarray(sign)[:, None, None] * step.gamma
    expected = gamma * x_prev + (1 - gamma) * x + (1 + gamma) * h
    with jax.enable_x64(True):
        given = [jnp.asarray(v) for v in (x_prev, x, h)]
        y, vjp = jax.vjp(lambda *states: step.real(*states, sign), *given)
        np.testing.assert_allclose(y, expected, rtol=1e-12)
        d_prev, d_x, d_h = vjp(jnp.asarray(a_next))
        pulled = step.pull(jnp.asarray(a_next), jnp.asarray(a), sign)
        chex.assert_trees_all_close(pulled, (d_h, a + d_x, d_prev), rtol=1e-12)
        # No cotangent from above, which only an Euler step can hand on.
        d_h, d_x, d_prev_or_none = step.pull(jnp.asarray(a_next), None, sign)
        chex.assert_trees_all_close((d_h, d_x), (pulled[0], pulled[1] - a), rtol=1e-12)
        assert (d_prev_or_none is None) == (step.gamma == 0)


@pytest.mark.parametrize("step", [BDIA(frac_bits=None), BDIA(0.6, frac_bits=None), Euler()])
def test_states_keep_their_type(step):
    """Sums of bfloat16 are made in float32, but for the standard network's."""
    x_prev, x, h = (jnp.asarray(v, jnp.bfloat16) for v in draw(3, 2, 16))
    sign = jnp.array([-1, 1], jnp.int32)
    y = step.real(x_prev, x, h, sign)
    assert y.dtype == jnp.bfloat16
    wide = step.real(*(v.astype(jnp.float32) for v in (x_prev, x, h)), sign)
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(("bits", "words"), [(1, 2), (2, 3), (3, 4), (4, 5), (5, 8)])
def test_what_is_kept_is_packed(bits, words):
    """Bytes for 10 elements: uint8 for 1, 2 and 4 bits, otherwise uint32."""
    n = jnp.arange(30).reshape(3, 10)
    for m in range(bits + 1):
        kept = BDIA(2.0**-m, tolerance_bits=bits - m).keep(n)
        assert kept.nbytes == 3 * words
    assert Midpoint().keep(n) is None
    assert Euler(9).keep(n) is None


def test_an_euler_step_on_the_grid_is_compared_with_itself():
    """σ = 0: nothing is taken back; q is, and tolerance bits put it right within their reach."""
    sign = jnp.zeros(2, jnp.int32)
    n_prev, n = jnp.arange(16).reshape(2, 2, 4)
    h = jnp.asarray(draw(2, 4), jnp.float32) / 64
    for r in (0, 1, 2):
        step = BDIA(tolerance_bits=r)
        n_next, y = step.up(n_prev, n, h, sign)
        np.testing.assert_array_equal(n_next, np.rint(y))
        for error in range(-3, 4):
            found = step.down(n_next, n, h + error / 512, sign, step.keep(n_prev))
            within = abs(error) <= (2 ** (r - 1) if r else 0)
            assert np.array_equal(found.q, n_next) == within


# ---------------------------------------------------------------------------------------------
# A step of one's own
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Damped(BDIA):
    """Its sign follows the number of the sample, and the update counts for half."""

    def sign(self, block_key, scan_key, batch):
        return jnp.arange(batch, dtype=jnp.int32) % 2 * 2 - 1

    def up(self, n_prev, n, h, sign):
        return super().up(n_prev, n, h / 2, sign)

    def down(self, n_next, n, h, sign, kept):
        return super().down(n_next, n, h / 2, sign, kept)

    def real(self, x_prev, x, h, sign):
        return super().real(x_prev, x, h / 2, sign)

    def pull(self, a_next, a, sign):
        d_h, d_x, d_prev = super().pull(a_next, a, sign)
        return d_h / 2, d_x, d_prev


def test_a_subclass_is_a_step():
    params, x = jnp.asarray(draw(3, 5, 5), jnp.float32), jnp.asarray(draw(4, 5), jnp.float32)

    def gradient(adjoint, params, x):
        def loss(params, x):
            y = reversible_scan(
                lambda w, x, key: jnp.tanh(x @ w),
                params,
                x,
                key=KEY,
                step=Damped(0.25, "block", 12, 1),
                adjoint=adjoint,
            )
            return jnp.sum(jnp.sin(y))

        return jax.grad(loss, (0, 1))(params, x)

    adjoints = Online(), Checkpoint(), Direct()
    run = jax.jit(lambda *given: [gradient(adjoint, *given) for adjoint in adjoints])
    *found, direct = run(params, x)
    for gradients in found:
        chex.assert_trees_all_close(gradients, direct, rtol=1e-5, atol=1e-6)
