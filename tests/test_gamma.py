"""γ chosen by forward passes: what is measured, which step is chosen, and what is told."""

import copy
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bdia_jax
from bdia_jax import (
    BDIA,
    Checkpoint,
    Direct,
    Euler,
    Online,
    choose_gamma,
    nn,
    reversible_scan,
    train,
)
from bdia_jax.data.text import TextData
from bdia_jax.gamma import FAIR, GAMMAS
from bdia_jax.steps import SIGNS

DEPTH, WIDTH = 6, 8


def block(p, x, key):
    return 0.7 * jnp.tanh(x @ p)


def of_a_stack(step, params, x, key):
    y = reversible_scan(block, params, x, key=key, step=step, adjoint=Direct())
    return jnp.mean(jnp.log(jnp.sum(y**2, axis=-1)))


def given(seed):
    rng = np.random.default_rng(seed)
    params, x = rng.normal(size=(DEPTH, WIDTH, WIDTH)), rng.normal(size=(5, WIDTH))
    return jnp.asarray(params, jnp.float32), jnp.asarray(x, jnp.float32), jax.random.key(seed)


@pytest.mark.slow
def test_every_trial_is_the_loss_of_its_step():
    """One program with a traced γ, against a step of its own for each γ and kind of signs."""
    calls, seen = [given(0), given(1)], []
    choice = choose_gamma(
        of_a_stack, calls, gammas=(1 / 4, 1 / 2, 1 / 32), signs=SIGNS, progress=seen.append
    )
    assert choice.trials == tuple(seen)
    tried = [(trial.gamma, trial.signs) for trial in choice.trials]
    assert tried == [(gamma, signs) for gamma in (1 / 2, 1 / 4, 1 / 32) for signs in SIGNS]

    def mean(step):
        return np.mean([of_a_stack(step, *call) for call in calls])

    standard = mean(Euler())
    assert choice.standard == pytest.approx(standard, rel=1e-5)
    losses = [mean(BDIA(*of)) for of in tried]
    # The trial rounds to the grid by floats, half a step of which is 2^-10.
    np.testing.assert_allclose([t.loss for t in choice.trials], losses, rtol=3e-3)
    assert np.ptp(losses) > 0.1, "this test wants losses that differ by γ and signs"
    rises = (np.array([t.loss for t in choice.trials]) - choice.standard) / abs(choice.standard)
    np.testing.assert_allclose([t.rise for t in choice.trials], rises, rtol=1e-6)


def by_table(table):
    """A loss of 2 for the standard network, and of a table for γ and signs."""

    def loss(step, values):
        if isinstance(step, Euler):
            return values[0, -1]
        # How the function measures is its own business, but for the test that is above.
        return values[jnp.int32(-jnp.log2(step.magnitude)) - 1, step.kind]

    values = np.full((len(GAMMAS), len(SIGNS) + 1), 2.0)
    for (gamma, signs), value in table.items():
        values[GAMMAS.index(gamma), SIGNS.index(signs)] = value
    return loss, [(jnp.asarray(values),)]


rises = st.sampled_from([-0.25, 0.0, 0.005, 0.0075, 0.02, 0.25, 4.0, math.nan, math.inf])


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    st.lists(rises, min_size=len(GAMMAS) * len(SIGNS), max_size=len(GAMMAS) * len(SIGNS)),
    st.booleans(),
)
def test_the_fewest_bits_within_the_tolerance_are_chosen(found, exhaustive):
    table = dict(zip([(g, s) for g in GAMMAS for s in SIGNS], found))
    loss, calls = by_table({of: 2 + 2 * rise for of, rise in table.items()})
    choice = choose_gamma(loss, calls, signs=SIGNS, exhaustive=exhaustive, frac_bits=7)
    rise = {of: r if math.isfinite(r) else math.inf for of, r in table.items() if of[1] in FAIR}
    within = [of for of, r in rise.items() if r <= 0.01]
    if within:
        most = max(gamma for gamma, _ in within)
        best = min((of for of in within if of[0] == most), key=rise.get)
        expected = {of for of in within if of[0] == most and rise[of] == rise[best]}
    else:
        expected = {of for of in rise if rise[of] == min(rise.values())}
    assert (choice.step.gamma, choice.step.signs) in expected
    assert choice.step.frac_bits == 7
    assert choice.within == bool(within)
    stop = max((of[0] for of in within), default=0) if not exhaustive else 0
    assert {t.gamma for t in choice.trials} == {gamma for gamma in GAMMAS if gamma >= stop}
    assert ("NOT within 1.0%" in str(choice)) == (not within)


def test_what_is_told():
    loss, calls = by_table(
        {(1 / 2, "block"): 4.826, (1 / 2, "sample"): 3.0, (1 / 4, "block"): 2.1}
        | {(1 / 4, "sample"): 2.012}
    )
    choice = choose_gamma(loss, calls, gammas=(1 / 2, 1 / 4), signs=FAIR, tolerance_bits=1)
    assert choice.step == BDIA(1 / 4, "sample", tolerance_bits=1)
    assert choice.chosen.rise == pytest.approx(0.006, rel=1e-4)
    assert str(choice) == (
        "γ = 1/4, a sign per sample, 2 bits per activation and step: loss 2.012 with, 2 without "
        "(1/2: 4.826)"
    )
    assert choice.table().splitlines() == [
        "| γ | bits | signs: block | signs: sample |",
        "|---|---|---|---|",
        "| 1/2 | 1 | 4.8260 (+141.30%) | 3.0000 (+50.00%) |",
        "| 1/4 | 2 | 2.1000 (+5.00%) | 2.0120 (+0.60%) |",
        "| 0 (standard) | | 2.0000 | |",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arguments": []}, "arguments must hold those of one call at least; got none"),
        ({"gammas": ()}, "gammas must hold one power of two at least; got none"),
        ({"gammas": (0.3,)}, r"2\*\*-m.*got 0.3"),
        ({"signs": ("both",)}, "signs must be of block, sample, minus, plus; got both"),
        ({"signs": ("minus",)}, "signs must include one of block, sample; got minus"),
        ({"tolerance": 0.0}, "tolerance must be positive; got 0.0"),
        ({"tolerance": math.nan}, "tolerance must be positive; got nan"),
        ({"arguments": [(jnp.full((1, 5), jnp.nan),)]}, "must be finite and not 0; got nan"),
        ({"arguments": [(jnp.zeros((1, 5)),)]}, "must be finite and not 0; got 0.0"),
    ],
)
def test_what_is_refused(options, message):
    loss, calls = by_table({})
    with pytest.raises(ValueError, match=message):
        choose_gamma(loss, options.pop("arguments", calls), **options)


def test_a_loss_that_would_take_steps_back_is_refused():
    """γ is traced: the steps of all trials would be wrong, without a word."""

    def loss(step, params, x, key):
        adjoint = Checkpoint() if step == Euler() else Online()
        return jnp.sum(reversible_scan(block, params, x, key=key, step=step, adjoint=adjoint))

    with pytest.raises(TypeError, match=r"give the scan of the loss adjoint=Direct\(\)"):
        choose_gamma(loss, [given(0)])


def test_no_loss_that_is_finite():
    calls = [(params, 1e7 * x, key) for params, x, key in [given(0)]]
    with pytest.raises(ValueError, match=r"leave the range ±2\*\*\(30 - frac.*got frac_bits = 9"):
        choose_gamma(of_a_stack, calls, gammas=(1 / 2,), signs=("block",))


# ---------------------------------------------------------------------------------------------
# Of models and their tasks
# ---------------------------------------------------------------------------------------------


def decoder(**settings):
    config = nn.DecoderConfig(
        vocab_size=13, max_length=8, width=8, depth=3, heads=2, dropout=0.2, **settings
    )
    return nn.Decoder(config, rngs=nnx.Rngs(0))


def task():
    tokens = np.random.default_rng(0).integers(13, size=200).astype(np.int32)
    return train.LanguageModelling(TextData("some", tokens, tokens[:50], 13), 8)


@pytest.mark.slow
def test_a_model_is_measured_on_its_task_and_left_as_it_is():
    model, of = decoder(signs="minus", frac_bits=8, tolerance_bits=1), task()
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    choice = train.choose_gamma(model, of, 4, batches=3, seed=5, gammas=(1 / 2,), signs=FAIR)
    assert model.blocks.step == BDIA(1 / 2, "minus", 8, 1)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.Param), before)
    # The grid is that of the model.
    assert choice.step == BDIA(1 / 2, choice.step.signs, 8, 1)

    data_key, model_key = jax.random.split(jax.random.key(5))
    arrays = jax.device_put(of.arrays())

    def mean(step):
        nn.set_step(model, step, Direct())
        losses = []
        for i in range(3):
            batch = of.batch(arrays, data_key, jnp.int32(i), 4)
            sums = of.loss(model, batch, jax.random.fold_in(model_key, i))
            losses.append(float(sums.means()["loss"]))
        return np.mean(losses)

    assert choice.standard == pytest.approx(mean(Euler()), rel=1e-5)
    for trial in choice.trials:
        assert trial.loss == pytest.approx(mean(BDIA(1 / 2, trial.signs, 8)), rel=3e-3)


def test_a_step_is_set_in_all_stacks_and_in_the_configuration():
    model = decoder()
    nn.set_step(model, BDIA(1 / 16, "sample", 10))
    assert model.blocks.step == BDIA(1 / 16, "sample", 10)
    assert model.config.step() == model.blocks.step
    online = model.blocks.adjoint
    nn.set_step(model, Euler(), bdia_jax.Checkpoint())
    assert (model.blocks.step, model.blocks.adjoint) == (Euler(), bdia_jax.Checkpoint())
    with pytest.raises(ValueError, match="Online"):
        nn.set_step(model, Euler(), online)
    assert model.blocks.adjoint == bdia_jax.Checkpoint()


@pytest.mark.parametrize(
    ("step", "adjoint", "method"),
    [
        (BDIA(1 / 4, "plus", 7, 2), bdia_jax.Online(), "bdia"),
        (BDIA(0.3), bdia_jax.Checkpoint(keep_in="host"), "bdia-checkpoint"),
        (BDIA(1 / 2, frac_bits=None), Direct(), "bdia-direct"),
        (bdia_jax.Midpoint(8, 1), bdia_jax.Online(narrow_cotangents=True), "midpoint"),
        (Euler(), Direct(), "standard"),
        (Euler(6), bdia_jax.Checkpoint(), "standard-checkpoint"),
    ],
)
def test_the_configuration_makes_the_step_that_was_set(step, adjoint, method):
    model = decoder(keep_in="host", tolerance_bits=1)
    nn.set_step(model, step, adjoint)
    assert model.config.method == method
    assert (model.config.step(), model.config.adjoint()) == (step, adjoint)


def test_a_step_that_does_not_fit_changes_nothing():
    model = decoder()
    step, adjoint, config = model.blocks.step, model.blocks.adjoint, model.config
    with pytest.raises(ValueError, match="power of two"):
        nn.set_step(model, BDIA(0.3))
    assert (model.blocks.step, model.blocks.adjoint, model.config) == (step, adjoint, config)


def test_stacks_on_several_grids_have_no_common_choice():
    class Two(nnx.Module):
        def __init__(self):
            self.parts = nnx.List([decoder(frac_bits=7), decoder(frac_bits=9)])

    with pytest.raises(ValueError, match=r"one grid.*\(7, 0\), \(9, 0\)"):
        nn.choose_gamma(Two(), lambda model: jnp.float32(1), [()])


def test_what_could_not_be_chosen_is_refused_before_it_is_measured():
    def never(*arguments):
        raise AssertionError("it was measured")

    with pytest.raises(ValueError, match="tolerance_bits must lie in"):
        choose_gamma(never, [()], gammas=(2.0**-16,), tolerance_bits=1)


@pytest.mark.slow
def test_two_stacks_of_a_model_are_measured_together():
    config = nn.EncoderDecoderConfig(
        source_vocab=9, max_length=8, width=8, encoder_depth=2, decoder_depth=2, heads=2, dropout=0
    )
    model = nn.EncoderDecoder(config, rngs=nnx.Rngs(0))
    tokens = jnp.ones((2, 5), jnp.int32)

    def loss(model, tokens, key):
        return jnp.sum(model(tokens, tokens, key=key) ** 2)

    calls = [(tokens, jax.random.key(3))]
    choice = nn.choose_gamma(model, loss, calls, gammas=(1 / 2,), signs=FAIR)
    for trial in choice.trials:
        other = copy.deepcopy(model)
        nn.set_step(other, BDIA(1 / 2, trial.signs), Direct())
        assert trial.loss == pytest.approx(float(loss(other, *calls[0])), rel=3e-3)


def test_a_model_without_bdia():
    with pytest.raises(ValueError, match="no stack that trains by BDIA"):
        train.choose_gamma(decoder(method="standard"), task(), 4)
