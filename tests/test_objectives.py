"""Preferences and distillation: their losses by the equations, and networks that are trained so."""

import ast
import dataclasses
import importlib.util
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _programs import products_of
from flax import nnx
from scipy import special

from bdia_jax import BDIA
from bdia_jax.data import Example, fingerprint, pack
from bdia_jax.nn import Decoder, DecoderConfig, set_step
from bdia_jax.nn.losses import log_likelihoods
from bdia_jax.planning import memory
from bdia_jax.train import TrainSettings, train
from bdia_jax.train.tasks import Distillation, Distilled, Preferences, distillation
from bdia_jax.train.tasks.preferences import log_probabilities

TINY = DecoderConfig(
    vocab_size=11, max_length=12, width=16, depth=2, heads=2, method="standard", gamma=1 / 8
)
# Logits are about as large.
CAPPED = dataclasses.replace(TINY, logit_cap=0.05)
RNG = np.random.default_rng(0)


def drawn(known, length):
    """A text of which the first tokens are a prompt."""
    tokens = RNG.integers(0, 11, length).tolist()
    return Example(tokens, [i >= known for i in range(length)])


def answers(count):
    pairs = []
    for _ in range(count):
        chosen = drawn(3, 9)
        rest = RNG.integers(0, 11, 4).tolist()
        rejected = Example(chosen.tokens[:3] + rest, [False] * 3 + [True] * 4)
        pairs.append((chosen, rejected))
    return pairs


def log_probability(model, example):
    """By the logits of the whole text, in float64."""
    tokens = np.asarray(example.tokens)
    logits = np.float64(model(jnp.asarray(tokens[None, :-1]))[0])
    each = special.log_softmax(logits, axis=-1)[np.arange(len(tokens) - 1), tokens[1:]]
    return each[np.asarray(example.learned[1:])].sum()


@pytest.mark.slow
def test_preferences_by_the_equation():
    before, model = (Decoder(CAPPED, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    pairs = answers(5)
    task = Preferences("pairs", pairs[:3], pairs[3:], 12, before, beta=0.3, eval_batch_size=2)
    rivals = task.train
    found = log_probabilities(model, jax.tree.map(jnp.asarray, rivals), None)
    for i, pair in enumerate(pairs[:3]):
        for j, text in enumerate(pair):
            assert rivals.reference[i, j] == pytest.approx(log_probability(before, text), rel=1e-5)
            assert found[i, j] == pytest.approx(log_probability(model, text), rel=1e-5)
    rewards = np.float64(found) - np.float64(rivals.reference)
    margins = rewards[:, 0] - rewards[:, 1]
    means = task.loss(model, jax.tree.map(jnp.asarray, rivals), None).means()
    assert means["loss"] == pytest.approx(-special.log_expit(0.3 * margins).mean(), rel=1e-4)
    assert means["accuracy"] == pytest.approx((margins > 0).mean())
    assert means["margin"] == pytest.approx(margins.mean(), rel=1e-4)
    # The last batch has one pair, and one that does not count.
    task = Preferences("pairs", pairs, pairs[:1], 12, before)
    batch = task.eval_batch(jax.device_put(task.arrays()), jnp.int32(0), 2)
    assert task.evaluate(before, batch).weight == 1
    assert task.evaluate(before, batch).means()["loss"] == pytest.approx(np.log(2), rel=1e-5)


@pytest.mark.slow
def test_distillation_by_the_equation():
    student, teacher = Decoder(CAPPED, rngs=nnx.Rngs(0)), Decoder(TINY, rngs=nnx.Rngs(1))
    packed = pack([drawn(2, 9), drawn(1, 5), drawn(1, 12)], 12)
    task = Distillation("texts", packed, packed, alpha=0.7, temperature=2.0)
    batch = jax.tree.map(jnp.asarray, task.arrays()["train"])
    model = Distilled(student, teacher)
    ours, theirs = (
        np.float64(net(batch.tokens, segments=batch.segments, positions=batch.positions))
        for net in (student, teacher)
    )
    entropy = -np.take_along_axis(
        special.log_softmax(ours, axis=-1), np.asarray(batch.targets)[..., None], axis=-1
    )[..., 0]
    p = special.softmax(theirs / 2, axis=-1)
    divergence = special.rel_entr(p, special.softmax(ours / 2, axis=-1)).sum(-1)
    expected = (packed.weights * (0.3 * entropy + 0.7 * 4 * divergence)).sum()
    sums = task.loss(model, batch, None)
    assert sums.loss == pytest.approx(expected, rel=1e-4)
    assert sums.weight == packed.weights.sum()
    plain = task.evaluate(model, batch)
    assert plain.loss == pytest.approx((packed.weights * entropy).sum(), rel=1e-4)


def test_log_likelihoods_in_chunks_in_float64():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 4)
        x = jax.random.normal(keys[0], (3, 7, 5), jnp.float64)
        matrix = jax.random.normal(keys[1], (11, 5), jnp.float64)
        targets = jax.random.randint(keys[2], (3, 7), 0, 11)
        weights = jax.random.uniform(keys[3], (3, 7))

        def ours(x, matrix):
            found = log_likelihoods(x, matrix, targets, weights, cap=2.0, chunk=6)
            return jnp.sum(jax.nn.sigmoid(found)), found

        def plain(x, matrix):
            each = jax.nn.log_softmax(2 * jnp.tanh(x @ matrix.T / 2), axis=-1)
            said = jnp.take_along_axis(each, targets[..., None], axis=-1)[..., 0]
            found = jnp.sum(weights * said, axis=1)
            return jnp.sum(jax.nn.sigmoid(found)), found

        (grads, found), (expected_grads, expected) = (
            jax.grad(f, (0, 1), has_aux=True)(x, matrix) for f in (ours, plain)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        for a, b in zip(grads, expected_grads, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)


def test_the_gradient_of_a_bfloat16_matrix_is_summed_in_float32():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 512, 8)).astype(jnp.bfloat16)
    matrix = jax.random.normal(keys[1], (11, 8)).astype(jnp.bfloat16)
    targets = jax.random.randint(keys[2], (2, 512), 0, 11)

    def gradient(chunk):
        def loss(matrix):
            return jnp.sum(log_likelihoods(x, matrix, targets, chunk=chunk) * jnp.array([1, -2]))

        return jax.grad(loss)(matrix).astype(jnp.float32)

    found, expected = gradient(8), gradient(1024)
    # Both are rounded to bfloat16 once.
    assert jnp.linalg.norm(found - expected) < 2**-8 * jnp.linalg.norm(expected)


@pytest.mark.slow
def test_what_the_reference_says_does_not_tell_the_data():
    """It rounds otherwise on other devices, where a run may be resumed."""
    pairs = answers(4)
    tasks = [
        Preferences("pairs", some, some, 12, Decoder(TINY, rngs=nnx.Rngs(seed)))
        for seed, some in ((0, pairs), (1, pairs), (0, pairs[::-1]))
    ]
    one, same, other = (fingerprint(task.given()) for task in tasks)
    assert one == same != other
    assert tasks[0].arrays()["train"].reference.shape == (4, 2)


def test_both_answers_of_a_pair_have_one_sign():
    """With one sign per sample, γ moves the margin of two equal answers by nothing."""
    config = dataclasses.replace(TINY, method="bdia", signs="sample", gamma=1 / 2)
    model = Decoder(config, rngs=nnx.Rngs(0))
    pairs = [(same, same) for same in (drawn(3, 9) for _ in range(4))]
    task = Preferences("pairs", pairs, pairs, 12, model)
    found = log_probabilities(model, jax.tree.map(jnp.asarray, task.train), jax.random.key(1))
    np.testing.assert_array_equal(found[:, 0], found[:, 1])
    # But pairs have different signs.
    assert not np.allclose(found[:, 0], task.train.reference[:, 0], atol=1e-4)


@pytest.mark.buffers
def test_preferences_need_no_gradient_of_the_matrix_per_answer():
    """All answers: 16 matrices of 8 MB; of one chunk of them, logits of 4 MB, a few times."""

    def gradient(x, matrix, targets):
        def loss(x, matrix):
            chosen, rejected = jnp.split(log_likelihoods(x, matrix, targets, chunk=64), 2)
            return jnp.sum(jax.nn.sigmoid(chosen - rejected))

        return jax.grad(loss, (0, 1))(x, matrix)

    x = jax.ShapeDtypeStruct((16, 64, 128), jnp.float32)
    matrix = jax.ShapeDtypeStruct((2**14, 128), jnp.float32)
    targets = jax.ShapeDtypeStruct((16, 64), jnp.int32)
    assert memory.temporaries(gradient, x, matrix, targets) < 40e6


def test_gradients_of_distillation_and_no_logits_twice(monkeypatch):
    """In chunks of few tokens, against plain automatic differentiation of the logits."""
    monkeypatch.setattr(distillation, "CHUNK", 12)
    student, teacher = Decoder(CAPPED, rngs=nnx.Rngs(0)), Decoder(TINY, rngs=nnx.Rngs(1))
    packed = pack([drawn(2, 9), drawn(1, 5), drawn(1, 12)], 12)
    task = Distillation("texts", packed, packed, alpha=0.7, temperature=2.0)
    batch = jax.tree.map(jnp.asarray, task.arrays()["train"])
    model = Distilled(student, teacher)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def plain(params):
        model = nnx.merge(graph, params, rest)
        ours, theirs = (
            net(batch.tokens, segments=batch.segments, positions=batch.positions)
            for net in (model.student, model.teacher)
        )
        said = jnp.take_along_axis(jax.nn.log_softmax(ours), batch.targets[..., None], -1)[..., 0]
        p, q = (jax.nn.log_softmax(each / 2) for each in (theirs, ours))
        divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        return jnp.sum(batch.weights * (0.7 * 4 * divergence - 0.3 * said))

    def ours(params):
        return task.loss(nnx.merge(graph, params, rest), batch, None).loss

    found, expected = (jax.jit(jax.grad(loss))(params) for loss in (ours, plain))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    of_logits = [p for p in products_of(jax.grad(ours), params) if 11 in _sizes(p)]
    assert len(of_logits) == 4, "the student's logits, and their two gradients; the teacher's"


def _sizes(product):
    return [size for v in (*product.invars, *product.outvars) for size in v.aval.shape]


def of_trl(file, name, **names):
    """A function of TRL's, from its source: importing all of TRL takes what it depends on."""
    if (spec := importlib.util.find_spec("trl")) is None:
        pytest.skip("comparing with TRL needs trl")
    torch = pytest.importorskip("torch", reason="comparing with TRL needs torch")
    (folder,) = spec.submodule_search_locations
    tree = ast.parse((pathlib.Path(folder) / "trainer" / file).read_text())
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
    if not found:
        pytest.skip(f"this version of trl has no {name} (0.19 has)")
    (node,) = found
    node.decorator_list = []
    given = {"torch": torch, "F": torch.nn.functional, **names}
    exec(compile(ast.Module([node], []), file, "exec"), given)
    return torch, given[name]


def test_preferences_are_those_of_trl():
    torch, theirs = of_trl(
        "dpo_trainer.py",
        "dpo_loss",
        FDivergenceType=types.SimpleNamespace(
            ALPHA_DIVERGENCE=types.SimpleNamespace(value="alpha"),
            JS_DIVERGENCE=types.SimpleNamespace(value="js"),
        ),
    )
    before, model = (Decoder(CAPPED, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    pairs = answers(4)
    task = Preferences("pairs", pairs, pairs, 12, before, beta=0.3)
    rivals = jax.tree.map(jnp.asarray, task.train)
    ours = log_probabilities(model, rivals, None)
    trainer = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device="cpu"),
        reference_free=False,
        f_divergence_type="reverse_kl",
        loss_type="sigmoid",
        beta=0.3,
        label_smoothing=0.0,
    )
    given = [torch.tensor(np.asarray(a)) for a in (*ours.T, *task.train.reference.T)]
    losses, chosen, rejected = theirs(trainer, *given)
    means = task.loss(model, rivals, None).means()
    assert means["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    # Their rewards are times beta.
    assert means["margin"] == pytest.approx(float((chosen - rejected).mean()) / 0.3, rel=1e-4)
    assert means["accuracy"] == pytest.approx(float((chosen > rejected).double().mean()))


def test_distillation_is_that_of_trl():
    """Of the divergence alone; without the square of the temperature, which TRL leaves out."""
    torch, theirs = of_trl("gkd_trainer.py", "generalized_jsd_loss")
    student, teacher = Decoder(CAPPED, rngs=nnx.Rngs(0)), Decoder(TINY, rngs=nnx.Rngs(1))
    packed = pack([drawn(2, 9), drawn(1, 5), drawn(1, 12)], 12)
    task = Distillation("texts", packed, packed, alpha=1.0, temperature=2.0)
    batch = jax.tree.map(jnp.asarray, task.arrays()["train"])
    where = {"segments": batch.segments, "positions": batch.positions}
    logits = (torch.tensor(np.asarray(net(batch.tokens, **where))) for net in (student, teacher))
    labels = torch.tensor(np.where(packed.weights > 0, packed.targets, -100))
    expected = theirs(*logits, labels=labels, beta=0, temperature=2.0)
    found = task.loss(Distilled(student, teacher), batch, None).means()["loss"]
    assert found == pytest.approx(4 * float(expected), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["preferences", "distillation"])
def test_networks_are_trained(objective, tmp_path):
    """Reversibly; what is frozen stays as it is."""
    config = dataclasses.replace(TINY, method="bdia", signs="sample")
    student = Decoder(config, rngs=nnx.Rngs(0))
    settings = TrainSettings(
        steps=20, batch_size=4, learning_rate=1e-2, eval_every=20, checkpoint_every=20
    )
    if objective == "preferences":
        pairs = answers(8)
        task, model = Preferences("pairs", pairs, pairs, 12, student), student
        before = np.log(2)
    else:
        packed = pack([drawn(1, 12) for _ in range(8)], 12)
        task = Distillation("texts", packed, packed, alpha=0.5)
        model = Distilled(student, Decoder(TINY, rngs=nnx.Rngs(1)))
        before = np.log(11)
        kept = jax.tree.map(np.asarray, nnx.state(model.teacher, nnx.Not(nnx.RngState)))
    result = train(model, task, settings, tmp_path, progress=False)
    assert result.last("eval", "loss") < 0.9 * before
    assert result.last("train", "mismatched") == 0
    if objective == "distillation":
        after = nnx.state(model.teacher, nnx.Not(nnx.RngState))
        jax.tree.map(np.testing.assert_array_equal, kept, after)


def test_bad_objectives():
    student = Decoder(TINY, rngs=nnx.Rngs(0))
    pairs = answers(2)
    with pytest.raises(ValueError, match="beta must be positive; got 0"):
        Preferences("pairs", pairs, pairs, 12, student, beta=0)
    with pytest.raises(ValueError, match="both splits need pairs; got 2 for training and 0"):
        Preferences("pairs", pairs, [], 12, student)
    packed = pack([drawn(1, 12)], 12)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]; got 2"):
        Distillation("texts", packed, packed, alpha=2)
    with pytest.raises(ValueError, match="temperature must be positive; got 0"):
        Distillation("texts", packed, packed, temperature=0)
    other = Decoder(dataclasses.replace(TINY, vocab_size=12), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="one vocabulary; they have 11 and 12 tokens"):
        Distilled(student, other)
    noisy = Decoder(dataclasses.replace(TINY, dropout=0.1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"dropout must be 0; got 0\.1"):
        Distilled(student, noisy)


def test_no_step_is_set_in_a_teacher():
    student, teacher = Decoder(TINY, rngs=nnx.Rngs(0)), Decoder(TINY, rngs=nnx.Rngs(1))
    model = Distilled(student, teacher)
    before = teacher.blocks.step
    set_step(model, BDIA(1 / 4))
    assert student.blocks.step == BDIA(1 / 4)
    assert teacher.blocks.step == before == before.network
