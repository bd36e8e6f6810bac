"""The guard under attack: a wrong reconstruction never gives a finite, wrong gradient."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _blocks import BATCH
from _rows import fast

from bdia_jax import BDIA, BackwardReport, Online, online, states
from bdia_jax.arguments import Inputs, Scan, prepare

pytestmark = pytest.mark.optimized

BLOCKS, WIDTH = 5, 11


def smooth_block(p, x, key, shift):
    del key
    return jnp.tanh(x @ p["w"] + shift) + p["offset"]


def masking_block(p, x, key, shift):
    """Its derivative drops what is not active, NaN included."""
    del key
    return jax.nn.relu(x @ p["w"] + shift) + p["offset"]


def second_part(p, x, key, shift):
    """Reads none of the first part's parameters and constants."""
    del key, shift
    return jnp.sin(x) * p["scale"]


class Passes(NamedTuple):
    """The two passes of one scan, compiled apart, and what the forward pass saved."""

    scan: Scan
    inputs: Inputs
    saved: online.Saved
    backward: Callable
    names: list[str]
    """Of the leaves of the parameters."""

    def gradients(self, saved):
        """Gradients as NumPy arrays, and the report."""
        got = jax.device_get(self.backward(saved))
        return {
            "params": {name: got.params[i] for i, name in enumerate(self.names)},
            "consts": got.consts[0],
            "x": got.x,
        }, got.probe

    def with_params(self, **changes):
        """What was saved, with other parameters."""
        params = {self.names.index(name): value for name, value in changes.items()}
        wanted = self.saved.wanted
        return self.saved._replace(wanted=wanted._replace(params=wanted.params | params))


@functools.cache
def passes(block=smooth_block, m=1, tolerance_bits=0, signs="block", audit=False):
    """Forward and backward pass of a small stack; every block has an ``offset`` per element."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"offset": jnp.zeros((BLOCKS, BATCH, WIDTH)), "w": draw(BLOCKS, WIDTH, WIDTH) / 3}
    if isinstance(block, tuple):
        params["scale"] = draw(BLOCKS, WIDTH)
    x, shift = draw(BATCH, WIDTH) * 2, draw(WIDTH) / 5
    step = BDIA(2.0**-m, signs, tolerance_bits=tolerance_bits)
    key = jax.random.key(3)
    scan, inputs = prepare(block, params, (x, x), 0, key, (shift,), step, Online())
    scan = scan._replace(audit=audit)
    wanted = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating), inputs)
    output, saved = jax.jit(lambda inputs: online.up(scan, inputs, wanted))(inputs)
    chex.assert_tree_all_finite(output)
    cotangents = jnp.ones((BATCH, WIDTH)), jnp.cos(output[1])
    backward = jax.jit(lambda saved: online.down(scan, saved, cotangents))
    return Passes(scan, inputs, saved, backward, sorted(params))


def is_caught(gradients, sample=None):
    """Whether the gradients by the input of ``sample``, and some of every array, are NaN."""
    d_x = gradients["x"] if sample is None else gradients["x"][sample]
    return np.isnan(d_x).all() and all(np.isnan(g).any() for g in jax.tree.leaves(gradients))


# ---------------------------------------------------------------------------------------------
# Single bits
# ---------------------------------------------------------------------------------------------


def with_array(saved, name, part, change):
    """What was saved, with one array changed: of a part's, of the last states, or a checksum."""
    if name in ("side", "checksum"):
        kept = saved.kept[part]
        kept = kept._replace(**{name: change(getattr(kept, name))})
        return saved._replace(kept=(*saved.kept[:part], kept, *saved.kept[part + 1 :]))
    if name in ("last_prev", "last"):
        pair = list(saved.checksums)
        pair[name == "last"] = change(pair[name == "last"])
        return saved._replace(checksums=tuple(pair))
    return saved._replace(**{name: change(getattr(saved, name))})


def bits_that_matter(name, part, p: Passes):
    """Per bit of a saved array, whether it takes part in the way back; on its shape + [bits]."""
    found = []
    with_array(p.saved, name, part, lambda array: found.append(array) or array)
    (array,) = found
    matter = np.ones((*array.shape, array.dtype.itemsize * 8), bool)
    if name in ("side", "checksum") and part == 0:
        # The first step of all is an Euler step: what it leaves behind is not reconstructed.
        matter[0] = False
    if name == "side":
        bits = p.scan.step.bits
        per_word = array.dtype.itemsize * 8 // bits
        element = np.arange(per_word) * array.shape[-1] + np.arange(array.shape[-1])[:, None]
        used = np.repeat(element < WIDTH, bits, axis=1)
        matter[..., : used.shape[1]] &= used
        matter[..., used.shape[1] :] = False
    return matter


def flipped(p: Passes, name, part, where):
    """What was saved, with one bit flipped."""

    def flip(array):
        array = np.array(array)
        word = np.array(1 << int(where[-1]), f"uint{array.dtype.itemsize * 8}").view(array.dtype)
        array[tuple(where[:-1])] ^= word
        return array

    return with_array(p.saved, name, part, flip)


TARGETS = ["side", "n", "n_prev", "checksum", "last_prev", "last"]
SETTINGS = {
    "m=1": {"m": 1},
    "m=2-r=1": {"m": 2, "tolerance_bits": 1},
    "m=0-r=2": {"m": 0, "tolerance_bits": 2, "signs": "minus"},
    "relu": {"block": masking_block, "m": 1},
    "parts": {"block": (smooth_block, second_part), "m": 1, "signs": "sample"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_every_flipped_bit_is_caught_or_changes_nothing(name, record_property):
    """200 random bits for each of five settings, 1,000 in all."""
    settings = SETTINGS[name]
    p, cases = passes(**settings), 200
    record_property("cases", cases)
    rng = np.random.default_rng(1)
    clean, report = p.gradients(p.saved)
    chex.assert_tree_all_finite(clean)
    chex.assert_trees_all_equal(report, BackwardReport.zeros(BLOCKS))
    caught = harmless = 0
    for i in range(cases):
        # Half of them side bits, of which there are most.
        name, part = (
            "side" if i % 2 else TARGETS[1 + i // 2 % 5],
            int(rng.integers(len(p.scan.parts))),
        )
        matter = bits_that_matter(name, part, p)
        where = [rng.integers(size) for size in matter.shape]
        gradients, _ = p.gradients(flipped(p, name, part, where))
        if matter[tuple(where)]:
            sample = where[1] if name in ("side", "checksum") else where[0]
            caught += is_caught(gradients, sample)
            others = np.arange(BATCH) != sample
            np.testing.assert_array_equal(gradients["x"][others], clean["x"][others])
            if settings.get("block") is not masking_block:
                # A smooth block hides no NaN: what is finite is right, element by element.
                for got, true in zip(jax.tree.leaves(gradients), jax.tree.leaves(clean)):
                    assert (np.isnan(got) | (got == true)).all()
        else:
            chex.assert_trees_all_equal(gradients, clean)
            harmless += 1
    assert caught + harmless == cases
    assert caught > 0.6 * cases
    assert harmless > 0.03 * cases


def test_the_gradient_is_nan_from_the_mismatch_down():
    """The blocks above it keep their gradients, so that one can see where it happened."""
    p = passes()
    clean, _ = p.gradients(p.saved)
    for block in range(1, BLOCKS):
        gradients, report = p.gradients(flipped(p, "side", 0, (block, 1, 0, 0)))
        d_w, true = gradients["params"]["w"], clean["params"]["w"]
        np.testing.assert_array_equal(d_w[block + 1 :], true[block + 1 :])
        assert np.isnan(d_w[: block + 1]).all()
        assert report.mismatched[block] == 1
        assert not report.mismatched[block + 1 :].any()


def test_the_gradient_is_nan_from_the_part_down():
    """A part that is not reconstructed spoils itself and the parts before it, not those after."""
    p = passes(**SETTINGS["parts"])
    clean, _ = p.gradients(p.saved)
    for part in range(2):
        gradients, report = p.gradients(flipped(p, "side", part, (2, 1, 0, 0)))
        assert np.isnan(gradients["params"]["w"][2]).all()
        same = gradients["params"]["scale"][2] == clean["params"]["scale"][2]
        assert same.all() == (part == 0)
        assert report.mismatched[2] >= 1
        assert not report.mismatched[3:].any()


# ---------------------------------------------------------------------------------------------
# Other faults
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["n", "n_prev"])
def test_a_perturbed_state_is_caught(name):
    p = passes()
    for change in (1, -3, 2**20):
        saved = p.saved._replace(**{name: getattr(p.saved, name).at[2, 4].add(change)})
        assert is_caught(p.gradients(saved)[0], sample=2)


def test_states_exchanged_between_samples_or_positions_are_caught():
    p = passes()
    for order in (np.s_[::-1], np.s_[:, ::-1]):
        assert is_caught(p.gradients(p.saved._replace(n=p.saved.n[order]))[0], sample=0)


def test_a_change_of_one_element_always_shows_in_the_checksum():
    """Different integers in the same place, all else equal, never have the same checksum."""
    rng = np.random.default_rng(0)
    integers = np.unique(rng.integers(-(2**31), 2**31, 2**18, dtype=np.int64)).astype(np.int32)
    n = jnp.zeros((len(integers), 2, 3), jnp.int32).at[:, 1, 2].set(integers)
    assert len(np.unique(states.checksum(n))) == len(integers)


def test_integers_that_change_places_show_in_the_checksum():
    """Along any axis: a state whose samples, rows or columns are exchanged is another one."""
    n = np.random.default_rng(0).integers(-(2**20), 2**20, (1, 4, 5, 6)).astype(np.int32)
    others = [n]
    for axis in (1, 2, 3):
        others += [np.flip(n, axis), np.roll(n, 1, axis)]
        one = np.moveaxis(n.copy(), axis, 0)
        one[[0, 1]] = one[[1, 0]]
        others.append(np.moveaxis(one, 0, axis))
    others.append(n.swapaxes(1, 2).reshape(n.shape))
    found = states.checksum(jnp.asarray(np.concatenate(others)))
    assert len(np.unique(found)) == len(others)


@pytest.mark.parametrize("signs", ["block", "sample"])
def test_other_keys_are_caught(signs):
    """Signs that are not those of the forward pass."""
    p = passes(signs=signs)
    key, keys = jax.random.key(99), jax.random.split(jax.random.key(99), (BLOCKS, 1))
    # One key for all blocks draws one fair coin, which comes out the same every other time.
    per_scan = [{"key": jax.random.key(seed)} for seed in range(4)]
    changes = {"block": [{"keys": keys}], "sample": per_scan}[signs]
    assert any(is_caught(p.gradients(p.saved._replace(**change))[0]) for change in changes)
    # The block itself draws nothing: the other key does not matter.
    same = p.saved._replace(**{"block": {"key": key}, "sample": {"keys": keys}}[signs])
    chex.assert_trees_all_equal(p.gradients(same)[0], p.gradients(p.saved)[0])


@pytest.mark.parametrize("change", [0.1, jnp.nan, jnp.inf])
def test_other_parameters_are_caught(change):
    """A block that is not the one of the forward pass."""
    p = passes()
    w = p.saved.wanted.params[p.names.index("w")]
    for block in range(BLOCKS):
        gradients, report = p.gradients(p.with_params(w=w.at[block].add(change)))
        assert is_caught(gradients)
        assert report.mismatched[block] > 0


def test_a_block_that_differs_is_caught():
    p = passes()
    (part,) = p.scan.parts
    other = part._replace(function=lambda *arguments: part.function(*arguments) * 1.001)
    scan = p.scan._replace(parts=(other,))
    cotangents = jnp.ones((BATCH, WIDTH)), jnp.ones((BATCH, WIDTH))
    got = jax.jit(lambda saved: online.down(scan, saved, cotangents))(p.saved)
    assert np.isnan(got.x).all()
    assert np.isnan(got.params[p.names.index("w")][0]).all()


# ---------------------------------------------------------------------------------------------
# Hardware that is not deterministic: noise on the recomputed pre-rounding values
# ---------------------------------------------------------------------------------------------


def noisy(p: Passes, largest, seed, blocks=slice(None)):
    """What was saved, such that the recomputed y are off by up to ``largest`` grid steps.

    The block adds ``offset`` to its update, which enters y with the factor 1 + γ. Returns the
    deviations as well.
    """
    rng = np.random.default_rng(seed)
    deviation = np.zeros((BLOCKS, BATCH, WIDTH))
    deviation[blocks] = rng.uniform(-largest, largest, deviation[blocks].shape)
    signs = np.stack(
        [p.scan.draw(p.saved.key, keys, k, 0)[0] for k, keys in enumerate(p.saved.keys)]
    )[:, :, None]
    factor = 1 + signs * p.scan.step.gamma
    deviation[np.broadcast_to(factor == 0, deviation.shape)] = 0
    offset = deviation * 2.0**-p.scan.step.frac_bits / np.where(factor == 0, 1, factor)
    return p.with_params(offset=jnp.asarray(offset, jnp.float32)), deviation


def bound(tolerance_bits):
    """In grid steps; deviations below it are put right."""
    return {0: 0.0, 1: 0.5}.get(tolerance_bits, 2.0 ** (tolerance_bits - 1) - 0.5)


@pytest.mark.parametrize("m", fast(1, [2, 0]))
@pytest.mark.parametrize("tolerance_bits", [0, 1, 2, 3])
def test_noise_under_the_bound_is_put_right_and_over_it_is_caught(m, tolerance_bits):
    p = passes(m=m, tolerance_bits=tolerance_bits, audit=True)
    # The audit goes on from the true states, so that all blocks are seen; it keeps the guard.
    _, y = jax.device_get(p.saved.kept[0].witness)
    for seed in range(5):
        under = 0.97 * bound(tolerance_bits)
        saved, deviation = noisy(p, under, seed)
        gradients, report = p.gradients(saved)
        chex.assert_tree_all_finite(gradients)
        np.testing.assert_array_equal(report.mismatched, 0)
        # The roundings that come out otherwise; a value within 1e-3 of a tie may do either.
        shifted = y.astype(np.float64) + deviation
        moved = np.rint(shifted) != np.rint(y)
        open_ = np.abs(np.abs(shifted - np.rint(shifted)) - 0.5) < 1e-3
        least, most = ((flags).sum(axis=(1, 2)) for flags in (moved & ~open_, moved | open_))
        assert (least <= report.corrected).all()
        assert (report.corrected <= most).all()
        assert (report.deviation <= under + 1e-2).all()
        if tolerance_bits:
            assert moved.mean() > 0.1

        # Over it every block has some that cannot be put right, and none goes unseen.
        saved, _ = noisy(p, 2 * bound(tolerance_bits) + 1, seed)
        gradients, report = p.gradients(saved)
        assert (report.mismatched > 0).all()
        assert np.isnan(gradients["x"]).any()
        assert np.isnan(gradients["params"]["w"][0]).any()


@pytest.mark.parametrize("tolerance_bits", [1, 2])
def test_with_noise_under_the_bound_the_states_stay_exact_all_the_way_down(tolerance_bits):
    """Without an audit, block after block; gradients differ by what the noise makes of them."""
    p = passes(m=1, tolerance_bits=tolerance_bits)
    clean, _ = p.gradients(p.saved)
    for seed in range(5):
        saved, _ = noisy(p, 0.97 * bound(tolerance_bits), seed)
        gradients, report = p.gradients(saved)
        np.testing.assert_array_equal(report.mismatched, 0)
        assert report.corrected.sum() > 0
        # Without an audit, a correction is what is told of the deviation.
        assert 1 <= report.deviation.max() <= 2 ** (tolerance_bits - 1)
        # The offset is not seen by the derivative of the block: the gradients are the same.
        chex.assert_trees_all_close(gradients, clean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_noise_over_the_bound_in_one_block_is_caught(block):
    """In every block, the Euler step included; and the blocks above keep their gradients."""
    p = passes(m=1, tolerance_bits=2)
    clean, _ = p.gradients(p.saved)
    saved, _ = noisy(p, 4.0, seed=0, blocks=block)
    gradients, report = p.gradients(saved)
    assert report.mismatched[block] > 0
    assert np.isnan(gradients["params"]["w"][block]).any()
    above = np.s_[block + 1 :]
    np.testing.assert_array_equal(gradients["params"]["w"][above], clean["params"]["w"][above])
