"""What is computed a chunk of positions at a time is what is computed at once."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdia_jax.nn.chunks import by_chunks, even

BATCH, WIDTH = 2, 3


def arguments(length, dtype=jnp.float64):
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def draw(*shape):
        return jax.random.normal(next(keys), shape, dtype)

    weights = {"w": draw(WIDTH, WIDTH), "v": draw(WIDTH, 4)}
    x, y = draw(BATCH, length, WIDTH), draw(BATCH, length, 2, 2)
    rows = jax.random.randint(next(keys), (BATCH, length), 0, WIDTH)
    return weights, x, y, rows


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def in_chunks(weights, x, y, rows, size):
    """Results as wide as an argument, and not; of what is differentiated, and of what is not."""
    picked = jnp.array([2, 0, 1])

    def function(x, pair):
        y, rows = pair
        z = jnp.tanh(x @ weights["w"])[..., picked]
        other = jnp.sin(z @ weights["v"]) * y.reshape(*y.shape[:2], -1)
        return z + jnp.take(weights["w"], rows, axis=0), {"other": other}

    return by_chunks(function, x, (y, rows), size=size)


@pytest.mark.parametrize("length", [13, 16, 5])
@pytest.mark.parametrize("used", ["both", "first", "other"])
def test_chunks_are_the_whole(length, used):
    with jax.enable_x64(True):
        weights, x, y, rows = arguments(length)

        def loss(weights, x, y, size):
            first, rest = in_chunks(weights, x, y, rows, size)
            first = 0.0 if used == "other" else jnp.sum(jnp.cos(first) * x)
            return first + (0.0 if used == "first" else jnp.sum(rest["other"] ** 3))

        whole, chunked = (
            jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)(weights, x, y, size)
            for size in (None, 4)
        )
        close(chunked, whole)
        # Only of some arguments, and of the others none.
        d = jax.grad(loss, 1)(weights, x, y, 4)
        close(d, whole[1][1])


def test_second_derivatives_and_many_at_once():
    with jax.enable_x64(True):
        weights, x, y, rows = arguments(7)

        def of(size):
            def loss(x):
                return jnp.sum(in_chunks(weights, x, y, rows, size)[0] ** 2)

            def slope(x):
                return jnp.sum(jax.grad(loss)(x) ** 2)

            return jax.vmap(jax.grad(slope))(jnp.stack([x, 2 * x]))

        close(of(3), of(None))


def test_in_a_scan_that_is_differentiated():
    """Nothing that a block reads, integers included, is taken from a trace that is over."""
    with jax.enable_x64(True):
        weights, x, y, rows = arguments(7)
        stacked = jax.tree.map(lambda w: jnp.stack([w, -w]), weights)

        def loss(stacked, size):
            def block(x, given):
                weights, shift = given
                return in_chunks(weights, x, y, (rows + shift) % WIDTH, size)[0], None

            return jnp.sum(jax.lax.scan(block, x, (stacked, jnp.arange(2)))[0] ** 2)

        whole, chunked = (jax.grad(loss)(stacked, size) for size in (None, 3))
        close(chunked, whole)


def test_gradients_are_summed_in_float32():
    """In bfloat16, a sum of 512 ones that takes one after the other stays at 256."""
    x = jnp.ones((1, 512, 1), jnp.bfloat16)

    def loss(w):
        return jnp.sum(by_chunks(lambda x: x * w, x, size=1).astype(jnp.float32))

    assert jax.grad(loss)(jnp.bfloat16(1)) == 512


@pytest.mark.parametrize("length", [8, 13])
def test_integers_among_the_results(length):
    with jax.enable_x64(True):
        weights, x, *_ = arguments(length)

        def loss(w, x, size):
            def function(x):
                y = jnp.tanh(x @ w)
                return {"y": y, "largest": jnp.argmax(y, axis=-1), "above": y > 0}

            found = by_chunks(function, x, size=size)
            return jnp.sum(jnp.where(found["above"], found["y"], 0) ** 2), found

        gradient = jax.grad(loss, (0, 1), has_aux=True)
        close(gradient(weights["w"], x, 4), gradient(weights["w"], x, None))
        with pytest.raises(ValueError, match="must be 1 or more; got 0"):
            loss(weights["w"], x, 0)


def test_sizes_are_even():
    for length, most in itertools.product(range(1, 300), (1, 5, 64, 100, 128)):
        size, count = even(length, most), -(-length // most)
        assert size <= most
        if length % size:
            assert -(-length // size) <= count, "no more than need be"
            assert count * size - length < 8 * count, "and little more than there is"
        else:
            assert -(-length // size) <= -(-4 * count // 3), "and none is filled up"
    assert [even(*sizes) for sizes in ((7, 64), (130, 128), (128, 113), (5, 2))] == [7, 72, 64, 2]
    assert even(32_768, 261) == 256
