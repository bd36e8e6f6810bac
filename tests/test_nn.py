"""The Flax side: the stack over any block, and the vision transformer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bdia_jax import BDIA, BackwardReport, Checkpoint, Direct, Euler
from bdia_jax.nn import (
    DecoderConfig,
    Dropout,
    Probe,
    ReversibleSettings,
    ReversibleStack,
    VisionTowerConfig,
    ViT,
    ViTConfig,
    add_lora,
    expand_base,
    merge_lora,
    quantize_base,
)
from bdia_jax.nn.blocks import LayerNorm, RMSNorm
from bdia_jax.nn.dropout import keep_mask
from bdia_jax.nn.linear import dot_general, product
from bdia_jax.nn.lora import LowRankLinear
from bdia_jax.nn.text_blocks import DecoderBlock
from bdia_jax.nn.vision import VisionBlock
from bdia_jax.nn.vit import patches, shifted

KEY = jax.random.key(0)
SMALL = ViTConfig(
    image_size=8, channels=1, patch_size=4, width=16, depth=3, heads=2, head_dim=8, hidden=24
)


class Block(nnx.Module):
    """A user's own block, with dropout and a vector that all blocks are given."""

    def __init__(self, rngs, rate=0.2):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, shift=0.0):
        return self.dropout(jnp.tanh(self.linear(self.norm(x)) + shift))


class Whole(Block):
    """The same block, written as x + h(x)."""

    def __call__(self, x, shift=0.0):
        return x + super().__call__(x, shift)


def gradients(model, *arguments, key=KEY):
    """Output, and gradients by parameters and probes, in training mode."""
    model.train()
    graph, params, probes, rest = nnx.split(model, nnx.Param, Probe, ...)

    @jax.jit
    def run(params, probes):
        def loss(params, probes):
            y = nnx.merge(graph, params, probes, rest)(*arguments, key=key)
            return jnp.sum(jnp.sin(y)), y

        (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, probes)
        return y, *grads

    return run(params, probes)


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * float(jnp.abs(y).max() + 1e-30))


X = jax.random.normal(jax.random.key(5), (4, 6))


@pytest.mark.slow
def test_online_and_direct_stacks_agree_and_dropout_follows_the_key():
    outputs = {}
    for method in ("bdia", "bdia-direct"):
        settings = ReversibleSettings(method=method)
        stack = ReversibleStack(Block, **settings.of_stack(4), rngs=nnx.Rngs(0))
        outputs[method] = gradients(stack, X)
        again, other = gradients(stack, X), gradients(stack, X, key=jax.random.key(1))
        np.testing.assert_array_equal(outputs[method][0], again[0])
        assert not np.array_equal(outputs[method][0], other[0])
    (y, grads, probes), (y_direct, grads_direct, _) = outputs.values()
    np.testing.assert_array_equal(y, y_direct)
    assert_close(grads, grads_direct, 1e-5)
    assert all(not leaf.any() for leaf in jax.tree.leaves(probes))


@pytest.mark.parametrize(("ours", "theirs"), [(LayerNorm, nnx.LayerNorm), (RMSNorm, nnx.RMSNorm)])
def test_norms_keep_their_argument_only(ours, theirs):
    x = jax.random.normal(KEY, (4, 8, 16), jnp.bfloat16)
    d_y = jax.random.normal(jax.random.key(1), x.shape, x.dtype)
    kept, results = [], []
    for kind in (ours, theirs):
        norm = kind(16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        y, vjp = jax.vjp(norm, x)
        kept.append([r.dtype for r in jax.tree.leaves(vjp) if r.size == x.size])
        results.append((y, *vjp(d_y)))
    assert kept[0] == [jnp.bfloat16]
    # flax's own keeps float32 copies; if it no longer does, there is no need for ours.
    assert jnp.float32 in kept[1]
    for a, b in zip(*results):
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=0.02)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_the_product_of_a_layer_has_the_derivatives_of_a_product(shape):
    with jax.enable_x64(True):
        keys = jax.random.split(KEY, 3)
        x, kernel, d = (
            jax.random.normal(key, size, jnp.float64)
            for key, size in zip(keys, (shape, (6, 5), (*shape[:-1], 5)))
        )
        ours, theirs = (jax.vjp(f, x, kernel) for f in (product, lambda x, kernel: x @ kernel))
        np.testing.assert_array_equal(ours[0], theirs[0])
        for a, b in zip(ours[1](d), theirs[1](d), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_the_product_of_a_layer_in_forward_mode_twice_and_in_vmap():
    def results(f):
        def scalar(x, kernel):
            return jnp.sum(jnp.sin(f(x, kernel)))

        yield jax.jvp(f, (x[0], kernel[0]), (x[1], kernel[1]))
        yield jax.hessian(scalar, (0, 1))(x[0], kernel[0])
        yield jax.grad(lambda x: jnp.sum(jax.grad(scalar)(x, kernel[0]) ** 2))(x[0])
        for axes, given in [
            ((0, 0), (x, kernel)),
            ((1, None), (x, kernel[0])),
            ((None, 2), (x[0], kernel)),
        ]:
            yield jax.vmap(f, axes)(*given)
            yield jax.vmap(jax.grad(scalar, (0, 1)), axes)(*given)

    with jax.enable_x64(True):
        x, kernel = (
            jax.random.normal(k, size, jnp.float64)
            for k, size in zip(jax.random.split(KEY), ((6, 4, 6), (6, 6, 6)))
        )
        given = (results(f) for f in (product, lambda x, kernel: x @ kernel))
        for ours, theirs in zip(*given, strict=True):
            for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_the_product_of_a_layer_has_the_precision_that_is_asked_for():
    """In both passes, of a layer and of a context that is left before anything is compiled."""
    x, kernel = jnp.ones((4, 6)), jnp.ones((6, 5))
    layer = nnx.Linear(6, 5, precision="highest", dot_general=dot_general, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)

    def in_context(params, x):
        with jax.default_matmul_precision("highest"):
            return jnp.sum(product(x, kernel * params.kernel[...].sum()))

    def of_layer(params, x):
        return jnp.sum(nnx.merge(graph, params)(x))

    for loss in (in_context, of_layer):
        for function, products in ((loss, 1), (jax.grad(loss, (0, 1)), 2)):
            text = jax.jit(function).lower(params, x).as_text()
            assert text.count("stablehlo.dot_general") >= products
            assert text.count("precision = [HIGHEST, HIGHEST]") == text.count("dot_general")


def test_the_product_of_a_layer_is_that_of_a_layer_only():
    x, kernel = jnp.ones((4, 6)), jnp.ones((4, 6))
    with pytest.raises(ValueError, match=r"dimension_numbers must be .* got"):
        dot_general(x, kernel, (((0,), (0,)), ((), ())))
    with pytest.raises(ValueError, match="preferred_element_type and out_sharding must be None"):
        dot_general(x, kernel.T, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def test_the_product_of_a_frozen_kernel_keeps_no_argument():
    x, kernel = jnp.ones((4, 6)), jnp.ones((6, 5))
    _, of_both = jax.vjp(product, x, kernel)
    _, of_x = jax.vjp(lambda x: product(x, kernel), x)
    assert [x.shape in map(jnp.shape, jax.tree.leaves(vjp)) for vjp in (of_both, of_x)] == [
        True,
        False,
    ]


def test_dropout_masks_differ_between_blocks():
    stack = ReversibleStack(
        lambda rngs: Block(rngs, rate=0.5), 2, step=Euler(), adjoint=Direct(), rngs=nnx.Rngs(0)
    )
    block, (params, rest) = stack.functional()
    first = jax.tree.map(lambda p: p[0], (params, rest))
    keys = jax.random.split(KEY, 2)
    a, b = (block(first, X, key) == 0 for key in keys)
    assert not np.array_equal(a, b)


def test_a_whole_residual_block_gives_the_same_network():
    ours = gradients(ReversibleStack(Block, 3, rngs=nnx.Rngs(0)), X)
    whole = gradients(ReversibleStack(Whole, 3, residual=True, rngs=nnx.Rngs(0)), X)
    # x + h - x differs from h by rounding, which may move a state by a grid step.
    np.testing.assert_allclose(ours[0], whole[0], atol=4 * 2.0**-9)


@pytest.mark.slow
def test_constants_reach_every_block_and_get_a_gradient():
    stack = ReversibleStack(Block, 3, rngs=nnx.Rngs(0))
    direct = ReversibleStack(Block, 3, adjoint=Direct(), rngs=nnx.Rngs(0))
    shift = jnp.linspace(-1, 1, 6)
    grads = [
        jax.grad(lambda shift, stack=stack: jnp.sum(stack(X, shift, key=KEY)))(shift)
        for stack in (stack, direct)
    ]
    assert jnp.abs(grads[0]).min() > 0
    assert_close(*grads, 1e-5)


def test_evaluation_is_the_standard_network():
    stack = ReversibleStack(Block, 5, rngs=nnx.Rngs(0))
    stack.eval()
    x = X
    for k in range(5):
        block = jax.tree.map(lambda p, k=k: p[k], nnx.state(stack.stacked))
        module = nnx.merge(nnx.graphdef(stack.stacked), block)
        x = x + module(x)
    # On the grid: half a grid step per block, which later blocks may amplify a little.
    np.testing.assert_allclose(stack(X), x, atol=5 * 2.0**-9)
    stack.step = BDIA(frac_bits=None)
    np.testing.assert_allclose(stack(X), x, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_all_methods_share_parameters_and_agree():
    images = jax.random.normal(KEY, (4, 8, 8, 1))
    state = nnx.state(ViT(SMALL, rngs=nnx.Rngs(0)), nnx.Param)
    outputs, logits = {}, {}
    for method in ("bdia", "bdia-direct", "standard"):
        model = ViT(dataclasses.replace(SMALL, method=method), rngs=nnx.Rngs(1))
        nnx.update(model, state)
        outputs[method] = gradients(model, images)
        model.eval()
        logits[method] = nnx.jit(lambda model: model(images))(model)
    assert_close(outputs["bdia"][:2], outputs["bdia-direct"][:2], 1e-5)
    np.testing.assert_array_equal(logits["bdia"], logits["bdia-direct"])
    assert not np.allclose(outputs["bdia"][0], outputs["standard"][0], atol=1e-3)
    assert all(not leaf.any() for leaf in jax.tree.leaves(outputs["bdia"][2]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"pool": "mean", "shifted_patches": False}, {"attention": "full"}]
)
def test_options_of_the_vit(options):
    model = ViT(dataclasses.replace(SMALL, **options), rngs=nnx.Rngs(0))
    y, grads, _ = gradients(model, jax.random.normal(KEY, (2, 8, 8, 1)))
    assert y.shape == (2, 10)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("attention", ["full", "linear"])
def test_low_rank_updates_and_few_bits_of_a_vit(attention):
    """Its attention splits kernels by itself; of others, what the layer computes."""
    images = jax.random.normal(KEY, (2, 8, 8, 1))
    config = dataclasses.replace(SMALL, attention=attention, projection=2)
    model = ViT(config, rngs=nnx.Rngs(0))
    model.eval()
    expected = model(images)
    add_lora(model, 2, targets=("qkv", "attention.out"), rngs=nnx.Rngs(1))
    model.eval()
    np.testing.assert_allclose(model(images), expected, atol=1e-5)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, LowRankLinear):
            layer.b[...] = jax.random.normal(KEY, layer.b.shape)
    changed = model(images)
    assert np.abs(changed - expected).max() > 1e-2
    merge_lora(model)
    np.testing.assert_allclose(model(images), changed, atol=1e-4)
    pytest.importorskip("qwix", reason="few bits need qwix")
    quantize_base(model, "int8")
    few = model(images)
    expand_base(model)
    np.testing.assert_allclose(model(images), few, atol=1e-4)


def test_patches_and_shifts_are_what_loops_say():
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    cut = patches(jnp.asarray(x), 2)
    for row in range(2):
        for column in range(3):
            window = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(cut[:, 3 * row + column], window.reshape(2, -1))
    stacked = np.asarray(shifted(jnp.asarray(x)))
    np.testing.assert_array_equal(stacked[..., :3], x)
    # Each shift moves the image by one pixel, and zeros in.
    left, right, up, down = (stacked[..., 3 * i : 3 * i + 3] for i in range(1, 5))
    np.testing.assert_array_equal(left[:, :, :-1], x[:, :, 1:])
    np.testing.assert_array_equal(right[:, :, 1:], x[:, :, :-1])
    np.testing.assert_array_equal(up[:, :-1], x[:, 1:])
    np.testing.assert_array_equal(down[:, 1:], x[:, :-1])
    assert not left[:, :, -1].any()
    assert not down[:, 0].any()


@pytest.mark.slow
def test_local_attention_does_not_attend_to_itself():
    from bdia_jax.nn import SelfAttention

    attention = SelfAttention(8, 2, 4, local=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(KEY, (1, 5, 8))
    # The value of a position reaches all outputs but its own; logits are blind to values.
    attention.qkv.kernel[...] = attention.qkv.kernel[...].at[:, :16].set(0)
    jacobian = jax.jacobian(lambda x: attention(x)[0])(x)[:, :, 0]
    reached = jnp.abs(jacobian).max(axis=(1, 3)) > 1e-6
    np.testing.assert_array_equal(reached, ~np.eye(5, dtype=bool))


def stack_of(**options):
    return ReversibleStack(Block, 2, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ReversibleStack(Block, 0, rngs=nnx.Rngs(0)), "depth.*>= 1; got 0"),
        (lambda: ReversibleSettings(method="bda"), "method must be one of bdia.*got 'bda'"),
        (lambda: ReversibleSettings(signs="odd"), "signs must be one of block.*got 'odd'"),
        (lambda: ReversibleSettings(gamma=0.3), "gamma.*0.3"),
        (lambda: ReversibleSettings(frac_bits=None), "frac_bits"),
        (lambda: ReversibleSettings(tolerance_bits=-1), "tolerance_bits.*-1"),
        (lambda: stack_of(step=Euler()), "Euler.*has no inverse"),
        (lambda: stack_of(adjoint=Checkpoint(probe=BackwardReport.zeros(2))), "stack has a probe"),
        (lambda: stack_of(parts=("attend",)), r"methods of Block; got \('attend',\)"),
        (lambda: stack_of(parts=()), r"methods of Block; got \(\)"),
        (lambda: ViTConfig(patch_size=5), "divide image_size = 32; got 5"),
        (lambda: ViTConfig(width=0), "width must be an int >= 1; got 0"),
        (lambda: ViTConfig(dropout=1.0), r"\[0, 1\); got 1.0"),
        (lambda: ViTConfig(dtype="float8"), "float32, bfloat16, float16, float64; got 'float8'"),
        (lambda: ViTConfig(pool="max"), "pool must be one of cls, mean; got 'max'"),
        (lambda: ViT(SMALL, rngs=nnx.Rngs(0))(jnp.zeros((2, 9, 8, 1)), key=KEY), r"8, 8, 1.*9"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(("rate", "kept"), [(0.1, 0.9), (0.25, 0.75), (1 - 2**-20, 2**-16)])
def test_dropout_keeps_the_mean(rate, kept):
    shape = (400, 625)  # An odd last axis: neighbours share a random word.
    dropout = Dropout(rate, rngs=nnx.Rngs(0))
    y = np.asarray(dropout(jnp.ones(shape)))
    count = y.size
    share = np.count_nonzero(y) / count
    # Five standard deviations of the share of kept elements, and of the mean.
    slack = 5 * np.sqrt(kept * (1 - kept) / count)
    assert abs(share - kept) < slack + 2**-16
    assert abs(y.mean() - 1) < slack / kept
    assert len(np.unique(y)) <= 2
    # Words are 32 random bits: neither half tells anything of the other.
    even, odd = y[:, 0:-1:2] != 0, y[:, 1::2] != 0
    assert abs((even & odd).mean() - kept**2) < 2 * slack
    assert (dropout(jnp.ones(shape)) != y).any()
    dropout.eval()
    assert (dropout(jnp.ones(shape)) == 1).all()


@pytest.mark.parametrize(
    "block",
    [
        lambda: VisionBlock(
            VisionTowerConfig(width=64, heads=2, hidden=64, dropout=0.5), rngs=nnx.Rngs(0)
        ),
        lambda: DecoderBlock(
            DecoderConfig(width=64, heads=2, hidden=64, dropout=0.5), rngs=nnx.Rngs(0)
        ),
    ],
)
def test_each_update_of_a_pretrained_network_is_dropped_once(block):
    block, x = block(), jax.random.normal(KEY, (4, 32, 64))
    for name in block.PARTS:
        y = np.asarray(getattr(block, name)(x))
        assert abs((y == 0).mean() - 0.5) < 5 * np.sqrt(0.25 / y.size) + 2**-16


def test_dropout_by_key_and_without_randomness():
    dropout, x = Dropout(0.5), jnp.ones((4, 6), jnp.bfloat16)
    first = dropout(x, rngs=jax.random.key(1))
    assert first.dtype == jnp.bfloat16
    np.testing.assert_array_equal(first, dropout(x, rngs=jax.random.key(1)))
    with pytest.raises(ValueError, match=r"draws random numbers.*got key=None"):
        dropout(x)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        keep_mask(jax.random.key(0), 1.0, x)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_dropout_is_drawn_where_the_elements_are(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    x = jax.device_put(jnp.ones((8, 3, 32)), NamedSharding(mesh, P("data", None, "model")))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda key, x: Dropout(0.5)(x, rngs=key))
        compiled = run.lower(jax.random.key(0), x).compile().as_text()
        y = run(jax.random.key(0), x)
    assert not [op for op in ("all-gather", "all-to-all", "permute", "reduce(") if op in compiled]
    np.testing.assert_array_equal(y, Dropout(0.5)(jnp.ones(x.shape), rngs=jax.random.key(0)))


def test_dropout_has_no_broadcast_dims():
    with pytest.raises(ValueError, match=r"broadcast_dims must be empty.*\(1,\)"):
        Dropout(0.5, broadcast_dims=(1,))
