"""The guard under attack: a wrong reconstruction never gives a finite, wrong gradient."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _blocks import BATCH

from bdia_jax import BackwardReport, reversible
from bdia_jax._arguments import prepare
from bdia_jax.reversible import Wanted

BLOCKS, WIDTH = 5, 11


def smooth_block(p, x, key, shift):
    del key
    return jnp.tanh(x @ p["w"] + shift) + p["offset"]


def masking_block(p, x, key, shift):
    """Its derivative drops what is not active, NaN included."""
    del key
    return jax.nn.relu(x @ p["w"] + shift) + p["offset"]


class Passes(NamedTuple):
    """The two passes of one scan, compiled apart, and what the forward pass saved."""

    scan: reversible.Scan
    inputs: reversible.Inputs
    saved: reversible._Saved
    backward: callable

    def gradients(self, saved):
        """Gradients as NumPy arrays, and the report."""
        got = jax.device_get(self.backward(saved))
        return {
            "params": got.params,
            "consts": got.consts,
            "x": got.x,
        }, got.probe


@functools.cache
def passes(block=smooth_block, m=1, tolerance_bits=0, frac_bits=9, audit=False):
    """Forward and backward pass of a small stack; every block has an ``offset`` per element."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"offset": jnp.zeros((BLOCKS, BATCH, WIDTH)), "w": draw(BLOCKS, WIDTH, WIDTH) / 3}
    x = draw(BATCH, WIDTH) * 2
    scan, inputs = prepare(
        block,
        params,
        (x, x),
        0,
        jax.random.key(3),
        (draw(WIDTH) / 5,),
        2.0**-m,
        "random",
        frac_bits,
        tolerance_bits,
        "online",
        0,
        None,
        None,
        None,
    )
    scan = scan._replace(audit=audit)
    inputs = inputs._replace(probe=BackwardReport.zeros(BLOCKS))
    wanted = Wanted((True,) * 2, (True,))
    output, saved = jax.jit(lambda inputs: reversible._forward(scan, wanted, inputs))(inputs)
    chex.assert_tree_all_finite(output)
    cotangents = jnp.ones((BATCH, WIDTH)), jnp.cos(output[1])
    backward = jax.jit(lambda saved: reversible._backward(scan, saved, cotangents))
    return Passes(scan, inputs, saved, backward)


def is_caught(gradients, sample=None):
    """Whether the gradients by the input of ``sample``, and some of every array, are NaN."""
    d_x = gradients["x"] if sample is None else gradients["x"][sample]
    return np.isnan(d_x).all() and all(np.isnan(g).any() for g in jax.tree.leaves(gradients))


# ---------------------------------------------------------------------------------------------
# Single bits
# ---------------------------------------------------------------------------------------------


def bits_that_matter(name, p: Passes):
    """Per bit of a saved array, whether it takes part in the way back; on its shape + [bits]."""
    array = dict(zip(("last_prev", "last"), p.saved.checksums_of_last)).get(name)
    array = getattr(p.saved, name) if array is None else array
    matter = np.ones((*array.shape, array.dtype.itemsize * 8), bool)
    if name in ("side", "checksums"):
        # The first block is an Euler step: what it leaves behind is not reconstructed.
        matter[0] = False
    if name == "side":
        per_word = array.dtype.itemsize * 8 // p.scan.bits
        element = np.arange(per_word) * array.shape[-1] + np.arange(array.shape[-1])[:, None]
        used = np.repeat(element < WIDTH, p.scan.bits, axis=1)
        matter[..., : used.shape[1]] &= used
        matter[..., used.shape[1] :] = False
    return array, matter


def flipped(p: Passes, name, where):
    """What was saved, with one bit flipped."""
    array, _ = bits_that_matter(name, p)
    array, bit = np.array(array), where[-1]
    word = np.array(1 << int(bit), f"uint{array.dtype.itemsize * 8}").view(array.dtype)
    array[tuple(where[:-1])] ^= word
    if name in ("last_prev", "last"):
        pair = list(p.saved.checksums_of_last)
        pair[name == "last"] = array
        return p.saved._replace(checksums_of_last=tuple(pair))
    return p.saved._replace(**{name: array})


TARGETS = ["side", "n", "n_prev", "checksums", "last_prev", "last"]
SETTINGS = [
    {"m": 1},
    {"m": 2, "tolerance_bits": 1},
    {"m": 0, "tolerance_bits": 2},
    {"block": masking_block, "m": 1},
]
IDS = ["m=1", "m=2-r=1", "m=0-r=2", "relu"]


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_every_flipped_bit_is_caught_or_changes_nothing(settings, record_property):
    """250 random bits for each of four settings, 1,000 in all."""
    p = passes(**settings)
    record_property("cases", 250)
    rng = np.random.default_rng(1)
    clean, report = p.gradients(p.saved)
    chex.assert_tree_all_finite(clean)
    chex.assert_trees_all_equal(report, BackwardReport.zeros(BLOCKS))
    caught = harmless = 0
    for i in range(250):
        # Half of them side bits, of which there are most.
        name = "side" if i % 2 else TARGETS[1 + i // 2 % 5]
        _, matter = bits_that_matter(name, p)
        where = [rng.integers(size) for size in matter.shape]
        gradients, _ = p.gradients(flipped(p, name, where))
        if matter[tuple(where)]:
            sample = where[1] if name in ("side", "checksums") else where[0]
            caught += is_caught(gradients, sample)
            others = np.arange(BATCH) != sample
            np.testing.assert_array_equal(gradients["x"][others], clean["x"][others])
            if "block" not in settings:
                # A smooth block hides no NaN: what is finite is right, element by element.
                for got, true in zip(jax.tree.leaves(gradients), jax.tree.leaves(clean)):
                    assert (np.isnan(got) | (got == true)).all()
        else:
            chex.assert_trees_all_equal(gradients, clean)
            harmless += 1
    assert caught + harmless == 250
    assert caught > 150
    assert harmless > 10


def test_the_gradient_is_nan_from_the_mismatch_down():
    """The blocks above it keep their gradients, so that one can see where it happened."""
    p = passes()
    clean, _ = p.gradients(p.saved)
    for block in range(1, BLOCKS):
        gradients, report = p.gradients(flipped(p, "side", (block, 1, 0, 0)))
        d_w, true = gradients["params"][1], clean["params"][1]
        np.testing.assert_array_equal(d_w[block + 1 :], true[block + 1 :])
        assert np.isnan(d_w[: block + 1]).all()
        assert report.mismatched[block] == 1
        assert not report.mismatched[block + 1 :].any()


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
    assert len(np.unique(reversible.checksum(n))) == len(integers)


def test_other_keys_are_caught():
    """Signs that are not those of the forward pass."""
    p = passes()
    keys = jax.random.split(jax.random.key(99), BLOCKS)
    assert is_caught(p.gradients(p.saved._replace(keys=keys))[0])


@pytest.mark.parametrize("change", [0.1, jnp.nan, jnp.inf])
def test_other_parameters_are_caught(change):
    """A block that is not the one of the forward pass."""
    p = passes()
    offset, w = p.saved.params
    for block in range(BLOCKS):
        saved = p.saved._replace(params=[offset, w.at[block].add(change)])
        gradients, report = p.gradients(saved)
        assert is_caught(gradients)
        assert report.mismatched[block] > 0


def test_a_block_that_differs_is_caught():
    p = passes()
    scan = p.scan._replace(block=lambda *arguments: p.scan.block(*arguments) * 1.001)
    cotangents = jnp.ones((BATCH, WIDTH)), jnp.ones((BATCH, WIDTH))
    got = jax.jit(lambda saved: reversible._backward(scan, saved, cotangents))(p.saved)
    assert np.isnan(got.x).all()
    assert np.isnan(got.params[1][0]).all()


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
        [reversible._signs(p.scan, key, k, BATCH)[0] for k, key in enumerate(p.saved.keys)]
    )[:, :, None]
    factor = 1 + signs * p.scan.gamma
    deviation[np.broadcast_to(factor == 0, deviation.shape)] = 0
    offset = deviation * 2.0**-p.scan.frac_bits / np.where(factor == 0, 1, factor)
    _, w = p.saved.params
    return p.saved._replace(params=[jnp.asarray(offset, jnp.float32), w]), deviation


def bound(tolerance_bits):
    """In grid steps; deviations below it are put right."""
    return {0: 0.0, 1: 0.5}.get(tolerance_bits, 2.0 ** (tolerance_bits - 1) - 0.5)


@pytest.mark.parametrize("m", [0, 1, 2])
@pytest.mark.parametrize("tolerance_bits", [0, 1, 2, 3])
def test_noise_under_the_bound_is_put_right_and_over_it_is_caught(m, tolerance_bits):
    p = passes(m=m, tolerance_bits=tolerance_bits, audit=True)
    # The audit goes on from the true states, so that all blocks are seen; it keeps the guard.
    _, y = jax.device_get(p.saved.witness)
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
        assert np.isnan(gradients["params"][1][0]).any()


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
    assert np.isnan(gradients["params"][1][block]).any()
    above = np.s_[block + 1 :]
    np.testing.assert_array_equal(gradients["params"][1][above], clean["params"][1][above])
