"""Micro-batches: their gradients and metrics are those of the whole batch, whatever they weigh.

The right value is the gradient of the whole batch, in float64.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bdia_jax import BackwardReport
from bdia_jax.data import Example, pack, pack_pairs
from bdia_jax.nn import Decoder, DecoderConfig, EncoderDecoder, EncoderDecoderConfig
from bdia_jax.train import PackedTexts, Sums, TrainSettings, Translation
from bdia_jax.train.programs import Programs
from bdia_jax.train.step import of_all

TINY = {"method": "standard", "dropout": 0.0, "width": 16, "heads": 2}
SETTINGS = TrainSettings(steps=1, batch_size=2)


def text_case(dtype):
    """Two rows of 33 tokens, of which 2 and 31 are learned."""
    rows = pack(
        [
            Example([*range(1, 34)], [False] * 31 + [True] * 2),
            Example([*range(1, 34)], [False] * 2 + [True] * 31),
        ],
        32,
    )
    config = DecoderConfig(vocab_size=40, max_length=32, depth=2, dtype=dtype, **TINY)
    return Decoder(config, rngs=nnx.Rngs(0)), PackedTexts("two rows", rows, rows)


def translation_case(dtype):
    """Two rows with targets of 2 and 11 tokens, smoothed."""
    rows = pack_pairs([([3] * 12, [4]), ([5] * 12, [*range(6, 16)])], 12, end=0)
    config = EncoderDecoderConfig(
        source_vocab=20, max_length=12, encoder_depth=1, decoder_depth=1, dtype=dtype, **TINY
    )
    task = Translation("two rows", rows, rows, label_smoothing=0.1)
    return EncoderDecoder(config, rngs=nnx.Rngs(0)), task


def after_a_step(model, task, settings):
    """What a step of gradient descent with learning rate 1 subtracts, and its report."""
    programs = Programs(model, task, settings, optax.sgd(1.0))
    state = programs.first_state(model)
    before = jax.device_get(state.params)
    state, report = programs.step(state)
    taken = jax.tree.map(np.subtract, before, jax.device_get(state.params))
    return dict(nnx.to_flat_state(taken)), jax.device_get(report)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("in_backward", [False, True])
def test_gradients_of_float16_blocks(parts, in_backward):
    """A mean over many tokens has derivatives below the smallest number of float16."""
    if parts > 1 and in_backward:
        pytest.skip("blocks are not updated before all parts of a batch are seen")
    rows = pack([Example([*range(1, 34)], [True] * 33)] * 128, 32)
    task, found = PackedTexts("rows", rows, rows), {}
    for dtype in ("float32", "float16"):
        changes = TINY | {"method": "standard-checkpoint", "dtype": dtype}
        model = Decoder(
            DecoderConfig(vocab_size=40, max_length=32, depth=2, **changes), rngs=nnx.Rngs(0)
        )
        settings = dataclasses.replace(
            SETTINGS, batch_size=128, accumulate=parts, update_in_backward=in_backward
        )
        # As of 32 times as many tokens.
        task.loss = lambda m, batch, key: (s := PackedTexts.loss(task, m, batch, key))._replace(
            weight=32 * s.weight
        )
        found[dtype], report = after_a_step(model, task, settings)
        assert report.grad_norm > 0
    for path, expected in found["float32"].items():
        if path[-2:] == ("k", "bias"):
            # It changes nothing, and its derivative is 0 but for roundings.
            continue
        a, b = (np.float64(v.get_value()).ravel() for v in (expected, found["float16"][path]))
        assert a @ b > 0.999 * np.linalg.norm(a) * np.linalg.norm(b), path


def in_float64(case):
    """Gradient and means of the whole batch; and the mean of the gradients of its rows."""
    with jax.enable_x64(True):
        model, task = case("float64")
        params = jax.tree.map(lambda p: p.astype(jnp.float64), nnx.state(model, nnx.Param))
        graph, _, rest = nnx.split(model, nnx.Param, ...)

        @jax.jit
        def gradient(params, batch):
            def loss(params):
                sums = task.loss(nnx.merge(graph, params, rest), batch, jax.random.key(0))
                return sums.loss / sums.weight, sums.means()

            return jax.grad(loss, has_aux=True)(params)

        batch = jax.tree.map(jnp.asarray, task.train)
        grads, means = gradient(params, batch)
        rows = [jax.tree.map(lambda a, i=i: a[i : i + 1], batch) for i in (0, 1)]
        rows = [gradient(params, row)[0] for row in rows]
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *rows)
        flat = (dict(nnx.to_flat_state(jax.device_get(tree))) for tree in (grads, mean))
        return *flat, jax.device_get(means)


@pytest.mark.slow
@pytest.mark.parametrize("case", [text_case, translation_case])
def test_unequal_micro_batches(case):
    expected, wrong, means = in_float64(case)
    square = sum(np.sum(e.get_value() ** 2) for e in expected.values())
    difference = sum(
        np.sum((wrong[path].get_value() - e.get_value()) ** 2) for path, e in expected.items()
    )
    assert difference > 0.1 * square, "this test wants rows whose mean of means is another"
    found, report = after_a_step(*case("float32"), dataclasses.replace(SETTINGS, accumulate=2))
    assert found.keys() == expected.keys()
    scale = max(np.abs(e.get_value()).max() for e in expected.values())
    for path, gradient in expected.items():
        # A difference of weights of order 1: an error of 2^-23 or two.
        np.testing.assert_allclose(
            found[path].get_value(),
            gradient.get_value(),
            rtol=2e-5,
            atol=5e-7 * max(1, scale),
            err_msg=str(path),
        )
    for name, mean in means.items():
        np.testing.assert_allclose(report.sums.means()[name], mean, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(report.grad_norm, np.sqrt(square), rtol=1e-5)


# ---------------------------------------------------------------------------------------------
# Small parts, and parts of nothing
# ---------------------------------------------------------------------------------------------


class Dot(nnx.Module):
    def __init__(self, dtype):
        self.w = nnx.Param(jnp.zeros(3, dtype))


class Linear:
    """The loss of a sample is ``x · w``, times a weight: the gradient is the weighted mean of x."""

    name, best, unit = "linear", "-loss", "samples"
    samples, eval_samples, eval_batch_size = None, 1, 1

    def __init__(self, x, weights):
        self.x, self.weights = x, weights

    def arrays(self):
        return {"x": self.x, "weights": self.weights}

    def batch(self, arrays, key, step, size):
        return arrays["x"][:size], arrays["weights"][:size]

    def eval_batch(self, arrays, step, size):
        return self.batch(arrays, None, step, size)

    def loss(self, model, batch, key):
        x, weights = batch
        each = jnp.sum(x.astype(model.w.get_value().dtype) * model.w[...], axis=-1)
        return Sums(jnp.sum(weights * each), jnp.sum(weights), {})

    def evaluate(self, model, batch):
        return self.loss(model, batch, None)


def gradient_of(x, weights, parts, dtype=jnp.float32):
    settings = dataclasses.replace(SETTINGS, batch_size=len(x), accumulate=parts)
    found, _ = after_a_step(Dot(dtype), Linear(x, weights), settings)
    return np.float64(found[("w",)].get_value())


def test_bfloat16_gradients_are_summed_in_float32():
    # Numbers of 8 bits, all about 1: a sum in bfloat16 stalls at 256.
    x = np.float32(1 + np.arange(512 * 3).reshape(512, 3) % 3 / 128)
    found = gradient_of(x, np.ones(512, np.float32), 512, jnp.bfloat16)
    np.testing.assert_allclose(found, np.float64(x).mean(0), rtol=2**-8)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_micro_batches_without_weight(parts):
    x = np.float32(np.arange(12).reshape(4, 3))
    weights = np.float32([0, 0, 0.25, 0.5])
    expected = (0.25 * x[2] + 0.5 * x[3]) / 0.75
    np.testing.assert_allclose(gradient_of(x, weights, parts), expected, rtol=1e-6)
    # Nothing to learn at all: nothing is learned, and nothing is wrong.
    settings = dataclasses.replace(SETTINGS, batch_size=4, accumulate=parts)
    nothing = Linear(x, np.zeros(4, np.float32))
    found, report = after_a_step(Dot(jnp.float32), nothing, settings)
    assert np.array_equal(found[("w",)].get_value(), np.zeros(3))
    assert report.grad_norm == report.sums.weight == 0


class Drawing(Linear):
    """Reports what it draws by its key."""

    def loss(self, model, batch, key):
        sums = super().loss(model, batch, key)
        draw = jax.random.uniform(key)
        return sums._replace(metrics={"mean": sums.weight * draw, "square": sums.weight * draw**2})


def test_every_micro_batch_of_every_step_has_a_key_of_its_own():
    settings = dataclasses.replace(SETTINGS, steps=3, batch_size=4, accumulate=4)
    task = Drawing(np.ones((4, 3), np.float32), np.ones(4, np.float32))
    programs = Programs(Dot(jnp.float32), task, settings, optax.sgd(1.0))
    state, means = programs.first_state(Dot(jnp.float32)), []
    for _ in range(3):
        state, report = programs.step(state)
        found = jax.device_get(report.sums.means())
        assert found["square"] - found["mean"] ** 2 > 1e-3, "all micro-batches drew the same"
        means.append(float(found["mean"]))
    assert len(set(means)) == 3, "all steps drew the same"


def test_a_report_of_micro_batches_has_the_largest_deviation():
    reports = BackwardReport(*(jnp.array([[1.0, 0.0], [2.0, 5.0]]) for _ in range(3)))
    found = of_all(reports)
    np.testing.assert_array_equal(found.mismatched, [3, 5])
    np.testing.assert_array_equal(found.corrected, [3, 5])
    np.testing.assert_array_equal(found.deviation, [2, 5])
