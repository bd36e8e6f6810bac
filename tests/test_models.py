"""Models under the modes of JAX that people debug with, and exported."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _models import CONFIGS, build, inputs, loss_of
from flax import nnx

from bdia_jax.nn import Decoder

KEY = jax.random.key(1)
MODES = {
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_debug_nans": True,
    "jax_enable_checks": True,
}


@pytest.fixture
def strict():
    """All modes at once."""
    before = {name: getattr(jax.config, name) for name in MODES}
    for name, value in MODES.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("strict")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-linear", "resnet", "gpt2", "gemma", "encoder-decoder"])
def test_loss_and_gradient_under_strict_modes(name):
    """With NaN checks, masked softmaxes must make none. In float32, since Flax's own layers do not
    pass strict promotion in bfloat16."""
    config = dataclasses.replace(CONFIGS[name], method="bdia", dtype="float32")
    graph, params, rest = nnx.split(build(config, nnx.Rngs(0)), nnx.Param, ...)

    @jax.jit
    def run(params):
        return jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p, rest), KEY))(params)

    loss, grads = run(params)
    assert jnp.isfinite(loss)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.skipif(
    importlib.util.find_spec("flatbuffers") is None, reason="jax.export needs flatbuffers"
)
@pytest.mark.parametrize("name", ["vit", "resnet", "gpt2", "llama", "encoder-decoder"])
def test_export_with_a_symbolic_batch(name):
    """A forward pass, written and read, is the model's for every size of the batch."""
    model = build(CONFIGS[name], nnx.Rngs(0))
    model.eval()
    given = inputs(type(model.config))
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in given]
    exported = jax.export.export(jax.jit(lambda *args: model(*args)))(*shapes)
    read = jax.export.deserialize(exported.serialize())
    for size in (1, 3):
        some = [a[:size] for a in given]
        np.testing.assert_allclose(read.call(*some), model(*some), atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-linear", "gpt2-plain"])
def test_standard_networks_have_all_derivatives(name):
    """Forward mode against reverse mode, and the second derivative by both ways."""
    config = dataclasses.replace(CONFIGS[name], method="standard", dtype="float32", dropout=0.0)
    graph, params, rest = nnx.split(build(config, nnx.Rngs(0)), nnx.Param, ...)
    v = jax.tree.map(jnp.cos, params)

    def output(params):
        model = nnx.merge(graph, params, rest)
        # Logits over a vocabulary and their loss are differentiable once.
        call = model.features if isinstance(model, Decoder) else model
        return jnp.mean(jnp.sin(call(*inputs(type(config)))))

    def along(params):
        return jax.jvp(output, (params,), (v,))[1]

    def times(a, b):
        return sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

    @jax.jit
    def run(params):
        gradient = jax.grad(output)
        first = along(params), times(gradient(params), v)
        return first, (jax.jvp(gradient, (params,), (v,))[1], jax.grad(along)(params))

    (forward, reverse), (over_reverse, over_forward) = run(params)
    np.testing.assert_allclose(forward, reverse, rtol=1e-4)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(over_forward))
    assert largest > 1e-6
    for a, b in zip(*map(jax.tree.leaves, (over_reverse, over_forward)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * largest)
