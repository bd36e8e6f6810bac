"""Optimizers and schedules by name: optax's own, of each block by itself; what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bdia_jax.train import TrainSettings, make_optimizer
from bdia_jax.train.blockwise import Blockwise
from bdia_jax.train.norms import clip_by_global_norm, global_norm
from bdia_jax.train.optimizers import OPTIMIZERS, make_blockwise
from bdia_jax.train.schedules import make_schedule
from bdia_jax.train.wording import about_decay

RATE = optax.constant_schedule(1e-2)


class Two(nnx.Module):
    """What models are made of: two stacks of other depths, and what is in neither."""

    def __init__(self):
        key = iter(jax.random.split(jax.random.key(0), 9))

        def normal(*shape):
            return nnx.Param(jax.random.normal(next(key), shape))

        self.embedding, self.bias = normal(7, 6), normal(6)
        self.blocks = nnx.Dict(
            stacked=nnx.Dict(
                kernel=normal(3, 6, 130), bias=normal(3, 130), conv=normal(3, 2, 2, 4, 6)
            )
        )
        self.others = nnx.Dict(stacked=nnx.Dict(kernel=normal(2, 130, 140)))


PARAMS = nnx.state(Two(), nnx.Param)
GRADS = jax.tree.map(lambda p: jnp.cos(3 * p), PARAMS)
DECAY = 0.1


def after(optimizer, params, grads, steps=2):
    @jax.jit
    def steps_taken(params, grads):
        state = optimizer.init(params)
        for _ in range(steps):
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    return steps_taken(params, grads)


def plain(state):
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def of_optax(name):
    """A factory of the optimizer as optax has it, of one array, for blocks and for the rest."""
    mask = {"mask": lambda params: jax.tree.map(lambda p: p.ndim > 1, params)}
    adamw = optax.adamw(RATE, weight_decay=DECAY, **mask)
    if name == "muon":
        return optax.contrib.muon(RATE, weight_decay=DECAY, consistent_rms=0.2), adamw
    both = {
        "adamw": adamw,
        "lion": optax.lion(RATE, weight_decay=DECAY, **mask),
        "adafactor": optax.chain(
            # With the sign and the decay where optax.adafactor does not put them.
            optax.adafactor(None, multiply_by_parameter_scale=False),
            optax.scale(-1),
            optax.add_decayed_weights(DECAY, **mask),
            optax.scale_by_learning_rate(RATE),
        ),
    }[name]
    return both, both


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor"])
def test_a_step_is_optax_s_of_each_block(name):
    found = plain(after(make_optimizer(name, RATE, weight_decay=DECAY), PARAMS, GRADS))
    params, grads = plain(PARAMS), plain(GRADS)
    of_block, of_others = of_optax(name)
    for path, p in params.items():
        if name == "muon" and path.endswith("conv"):
            continue
        if "stacked" in path:
            blocks = [after(of_block, *leaves) for leaves in zip(p, grads[path], strict=True)]
            expected = jnp.stack(blocks)
        else:
            expected = after(of_others, p, grads[path])
        np.testing.assert_allclose(found[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)


def test_the_norm_of_bfloat16_is_summed_in_float32():
    """In bfloat16, what is small beside the largest array would not count."""
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(64, 64)) * (20 if i == 3 else 1) for i in range(24)]
    grads = [jnp.asarray(v, jnp.bfloat16) for v in values]
    expected = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in grads))
    np.testing.assert_allclose(global_norm(grads), expected, rtol=1e-5)
    clip = clip_by_global_norm(1.0)
    clipped, _ = clip.update(grads, clip.init(grads))
    assert {c.dtype for c in clipped} == {grads[0].dtype}
    for c, g in zip(clipped, grads, strict=True):
        # Rounded once.
        np.testing.assert_allclose(np.float64(c), np.float64(g) / expected, rtol=2**-8)


def test_muon_takes_a_convolution_as_a_matrix():
    found = plain(after(make_optimizer("muon", RATE), PARAMS, GRADS, 1))["blocks.stacked.conv"]
    params, grads = (plain(tree)["blocks.stacked.conv"] for tree in (PARAMS, GRADS))
    for i in range(3):
        flat = (a[i].reshape(16, 6) for a in (params, grads))
        expected = after(optax.contrib.muon(RATE, consistent_rms=0.2), *flat, 1)
        np.testing.assert_allclose(found[i].reshape(16, 6), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n, recipe in OPTIMIZERS.items() if recipe.decays])
@pytest.mark.parametrize("decayed", ["matrices", "all"])
@pytest.mark.parametrize("by_block", [False, True])
def test_what_decays(name, decayed, by_block):
    """Without a gradient a weight becomes 1 - rate × decay times itself, or stays."""
    make = make_blockwise if by_block else make_optimizer
    optimizer = make(name, RATE, weight_decay=DECAY, decayed=decayed)
    found = plain(after(optimizer, PARAMS, jax.tree.map(jnp.zeros_like, PARAMS), 1))
    for path, p in plain(PARAMS).items():
        decays = decayed == "all" or not path.endswith("bias")
        factor = 1 - 1e-2 * DECAY if decays else 1.0
        np.testing.assert_allclose(found[path], factor * p, rtol=1e-6, err_msg=path)


def test_integers_of_each_weight_are_refused():
    """They would be taken for a count that all blocks share."""
    levels = optax.stateless(lambda updates, params: updates)._replace(
        init=lambda params: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.int8), params)
    )
    with pytest.raises(TypeError, match=r"must be floating-point numbers; got int8\["):
        Blockwise(levels, levels).init(PARAMS)


def test_what_decays_is_said():
    settings = TrainSettings(weight_decay=0.01)
    decaying = sum(p.size for path, p in plain(PARAMS).items() if not path.endswith("bias"))
    share = decaying / (decaying + 6 + 3 * 130)
    assert f"weight decay 0.01 of {share:.2%} of the par" in about_decay(PARAMS, settings)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("cosine", [0, 0.5, 1, 0.5, 0, 0]),
        ("linear", [0, 0.5, 1, 0.5, 0, 0]),
        ("wsd", [0, 0.5, 1, 1, 0, 0]),
    ],
)
def test_schedules(name, expected):
    schedule = make_schedule(name, 1.0, 10, 2, 4 if name == "wsd" else 0)
    np.testing.assert_allclose([schedule(i) for i in (0, 1, 2, 6, 10, 11)], expected, atol=1e-6)


def test_the_cooldown():
    settings = TrainSettings(steps=10, schedule="wsd", learning_rate=1.0, warmup_steps=2)
    assert settings.cooldown == 2
    values = [settings.make_schedule()(i) for i in range(11)]
    np.testing.assert_allclose(values, [0, 0.5, *[1] * 7, 0.5, 0], atol=1e-6)
    TrainSettings(steps=10, schedule="wsd", warmup_steps=2, cooldown_steps=8)
    for wrong in (
        {"cooldown_steps": 9, "schedule": "wsd"},
        {"cooldown_steps": 3},
        {"cooldown_steps": 0, "schedule": "wsd"},
    ):
        with pytest.raises(ValueError, match="cooldown_steps"):
            TrainSettings(steps=10, warmup_steps=2, **wrong)
    with pytest.raises(ValueError, match="decayed must be one of matrices, all; got 'some'"):
        TrainSettings(decayed="some")  # type: ignore[arg-type]
