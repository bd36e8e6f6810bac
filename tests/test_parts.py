"""Sublayers as steps: the standard network is the same, and all of it is taken back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _models import CONFIGS, build, inputs, loss_of
from _rows import fast
from flax import nnx

from bdia_jax import BDIA, Direct, Euler, check_reversible
from bdia_jax.nn import Probe, ReversibleStack, TransformerBlock

PARTED = ("llama", "vit", "encoder-decoder")
"""One of each kind of block."""
KEY = jax.random.key(1)


def loss_and_gradients(config, train=True):
    """Loss, and gradients by parameters and probes."""
    model = build(config, nnx.Rngs(0))
    model.train() if train else model.eval()
    graph, params, probes, rest = nnx.split(model, nnx.Param, Probe, ...)

    @jax.jit
    def run(params, probes):
        def loss(params, probes):
            return loss_of(nnx.merge(graph, params, probes, rest), KEY if train else None)

        return jax.value_and_grad(loss, (0, 1))(params, probes)

    loss, grads = run(params, probes)
    return loss, *grads


def wide(config):
    """In float64, where the order of sums does not show."""
    changes = {"dtype": "float64"}
    if hasattr(config, "param_dtype"):
        changes["param_dtype"] = "float64"
    return dataclasses.replace(config, **changes)


def relative(tree, reference) -> float:
    """The distance of two trees."""
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, tree, reference))
    return float(difference / optax.tree.norm(reference))


@pytest.mark.parametrize("name", fast(1, ["vit", "encoder-decoder"]))
def test_the_standard_network_is_the_same(name):
    """``(x + a) + f(x + a)`` is ``x + (a + f(x + a))``, in values and gradients."""
    with jax.enable_x64(True):
        config = wide(dataclasses.replace(CONFIGS[name], method="standard"))
        (loss, grads, _), (whole, expected, _) = (
            loss_and_gradients(dataclasses.replace(config, parts_as_steps=parts), train=False)
            for parts in (True, False)
        )
        # Norms of images, heads and rotary positions are in float32.
        np.testing.assert_allclose(loss, whole, rtol=1e-6)
        assert relative(grads, expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTED)
def test_evaluation_on_the_grid_is_the_network_of_parts(name):
    """What evaluation computes is ``x + part(x)``, rounded to the grid, part by part."""
    model = build(dataclasses.replace(CONFIGS[name], parts_as_steps=True), nnx.Rngs(0))
    model.eval()
    stack = model.decoder if name == "encoder-decoder" else model.blocks
    x = jax.random.normal(KEY, (3, 5, 16))
    segments = jnp.zeros((3, 5), jnp.int32)
    consts = {
        "vit": (),
        "llama": (getattr(model, "angles", lambda p: None)(segments + jnp.arange(5)), segments),
        "encoder-decoder": (x, segments, segments),
    }[name]
    blocks = nnx.split(stack.stacked)

    @jax.jit
    def by_hand(x, consts):
        rounded = lambda x: jnp.round(x * 2**9) / 2**9  # noqa: E731
        x = rounded(x)
        for k in range(stack.depth):
            block = nnx.merge(blocks[0], jax.tree.map(lambda leaf, k=k: leaf[k], blocks[1]))
            for part in type(block).PARTS:
                x = rounded(x + getattr(block, part)(x, *consts))
        return x

    found, expected = jax.jit(lambda x, consts: stack(x, *consts))(x, consts), by_hand(x, consts)
    # Rounding half a grid step the other way, here and there, moves what follows.
    np.testing.assert_allclose(found, expected, atol=2 * 2.0**-9)
    assert (found == expected).mean() > 0.9


@pytest.mark.parametrize("name", fast(1, ["llama", "encoder-decoder"]))
def test_gradients_are_those_of_the_forward_pass(name):
    """With dropout, whose keys are the same in both passes; and every step is taken back."""
    with jax.enable_x64(True):
        config = wide(dataclasses.replace(CONFIGS[name], parts_as_steps=True))
        online, direct = (
            loss_and_gradients(dataclasses.replace(config, method=method))
            for method in ("bdia", "bdia-direct")
        )
        assert online[0] == direct[0]
        assert relative(online[1], direct[1]) < 1e-6
        assert all(not leaf.any() for leaf in jax.tree.leaves(online[2]))


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", PARTED)
def test_every_part_is_reversible_in_bfloat16(name):
    """Without dropout, which takes long to compile: test_encoder_decoder has it."""
    changes = {"parts_as_steps": True, "dtype": "bfloat16", "gamma": 1 / 8, "dropout": 0.0}
    config = dataclasses.replace(CONFIGS[name], **changes)
    model = build(config, nnx.Rngs(0))
    stack = model.decoder if name == "encoder-decoder" else model.blocks
    x = jax.random.normal(KEY, (3, 12, 16), jnp.bfloat16)
    segments = jnp.zeros((3, 12), jnp.int32)
    consts = {
        "vit": (),
        "encoder-decoder": (x, segments, segments),
        "llama": (getattr(model, "angles", lambda p: None)(segments + jnp.arange(12)), None),
    }[name]
    report = stack.check_reversible(x, *consts, key=KEY)
    assert report.exact, str(report)
    assert report.compared == stack.depth * len(stack.parts) * x.size


def test_parts_draw_from_keys_of_their_own():
    """The same dropout module, asked by two parts, drops other elements."""

    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.one = nnx.Param(jnp.ones(()))

        def first(self, x):
            return self.dropout(self.one * jnp.ones_like(x))

        second = first

    parts = ("first", "second")
    stack = ReversibleStack(Twice, 1, step=Euler(), adjoint=Direct(), parts=parts, rngs=nnx.Rngs(0))
    added = stack(jnp.zeros((4, 64)), key=KEY)
    # Each drops half: with one mask for both, 2 would be missing.
    assert set(np.unique(added)) == {0.0, 2.0, 4.0}
    assert abs(np.mean(added == 2.0) - 0.5) < 0.2


@pytest.mark.slow
def test_a_stack_of_parts_is_a_function_per_part():
    def make(rngs):
        return TransformerBlock(8, lambda rngs: nnx.Linear(8, 8, rngs=rngs), hidden=8, rngs=rngs)

    stack = ReversibleStack(make, 3, parts=TransformerBlock.PARTS, rngs=nnx.Rngs(0))
    functions, params = stack.functional()
    assert len(functions) == 2
    x = jax.random.normal(KEY, (2, 4, 8))
    assert check_reversible(functions, params, x, key=KEY, step=BDIA(1 / 4)).exact


@pytest.mark.slow
def test_streams_of_parts_are_the_coupled_ones():
    """RevViT is made of the same methods; its stack is asked for no step."""
    model = build(dataclasses.replace(CONFIGS["vit"], method="coupled"), nnx.Rngs(0))
    model.eval()
    assert model(*inputs(type(model.config))).shape == (3, 10)
    with pytest.raises(KeyError):
        model.config.step()
