"""What γ costs: the loss without it beside that of training, and a warning that it is too much."""

import dataclasses
import logging

import _toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _rows import fast
from flax import nnx

from bdia_jax import Direct
from bdia_jax.data import TextData
from bdia_jax.nn import Decoder, DecoderConfig
from bdia_jax.train import LanguageModelling, TrainSettings, gap, train, training_step
from bdia_jax.train.programs import Programs

PERIOD = np.random.default_rng(0).permutation(40)
TEXT = np.tile(PERIOD, 20).astype(np.int32)
TASK = LanguageModelling(TextData("a period", TEXT, TEXT[:100], 40), 16)
CONFIG = DecoderConfig(vocab_size=40, max_length=16, width=32, depth=12, heads=2, dropout=0.0)
SETTINGS = TrainSettings(
    steps=2, batch_size=8, learning_rate=1e-4, log_every=1, eval_every=2, checkpoint_every=2
)
WARNING = "*** The noise of γ destroys what these weights know ***"


def decoder(**changes):
    return Decoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def pretrained():
    """Weights of the standard network, on the host, that know the text.

    As in large pretrained decoders, one block adds to a feature what a later one takes away.
    """
    settings = dataclasses.replace(SETTINGS, steps=150, learning_rate=3e-3, batch_size=16)
    model = decoder(method="standard")
    bias = model.blocks.stacked.ffn.down.bias
    bias.set_value(bias.get_value().at[2, 0].add(10).at[9, 0].add(-10))
    step, state = training_step(model, TASK, settings)
    for _ in range(settings.steps):
        state, report = step(state)
    assert report.sums.means()["loss"] < 0.5
    return jax.device_get(state.params)


def lines(folder, model, caplog, **changes):
    with caplog.at_level(logging.WARNING, "bdia_jax"):
        result = train(model, TASK, dataclasses.replace(SETTINGS, **changes), folder)
    return [r for r in result.history if r["split"] == "train"]


# ---------------------------------------------------------------------------------------------
# The loss without γ
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", fast(1, [1, 4]))
def test_it_is_that_of_the_network_handed_back(accumulate):
    model = decoder(depth=3)
    settings = dataclasses.replace(SETTINGS, accumulate=accumulate)
    programs = Programs(model, TASK, settings)
    state = programs.first_state(model)
    found = float(programs.network_loss(state))
    data_key, _ = jax.random.split(jax.random.wrap_key_data(state.key))
    batch = TASK.batch(jax.tree.map(jnp.asarray, TASK.arrays()), data_key, 0, settings.batch_size)
    model.eval()
    expected = TASK.evaluate(model, batch).means()["loss"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    _, report = programs.step(state)
    assert abs(float(report.sums.means()["loss"]) - found) > 1e-5


@pytest.mark.slow
def test_lines_have_it_where_training_runs_another_network(tmp_path):
    for method, has in (("bdia", True), ("midpoint", False), ("standard", False)):
        model = _toy.Toy(method=method)
        assert gap.has_gap(model) == has
        result, _ = _toy.run(tmp_path / method, model=model, log_every=1, steps=3, eval_every=3)
        for record in result.history:
            told = has and record["split"] == "train"
            assert ("network_loss" in record) == ("batch_loss" in record) == told


def test_it_is_beside_the_loss_of_the_same_batch(tmp_path):
    """Which is not that of all steps since the line before."""
    often, seldom = (
        _toy.run(tmp_path / str(every), log_every=every, steps=4, eval_every=4)[0].history
        for every in (1, 4)
    )
    each = [record for record in often if record["split"] == "train"]
    (line,) = (record for record in seldom if record["split"] == "train")
    for name in ("batch_loss", "network_loss"):
        assert line[name] == pytest.approx(each[-1][name], rel=1e-5)
    assert each[-1]["batch_loss"] == each[-1]["loss"]
    assert line["loss"] == pytest.approx(np.mean([record["loss"] for record in each]), rel=1e-5)


def test_a_model_of_ones_own_network(tmp_path):
    """Dropout and label smoothing are the same on both sides: γ alone makes the difference."""
    model = _toy.Toy(dropout=0.5)
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "adjoint"):
            module.step, module.adjoint = module.step.network, Direct()
    step, state = training_step(model, _toy.Regression(), _toy.settings())
    model = _toy.Toy(dropout=0.5)
    programs = Programs(model, _toy.Regression(), _toy.settings())
    found = float(programs.network_loss(programs.first_state(model)))
    np.testing.assert_allclose(found, step(state)[1].sums.means()["loss"], rtol=1e-6)


# ---------------------------------------------------------------------------------------------
# The warning
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"gamma": 1 / 2}, True),
        ({"gamma": 1 / 32}, False),
    ],
)
def test_pretrained_weights(changes, warned, pretrained, tmp_path, caplog):
    model = decoder(**changes)
    nnx.update(model, jax.tree.map(jnp.array, pretrained))
    first, second = lines(tmp_path / "run", model, caplog)
    assert caplog.text.count(WARNING) == warned
    assert (WARNING in (tmp_path / "run" / "log.txt").read_text()) == warned
    if warned:
        told = f"{first['loss']:.4g} with γ = 0.5, signs by block; {first['network_loss']:.4g}"
        assert told in caplog.text
        assert 'signs="sample"' in caplog.text
        assert "--gamma auto" in caplog.text
        assert second["loss"] > second["network_loss"]


@pytest.mark.slow
def test_it_is_not_said_again_when_the_run_is_resumed(pretrained, tmp_path, caplog):
    for resume in (False, True):
        caplog.clear()
        model = decoder()
        nnx.update(model, jax.tree.map(jnp.array, pretrained))
        settings = dataclasses.replace(SETTINGS, stop_at=None if resume else 1)
        with caplog.at_level(logging.WARNING, "bdia_jax"):
            train(model, TASK, settings, tmp_path / "run", resume=resume)
        assert (WARNING in caplog.text) == (not resume)


@pytest.mark.slow
def test_fresh_weights_are_not_warned_of(tmp_path):
    """With γ = 1/2, dropout and small batches, over seeds of weights, batches and signs."""
    model = decoder(dropout=0.2, depth=6)
    programs = Programs(model, TASK, dataclasses.replace(SETTINGS, batch_size=2))
    for seed in range(20):
        fresh = Decoder(dataclasses.replace(CONFIG, dropout=0.2, depth=6), rngs=nnx.Rngs(seed))
        state = programs.first_state(fresh)
        state = state._replace(key=jax.random.key_data(jax.random.key(seed)))
        without = float(programs.network_loss(state))
        _, report = programs.step(state)
        loss = float(report.sums.means()["loss"])
        assert not gap.is_far(loss, without, float(report.sums.weight)), seed
        assert abs(loss / without - 1) < 0.05


def test_the_threshold():
    # What was measured on a pretrained decoder: γ = 1/2, 1/4 and 1/8; 6 × 128 tokens.
    assert gap.is_far(9.65, 3.997, 768)
    assert gap.is_far(4.90, 3.997, 768)
    assert not gap.is_far(4.17, 3.997, 768)
    # The same rise may be chance if the batch is small.
    assert not gap.is_far(4.90, 3.997, 4)
    # Weights trained with γ: small losses on both sides.
    assert not gap.is_far(0.08, 0.01, 128)
    # Nothing to say of losses that are not numbers, which are an error, and of empty batches.
    assert not gap.is_far(float("nan"), 1.0, 8)
    assert not gap.is_far(9.0, 1.0, 0)
