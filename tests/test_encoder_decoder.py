"""The encoder-decoder: two reversible stacks, one of which looks into the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _rows import fast
from flax import nnx

from bdia_jax.data import PackedPairs, pack_pairs
from bdia_jax.nn import EncoderDecoder, EncoderDecoderConfig, Probe, beam_search, generate
from bdia_jax.nn.attention.grouped import GroupedQueryAttention
from bdia_jax.train import TrainSettings, Translation, step_memory

SMALL = EncoderDecoderConfig(
    source_vocab=23,
    max_length=32,
    width=16,
    encoder_depth=2,
    decoder_depth=3,
    heads=2,
    dropout=0.1,
)
PAIRS = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 10]), ([11, 12, 13, 14], [15])]
END = 22
SEPARATE = {"target_vocab": 25, "tied_head": False, "positions": "learned"}


def packed(rows=2, length=16) -> PackedPairs:
    """Rows of three pairs, each row in another order."""
    each = [pack_pairs(PAIRS[i:] + PAIRS[:i], length, end=END) for i in range(rows)]
    return PackedPairs(*(jnp.concatenate(parts) for parts in zip(*each)))


def mean_loss(model, batch, **options):
    sums = model.loss(
        batch.source,
        batch.tokens,
        batch.targets,
        batch.weights,
        segments=batch.segments,
        source_segments=batch.source_segments,
        source_positions=batch.source_positions,
        positions=batch.positions,
        **options,
    )
    return sums.loss / sums.weight


@pytest.mark.parametrize("separate", fast(1, [False, True]))
def test_online_gradients_are_those_of_the_forward_pass(separate):
    """Of all parameters, the encoder's included, in float64; one embedding, or two and a head."""
    with jax.enable_x64(True):
        config = dataclasses.replace(
            SMALL,
            dtype="float64",
            param_dtype="float64",
            **(SEPARATE if separate else {}),
        )
        batch, grads = packed(), {}
        for method in ("bdia", "bdia-direct"):
            settings = dataclasses.replace(config, method=method)
            model = EncoderDecoder(settings, rngs=nnx.Rngs(0))
            graph, params, rest = nnx.split(model, nnx.Param, ...)

            @jax.jit
            @jax.value_and_grad
            def loss(params, graph=graph, rest=rest):
                model = nnx.merge(graph, params, rest)
                return mean_loss(model, batch, key=jax.random.key(1))

            grads[method] = loss(params)
    (value, online), (expected_value, direct) = grads["bdia"], grads["bdia-direct"]
    assert value == expected_value
    for (path, d), (_, expected) in zip(
        nnx.to_flat_state(online), nnx.to_flat_state(direct), strict=True
    ):
        # Softmax does not see a shift of all keys: that gradient is nothing but rounding.
        scale = 1.0 if path[-2:] == ("k", "bias") else np.abs(expected[...]).max()
        assert scale > 0, path
        assert np.abs(d[...] - expected[...]).max() <= 1e-10 * scale, path


@pytest.mark.slow
@pytest.mark.optimized
def test_both_stacks_are_reversible_in_bfloat16():
    """By the report of the backward pass of a training step."""
    config = dataclasses.replace(
        SMALL, dtype="bfloat16", width=64, encoder_depth=6, decoder_depth=6
    )
    model = EncoderDecoder(config, rngs=nnx.Rngs(0))
    batch, key = packed(rows=3), jax.random.key(1)
    graph, probes, rest = nnx.split(model, Probe, ...)

    @jax.jit
    @jax.grad
    def reports(probes):
        return mean_loss(nnx.merge(graph, probes, rest), batch, key=key)

    found = reports(probes)
    for stack in ("encoder", "decoder"):
        assert not found[stack]["probe"].get_value().mismatched.any()


@pytest.mark.slow
def test_pairs_in_a_row_do_not_see_each_other():
    """What a pair gives is the same alone and packed: no text, and no source, but its own."""
    model = EncoderDecoder(dataclasses.replace(SMALL, method="standard"), rngs=nnx.Rngs(0))
    model.eval()
    batch = packed(rows=1)
    together = model(
        batch.source,
        batch.tokens,
        source_segments=batch.source_segments,
        segments=batch.segments,
        source_positions=batch.source_positions,
        positions=batch.positions,
    )
    start = 0
    for source, target in PAIRS:
        tokens = jnp.array([[END, *target]])
        alone = model(jnp.array([source]), tokens)
        there = together[:, start : start + tokens.shape[1]]
        np.testing.assert_allclose(alone, there, atol=1e-5)
        start += tokens.shape[1]


def sharp() -> EncoderDecoder:
    """A network whose next tokens differ from each other."""
    model = EncoderDecoder(dataclasses.replace(SMALL, method="standard"), rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: p * 12 if p.ndim > 2 else p, state))
    return model


@pytest.mark.slow
def test_generation_with_caches_is_that_without():
    model = sharp()
    sources, prompts = [[1, 2, 3], [9], [4, 7, 8, 15, 16]], [[END], [END, 3], [END]]
    found = generate(model, prompts, 8, sources=sources)
    assert beam_search(model, prompts, 8, sources=sources, beams=1) == [
        (text, pytest.approx(score, rel=1e-4))
        for text, (_, score) in zip(found, beam_search(model, prompts, 8, sources=sources, beams=1))
    ]
    assert not model.decoder.deterministic
    model.eval()

    @jax.jit
    def after(source, tokens):
        return model(source, tokens)[0].argmax(-1)

    for source, prompt, new in zip(sources, prompts, found, strict=True):
        text = list(prompt)
        for _ in range(8):
            # One length, so that there are few compilations; what comes after changes nothing.
            padded = jnp.array([text + [0] * (12 - len(text))])
            text.append(int(after(jnp.array([source]), padded)[len(text) - 1]))
        assert new == text[len(prompt) :]
    assert len({token for text in found for token in text}) > 3


@pytest.mark.slow
def test_beams_find_what_is_at_least_as_probable():
    model = sharp()
    sources, prompts = [[1, 2, 3], [9, 4]], [[END], [END]]
    options = {"sources": sources, "length_penalty": 0.0}
    greedy = beam_search(model, prompts, 5, beams=1, **options)
    wide = beam_search(model, prompts, 5, beams=11, **options)
    assert all(w[1] >= g[1] - 1e-5 for w, g in zip(wide, greedy))
    # A text is not translated by what is beside it in the batch.
    (alone,) = beam_search(model, prompts[:1], 5, beams=11, sources=sources[:1], length_penalty=0.0)
    assert alone[0] == wide[0][0]


@pytest.mark.slow
def test_memory_falls():
    """Of a training step: below that of checkpointed blocks, and far below the standard one's."""
    batch = pack_pairs([([1] * 60, [2] * 59)] * 8, 64, end=END)
    task = Translation("nothing", batch, batch)
    settings = TrainSettings(batch_size=8, steps=1)
    found = {}
    for method in ("standard", "standard-checkpoint", "bdia"):
        config = dataclasses.replace(
            SMALL,
            method=method,
            width=64,
            max_length=64,
            encoder_depth=8,
            decoder_depth=8,
            dropout=0.0,
        )
        model = nnx.eval_shape(lambda c=config: EncoderDecoder(c, rngs=nnx.Rngs(0)))
        found[method] = step_memory(model, task, settings).memory.temporaries
    assert found["bdia"] < found["standard-checkpoint"] < 0.5 * found["standard"]


def test_the_network_refuses():
    for changes, message in (
        ({"positions": "rotary"}, "positions must be"),
        ({"encoder_depth": 0}, "encoder_depth must be"),
        ({"width": 15, "heads": 3}, "even width"),
        ({"heads": 3}, "heads must divide"),
        ({"dtype": "float64"}, "jax_enable_x64"),
    ):
        with pytest.raises(ValueError, match=message):
            EncoderDecoder(dataclasses.replace(SMALL, **changes), rngs=nnx.Rngs(0))
    model = EncoderDecoder(SMALL, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="needs sources"):
        generate(model, [[END]], 3)
    with pytest.raises(ValueError, match="a source for each of 1"):
        generate(model, [[END]], 3, sources=[[1], [2]])
    with pytest.raises(ValueError, match="source 0 has"):
        generate(model, [[END]], 3, sources=[[1, 23]])
    with pytest.raises(ValueError, match="source 0 has 33"):
        beam_search(model, [[END]], 3, sources=[[1] * 33])
    with pytest.raises(ValueError, match="sequences may have 32"):
        model(jnp.ones((1, 33), int), jnp.ones((1, 4), int), key=jax.random.key(0))
    with pytest.raises(ValueError, match="label_smoothing"):
        Translation("x", packed(), packed(), label_smoothing=1.0)


@pytest.mark.slow
def test_label_smoothing_is_for_training_only():
    model = EncoderDecoder(SMALL, rngs=nnx.Rngs(0))
    model.eval()
    batch = packed()
    losses = [
        optax.tree.sum(Translation("x", batch, batch, label_smoothing=s).evaluate(model, batch))
        for s in (0.0, 0.3)
    ]
    assert losses[0] == losses[1]
    plain, smooth = (mean_loss(model, batch, label_smoothing=s) for s in (0.0, 0.3))
    assert plain != smooth


def test_looking_up_is_a_call_whose_keys_and_values_are_known():
    attention = GroupedQueryAttention(
        16, 4, 2, 4, causal=False, scale=40.0, cap=1.5, rngs=nnx.Rngs(0)
    )
    x, memory = (jax.random.normal(jax.random.key(i), (2, n, 16)) for i, n in enumerate((3, 5)))
    present = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = attention(20 * x, None, jnp.ones((2, 3), int), (20 * memory, present))
    found = attention.look_up(20 * x, attention.keys_values(20 * memory), present)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
