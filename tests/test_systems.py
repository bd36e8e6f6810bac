"""Other systems: recurrence, two streams, mid-point, linear attention, ResNet, SET-Adam."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _rows import fast
from flax import nnx
from test_nn import assert_close, gradients

from bdia_jax import (
    BDIA,
    Checkpoint,
    Direct,
    Midpoint,
    Online,
    check_reversible,
    coupling,
    reversible_scan,
)
from bdia_jax.nn import (
    CoupledStack,
    LinearAttention,
    Probe,
    ResNet,
    ResNetConfig,
    ReversibleStack,
    ViT,
    ViTConfig,
)
from bdia_jax.nn.stacked import is_stacked
from bdia_jax.optim import scale_by_set_adam, set_adam
from bdia_jax.train import errors, make_optimizer
from bdia_jax.train.step import StepReport

KEY = jax.random.key(0)
VIT = ViTConfig(
    image_size=8, channels=1, patch_size=4, width=16, depth=3, heads=2, head_dim=8, hidden=24
)
RESNET = ResNetConfig(image_size=8, channels=1, widths=(8, 16), depth=2, groups=4, dropout=0.1)


def relative(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in leaves)


# ---------------------------------------------------------------------------------------------
# A recurrence
# ---------------------------------------------------------------------------------------------


class Recurrent(nnx.Module):
    """A gated linear recurrence over the positions, by an associative scan."""

    def __init__(self, rngs, dtype):
        self.norm = nnx.LayerNorm(8, dtype=dtype, rngs=rngs)
        self.gate, self.input, self.output = (
            nnx.Linear(8, 8, dtype=dtype, rngs=rngs) for _ in range(3)
        )

    def __call__(self, x):
        z = self.norm(x)
        a = nnx.sigmoid(self.gate(z))
        after = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])  # noqa: E731
        return self.output(jax.lax.associative_scan(after, (a, (1 - a) * self.input(z)), axis=1)[1])


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", fast(1, ["bfloat16", "float32"]))
def test_a_recurrence_is_trained_exactly(dtype):
    """To say what came three positions before: only what is carried along tells."""
    step = BDIA(gamma=1 / 8, signs="sample")
    model = ReversibleStack(lambda rngs: Recurrent(rngs, dtype), 3, step=step, rngs=nnx.Rngs(0))
    x = jax.random.normal(KEY, (16, 24, 8))
    y = jnp.roll(x, 3, axis=1).at[:, :3].set(0)
    graph, params, probe, rest = nnx.split(model, nnx.Param, Probe, ...)
    optimizer = optax.adam(1e-2)

    def loss(params, probe, key):
        z = nnx.merge(graph, params, probe, rest)(x.astype(dtype), key=key)
        return jnp.mean((z - y) ** 2)

    @jax.jit
    def train(params):
        def one(carry, key):
            params, state = carry
            value, (grads, report) = jax.value_and_grad(loss, (0, 1))(params, probe, key)
            updates, state = optimizer.update(grads, state)
            mismatched = report["probe"].get_value().mismatched.sum()
            return (optax.apply_updates(params, updates), state), (value, mismatched)

        start = params, optimizer.init(params)
        return jax.lax.scan(one, start, jax.random.split(KEY, 60))[1]

    losses, mismatched = train(params)
    assert losses[-1] < 0.8 * losses[0]
    assert not mismatched.any()
    assert model.check_reversible(x.astype(dtype), key=KEY).mismatched == 0


# ---------------------------------------------------------------------------------------------
# Two streams
# ---------------------------------------------------------------------------------------------


def half(name):
    def function(params, x, key):
        y = jnp.tanh(x @ params[name])
        return jnp.where(jax.random.bernoulli(key, 0.8, y.shape), y / 0.8, 0)

    return function


def streams(dtype, blocks=6, width=5):
    keys = jax.random.split(KEY, 4)
    params = {
        name: jax.random.normal(key, (blocks, width, width), dtype) for name, key in zip("fg", keys)
    }
    return params, tuple(jax.random.normal(key, (3, width), dtype) for key in keys[2:])


def test_coupled_gradients_are_those_of_plain_differentiation_in_float64():
    with jax.enable_x64(True):
        params, state = streams(jnp.float64)

        def loss(params, state, adjoint):
            y1, y2 = coupling.coupled_scan(
                half("f"), half("g"), params, state, key=KEY, adjoint=adjoint
            )
            return jnp.sum(jnp.sin(y1) + y2**2)

        online, direct = (
            jax.grad(loss, argnums=(0, 1))(params, state, adjoint)
            for adjoint in (Online(), Direct())
        )
        assert relative(online, direct) < 1e-12


def test_coupled_streams_are_taken_back_with_errors_that_grow():
    params, state = streams(jnp.float32, blocks=24)
    errors = coupling.reconstruction_errors(half("f"), half("g"), params, state, key=KEY)
    assert errors.shape == (24,)
    # The first step back may happen to be exact, all of them cannot.
    assert errors[0] > errors[-1]
    assert errors[0] < 1e-3


@pytest.mark.slow
def test_coupled_vit():
    """Online and direct agree, as far as a float inverse does; the streams are the equations'."""
    images = jax.random.normal(KEY, (2, 8, 8, 1))
    found = {}
    for method in ("coupled", "coupled-direct"):
        model = ViT(dataclasses.replace(VIT, method=method), rngs=nnx.Rngs(0))
        y, grads, _ = gradients(model, images)
        assert y.shape == (2, 10)
        assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
        found[method] = y, grads
    assert_close(*found.values(), 1e-3)
    report = StepReport(None, None, None, {})
    assert errors.reversibility(model, report) == "no reversible blocks"
    online = ViT(dataclasses.replace(VIT, method="coupled"), rngs=nnx.Rngs(0))
    assert "taken back in floats, not exactly" in errors.reversibility(online, report)

    model.eval()
    x = jax.random.normal(KEY, (2, 5, 16))
    graph, state = nnx.split(model.blocks.stacked)

    @jax.jit
    def one_block(state, x1, x2):
        block = nnx.merge(graph, state)
        x1 = x1 + block.attend(x2)
        return x1, x2 + block.feed_forward(x1)

    x1 = x2 = x
    for k in range(VIT.depth):
        x1, x2 = one_block(jax.tree.map(lambda leaf, k=k: leaf[k], state), x1, x2)
    np.testing.assert_allclose(model.blocks(x), jnp.concatenate([x1, x2], -1), atol=1e-4)
    assert model.blocks.reconstruction_errors(x).shape == (VIT.depth,)


def test_bad_streams():
    params, state = streams(jnp.float32)
    with pytest.raises(TypeError, match=r"Online\(\) or Direct\(\); got 'offline'"):
        coupling.coupled_scan(half("f"), half("g"), params, state, key=KEY, adjoint="offline")
    with pytest.raises(ValueError, match=r"Online\(\) or Direct\(\); got Checkpoint"):
        CoupledStack(
            lambda rngs: nnx.Linear(3, 3, rngs=rngs), 2, adjoint=Checkpoint(), rngs=nnx.Rngs(0)
        )


# ---------------------------------------------------------------------------------------------
# The mid-point network
# ---------------------------------------------------------------------------------------------


def tanh_block(w, x, key):
    del key
    return 0.1 * jnp.tanh(x @ w)


@pytest.mark.parametrize("adjoint", [Online(), Checkpoint(), Direct()])
def test_midpoint_is_its_equation_on_the_grid(adjoint):
    """x_{k+1} = x_{k-1} + Q[2 h(x_k)]: a sum of multiples of the grid's spacing, thus exact."""
    w = jax.random.normal(KEY, (5, 4, 4))
    x = jax.random.normal(jax.random.key(1), (3, 4))

    def quantize(y):
        return jnp.round(y * 2**9) / 2**9

    before, now = quantize(x), quantize(quantize(x) + tanh_block(w[0], quantize(x), None))
    for k in range(1, 5):
        before, now = now, before + quantize(2 * tanh_block(w[k], now, None))
    found = reversible_scan(tanh_block, w, x, step=Midpoint(), adjoint=adjoint)
    np.testing.assert_array_equal(found, now)


@pytest.mark.optimized
def test_midpoint_is_reversible_without_a_key_or_side_bits():
    w = jax.random.normal(KEY, (5, 4, 4))
    x = jax.random.normal(jax.random.key(1), (3, 4), jnp.bfloat16)
    found = check_reversible(
        lambda w, x, key: tanh_block(w.astype(x.dtype), x, key), w, x, step=Midpoint()
    )
    assert found.exact
    assert Midpoint().bits == 0
    with pytest.raises(ValueError, match="needs a PRNG key"):
        reversible_scan(tanh_block, w, x, step=BDIA(gamma=1.0))


@pytest.mark.slow
def test_midpoint_vit_is_the_same_network_in_evaluation():
    images = jax.random.normal(KEY, (2, 8, 8, 1))
    found = {}
    for method in ("midpoint", "midpoint-direct"):
        model = ViT(dataclasses.replace(VIT, method=method, dropout=0.0), rngs=nnx.Rngs(0))
        y, grads, probes = gradients(model, images)
        assert all(not leaf.any() for leaf in jax.tree.leaves(probes))
        found[method] = y, grads
        model.eval()
        np.testing.assert_allclose(model(images), y, atol=1e-5)
    assert_close(*found.values(), 1e-5)


# ---------------------------------------------------------------------------------------------
# Linear attention
# ---------------------------------------------------------------------------------------------


def test_linear_attention_with_positions_for_mixtures_is_attention():
    """Projected by the identity, keys and values are those of ordinary attention."""
    width, heads, head_dim, length = 8, 2, 4, 5
    attention = LinearAttention(
        width, heads, head_dim, length=length, projection=length, rngs=nnx.Rngs(0)
    )
    attention.mix_keys[...] = attention.mix_values[...] = jnp.eye(length)
    x = jax.random.normal(KEY, (2, length, width))
    q, k, v = jnp.moveaxis(attention.qkv(x).reshape(2, length, 3, heads, head_dim), 2, 0)
    expected = attention.out(jax.nn.dot_product_attention(q, k, v).reshape(2, length, -1))
    np.testing.assert_allclose(attention(x), expected, atol=1e-5)


@pytest.mark.slow
def test_linear_vit_is_reversible_and_all_of_it_is_trained():
    config = dataclasses.replace(VIT, attention="linear", projection=3, dtype="bfloat16")
    model = ViT(config, rngs=nnx.Rngs(0))
    assert model.blocks.stacked.attention.mix_keys.shape == (3, 5, 3)
    _, grads, probes = gradients(model, jax.random.normal(KEY, (2, 8, 8, 1)))
    assert all(not leaf.any() for leaf in jax.tree.leaves(probes))
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match="one of local, full, linear; got 'line'"):
        dataclasses.replace(VIT, attention="line")


# ---------------------------------------------------------------------------------------------
# ResNet
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resnet_trains_alike_by_every_method():
    images = jax.random.normal(KEY, (3, 8, 8, 1))
    found = {}
    for method in ("bdia", "bdia-direct", "standard"):
        model = ResNet(dataclasses.replace(RESNET, method=method), rngs=nnx.Rngs(0))
        found[method] = gradients(model, images)
        model.eval()
        assert nnx.eval_shape(lambda m: m(images), model).shape == (3, 10)
    assert_close(found["bdia"][:2], found["bdia-direct"][:2], 1e-4)
    y, grads, probes = found["bdia"]
    assert not np.allclose(y, found["standard"][0], atol=1e-3)
    assert len(jax.tree.leaves(probes)) == 3 * 2
    assert all(not leaf.any() for leaf in jax.tree.leaves(probes))
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, r"divide the widths \(8, 16\); got 3"),
        ({"image_size": 9}, "divisible by 2.*got 9"),
        ({"widths": ()}, "at least one stage"),
        ({"widths": (8, 0)}, r"widths\[1\] must be an int >= 1; got 0"),
        ({"dropout": 1.0}, r"\[0, 1\); got 1.0"),
        ({"method": "coupled"}, "one of bdia.*'coupled'"),
    ],
)
def test_bad_resnet(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RESNET, **options)


def test_resnet_rejects_images_of_another_size():
    with pytest.raises(ValueError, match=r"8, 8, 1.*9, 9"):
        ResNet(RESNET, rngs=nnx.Rngs(0))(jnp.zeros((2, 9, 9, 1)), key=KEY)


# ---------------------------------------------------------------------------------------------
# SET-Adam
# ---------------------------------------------------------------------------------------------


def by_hand(gradients, rate, b1=0.9, b2=0.999, eps=1e-18, tau=0.5):
    """The equations of the docstring for one tensor, in plain Python."""
    d = len(gradients[0])
    m, v, theta = [0.0] * d, [0.0] * d, [0.0] * d
    for t, g in enumerate(gradients, 1):
        m = [b1 * mi + (1 - b1) * gi for mi, gi in zip(m, g)]
        v = [b2 * vi + (1 - b2) * gi**2 for vi, gi in zip(v, g)]
        factor = sum(v) ** 2 / (d * sum(vi**2 for vi in v))
        w = [math.sqrt(factor * vi / (1 - b2**t) + eps) for vi in v]
        theta = [
            x - rate / (1 - b1**t) * mi / (wi - tau * min(w)) for x, mi, wi in zip(theta, m, w)
        ]
    return theta


def test_set_adam_follows_its_equations():
    gradients = [[1.0, -2.0, 0.5], [0.3, 1.0, 0.0], [-0.2, 0.1, 4.0]]
    optimizer = set_adam(0.1)
    theta = jnp.zeros(3)
    state = optimizer.init(theta)
    for g in gradients:
        updates, state = optimizer.update(jnp.array(g), state)
        theta = optax.apply_updates(theta, updates)
    np.testing.assert_allclose(theta, by_hand(gradients, 0.1), rtol=1e-5)
    # The first step, by hand: v is 1, 4, 1/4 (over 1000); (Σv)²/(dΣv²) = 27.5625 / 51.1875.
    root = math.sqrt(27.5625 / 51.1875)
    first = [g / (root * (abs(g) - 0.25)) for g in gradients[0]]
    np.testing.assert_allclose(by_hand(gradients[:1], 1.0), [-f for f in first], rtol=1e-9)


@pytest.mark.slow
def test_set_adam_takes_each_block_of_a_stack_for_a_tensor():
    model = ReversibleStack(lambda rngs: nnx.Linear(2, 2, rngs=rngs), 3, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    grads = jax.tree.map(lambda p: jax.random.normal(KEY, p.shape), params)
    optimizer = scale_by_set_adam(is_stacked=is_stacked)
    together, _ = optimizer.update(grads, optimizer.init(params))
    alone = scale_by_set_adam()
    for k in range(3):
        one = jax.tree.map(lambda g, k=k: g[k], grads)
        updates, _ = alone.update(one, alone.init(one))
        assert relative(jax.tree.map(lambda u, k=k: u[k], together), updates) < 1e-5
    assert relative(together, alone.update(grads, alone.init(params))[0]) > 0.01


def test_a_number_of_each_block_is_a_tensor_of_set_adam():
    optimizer, gradient = scale_by_set_adam(is_stacked=lambda path: True), jnp.array([1e-3, 1, 30])
    found, _ = optimizer.update(gradient, optimizer.init(gradient))
    alone = scale_by_set_adam()
    expected = [alone.update(g, alone.init(g))[0] for g in gradient]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_set_adam_can_be_overwritten_in_place():
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(4)}
    optimizer = set_adam(0.1)
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(gradients, state):
        return optimizer.update(gradients, state)

    for _ in range(2):
        updates, state = step(params, state)
    assert np.isfinite(updates["a"]).all()


def test_set_adam_survives_gradients_that_are_zero_or_tiny():
    optimizer = make_optimizer("set-adam", optax.constant_schedule(0.1))
    for scale in (0.0, 1e-15):
        params = {"w": jnp.ones((2, 3))}
        g = {"w": scale * jnp.arange(6.0).reshape(2, 3)}
        updates, _ = optimizer.update(g, optimizer.init(params), params)
        assert jnp.isfinite(updates["w"]).all()
        assert bool(jnp.any(updates["w"])) == bool(scale)


@pytest.mark.parametrize("options", [{"b1": 1.0}, {"b2": -0.1}, {"tau": 1.0}, {"eps": 0.0}])
def test_bad_set_adam(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} must .*got {value}"):
        scale_by_set_adam(**options)


def test_probe_of_every_stage_reaches_the_report():
    model = ResNet(RESNET, rngs=nnx.Rngs(0))
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, Probe))}
    assert names == {"stages.0.probe", "stages.1.probe"}
