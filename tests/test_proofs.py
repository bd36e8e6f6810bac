"""The inverse and the tolerance bits, proved by a solver over all inputs.

The solver is given the very functions of ``bdia_jax.maps``, run on symbolic 32-bit words; that
the words mean what JAX's arrays mean is checked on random values, and so is that the steps of
``bdia_jax.steps`` do with arrays what is proved of words.

The maps act element by element, and σ of an element is -1 or +1 (0 in the first step of all,
which is not taken back). Proved for each of the two, they are proved for every way to choose signs;
``test_steps.py`` shows that no way gives anything else.
"""

import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import z3
from hypothesis import strategies as st

from bdia_jax import BDIA, Midpoint, maps

INT32 = st.integers(-(2**31), 2**31 - 1)
SIGNS = st.sampled_from([-1, 1])


class Word:
    """A symbolic int32 or uint32 that behaves as an array of JAX does."""

    def __init__(self, bits, signed=True):
        self.bits, self.signed = bits, signed

    def astype(self, dtype):
        assert jnp.dtype(dtype).name in ("int32", "uint32")
        return Word(self.bits, jnp.dtype(dtype) == jnp.int32)

    def _with(self, other):
        if isinstance(other, Word):
            assert other.signed == self.signed, "JAX would promote to another type"
            return other.bits
        if not isinstance(other, int):
            assert jnp.issubdtype(other.dtype, jnp.signedinteger) == self.signed
        return z3.BitVecVal(int(other), 32)

    def __add__(self, other):
        return Word(self.bits + self._with(other), self.signed)

    def __sub__(self, other):
        return Word(self.bits - self._with(other), self.signed)

    def __mul__(self, other):
        return Word(self.bits * self._with(other), self.signed)

    def __and__(self, other):
        return Word(self.bits & self._with(other), self.signed)

    def __lshift__(self, count: int):
        return Word(self.bits << count, self.signed)

    def __rshift__(self, count: int):
        # On z3's words >> is the arithmetic shift.
        return Word(self.bits >> count if self.signed else z3.LShR(self.bits, count), self.signed)

    def __neg__(self):
        return Word(-self.bits, self.signed)

    def __eq__(self, other):
        return Truth(self.bits == self._with(other))


class Truth:
    """A symbolic Boolean, with the ``&`` of arrays."""

    def __init__(self, value):
        self.value = value

    def __and__(self, other):
        return Truth(z3.And(self.value, other.value))


class Remainder:
    """A symbolic ``y' - q'``, of which only the sign is looked at."""

    def __init__(self, negative):
        self.negative = negative

    def __lt__(self, zero):
        assert zero == 0
        return Truth(self.negative)


def _where(condition, a: int, b: Word):
    return Word(z3.If(condition.value, z3.BitVecVal(a, 32), b.bits), b.signed)


@pytest.fixture
def symbolic(monkeypatch):
    """Lets the functions of ``bdia_jax.maps`` run on symbolic words."""
    names = types.SimpleNamespace(uint32=np.uint32, int32=np.int32, where=_where)
    monkeypatch.setattr(maps, "jnp", names)


def prove(claim, *assumptions):
    """Fails with a counterexample, unless the claim follows from the assumptions."""
    solver = z3.Solver()
    solver.set("timeout", 120_000)
    solver.add(*assumptions, z3.Not(claim))
    answer = solver.check()
    assert answer == z3.unsat, f"{answer}: {solver.model() if answer == z3.sat else ''}"


def find(*claims):
    """A model in which all the claims hold; fails where there is none."""
    solver = z3.Solver()
    solver.add(*claims)
    assert solver.check() == z3.sat
    return solver.model()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("m", range(5))
def test_inverse_is_exact_for_all_int32(symbolic, m, sign):
    n_prev, q = Word(z3.BitVec("n_prev", 32)), Word(z3.BitVec("q", 32))
    sign = Word(z3.BitVecVal(sign, 32))
    n_next = maps.bdia_step(n_prev, q, sign, m)
    for tolerance_bits in (0, 2):
        side = maps.side_information(n_prev, m, tolerance_bits)
        back = maps.bdia_inverse(n_next, q, side, sign, m)
        prove(back.bits == n_prev.bits)


@pytest.mark.parametrize("m", range(5))
def test_every_side_bit_is_needed(symbolic, m):
    """Two states that differ in the lowest m bits alone are taken to the same state."""
    a, b, q = (Word(z3.BitVec(name, 32)) for name in "abq")
    sign = Word(z3.BitVecVal(1, 32))
    same = maps.bdia_step(a, q, sign, m).bits == maps.bdia_step(b, q, sign, m).bits
    if m == 0:
        prove(a.bits == b.bits, same)
    else:
        find(same, a.bits != b.bits, z3.Extract(m - 1, 1, a.bits ^ b.bits) == 0 if m > 1 else True)
        prove(a.bits == b.bits, same, z3.Extract(m - 1, 0, a.bits ^ b.bits) == 0)


@pytest.mark.parametrize("m", range(5))
def test_euler_step_is_q(symbolic, m):
    n_prev, q = Word(z3.BitVec("n_prev", 32)), Word(z3.BitVec("q", 32))
    prove(maps.bdia_step(n_prev, q, Word(z3.BitVecVal(0, 32)), m).bits == q.bits)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("tolerance_bits", [1, 2, 3])
@pytest.mark.parametrize("m", range(4))
def test_tolerance_bits_find_the_error(symbolic, m, tolerance_bits, sign):
    """Integers: every error up to 2^(r-1), where the remainder tells the sign of the largest."""
    n_prev, q, e = (Word(z3.BitVec(name, 32)) for name in ("n_prev", "q", "e"))
    sign = Word(z3.BitVecVal(sign, 32))
    negative = z3.Bool("remainder is negative")
    half = 2 ** (tolerance_bits - 1)
    n_next = maps.bdia_step(n_prev, q, sign, m)
    side = maps.side_information(n_prev, m, tolerance_bits)
    recomputed = q + e
    found = maps.rounding_error(
        n_next, recomputed, Remainder(negative), side, sign, m, tolerance_bits
    )
    back = maps.bdia_inverse(n_next, recomputed - found, side, sign, m)
    prove(
        z3.And(found.bits == e.bits, back.bits == n_prev.bits),
        e.bits >= -half,
        e.bits <= half,
        z3.Implies(e.bits == -half, z3.Not(negative)),
        z3.Implies(e.bits == half, negative),
    )


def _rounds_to(y, q):
    """``q`` is ``y`` rounded, ties to even, as a statement about reals."""
    even = q % 2 == 0
    tie = z3.Or(y - q == z3.Q(1, 2), y - q == z3.Q(-1, 2))
    return z3.And(y - q <= z3.Q(1, 2), y - q >= z3.Q(-1, 2), z3.Implies(tie, even))


def _bound(tolerance_bits):
    """How far a recomputed pre-rounding value may be off: strictly less than this."""
    return z3.Q(1, 2) if tolerance_bits == 1 else z3.Q(2**tolerance_bits - 1, 2)


@pytest.mark.parametrize("tolerance_bits", [1, 2, 3, 4])
def test_float_rule_gives_what_the_integers_need(tolerance_bits):
    """Reals: |y' - y| under the bound implies what the integer rule assumes of e."""
    y, y_again = z3.Reals("y y_again")
    q, q_again = z3.Ints("q q_again")
    half, e = 2 ** (tolerance_bits - 1), q_again - q
    bound = _bound(tolerance_bits)
    prove(
        z3.And(
            e >= -half,
            e <= half,
            z3.Implies(e == -half, y_again - q_again > 0),
            z3.Implies(e == half, y_again - q_again < 0),
        ),
        _rounds_to(y, q),
        _rounds_to(y_again, q_again),
        y_again - y < bound,
        y - y_again < bound,
    )


@pytest.mark.parametrize("tolerance_bits", [1, 2, 3, 4])
def test_float_rule_is_sharp(tolerance_bits):
    """At the bound itself no rule can work: two errors, 2^r apart, with the same y'."""
    y, other, y_again = z3.Reals("y other y_again")
    q, other_q, q_again = z3.Ints("q other_q q_again")
    bound = _bound(tolerance_bits)
    model = find(
        _rounds_to(y, q),
        _rounds_to(other, other_q),
        _rounds_to(y_again, q_again),
        y_again - y == bound,
        other - y_again == bound,
        other_q - q == 2**tolerance_bits,
    )
    # The library's rule gets one of the two right, and the other wrong.
    value = {v.name(): model[v].as_fraction() for v in model if isinstance(model[v], z3.RatNumRef)}
    wrong = [
        _recovered(np.array(float(value[name])), np.array(float(value["y_again"])), tolerance_bits)
        for name in ("y", "other")
    ]
    assert sorted(map(bool, wrong)) == [False, True]


def _recovered(y, y_again, tolerance_bits, n_prev=12345, sign=1, m=1):
    """Whether the state is reconstructed from a recomputation that gave y_again instead of y."""
    n_prev = jnp.full(y.shape, n_prev, jnp.int32)
    sign = jnp.full(y.shape, sign, jnp.int32)
    return np.asarray(_RECOVER(tolerance_bits, m)(n_prev, y, y_again, sign))


def _recover(n_prev, y, y_again, sign, tolerance_bits, m):
    q, q_again = (jnp.round(v).astype(jnp.int32) for v in (y, y_again))
    n_next = maps.bdia_step(n_prev, q, sign, m)
    side = maps.side_information(n_prev, m, tolerance_bits)
    if tolerance_bits:
        q_again -= maps.rounding_error(
            n_next, q_again, y_again - q_again, side, sign, m, tolerance_bits
        )
    return maps.bdia_inverse(n_next, q_again, side, sign, m) == n_prev


_COMPILED = {}


def _RECOVER(tolerance_bits, m):
    def run(n_prev, y, y_again, sign):
        return _recover(n_prev, y, y_again, sign, tolerance_bits, m)

    return _COMPILED.setdefault((tolerance_bits, m), jax.jit(run))


@pytest.mark.parametrize("tolerance_bits", [1, 2, 3])
@pytest.mark.parametrize("m", [0, 1, 3])
@hypothesis.given(seed=st.integers(0, 2**32 - 1), coarse=st.booleans())
def test_float_rule_on_floats(m, tolerance_bits, seed, coarse):
    """float32 values; on a coarse lattice, so that ties and remainders of 0 are common."""
    rng = np.random.default_rng(seed)
    bound = 0.5 if tolerance_bits == 1 else 2 ** (tolerance_bits - 1) - 0.5
    y = rng.uniform(-50, 50, 4096)
    y_again = y + rng.uniform(-bound, bound, y.shape)
    if coarse:
        y, y_again = np.round(y * 8) / 8, np.round(y_again * 8) / 8
    y, y_again = y.astype(np.float32), y_again.astype(np.float32)
    under = np.abs(y.astype(np.float64) - y_again) < bound
    sign = rng.choice(np.array([-1, 1], np.int32), y.shape)
    n_prev = rng.integers(-(2**31), 2**31, y.shape, dtype=np.int32)
    right = np.asarray(_RECOVER(tolerance_bits, m)(n_prev, y, y_again, sign))
    assert under.mean() > 0.5
    assert (np.round(y) != np.round(y_again))[under].mean() > 0.1
    assert right[under].all()


@hypothesis.given(
    n_prev=INT32,
    q=INT32,
    error=st.integers(-4, 4),
    negative=st.booleans(),
    sign=st.sampled_from([-1, 0, 1]),
    m=st.integers(0, 4),
    tolerance_bits=st.integers(1, 3),
)
def test_symbolic_words_mean_what_arrays_mean(n_prev, q, error, negative, sign, m, tolerance_bits):
    """The functions give the same on words (of constants) as on arrays."""

    def run(n_prev, q, error, remainder, sign):
        n_next = maps.bdia_step(n_prev, q, sign, m)
        side = maps.side_information(n_prev, m, tolerance_bits)
        return (
            n_next,
            side,
            maps.bdia_inverse(n_next, q, side, sign, m),
            maps.rounding_error(n_next, q + error, remainder, side, sign, m, tolerance_bits),
        )

    ints = (n_prev, q, error)
    arrays = run(*(jnp.int32(i) for i in ints), jnp.float32(-negative), jnp.int32(sign))
    names = types.SimpleNamespace(uint32=np.uint32, int32=np.int32, where=_where)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "jnp", names)
        words = run(
            *(Word(z3.BitVecVal(i, 32)) for i in ints),
            Remainder(z3.BoolVal(negative)),
            Word(z3.BitVecVal(sign, 32)),
        )
    for array, word in zip(arrays, words, strict=True):
        assert array.dtype == (jnp.int32 if word.signed else jnp.uint32)
        value = z3.simplify(word.bits)
        assert int(array) == (value.as_signed_long() if word.signed else value.as_long())


@st.composite
def reversible_steps(draw):
    """Every step with an inverse."""
    r = draw(st.integers(0, 3))
    if draw(st.booleans()):
        return Midpoint(draw(st.integers(0, 9)), r)
    signs = st.sampled_from(["block", "sample", "minus", "plus"])
    return BDIA(2.0 ** -draw(st.integers(0, 4)), draw(signs), draw(st.integers(-2, 9)), r)


@hypothesis.given(step=reversible_steps(), seed=st.integers(0, 2**32 - 1))
def test_every_step_takes_itself_back(step, seed):
    """On arrays, with recomputed values that are off by as much as the tolerance bits allow."""
    rng = np.random.default_rng(seed)
    r, shape, signs = step.tolerance_bits, (16, 9), np.array([-1, 1], np.int32)
    sign = rng.choice(signs, 16)
    n_prev = rng.integers(-(2**31), 2**31, shape, dtype=np.int32)
    # Small enough that float32 tells thousandths of a grid step apart.
    n = rng.integers(-(2**12), 2**12, shape, dtype=np.int32)
    h = rng.integers(-(2**12), 2**12, shape) * 2.0**-step.frac_bits * rng.random(shape)
    bound = {0: 0.0, 1: 0.5}.get(r, 2.0 ** (r - 1) - 0.5)
    factor = 1 + sign[:, None] * step.gamma
    off = rng.uniform(-bound, bound, shape) * 2.0**-step.frac_bits
    again = h + np.divide(off, factor, out=np.zeros(shape), where=factor != 0)
    h, again = h.astype(np.float32), again.astype(np.float32)

    n_next, y = step.up(n_prev, n, h, sign)
    kept = step.keep(n_prev)
    found = step.down(n_next, n, again, sign, kept)
    # y is rounded to float32 as h is; at the bound itself nothing is promised.
    under = np.abs(np.asarray(found.y, np.float64) - y) < bound if r else np.full(shape, True)
    assert under.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(found.n_prev)[under], n_prev[under])
    np.testing.assert_array_equal(np.asarray(found.q)[under], np.rint(y)[under])
    moved = np.rint(found.y) - np.rint(y)
    np.testing.assert_array_equal(np.asarray(found.error)[under], moved[under])
    assert (kept is None) == (step.bits == 0)
