"""What does not fit is an error that says what was given and what is allowed, before any work."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bdia_jax
from bdia_jax import BackwardReport

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
W, X = jnp.ones((3, 4, 4)), jnp.ones((2, 4))


def block(w, x, key, *consts):
    return jnp.tanh(x @ w + sum(consts))


def scan(block=block, params=W, x=X, **settings):
    return bdia_jax.reversible_scan(block, params, x, **({"key": KEY} | with_step(settings)))


def with_step(settings):
    """Fields of BDIA's step, among other arguments, made into one."""
    fields = ("gamma", "signs", "frac_bits", "tolerance_bits")
    given = {name: settings.pop(name) for name in fields if name in settings}
    return settings | {"step": bdia_jax.BDIA(**given)} if given else settings


def pair(state=(X, X), start=0, **settings):
    return bdia_jax.reversible_scan_pair(block, W, state, start=start, key=KEY, **settings)


def check(block=block, params=W, x=X, **settings):
    return bdia_jax.check_reversible(block, params, x, **({"key": KEY} | with_step(settings)))


def packed(bits=1, width=20):
    return bdia_jax.pack_bits(jnp.zeros((2, width), jnp.uint32), bits)


# What is called, with which arguments; the exception; and what its message must say: what was
# given, and what is allowed.
CASES = {
    # The block.
    "block: not a function": (lambda: scan(block=W), TypeError, "block must be a function", "got"),
    "block: other shape": (
        lambda: scan(lambda w, x, key: x[:, :3]),
        ValueError,
        r"shape of x, \(2, 4\)",
        r"\(2, 3\)",
    ),
    "block: other rank": (
        lambda: scan(lambda w, x, key: x.sum()),
        ValueError,
        r"shape of x, \(2, 4\)",
        r"got \(\)",
    ),
    "block: integers": (
        lambda: scan(lambda w, x, key: jnp.int32(x)),
        TypeError,
        "floating-point",
        "int32",
    ),
    "block: complex": (
        lambda: scan(lambda w, x, key: x + 1j),
        TypeError,
        "floating-point",
        "complex64",
    ),
    "block: a tuple": (
        lambda: scan(lambda w, x, key: (x, x)),
        TypeError,
        "one array",
        "tuple of 2 arrays",
    ),
    "block: nothing": (
        lambda: scan(lambda w, x, key: None),
        TypeError,
        "one array",
        "NoneType of 0 arrays",
    ),
    "block: a dict": (
        lambda: scan(lambda w, x, key: {"h": x}),
        TypeError,
        "one array",
        "dict of 1 arrays",
    ),
    # The parameters.
    "params: none": (lambda: scan(params={}), ValueError, "no array", "depth"),
    "params: depth 0": (lambda: scan(params=W[:0]), ValueError, "0 blocks", "at least 1"),
    "params: unequal depths": (
        lambda: scan(params={"a": W, "b": W[:2]}),
        ValueError,
        r"\['a'\] has 3",
        r"\['b'\] has 2",
        "as many blocks",
    ),
    "params: a scalar": (
        lambda: scan(params={"a": W, "b": jnp.ones(())}),
        ValueError,
        r"\['b'\] is a scalar",
        "leading block axis",
    ),
    "params: not an array": (
        lambda: scan(params={"a": W, "b": 1.0}),
        TypeError,
        r"\['b'\] must be an array",
        "float",
    ),
    "params: a list of blocks": (
        lambda: scan(params=[["w"], W]),
        TypeError,
        r"\[0\]\[0\] must be an array",
        "str",
    ),
    # The input.
    "x: integers": (lambda: scan(x=jnp.ones((2, 4), int)), TypeError, "floating-point", "int32"),
    "x: complex": (lambda: scan(x=X + 1j), TypeError, "floating-point", "complex64"),
    "x: a list": (lambda: scan(x=[[1.0] * 4] * 2), TypeError, "floating-point array", "list"),
    "x: no batch": (lambda: scan(x=X[0]), ValueError, r"\[batch, \.\.\., features\]", r"\(4,\)"),
    "x: empty batch": (lambda: scan(x=X[:0]), ValueError, "empty", r"\(0, 4\)"),
    "x: no features": (lambda: scan(x=X[:, :0]), ValueError, "empty", r"\(2, 0\)"),
    # The key.
    "key: missing": (lambda: scan(key=None), ValueError, "needs a PRNG key", "key=None"),
    "key: an int": (lambda: scan(key=0), TypeError, r"jax.random.key\(0\)", "int"),
    "key: text": (lambda: scan(key="0"), TypeError, r"jax.random.key\(0\)", "str"),
    "key: floats": (lambda: scan(key=jnp.ones(2)), TypeError, "PRNG key", "float32"),
    "key: a batch": (
        lambda: scan(key=jax.random.split(KEY, 5)),
        ValueError,
        "one PRNG key",
        r"\(5,\)",
    ),
    "key: a raw batch": (
        lambda: scan(key=jnp.zeros((5, 2), jnp.uint32)),
        ValueError,
        "one PRNG key",
        r"\(5,\)",
    ),
    # The constants.
    "consts: an array": (lambda: scan(consts=X), TypeError, r"tuple.*consts=\(mask,\)", "got"),
    "consts: None": (lambda: scan(consts=None), TypeError, r"consts=\(mask,\)", "NoneType"),
    "consts: a dict": (lambda: scan(consts={"m": X}), TypeError, r"consts=\(mask,\)", "dict"),
    # γ.
    "gamma: no power of two": (
        lambda: scan(gamma=0.6),
        ValueError,
        "power of two",
        "0.6",
        r"Checkpoint\(\) or Direct\(\)",
    ),
    "gamma: negative": (lambda: scan(gamma=-0.5), ValueError, r"\(0, 1\]", "-0.5"),
    "gamma: above 1": (lambda: scan(gamma=2.0), ValueError, r"\(0, 1\]", "2.0"),
    "gamma: NaN": (lambda: scan(gamma=float("nan")), ValueError, r"\(0, 1\]", "nan"),
    "gamma: too small": (lambda: scan(gamma=2.0**-17), ValueError, r"m in 0 … 16", "7.6"),
    "gamma: nothing": (lambda: scan(gamma=None), TypeError, "number", "None"),
    "gamma: above 1, direct": (
        lambda: scan(gamma=1.5, adjoint=bdia_jax.Direct()),
        ValueError,
        r"\(0, 1\]",
        "1.5",
    ),
    "gamma: text": (lambda: scan(gamma="0.5"), TypeError, "number", "'0.5'"),
    "gamma: a Boolean": (lambda: scan(gamma=True), TypeError, "number", "True"),
    "gamma: traced": (
        lambda: jax.jit(lambda g: scan(gamma=g))(0.5),
        TypeError,
        "static, not traced",
        "got",
    ),
    # The grid.
    "frac_bits: too many": (lambda: scan(frac_bits=25), ValueError, r"\[-16, 24\]", "25"),
    "frac_bits: too few": (lambda: scan(frac_bits=-17), ValueError, r"\[-16, 24\]", "-17"),
    "frac_bits: a float": (lambda: scan(frac_bits=9.0), TypeError, "integer", "9.0"),
    "frac_bits: a Boolean": (lambda: scan(frac_bits=True), TypeError, "integer", "True"),
    "frac_bits: none, online": (
        lambda: scan(frac_bits=None),
        ValueError,
        "on the grid",
        "None",
        r"Checkpoint\(\) or Direct\(\)",
    ),
    # Tolerance bits and back-propagation.
    "tolerance_bits: negative": (
        lambda: scan(tolerance_bits=-1),
        ValueError,
        r"\[0, 15\]",
        r"2\*\*-1",
        "-1",
    ),
    "tolerance_bits: too many": (
        lambda: scan(tolerance_bits=15, gamma=0.25),
        ValueError,
        r"\[0, 14\]",
        "got 15",
    ),
    "tolerance_bits: a float": (lambda: scan(tolerance_bits=1.0), TypeError, "integer", "1.0"),
    "adjoint: a name": (lambda: scan(adjoint="online"), TypeError, r"Online\(...\)", "'online'"),
    "step: a name": (lambda: scan(step="bdia"), TypeError, r"BDIA\(...\)", "'bdia'"),
    "step: none to take back": (
        lambda: scan(step=bdia_jax.Euler()),
        ValueError,
        "has no inverse",
        "Euler",
        r"Checkpoint\(\)",
    ),
    "signs: unknown": (lambda: scan(signs="random"), ValueError, "block, sample", "'random'"),
    "bits: too many": (lambda: scan(adjoint=bdia_jax.Checkpoint(bits=9)), ValueError, "2 … 8", "9"),
    "bits: on the grid": (
        lambda: scan(adjoint=bdia_jax.Checkpoint(bits=4)),
        ValueError,
        "without a grid",
        "BDIA",
    ),
    # The probe.
    "probe: not a report": (
        lambda: scan(adjoint=bdia_jax.Online(probe=jnp.zeros(3))),
        ValueError,
        r"BackwardReport.zeros\(3\)",
        "got",
    ),
    "probe: of another depth": (
        lambda: scan(adjoint=bdia_jax.Online(probe=BackwardReport.zeros(2))),
        ValueError,
        r"zeros\(3\)",
        "got",
    ),
    # From state to state.
    "pair: shapes": (lambda: pair((X, X[:, :3])), ValueError, "alike", r"\[2, 4\]", r"\[2, 3\]"),
    "pair: dtypes": (
        lambda: pair((X, X.astype(jnp.bfloat16))),
        ValueError,
        "alike",
        "float32",
        "bfloat16",
    ),
    "pair: one state": (lambda: pair(X), TypeError, r"pair \(x_prev, x\)", "got"),
    "pair: three states": (lambda: pair((X, X, X)), TypeError, r"pair \(x_prev, x\)", "got"),
    "pair: integers before": (
        lambda: pair((jnp.ones((2, 4), int), X)),
        TypeError,
        "x_prev",
        "floating-point",
        "int32",
    ),
    "pair: start negative": (lambda: pair(start=-1), ValueError, "int >= 0", "-1"),
    "pair: start a float": (lambda: pair(start=1.0), ValueError, "int >= 0", "1.0"),
    "pair: compute in integers": (
        lambda: pair(compute_dtype=jnp.int32),
        TypeError,
        "floating-point",
        "int32",
    ),
    # The audit.
    "check: no grid": (lambda: check(frac_bits=None), ValueError, "on the grid", "None"),
    "check: tolerance_bits": (lambda: check(tolerance_bits=16), ValueError, r"\[0, 15\]", "16"),
    "check: block": (
        lambda: check(lambda w, x, key: x[0]),
        ValueError,
        r"shape of x, \(2, 4\)",
        r"\(4,\)",
    ),
    "check: gamma 0": (lambda: check(step=bdia_jax.Euler()), ValueError, "no inverse", "Euler"),
    "check: gamma": (lambda: check(gamma=0.3), ValueError, "power of two", "0.3"),
    "check: another program each time": (
        lambda: check(lambda w, x, key: x * RNG.random(4)),
        ValueError,
        "not a function of its arguments",
        "key_k",
    ),
    # The grid, by itself.
    "to_grid: integers": (
        lambda: bdia_jax.to_grid(jnp.arange(3), 9),
        TypeError,
        "floating-point",
        "int32",
    ),
    "to_grid: frac_bits": (lambda: bdia_jax.to_grid(X, 30), ValueError, r"\[-16, 24\]", "30"),
    "from_grid: floats": (lambda: bdia_jax.from_grid(X, 9), TypeError, "integers", "float32"),
    "from_grid: a list": (lambda: bdia_jax.from_grid([1, 2], 9), TypeError, "integers", "list"),
    "from_grid: to integers": (
        lambda: bdia_jax.from_grid(jnp.arange(3), 9, jnp.int32),
        TypeError,
        "floating",
        "int32",
    ),
    "quantize: frac_bits": (lambda: bdia_jax.quantize(X, 0.5), TypeError, "integer", "0.5"),
    "on_grid: integers": (
        lambda: bdia_jax.on_grid(jnp.arange(3), 0),
        TypeError,
        "floating-point",
        "int32",
    ),
    # Packing.
    "pack_bits: signed": (
        lambda: bdia_jax.pack_bits(jnp.arange(8), 1),
        TypeError,
        "unsigned integers",
        "int32",
    ),
    "pack_bits: floats": (
        lambda: bdia_jax.pack_bits(X, 1),
        TypeError,
        "unsigned integers",
        "float32",
    ),
    "pack_bits: 0 bits": (lambda: packed(0), ValueError, r"1 … 32", "got 0"),
    "pack_bits: 33 bits": (lambda: packed(33), ValueError, r"1 … 32", "got 33"),
    "pack_bits: a float": (lambda: packed(1.0), ValueError, r"1 … 32", "got 1.0"),
    "pack_bits: a scalar": (
        lambda: bdia_jax.pack_bits(jnp.uint32(1), 1),
        ValueError,
        "feature axis",
        "scalar",
    ),
    "unpack_bits: width": (
        lambda: bdia_jax.unpack_bits(packed(1, 20), 1, 40),
        ValueError,
        "40 elements",
        "got 3",
    ),
    "unpack_bits: word": (
        lambda: bdia_jax.unpack_bits(packed(8), 3, 200),
        ValueError,
        "uint32",
        "uint8",
    ),
    "packed_width: bits": (lambda: bdia_jax.packed_width(8, 64), ValueError, r"1 … 32", "got 64"),
}


@pytest.mark.parametrize("name", CASES)
def test_says_what_was_given_and_what_is_allowed(name):
    call, exception, *sayings = CASES[name]
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception
    for saying in sayings:
        assert re.search(saying, str(caught.value)), f"{saying!r} is not in: {caught.value}"


# What users may well try, and is right: it must not be refused.
GOOD = {
    "a raw key": lambda: scan(key=jax.random.PRNGKey(0)),
    "NumPy arrays": lambda: scan(
        params=np.ones((3, 4, 4), np.float32), x=np.ones((2, 4), np.float32)
    ),
    "an int as gamma": lambda: scan(gamma=1),
    "a NumPy number as gamma": lambda: scan(gamma=np.float32(0.5)),
    "a NumPy integer as frac_bits": lambda: scan(frac_bits=np.int64(9)),
    "a list of consts": lambda: scan(consts=[X]),
    "another block dtype": lambda: scan(lambda w, x, key: (x @ w[:, :]).astype(jnp.bfloat16)),
    "any gamma, direct": lambda: scan(gamma=0.3, adjoint=bdia_jax.Direct()),
    "no key, nothing draws": lambda: scan(key=None, signs="minus"),
}


@pytest.mark.parametrize("name", GOOD)
def test_is_not_refused(name):
    y = jax.eval_shape(GOOD[name])
    assert y.shape == X.shape
