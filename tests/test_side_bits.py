"""Packing: everything comes back, and nothing is wasted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bdia_jax

pytestmark = pytest.mark.optimized

BITS = [1, 2, 3, 4, 5, 8, 12, 16, 32]


# Every shape is compiled anew.
@pytest.mark.slow
@settings(max_examples=25)
@given(
    bits=st.sampled_from(BITS),
    width=st.integers(1, 40),
    lead=st.sampled_from([(), (2, 3)]),
    seed=st.integers(0, 1000),
)
def test_packed_bits_come_back(bits, width, lead, seed):
    shape = (*lead, width)
    values = np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint32)
    packed = bdia_jax.pack_bits(jnp.asarray(values), bits)
    assert packed.shape == (*lead, bdia_jax.packed_width(width, bits))
    np.testing.assert_array_equal(bdia_jax.unpack_bits(packed, bits, width), values)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing_wastes_nothing(bits):
    packed = bdia_jax.pack_bits(jnp.zeros((3, 64), jnp.uint32), bits)
    assert packed.nbytes * 8 == 3 * 64 * bits


@pytest.mark.parametrize("bits", BITS)
def test_a_row_wastes_less_than_one_word(bits):
    per_word = (8 if 8 % bits == 0 else 32) // bits
    for width in range(1, 100):
        assert 0 <= bdia_jax.packed_width(width, bits) * per_word - width < per_word


@pytest.mark.parametrize("bits", BITS)
def test_every_element_has_bits_of_its_own(bits):
    """One element at a time set to all ones: the words share no bit."""
    width = 21
    ones = jnp.eye(width, dtype=jnp.uint32) * jnp.uint32(2**bits - 1)
    packed = np.asarray(bdia_jax.pack_bits(ones, bits)).astype(np.uint64)
    assert (np.bitwise_or.reduce(packed) == packed.sum(axis=0)).all()
    assert sum(int(word).bit_count() for word in packed.ravel()) == width * bits


def test_under_jit_and_vmap_nothing_changes():
    values = jax.random.randint(jax.random.key(0), (3, 4, 19), 0, 8).astype(jnp.uint32)

    def there_and_back(values):
        return bdia_jax.unpack_bits(bdia_jax.pack_bits(values, 3), 3, 19)

    np.testing.assert_array_equal(jax.jit(jax.vmap(there_and_back))(values), values)
