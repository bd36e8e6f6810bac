"""Decoders: attention in chunks, cross-entropy in chunks, families, packing, low-rank updates."""

import dataclasses
import itertools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _programs import products_of
from _rows import fast
from flax import nnx

from bdia_jax.interop import save
from bdia_jax.nn import (
    Decoder,
    DecoderConfig,
    Frozen,
    LowRankLinear,
    RotaryScaling,
    add_lora,
    beam_search,
    chunked_attention,
    cross_entropy,
    freeze,
    generate,
    generation,
    llama,
    merge_lora,
    prompts,
    unfreeze,
)
from bdia_jax.nn.attention import KERNELS, KernelName, attend, kernels
from bdia_jax.nn.dropout import keep_mask
from bdia_jax.planning import memory

GPT2 = DecoderConfig(vocab_size=31, max_length=24, width=16, depth=3, heads=4)
LLAMA = llama(
    vocab_size=31,
    max_length=24,
    width=16,
    depth=3,
    heads=4,
    kv_heads=2,
    hidden=24,
    rope_scaling=RotaryScaling(original_length=8),
)
QWEN2 = dataclasses.replace(LLAMA, qkv_bias=True, tied_head=True, rope_scaling=None)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, head_dim=8, rope_scaling=None)
GEMMA = dataclasses.replace(
    QWEN3,
    norm_place="both",
    zero_centered_norm=True,
    feed_forward="geglu",
    window=4,
    windowed=(True, False, True),
    window_rope_theta=100.0,
    attention_scale=0.3,
    attention_cap=2.0,
    logit_cap=3.0,
    embedding_scale=4.0,
)
PYTHIA = dataclasses.replace(
    GPT2, positions="rotary", rotary_dim=2, parallel=True, feed_forward="exact_gelu"
)
MIXTRAL = dataclasses.replace(LLAMA, experts=4, experts_per_token=2, rope_scaling=None)
OLMO = dataclasses.replace(
    LLAMA, norm_place="after", qk_norm_whole=True, window=5, rotated=(True, False, True)
)
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "olmo": OLMO,
    "pythia": PYTHIA,
    "mixtral": MIXTRAL,
}


def tokens_of(config, batch=2, length=12, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, config.vocab_size)


def trees_close(a, b, **tolerances):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerances), a, b)


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------


def attention_inputs(queries, keys, heads=4, kv_heads=2, dim=6, dtype=jnp.float64):
    q, k, v, w = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(
            jax.random.split(jax.random.key(0), 4),
            [
                (2, queries, heads, dim),
                (2, keys, kv_heads, dim),
                (2, keys, kv_heads, dim),
                (2, queries, heads, dim),
            ],
        )
    )
    return q, k, v, w


@pytest.mark.parametrize(
    ("queries", "keys", "chunk", "causal", "segmented", "window"),
    [
        (9, 9, 4, True, False, None),
        (9, 9, 3, True, True, 2),
        (7, 10, 4, False, False, None),
        (5, 10, 128, False, True, None),
        (1, 8, 8, True, False, 5),
    ],
)
def test_chunked_attention_is_attention(queries, keys, chunk, causal, segmented, window):
    with jax.enable_x64(True):
        q, k, v, w = attention_inputs(queries, keys)
        offset = keys - queries
        allowed = np.ones((2, 1, queries, keys), bool)
        segments = None
        if causal:
            allowed &= np.arange(keys) <= offset + np.arange(queries)[:, None]
        if window is not None:
            allowed &= np.arange(keys) > offset + np.arange(queries)[:, None] - window
        if segmented:
            of_keys = np.array([np.sort(np.arange(keys) % 3), np.arange(keys) // 5])
            segments = of_keys[:, offset:], of_keys
            allowed &= (segments[0][:, :, None] == of_keys[:, None])[:, None]

        def ours(q, k, v):
            y = chunked_attention(
                q,
                k,
                v,
                causal=causal,
                offset=offset,
                chunk=chunk,
                window=window,
                segments=None if segments is None else tuple(map(jnp.asarray, segments)),
            )
            return jnp.sum(y * w), y

        def plain(q, k, v):
            y = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(allowed))
            return jnp.sum(y * w), y

        grads, y = jax.jit(jax.grad(ours, (0, 1, 2), has_aux=True))(q, k, v)
        expected, y_expected = jax.jit(jax.grad(plain, (0, 1, 2), has_aux=True))(q, k, v)
    # Accumulated in float32.
    np.testing.assert_allclose(y, y_expected, rtol=1e-5, atol=1e-6)
    trees_close(grads, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["chunked", "plain"])
def test_capped_scores(kernel):
    """The equation, in values and gradients; among keys that may not be attended to."""
    with jax.enable_x64(True):
        q, k, v, w = attention_inputs(5, 5, kv_heads=4)
        window = jnp.int32(3)

        def ours(q, k, v):
            options = {"window": window, "scale": 0.7, "cap": 1.5}
            return jnp.sum(w * attend(q, k, v, kernel=kernel, causal=True, **options))

        def plain(q, k, v):
            scores = 1.5 * jnp.tanh(0.7 * jnp.einsum("bqhd,bkhd->bhqk", q, k) / 1.5)
            allowed = jnp.tril(jnp.ones((5, 5), bool)) & jnp.triu(jnp.ones((5, 5), bool), -2)
            weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf))
            return jnp.sum(w * jnp.einsum("bhqk,bkhd->bqhd", weights, v))

        found, expected = (jax.value_and_grad(f, (0, 1, 2))(q, k, v) for f in (ours, plain))
    trees_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_dropout_of_attention_weights():
    q, k, v, w = attention_inputs(5, 7, kv_heads=4, dtype=jnp.float32)
    key = jax.random.key(3)

    def ours(q, k, v):
        return jnp.sum(w * chunked_attention(q, k, v, dropout=0.5, key=key))

    def plain(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 6**-0.5)
        keep, probability = keep_mask(jax.random.fold_in(key, 0), 0.5, weights[:, :, None])
        weights = jnp.where(keep[:, :, 0], weights / probability, 0)
        return jnp.sum(w * jnp.einsum("bhqk,bkhd->bqhd", weights, v))

    np.testing.assert_allclose(ours(q, k, v), plain(q, k, v), rtol=1e-5)
    trees_close(jax.grad(ours, (0, 1, 2))(q, k, v), jax.grad(plain, (0, 1, 2))(q, k, v), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_kernels_agree(causal, segmented):
    """All that a CPU has, in values and gradients; padding attends to nothing."""
    q, k, v, w = attention_inputs(6, 6, dtype=jnp.float32)
    segments = None
    if segmented:
        segments = jnp.array([[0, 0, 0, 1, 1, 1], [5, 5, 6, 6, 6, 6]])
        segments = segments, segments.at[1, :2].set(7)

    options = {"causal": causal, "segments": segments}
    if causal:
        options |= {"window": jnp.int32(4), "scale": 0.5}

    def run(kernel):
        def total(q, k, v):
            return jnp.sum(w * attend(q, k, v, kernel=kernel, **options))

        return jax.value_and_grad(total, (0, 1, 2))(q, k, v)

    reference = run("plain")
    for kernel in ("auto", "chunked", "xla")[: 2 if segmented else 3]:
        trees_close(run(kernel), reference, rtol=1e-5, atol=1e-5)


def test_the_table_of_kernels():
    assert typing.get_args(KernelName) == ("auto", *KERNELS)
    q, k, v, _ = attention_inputs(4, 4, dtype=jnp.float32)
    for name, kernel in KERNELS.items():
        if not kernel.drops:
            with pytest.raises(ValueError, match=f"{name} attention cannot drop weights.*0.1"):
                attend(q, k, v, kernel=name, dropout=0.1, key=jax.random.key(0))
        if not kernel.caps:
            with pytest.raises(ValueError, match=f"{name} attention cannot cap scores; got cap=2"):
                attend(q, k, v, kernel=name, cap=2.0)
    dropping = attend(q, k, v, kernel="plain", dropout=0.5, key=jax.random.key(0))
    assert jnp.abs(dropping - attend(q, k, v, kernel="plain")).max() > 0.1


def test_who_may_not_attend_gets_zeros_and_no_nan():
    q, k, v, _ = attention_inputs(3, 3, dtype=jnp.float32)
    nobody = jnp.zeros((2, 3), int), jnp.ones((2, 3), int)

    def f(q, k, v):
        return chunked_attention(q, k, v, segments=nobody)

    np.testing.assert_array_equal(f(q, k, v), 0)
    for gradient in jax.grad(lambda *a: f(*a).sum(), (0, 1, 2))(q, k, v):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.buffers
def test_attention_never_holds_the_matrix():
    shapes = [jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.float32)] * 3

    def gradient(q, k, v):
        return jax.grad(lambda *a: chunked_attention(*a, causal=True).sum(), (0, 1, 2))(q, k, v)

    # A chunk of 128 keys has 2 MB of weights, the matrix has 34.
    assert memory.temporaries(gradient, *shapes) < 12e6


def test_masks_are_computed_again_under_a_checkpoint():
    # Kept, those of 8 chunks would be as large as all weights.
    shapes = [jax.ShapeDtypeStruct((2, 1024, 8, 8), jnp.bfloat16)] * 3

    def gradient(q, k, v):
        @jax.checkpoint
        def block(q, k, v):
            return chunked_attention(q, k, v, causal=True)

        def step(x, _):
            return block(x, k, v), None

        return jax.grad(lambda q: jax.lax.scan(step, q, None, 2)[0].astype(jnp.float32).sum())(q)

    kept = jax.make_jaxpr(gradient)(*shapes)
    assert "bool[8,2,8,1,1024,128]" not in str(kept)


@pytest.mark.unchecked
def test_attention_refuses():
    q, k, v, _ = attention_inputs(3, 3, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"kv_head must divide head; got \(2, 3, 3, 6\)"):
        chunked_attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="batch, query, head, dim"):
        chunked_attention(q[0], k, v)
    with pytest.raises(ValueError, match="needs a key; got None"):
        chunked_attention(q, k, v, dropout=0.1)
    with pytest.raises(ValueError, match="chunk must be at least 1; got 0"):
        chunked_attention(q, k, v, chunk=0)
    with pytest.raises(ValueError, match=r"segments must have the shapes \(2, 3\) and \(2, 3\)"):
        chunked_attention(q, k, v, segments=(jnp.ones(3, int), jnp.ones(3, int)))


# ---------------------------------------------------------------------------------------------
# Cross-entropy
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_in_chunks_is_cross_entropy(smoothing):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 4)
        x = jax.random.normal(keys[0], (3, 7, 5), jnp.float64)
        matrix = jax.random.normal(keys[1], (11, 5), jnp.float64)
        targets = jax.random.randint(keys[2], (3, 7), 0, 11)
        weights = jax.random.uniform(keys[3], (3, 7)).at[0, 2].set(0)

        def ours(x, matrix, weights):
            nowhere = targets.at[0, 2].set(99)
            sums = cross_entropy(x, matrix, nowhere, weights, label_smoothing=smoothing, chunk=6)
            return sums.loss, sums

        def plain(x, matrix, weights):
            labels = optax.smooth_labels(jax.nn.one_hot(targets, 11), smoothing)
            logits = x @ matrix.T
            loss = jnp.sum(weights * optax.softmax_cross_entropy(logits, labels))
            return loss, jnp.sum(weights * (logits.argmax(-1) == targets))

        (loss, sums), grads = jax.value_and_grad(ours, (0, 1, 2), has_aux=True)(x, matrix, weights)
        (expected, correct), expected_grads = jax.value_and_grad(plain, (0, 1, 2), has_aux=True)(
            x, matrix, weights
        )
        # Whatever asks nothing of the word that is nowhere.
        grads, expected_grads = (
            (*of, d_weights.at[0, 2].set(0)) for *of, d_weights in (grads, expected_grads)
        )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(
        [sums.metrics["accuracy"], sums.weight], [correct, weights.sum()], rtol=1e-6
    )
    trees_close(grads, expected_grads, rtol=1e-5, atol=1e-6)


def loss_gradient(chunk=None):
    """Of the loss, by features and matrix."""

    def gradient(x, matrix, targets):
        def loss(x, matrix):
            return cross_entropy(x, matrix, targets, chunk=chunk).loss

        return jax.grad(loss, (0, 1))(x, matrix)

    return gradient


def loss_inputs(vocabulary):
    """Shapes of features, matrix and targets of 1,024 tokens."""
    x = jax.ShapeDtypeStruct((4, 256, 8), jnp.float32)
    matrix = jax.ShapeDtypeStruct((vocabulary, 8), jnp.float32)
    return x, matrix, jax.ShapeDtypeStruct((4, 256), jnp.int32)


@pytest.mark.buffers
def test_logits_of_the_whole_batch_never_exist():
    # All logits: 82 MB; those of a chunk: 5 MB, a few times.
    assert memory.temporaries(loss_gradient(chunk=64), *loss_inputs(20_000)) < 25e6


@pytest.mark.buffers
def test_a_chunk_of_a_large_vocabulary_is_smaller():
    # 2^25 logits are 256 tokens of 2^17 words.
    given = loss_inputs(2**17)
    ours, quarter, whole = (
        memory.temporaries(loss_gradient(chunk), *given) for chunk in (None, 256, 1024)
    )
    assert ours == quarter < whole


def test_the_derivative_of_the_loss_scatters_nothing():
    # It would scatter into copies of all logits of a chunk.
    program = str(jax.make_jaxpr(loss_gradient())(*loss_inputs(50)))
    assert "dot_general" in program
    assert "scatter" not in program


def test_the_loss_of_bfloat16_features_multiplies_bfloat16_matrices():
    # A float32 copy of the matrix would be larger than all logits of a chunk.
    x, matrix, targets = loss_inputs(50)
    x, matrix = (jax.ShapeDtypeStruct(a.shape, jnp.bfloat16) for a in (x, matrix))
    products = products_of(loss_gradient(), x, matrix, targets)
    for product in products:
        assert {v.aval.dtype.name for v in product.invars} == {"bfloat16"}
        assert product.params["preferred_element_type"] == jnp.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_gradients_of_the_loss_are_not_lost(dtype):
    # A mean over many tokens, of many words: in float16 the cotangents of nearly all logits are 0.
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 64, 16)).astype(dtype)
    matrix = (0.1 * jax.random.normal(keys[1], (2000, 16))).astype(dtype)
    targets = jax.random.randint(keys[2], (2, 64), 0, 2000)

    def gradient(x, matrix):
        def loss(matrix):
            return 1e-5 * cross_entropy(x, matrix, targets).loss

        # By float32 weights, as they are trained.
        return jax.grad(loss)(matrix.astype(jnp.float32))

    found, expected = gradient(x, matrix), gradient(x.astype(jnp.float32), matrix)
    assert optax.tree.norm(found - expected) < 0.02 * optax.tree.norm(expected)
    others = np.setdiff1d(np.arange(2000), targets)
    found, expected = found[others], expected[others]
    assert optax.tree.norm(found - expected) < 0.02 * optax.tree.norm(expected)


def test_the_gradient_of_a_bfloat16_matrix_is_summed_in_float32():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (1, 512, 8)).astype(jnp.bfloat16)
    matrix = jax.random.normal(keys[1], (11, 8)).astype(jnp.bfloat16)
    targets = jax.random.randint(keys[2], (1, 512), 0, 11)
    found, expected = (
        loss_gradient(chunk)(x, matrix, targets)[1].astype(jnp.float32) for chunk in (4, 512)
    )
    # Both are rounded to bfloat16 once.
    assert optax.tree.norm(found - expected) < 2**-8 * optax.tree.norm(expected)


def test_no_product_of_the_loss_is_taken_twice():
    given = loss_inputs(50)
    assert len(products_of(lambda *args: cross_entropy(*args).loss, *given)) == 1
    assert len(products_of(loss_gradient(), *given)) == 3
    # Of a frozen matrix there is no gradient.
    of_features = jax.grad(lambda *args: cross_entropy(*args).loss)
    assert len(products_of(of_features, *given)) == 2


@pytest.mark.parametrize("target", [5, -1])
def test_a_target_that_does_not_exist_is_nan(target):
    x, matrix = jnp.ones((1, 2, 3)), jnp.ones((5, 3))
    assert np.isnan(cross_entropy(x, matrix, jnp.array([[1, target]])).loss)


# ---------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------


def loss_and_gradient(config, tokens):
    """Of the next token, by all parameters."""
    graph, params, rest = nnx.split(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param, ...)

    @jax.jit
    @jax.value_and_grad
    def mean(params):
        model = nnx.merge(graph, params, rest)
        sums = model.loss(tokens, jnp.roll(tokens, -1, 1), key=jax.random.key(1))
        return sums.loss / sums.weight

    return mean(params)


@pytest.mark.slow
def test_online_gradients_are_those_of_the_forward_pass():
    """Of the other kind of decoder, and in float64, by parts: test_parts."""
    config = dataclasses.replace(GPT2, dropout=0.1)
    tokens = tokens_of(config)
    (loss, online), (expected, direct) = (
        loss_and_gradient(dataclasses.replace(config, method=method), tokens)
        for method in ("bdia", "bdia-direct")
    )
    assert loss == expected
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, online, direct))
    assert difference < 1e-5 * min(optax.tree.norm(online), optax.tree.norm(direct))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_feed_forward_network_in_chunks_is_the_same_network(family):
    tokens = tokens_of(GPT2, length=13)
    wide = {"dtype": "float64", "param_dtype": "float64"}
    with jax.enable_x64(True):
        (loss, whole), (in_chunks, chunked) = (
            loss_and_gradient(
                dataclasses.replace(FAMILIES[family], ffn_chunk=chunk, **wide), tokens
            )
            for chunk in (None, 5)
        )
        assert in_chunks == loss
        trees_close(chunked, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.buffers
def test_the_hidden_layer_exists_in_chunks():
    def gradient(chunk):
        config = dataclasses.replace(
            GPT2, max_length=512, hidden=2048, ffn_chunk=chunk, depth=2, method="bdia"
        )
        graph, params, rest = nnx.split(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param, ...)

        def loss(params, tokens):
            return nnx.merge(graph, params, rest).loss(tokens, tokens, key=jax.random.key(1)).loss

        shape = jax.ShapeDtypeStruct((4, 512), jnp.int32)
        return memory.temporaries(jax.grad(loss), params, shape)

    # 4 × 512 positions of 2048 hidden features are 17 MB.
    whole, chunked = gradient(None), gradient(64)
    assert whole > 2 * 17e6
    assert chunked < whole - 30e6


@pytest.mark.slow
def test_fused_attention_is_chosen_where_it_can_be_had(monkeypatch):
    config = dataclasses.replace(GPT2, dtype="bfloat16", head_dim=8, dropout=0.1)
    model = Decoder(config, rngs=nnx.Rngs(0))
    asked = []

    def fused(q, k, v, *, implementation, **_):
        asked.append(implementation)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    model.eval()
    model(tokens_of(config))
    assert not asked, "there is none"
    monkeypatch.setattr(kernels, "has_fused_attention", lambda: True)
    model(tokens_of(config))
    assert set(asked) == {"cudnn"}
    asked.clear()
    model(tokens_of(config, length=11))
    model.train()
    model(tokens_of(config), key=jax.random.key(0))
    assert not asked, "neither for odd lengths, nor with dropout"
    right = {"dtype": jnp.float16, "head_dim": 128, "lengths": (6, 8), "dropout": 0, "cap": None}
    assert kernels.fusible(**right)
    for name, values in {
        "dtype": (jnp.float32,),
        "head_dim": (6, 136),
        "lengths": ((6, 7), (7, 8)),
        "dropout": (0.1,),
        "cap": (30.0,),
    }.items():
        assert not any(kernels.fusible(**right | {name: value}) for value in values)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("family", "attention", "chunk"),
    fast(
        1,
        [
            ("llama", "plain", None),
            ("gpt2", "xla", 5),
            ("gemma", "chunked", None),
            ("olmo", "chunked", 5),
            ("pythia", "chunked", 5),
            ("mixtral", "chunked", 5),
        ],
    ),
)
def test_every_family_is_reversible_in_bfloat16(family, attention, chunk):
    """Without dropout, which takes long to compile: test_encoder_decoder has it."""
    of = FAMILIES[family]
    config = dataclasses.replace(
        of,
        dtype="bfloat16",
        attention=attention,
        dropout=0.0,
        depth=6,
        width=64,
        head_dim=16,
        ffn_chunk=chunk,
        **{name: flags * 2 for name in ("windowed", "rotated") if (flags := getattr(of, name))},
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 24, 64), jnp.bfloat16)
    angles = model.angles(jnp.broadcast_to(jnp.arange(24), (4, 24)))
    segments = jnp.repeat(jnp.arange(4), 6)[None].repeat(4, 0)
    report = model.blocks.check_reversible(x, angles, segments, key=jax.random.key(1))
    assert (report.compared, report.mismatched) == (6 * 4 * 24 * 64, 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_texts_do_not_see_each_other(family):
    config = dataclasses.replace(FAMILIES[family], method="standard")
    model = Decoder(config, rngs=nnx.Rngs(0))
    model.eval()
    a, b = tokens_of(config, 1, 5, 0), tokens_of(config, 1, 7, 1)
    apart = [model(a), model(b)]
    packed = model(
        jnp.concatenate([a, b], 1),
        segments=jnp.array([[0] * 5 + [1] * 7]),
        positions=jnp.array([[*range(5), *range(7)]]),
    )
    np.testing.assert_allclose(packed, jnp.concatenate(apart, 1), atol=2e-6)


@pytest.mark.unchecked
def test_the_network_refuses():
    model = Decoder(dataclasses.replace(GPT2, method="standard"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="sequences may have 24 tokens"):
        model(jnp.zeros((1, 25), int))
    with pytest.raises(ValueError, match="tokens must be integers"):
        model(jnp.zeros((1, 5)))
    model.eval()
    assert np.isnan(model(jnp.array([[31]]))).all()
    for wrong, message in [
        ({"heads": 3}, "heads must divide width = 16"),
        ({"kv_heads": 3}, "kv_heads must divide heads = 4"),
        ({"positions": "rotary", "head_dim": 5}, "head_dim must be even; got 5"),
        ({"norm": "batch"}, "norm must be one of layer, rms; got 'batch'"),
        (
            {"attention": "xla", "dropout": 0.1},
            "dropout = 0.1, attention must be one of auto, chunked, plain; got 'xla'",
        ),
        (
            {"attention": "cudnn", "attention_cap": 2.0},
            "attention_cap = 2.0, attention must be one of auto, chunked, plain; got 'cudnn'",
        ),
        ({"depth": 0}, "depth must be an int >= 1; got 0"),
        ({"rotary_dim": 3, "positions": "rotary"}, "rotary_dim must be even; got 3"),
        (
            {"rotary_dim": 6, "positions": "rotary"},
            "rotary_dim must be at most head_dim = 4; got 6",
        ),
        ({"window": 0}, "window must be an int >= 1; got 0"),
        ({"windowed": (True,) * 3}, "windowed needs a window; got window = None"),
        ({"window_rope_theta": 10.0}, "window_rope_theta needs a window; got window = None"),
        ({"window": 4, "windowed": (True,)}, "windowed must have .* each of 3 blocks; got 1"),
        ({"rotated": (True,)}, "rotated must have an entry for each of 3 blocks; got 1"),
        ({"zero_centered_norm": True}, "zero_centered_norm needs norm = 'rms'; got 'layer'"),
        ({"qk_norm": True, "qk_norm_whole": True}, "exclude each other; got both"),
        ({"logit_cap": 0.0}, "logit_cap must be positive; got 0.0"),
        ({"ffn_chunk": 0}, "ffn_chunk must be an int >= 1; got 0"),
        (
            {"attention": "flash"},
            "attention must be one of auto, .*, plain; got 'flash'",
        ),
        ({"method": "magic"}, "method must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(GPT2, **wrong)


# ---------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------


def sharp(family):
    """A network whose next tokens differ from each other: as initialized, it repeats itself."""
    model = Decoder(dataclasses.replace(FAMILIES[family], method="standard"), rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: p * 20 if p.ndim > 2 else p, state))
    model.eval()
    return model


def log_probabilities(model):
    @jax.jit
    def run(tokens):
        return jax.nn.log_softmax(model(tokens)[0])

    # One length, so that there is one compilation; what comes after a token changes nothing.
    return lambda text: run(jnp.array([text + [0] * (24 - len(text))]))[len(text) - 1]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_with_a_cache_is_that_without(family):
    model = sharp(family)
    after = log_probabilities(model)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [3, 30, 2]]
    found = generate(model, prompts, 9)
    for prompt, new in zip(prompts, found, strict=True):
        text = list(prompt)
        for _ in range(9):
            text.append(int(after(text).argmax()))
        assert new == text[len(prompt) :]
    assert len(set(found[0])) > 2
    # The mode of the model does not matter, and is left alone.
    model.train()
    assert generate(model, prompts, 9) == found
    assert not model.blocks.deterministic


def test_generation_ends():
    model = sharp("llama")
    (free,) = generate(model, [[5, 6]], 8)
    end = free[3]
    assert generate(model, [[5, 6]], 8, end=end) == [free[: free.index(end)]]
    # Of several, after the first that comes, whichever number it has.
    unseen = sorted({*range(model.config.vocab_size)} - {*free})
    for other in (unseen[0], unseen[-1]):
        assert generate(model, [[5, 6]], 8, end={end, other}) == [free[: free.index(end)]]


@pytest.mark.slow
def test_nothing_is_computed_after_the_end(monkeypatch):
    """Neither of texts that are over, nor after the last token."""
    model, calls, extend = sharp("llama"), [], Decoder.extend

    def counted(self, *arguments):
        jax.debug.callback(lambda: calls.append(None))
        return extend(self, *arguments)

    monkeypatch.setattr(Decoder, "extend", counted)

    def steps(function, **options):
        calls.clear()
        found = function(model, [[5, 6], [7]], 9, **options)
        jax.effects_barrier()
        return len(calls), found

    assert steps(generate)[0] == steps(beam_search, beams=2)[0] == 9
    free = steps(generate)[1]
    last = [text[4] for text in free]
    count, found = steps(generate, end=last)
    assert count == 1 + max(map(len, found)) < 9
    # Nor where no text can get as probable as one that is over.
    assert steps(beam_search, beams=2, length_penalty=0.0, end=range(8))[0] < 9


@pytest.mark.slow
def test_programs_are_few():
    """One for prompts of all lengths up to 16, of all temperatures, and of all top_p."""
    model, draw = sharp("gpt2"), {"key": jax.random.key(0)}
    generate(model, [[1]], 6, temperature=1.0, top_p=0.9, **draw)
    before = generation._generate._cache_size()
    for length, temperature, top_p in ((3, 0.7, 0.5), (11, 2.0, 0.9), (16, 1e-40, 1e-3)):
        generate(model, [[2] * length], 6, temperature=temperature, top_p=top_p, **draw)
    assert generation._generate._cache_size() == before


@pytest.mark.slow
def test_drawing():
    model = sharp("gpt2")
    after = np.asarray(log_probabilities(model)([4, 9]))
    order = np.argsort(-after)
    prompts = [[4, 9]] * 64

    def drawn(**options):
        options = {"temperature": 1.0, "key": jax.random.key(0)} | options
        return [new[0] for new in generate(model, prompts, 1, **options)]

    assert set(drawn(top_k=1)) == set(drawn(top_p=1e-6)) == {order[0]}
    assert set(drawn(top_k=3, temperature=50.0)) == set(order[:3])
    least = int(np.searchsorted(np.cumsum(np.exp(after[order])), 0.6)) + 1
    assert set(drawn(top_p=0.6)) <= set(order[:least])
    assert drawn() == drawn() != drawn(key=jax.random.key(1))
    # Temperatures at which logits would be infinite, or 0.
    assert set(drawn(temperature=1e-40)) == set(drawn(temperature=1e30, top_k=1)) == {order[0]}
    both = drawn(temperature=50.0, top_k=3, top_p=0.6)
    assert set(both) == set(order[:2])


def test_of_equally_probable_tokens_no_more_are_drawn_than_make_up_top_p():
    logits, top_p = jnp.zeros((400, 8)), jnp.float32(0.5)
    found = generation._draw(logits, jax.random.key(0), jnp.float32(1), None, top_p)
    assert len(set(np.asarray(found).tolist())) == 4


def naive_beam_search(after, prompt, new, beams, penalty, end):
    live, finished = [(0.0, [])], []
    for i in range(new):
        extended = [
            (score + float(p), [*text, token])
            for score, text in live
            for token, p in enumerate(after(prompt + text))
        ]
        extended.sort(key=lambda each: -each[0])
        over = [each for each in extended[:beams] if each[1][-1] == end or i == new - 1]
        finished += [(score / len(text) ** penalty, text) for score, text in over]
        live = [each for each in extended[: 2 * beams] if each[1][-1] != end][:beams]
    return max(finished)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_beam_search_is_the_naive_one(penalty):
    model = sharp("gpt2")
    after = log_probabilities(model)
    prompts = [[4, 9, 2], [7]]
    # A token that some texts end with.
    end = generate(model, [[4, 9, 2]], 2)[0][1]
    found = beam_search(model, prompts, 5, beams=3, length_penalty=penalty, end=end)
    for prompt, (text, score) in zip(prompts, found, strict=True):
        best, expected = naive_beam_search(after, prompt, 5, 3, penalty, end)
        assert text == [token for token in expected if token != end]
        np.testing.assert_allclose(score, best, rtol=1e-4)


def test_generation_refuses():
    model = sharp("gpt2")
    for function, arguments, options, message in [
        (generate, ([], 3), {}, "at least one prompt"),
        (generate, ([[1], []], 3), {}, "prompt 1 has none"),
        (generate, ([[31]], 3), {}, r"tokens must lie in \[0, vocab_size = 31\)"),
        (generate, ([[1], [1] * 20], 5), {}, "max_length = 24; got 20 of prompt 1, and 5"),
        (generate, ([[1]], 0), {}, "new_tokens must be an int >= 1; got 0"),
        (generate, ([[1]], 3), {"temperature": 1.0}, "needs a key"),
        (generate, ([[1]], 3), {"temperature": math.inf}, "and finite; got inf"),
        (generate, ([[1]], 3), {"top_p": 0.5}, "give a temperature above 0"),
        (generate, ([[1]], 3), {"end": 31}, r"end, a token, must be an int in \[0, 30\]; got 31"),
        (beam_search, ([[1]], 3), {"length_penalty": math.nan}, "must be finite; got nan"),
        (generate, ([[1]], 3), {"temperature": -1.0}, "temperature must be 0 or positive"),
        (generate, ([[1]], 3), {"top_k": 32}, r"top_k must be an int in \[1, 31\]; got 32"),
        (generate, ([[1]], 3), {"top_p": 0.0}, "top_p must lie in"),
        (beam_search, ([[1]], 3), {"beams": 16}, r"beams must be an int in \[1, 15\]; got 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(model, *arguments, **options)
    # As they are without a checker of types.
    for given, new_tokens, message in [
        ([1, 2], 3, "prompt 0 is 1$"),
        (["hello"], 3, "prompt 0 is 'hello'"),
        ([[1.5, 2.0]], 3, r"prompt 0 is \[1.5, 2.0\]"),
        ([[1]], 2.5, "new_tokens must be an int >= 1; got 2.5"),
        ([[1]], True, "new_tokens must be an int >= 1; got True"),
    ]:
        with pytest.raises(TypeError, match=message):
            prompts.left_padded(model, given, new_tokens)
    assert not prompts.is_key(0)
    assert not prompts.is_key(nnx.Rngs(0))
    # Integers of any kind.
    arguments = [np.array([1, 2])], np.int64(2)
    assert generate(model, *arguments) == generate(model, [[1, 2]], 2)


# ---------------------------------------------------------------------------------------------
# Low-rank updates
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_low_rank_updates(family):
    config = dataclasses.replace(FAMILIES[family], dropout=0.0)
    model = Decoder(config, rngs=nnx.Rngs(0))
    tokens = tokens_of(config)
    model.eval()
    before = model(tokens)
    whole = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))

    added = add_lora(model, 2, 8.0, ("q", "attention.out", "ffn.down"), rngs=nnx.Rngs(1))
    assert sorted(added) == ["attention.out", "attention.q", "ffn.down"]
    np.testing.assert_array_equal(model(tokens), before)
    trained = nnx.state(model, nnx.Param)
    assert sum(p.size for p in jax.tree.leaves(trained)) == 3 * 2 * (
        4 * 16 + 16 + (64 if family == "gpt2" else 24)
    )

    # Gradients reach the updates, and what is frozen is not differentiated.
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(lambda p: p + 0.1, params)

    @jax.jit
    @jax.grad
    def gradient(params):
        return nnx.merge(graph, params, rest).loss(tokens, tokens, key=jax.random.key(1)).loss

    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(gradient(params)))
    nnx.update(model, params)
    model.eval()
    updated = model(tokens)
    assert jnp.abs(updated - before).max() > 1e-3

    # The equation: alpha / rank is 4.
    q = model.blocks.stacked.attention.q
    x, a, b = jax.random.normal(jax.random.key(2), (5, 16)), q.a[...], q.b[...]
    one = nnx.merge(nnx.graphdef(q), jax.tree.map(lambda p: p[0], nnx.state(q)))
    np.testing.assert_allclose(one(x), one.base(x) + 4 * (x @ a[0] @ b[0]), rtol=1e-5, atol=1e-5)

    merge_lora(model)
    np.testing.assert_allclose(model(tokens), updated, rtol=1e-4, atol=1e-5)
    merged = nnx.state(model, nnx.Param)
    assert jax.tree.structure(merged) == jax.tree.structure(whole)
    assert not any(isinstance(m, LowRankLinear) for _, m in nnx.iter_modules(model))


def test_a_weight_in_two_places_stays_one():
    class Tied(nnx.Module):
        def __init__(self):
            self.embed = self.head = nnx.Param(jnp.ones(2), tag="both")

    model = Tied()
    for change, kind in ((freeze, Frozen), (unfreeze, nnx.Param)):
        change(model)
        assert model.embed is model.head
        assert type(model.embed) is kind
        assert model.embed.tag == "both"
    freeze(model, "^embed$")
    assert model.embed is model.head
    assert type(model.head) is Frozen


def test_another_network_generates_nothing_and_is_not_written(tmp_path):
    # A mid-point network's blocks are not x + h(x).
    model = Decoder(dataclasses.replace(GPT2, method="midpoint"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"generation runs blocks as the standard network.*Midp"):
        generate(model, [[1, 2, 3]], 2)
    with pytest.raises(ValueError, match=r"transformers knows the standard network.*Midpoint"):
        save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_low_rank_updates_refuse():
    model = Decoder(GPT2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"of which there are attention.k, .*; got gate"):
        add_lora(model, 2, targets=("q", "gate"), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"rank must lie in \[1, 16\].*got 17"):
        add_lora(model, 17, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="at least one linear layer; got none"):
        add_lora(model, 2, targets=(), rngs=nnx.Rngs(1))
    assert not jax.tree.leaves(nnx.state(model, Frozen))


def test_freezing_a_part():
    model = Decoder(GPT2, rngs=nnx.Rngs(0))
    count = len(jax.tree.leaves(nnx.state(model, nnx.Param)))
    freeze(model, "^(embedding|positions)$")
    assert len(jax.tree.leaves(nnx.state(model, Frozen))) == 2
    unfreeze(model)
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == count
    with pytest.raises(
        ValueError, match=r"path of a parameter; got 'embeding', and there are blocks"
    ):
        freeze(model, "embeding")
    assert list(itertools.islice(nnx.to_flat_state(nnx.state(model, Frozen)), 1)) == []
