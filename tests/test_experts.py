"""Mixtures of experts, against the sum over all experts, written out."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from bdia_jax.data import TextData
from bdia_jax.nn import Decoder, Experts, llama
from bdia_jax.nn.experts import LARGEST_TILE, arrange
from bdia_jax.planning import memory
from bdia_jax.train import LanguageModelling, TrainSettings
from bdia_jax.train.optimizers import make_optimizer
from bdia_jax.train.programs import Programs

SIZES = {"vocab_size": 31, "width": 16, "depth": 3, "heads": 4, "hidden": 24}
TINY = llama(experts=5, experts_per_token=2, gamma=1 / 8, **SIZES)
WIDE = {"dtype": "float64", "param_dtype": "float64"}


def made(normalized=True, dtype=jnp.float64, experts=5, per_token=3):
    return Experts(
        *(8, 12, experts, per_token),
        normalized=normalized,
        dtype=dtype,
        param_dtype=dtype,
        kernel_init=nnx.initializers.normal(0.5),
        rngs=nnx.Rngs(0),
    )


def written_out(module, x):
    """Every expert computes every position."""
    shares = jax.nn.softmax(x @ module.router[...])
    kept = shares >= jnp.sort(shares)[..., -module.per_token][..., None]
    shares = jnp.where(kept, shares, 0)
    if module.normalized:
        shares /= shares.sum(-1, keepdims=True)
    y = [
        (jax.nn.silu(x @ module.gate[e]) * (x @ module.up[e])) @ module.down[e]
        for e in range(module.gate.shape[0])
    ]
    return jnp.einsum("...e,e...w->...w", shares, jnp.stack(y))


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("rows", [1, 40])
def test_values_and_gradients(normalized, rows):
    """Also of experts that nobody picks."""
    with jax.enable_x64(True):
        module = made(normalized, experts=5 if rows > 1 else 9)
        graph, params = nnx.split(module)
        x, w = jax.random.normal(jax.random.key(1), (2, 2, rows, 8), jnp.float64)

        def loss(apply):
            return lambda params, x: jnp.sum(apply(nnx.merge(graph, params), x) * w)

        found = jax.jit(jax.value_and_grad(loss(lambda m, x: m(x)), (0, 1)))(params, x)
        expected = jax.value_and_grad(loss(written_out), (0, 1))(params, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, expected)
        if rows == 1:
            assert (np.asarray(found[1][0]["gate"][...]) == 0).all(axis=(1, 2)).any()


@pytest.mark.slow
def test_second_derivatives():
    with jax.enable_x64(True):
        graph, params = nnx.split(made())
        x = jax.random.normal(jax.random.key(1), (3, 8), jnp.float64)
        check_grads(
            lambda p, x: nnx.merge(graph, p)(jnp.asarray(x)), (params, x), order=2, modes=["rev"]
        )


@hypothesis.given(
    st.sampled_from([(1, 7), (4, 1), (9, 7), (3, 60)]).flatmap(
        lambda n: st.tuples(
            st.just(n[0]), st.lists(st.integers(0, n[0] - 1), min_size=n[1], max_size=n[1])
        )
    )
)
def test_every_row_has_a_place_in_a_tile_of_its_expert(drawn):
    experts, chosen = drawn
    slots, of_tile, tile = arrange(jnp.array(chosen), experts)
    slots, of_tile = np.asarray(slots), np.asarray(of_tile)
    assert len({*slots.tolist()}) == len(chosen)
    assert slots.min() >= 0
    assert slots.max() < len(of_tile) * tile
    np.testing.assert_array_equal(of_tile[slots // tile], chosen)


def test_tiles_are_small_beside_what_an_expert_has():
    chosen = jnp.arange(4096) % 8
    _, of_tile, tile = arrange(chosen, 8)
    assert tile == 256
    assert len(of_tile) * tile <= 1.5 * 4096
    assert arrange(jnp.arange(65536) % 2, 2)[2] == LARGEST_TILE


@pytest.mark.slow
@pytest.mark.optimized
def test_routing_is_the_same_in_both_passes():
    """In bfloat16, with bits kept by part; the report counts integers that are not."""
    config = dataclasses.replace(TINY, dtype="bfloat16", parts_as_steps=True)
    model = Decoder(config, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 24, 16), jnp.bfloat16)
    angles = model.angles(jnp.broadcast_to(jnp.arange(24), (4, 24)))
    report = model.blocks.check_reversible(x, angles, None, key=jax.random.key(1))
    assert (report.compared, report.mismatched) == (2 * 3 * x.size, 0)


def loss_and_gradients(method):
    model = Decoder(dataclasses.replace(TINY, method=method, **WIDE), rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 31)

    def loss(params):
        sums = nnx.merge(graph, params, rest).loss(tokens, tokens, key=jax.random.key(1))
        return sums.loss / sums.weight

    return jax.value_and_grad(loss)(params)


def test_gradients_of_a_reversible_stack_are_those_of_its_forward_pass():
    with jax.enable_x64(True):
        (loss, online), (expected, direct) = map(loss_and_gradients, ("bdia", "bdia-direct"))
        assert loss == expected
        difference = optax.tree.norm(jax.tree.map(jnp.subtract, online, direct))
        assert difference < 1e-6 * optax.tree.norm(direct)


@pytest.mark.slow
def test_under_shard_map():
    """Gradients of matrices that every device has are summed over the devices."""
    with jax.enable_x64(True):
        graph, params = nnx.split(made())
        x = jax.random.normal(jax.random.key(1), (4, 6, 8), jnp.float64)
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

        def loss(params, x):
            return jnp.sum(jnp.sin(nnx.merge(graph, params)(x)))

        @jax.jit
        @jax.shard_map(mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P("data")))
        def of_shards(params, x):
            return jax.grad(lambda p, x: jax.lax.psum(loss(p, x), "data"), (0, 1))(params, x)

        found, expected = of_shards(params, x), jax.grad(loss, (0, 1))(params, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, expected)


@pytest.mark.buffers
def test_hidden_layers_exist_by_tiles():
    """Of 8,192 positions with two experts each, 1,024 hidden features are 67 MB."""
    module = Experts(*(64, 1024, 4, 2), kernel_init=nnx.initializers.normal(0.1), rngs=nnx.Rngs(0))
    graph, params = nnx.split(module)

    def gradient(apply):
        return jax.grad(lambda params, x: jnp.sum(apply(nnx.merge(graph, params), x) ** 2), (0, 1))

    x = jax.ShapeDtypeStruct((8192, 64), jnp.float32)
    assert memory.temporaries(gradient(written_out), params, x) > 67e6
    assert memory.temporaries(gradient(lambda m, x: m(x)), params, x) < 67e6 / 2


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=4"])
def test_training_on_a_mesh_has_the_losses_of_one_device(mesh):
    text = np.random.default_rng(0).integers(31, size=400).astype(np.int32)
    task = LanguageModelling(TextData("random", text, text[:100], 31), 12)

    def losses(**settings):
        programs = Programs(
            Decoder(TINY, rngs=nnx.Rngs(0)), task, TrainSettings(batch_size=8, **settings)
        )
        state = programs.first_state(Decoder(TINY, rngs=nnx.Rngs(0)))
        found = []
        for _ in range(3):
            state, report = programs.step(state)
            assert not any(stack.mismatched.any() for stack in report.backward.values())
            found.append(float(report.sums.means()["loss"]))
        return found

    np.testing.assert_allclose(losses(mesh=mesh), losses(), rtol=1e-4)


def test_muon_takes_experts_one_by_one():
    rng = np.random.default_rng(0)
    gradient = jnp.asarray(rng.normal(size=(3, 8, 12)), jnp.float32)

    def step(gradient):
        optimizer = make_optimizer("muon", optax.constant_schedule(0.1))
        params = nnx.State({"gate": nnx.Param(jnp.zeros_like(gradient))})
        gradients = nnx.State({"gate": nnx.Param(gradient)})
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return updates["gate"][...]

    whole = step(gradient)
    for one, expected in zip(whole, gradient):
        np.testing.assert_allclose(one, step(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 0}, "experts must be an int >= 1; got 0"),
        ({"experts_per_token": 6}, "experts_per_token must be at most experts = 5; got 6"),
        ({"feed_forward": "gelu"}, "experts need feed_forward = swiglu or geglu.*; got gelu"),
        ({"ffn_bias": True}, "experts need .* ffn_bias = False; got swiglu, True"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **settings)
