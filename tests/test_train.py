"""The training loop: what it computes, what it writes, what it refuses, and how it continues."""

import dataclasses
import json
import logging

import _toy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bdia_jax import train as training
from bdia_jax.data import ImageData
from bdia_jax.nn import freeze
from bdia_jax.train import (
    CheckpointError,
    ImageClassification,
    InexactInverseError,
    NonFiniteError,
    ResizedImages,
    State,
    TrainSettings,
    evaluate,
    make_optimizer,
    plot_curves,
    read_metrics,
)
from bdia_jax.train.checkpoints import Checkpoints, _fingerprint
from bdia_jax.train.programs import Programs


def assert_same(a, b):
    a, b = _toy.parameters(a), _toy.parameters(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def steps_in(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run in one go: folder, result, model, task."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    task = _toy.Regression()
    result, model = _toy.run(folder, task=task)
    return folder, result, model, task


# ---------------------------------------------------------------------------------------------
# What a run leaves
# ---------------------------------------------------------------------------------------------


def test_result_and_files(whole):
    folder, result, _, _ = whole
    assert (result.step, len(result.history)) == (8, 6)
    assert result.history == read_metrics(folder) == read_metrics(folder / "metrics.jsonl")
    evals = [r["loss"] for r in result.history if r["split"] == "eval"]
    assert result.best == min(evals)
    assert result.last("eval", "loss") == evals[-1]
    assert result.seconds_per_step > 0
    assert steps_in(folder) == [4, 8]
    assert any((folder / "tensorboard").iterdir())
    line = next(r for r in result.history if r["split"] == "train")
    assert line.keys() == {
        "step",
        "split",
        "seconds",
        "loss",
        "absolute",
        "batch_loss",
        "network_loss",
        "grad_norm",
        "learning_rate",
        "mismatched",
        "corrected",
        "per_second",
    }
    assert line["mismatched"] == 0
    assert line["per_second"] > 0
    with pytest.raises(KeyError, match="eval perplexity"):
        result.last("eval", "perplexity")


@pytest.mark.slow
def test_it_learns(tmp_path):
    result, _ = _toy.run(tmp_path / "run", steps=60, eval_every=60, learning_rate=3e-2)
    first = next(r["loss"] for r in result.history if r["split"] == "train")
    assert result.last("eval", "loss") < 0.3 * first


def test_traced_once_for_checking_and_running(whole):
    # Once for the step, once for the loss without γ; evaluation does not draw batches.
    assert whole[3].traces == 2


def test_state_is_updated_in_place(tmp_path):
    model = _toy.Toy(dropout=0.0)
    programs = Programs(model, _toy.Regression(), _toy.settings())
    state = programs.first_state(model)
    new, _ = programs.step(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_clipping_bounds_the_step():
    optimizer = make_optimizer("sgd", optax.constant_schedule(1.0), clip_norm=1e-3)
    gradient = jnp.full(4, 100.0)
    updates, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    np.testing.assert_allclose(jnp.linalg.norm(updates), 1e-3, rtol=1e-5)


@pytest.mark.slow
def test_an_optimizer_of_ones_own(tmp_path):
    result, _ = _toy.run(tmp_path / "run", own_optimizer=optax.lion(1e-3))
    assert "learning_rate" not in result.history[0]
    assert json.loads((tmp_path / "run/settings.json").read_text())["train"]["optimizer"] == (
        "one given to train()"
    )


def test_curves(whole, tmp_path):
    folder, result, _, _ = whole
    path = tmp_path / "new" / "curves.png"
    plot_curves({"a": folder, "b": result.history}, path, metric="loss")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_line_cut_short_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    assert read_metrics(tmp_path / "elsewhere") == []


# ---------------------------------------------------------------------------------------------
# Continuing
# ---------------------------------------------------------------------------------------------


def test_stopped_and_resumed_is_the_same_run(whole, tmp_path):
    folder, result, model, _ = whole
    half, _ = _toy.run(tmp_path / "run", stop_at=4)
    assert half.step == 4
    # A model initialized otherwise: all comes from the checkpoint.
    resumed, other = _toy.run(tmp_path / "run", model=_toy.Toy(seed=5), resume=True)
    assert_same(model, other)
    assert _toy.lines(tmp_path / "run") == _toy.lines(folder)
    assert (resumed.step, resumed.best) == (8, result.best)


@pytest.mark.slow
def test_lines_after_the_checkpoint_are_written_again(whole, tmp_path):
    folder = tmp_path / "run"
    _toy.run(folder, stop_at=4)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "split": "train", "seconds": 1.0, "loss": 7.0}\n{"step": 7, "sp')
    _toy.run(folder, resume=True)
    assert _toy.lines(folder) == _toy.lines(whole[0])


def test_resuming_a_finished_run(whole):
    folder, result, model, _ = whole
    again, other = _toy.run(folder, resume=True)
    assert_same(model, other)
    assert (again.step, again.last("eval", "loss")) == (8, result.last("eval", "loss"))


def test_resume_in_an_empty_folder_begins(tmp_path):
    (tmp_path / "run").mkdir()
    # What a process leaves that was killed at its very start.
    (tmp_path / "run" / "settings.json.tmp").write_text('{"tra')
    assert _toy.run(tmp_path / "run", resume=True, steps=1)[0].step == 1


@pytest.mark.slow
def test_the_best_is_kept_over_a_resumption(tmp_path):
    # The rate is such that the loss rises: the first checkpoint stays the best.
    changes = {
        "schedule": "constant",
        "optimizer": "sgd",
        "learning_rate": 0.7,
        "clip_norm": 5.0,
        "keep_last": 1,
        "eval_every": 1,
        "checkpoint_every": 1,
        "log_every": 1,
    }
    folder = tmp_path / "run"
    _toy.run(folder, stop_at=3, **changes)
    result, _ = _toy.run(folder, resume=True, **changes)
    evals = {r["step"]: r["loss"] for r in result.history if r["split"] == "eval"}
    best = min(evals, key=evals.get)
    assert steps_in(folder) == sorted({best, 8})
    assert best <= 3, "this test wants a best before the resumption"


@pytest.mark.slow
def test_checkpoints_between_evaluations_are_not_the_best(tmp_path):
    folder = tmp_path / "run"
    result, _ = _toy.run(folder, steps=6, eval_every=2, checkpoint_every=1, keep_last=1)
    evals = {r["step"]: r["loss"] for r in result.history if r["split"] == "eval"}
    assert steps_in(folder) == sorted({min(evals, key=evals.get), 6})


@pytest.mark.slow
def test_harmless_settings_may_change(tmp_path):
    folder = tmp_path / "run"
    _toy.run(folder, schedule="constant", steps=2)
    result, _ = _toy.run(
        folder, schedule="constant", steps=4, log_every=1, keep_last=3, resume=True
    )
    assert result.step == 4
    with pytest.raises(ValueError, match="at step 4; got steps=3"):
        _toy.run(folder, schedule="constant", steps=3, resume=True)


# ---------------------------------------------------------------------------------------------
# Refusals, before anything is compiled
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_compiling(monkeypatch):
    def step(self, state):
        raise AssertionError("a step was run")

    monkeypatch.setattr(Programs, "step", step)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be an int >= 1, or None; got 0"),
        ({"steps": 1.5}, "steps must be an int"),
        ({"steps": True}, "got True"),
        ({"batch_size": -1}, "batch_size"),
        ({"accumulate": 3}, "accumulate must divide batch_size = 8; got 3"),
        ({"optimizer": "adan"}, "optimizer must be one of adam, .*'adan'"),
        ({"schedule": "step"}, "schedule must be one of constant, cosine, .*; got 'step'"),
        ({"learning_rate": 0.0}, "learning_rate must be positive; got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite"),
        ({"learning_rate": "1e-3"}, "got '1e-3'"),
        ({"warmup_steps": -1}, "warmup_steps must be an int >= 0; got -1"),
        ({"warmup_steps": 0.5}, "warmup_steps must be an int"),
        ({"eval_batch_size": 0}, "eval_batch_size must be an int >= 1, or None; got 0"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and 0 or positive; got -0.1"),
        (
            {"weight_decay": 0.1, "optimizer": "sgd"},
            "weight_decay needs an optimizer of adamw, lion, .*; got 0.1 with 'sgd'",
        ),
        ({"clip_norm": 0.0}, "clip_norm must be positive, or None; got 0.0"),
        ({"seed": "x"}, "seed must be an int; got 'x'"),
        ({"log_every": 0}, "log_every"),
        ({"eval_every": 0}, "eval_every"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"keep_last": 0}, "keep_last"),
        ({"patience": 0}, "patience must be an int >= 1, or None; got 0"),
        ({"wandb": " "}, "wandb must be the name of a project, or None; got ' '"),
        ({"wandb": True}, "wandb must be .* got True"),
        ({"stop_at": 0}, "stop_at"),
        ({"update_in_backward": "no"}, "update_in_backward must be True or False; got 'no'"),
        ({"mesh": 4}, "mesh must look like .*; got 4"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        _toy.settings(**changes)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=4", "of 4 devices; there are 8"),
        ("data=0,fsdp=8", "sizes of a mesh must be 1 or more"),
        ("tensor=8", "must look like \"data=4,fsdp=2\"; got 'tensor=8'"),
        ("data=4,data=2", "must look like"),
        ("data:8", "must look like"),
        ("data=4,fsdp=2", "8 devices .* must divide a micro-batch of 4 samples"),
    ],
)
def test_bad_meshes(mesh, message, tmp_path, no_compiling):
    with pytest.raises(ValueError, match=message):
        _toy.run(tmp_path / "run", mesh=mesh, accumulate=2)
    assert not (tmp_path / "run").exists()


class BestOfNone(_toy.Regression):
    best = "-perplexity"


class Noisy(_toy.Toy):
    """Draws from a stream of its own, outside of the blocks."""

    def __init__(self):
        super().__init__()
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x, key=None):
        return super().__call__(self.dropout(x), key)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": BestOfNone()}, "one of its metrics, loss, absolute, .*got '-perplexity'"),
        ({"model": Noisy()}, "must be a pure function.*nnx.Dropout"),
    ],
)
def test_what_tracing_tells(given, message, tmp_path, no_compiling):
    with pytest.raises(ValueError, match=message):
        _toy.run(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


class Distilled(nnx.Module):
    """A student, and a teacher that begins with the same arrays, and stays as it is."""

    def __init__(self):
        self.student = _toy.Toy()
        self.teacher = nnx.clone(self.student)
        freeze(self.teacher)

    def __call__(self, x, key=None):
        return self.student(x, key) + 0 * self.teacher(x, key)


def test_a_trained_array_that_is_also_a_frozen_one(tmp_path):
    model = Distilled()
    before = np.array(model.teacher.head.kernel[...])
    np.testing.assert_array_equal(before, model.student.head.kernel[...])
    _toy.run(tmp_path / "run", model=model, steps=2)
    np.testing.assert_array_equal(before, model.teacher.head.kernel[...])
    assert np.abs(before - model.student.head.kernel[...]).max() > 1e-4


class Logits(nnx.Module):
    """The same for every image."""

    def __call__(self, images, key=None):
        return jnp.zeros((len(images), 2)) + jnp.array([1.0, 0.0])


@pytest.mark.parametrize("kind", [np.uint8, np.uint32, np.int8, np.int64])
def test_labels_of_any_integers(kind):
    """What fills up the last batch of an evaluation counts for nothing."""
    images, labels = np.zeros((10, 4, 4, 1), np.uint8), (np.arange(10) % 2).astype(kind)
    data = ImageData("some", images, labels, images, labels, 2)
    for task in (
        ImageClassification(data, augment=False),
        ResizedImages(data, 4, np.zeros(1), np.ones(1), augmentation=None),
    ):
        found = evaluate(Logits(), task, eval_batch_size=8)
        assert found["accuracy"] == 0.5
        np.testing.assert_allclose(found["loss"], np.log(1 + np.exp(1)) - 0.5, rtol=1e-6)


def test_a_run_is_never_overwritten(whole, no_compiling):
    with pytest.raises(FileExistsError, match=r"there is a run in .*resume"):
        _toy.run(whole[0])


def test_a_folder_of_something_else(tmp_path, no_compiling):
    (tmp_path / "thesis.tex").write_text("...")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="not empty, and holds no run"):
            _toy.run(tmp_path, resume=resume)


def test_a_folder_that_cannot_be_written(tmp_path, no_compiling):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        _toy.run(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        _toy.run(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 16}, "train.batch_size: 8 there, 16 now"),
        ({"seed": 1, "learning_rate": 1.0}, "train.learning_rate: 0.01 there, 1.0 now; train.seed"),
        ({"steps": 20}, "train.steps: 8 there, 20 now"),
        (
            {"own_optimizer": optax.sgd(0.1)},
            "train.optimizer: 'adamw' there, 'one given to train",
        ),
        ({"about": {"model": {"depth": 3}}}, "model: 'nothing' there, {'depth': 3} now"),
    ],
)
def test_another_run(whole, changes, message, no_compiling):
    before = {p: p.read_bytes() for p in whole[0].glob("*.json*")}
    with pytest.raises(ValueError, match=message):
        _toy.run(whole[0], resume=True, **changes)
    assert before == {p: p.read_bytes() for p in whole[0].glob("*.json*")}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: _toy.Toy(width=12),
            r"params.head.kernel: float32\[16, 1\] there, float32\[12, 1\] now",
        ),
        (
            lambda: _toy.Toy(depth=2),
            r"optimizer: params.stack.stacked.inner.bias: float32\[3, 16\] there, float32\[2, 1",
        ),
    ],
)
def test_a_checkpoint_of_another_model(whole, model, message, no_compiling):
    with pytest.raises(ValueError, match=message):
        _toy.run(whole[0], model=model(), resume=True)
    assert steps_in(whole[0]) == [4, 8]


def test_settings_that_cannot_be_read(tmp_path, no_compiling):
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json can't be read"):
        _toy.run(tmp_path, resume=True)


@pytest.mark.slow
def test_a_run_from_before_there_was_a_setting_continues(tmp_path):
    _toy.run(tmp_path / "run", stop_at=2)
    path = tmp_path / "run" / "settings.json"
    described = json.loads(path.read_text())
    del described["train"]["clip_by"]
    path.write_text(json.dumps(described))
    result, _ = _toy.run(tmp_path / "run", resume=True)
    assert result.step == _toy.SETTINGS["steps"]


def test_a_model_that_does_not_fit_leaves_no_folder(tmp_path, no_compiling):
    class Wrong(_toy.Regression):
        def arrays(self):
            return {"x": np.zeros((64, 5), np.float32), "y": np.zeros(64, np.float32)}

    with pytest.raises(TypeError):
        _toy.run(tmp_path / "run", task=Wrong())
    assert not (tmp_path / "run").exists()


@pytest.mark.unchecked
def test_image_tasks_refuse():
    images, labels = np.zeros((4, 2, 2, 1), np.uint8), np.zeros(4, np.int32)
    data = ImageData("x", images, labels, images, labels, 2)
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\); got 1.0"):
        ImageClassification(data, label_smoothing=1.0)
    with pytest.raises(ValueError, match="eval_batch_size must be at least 1; got 0"):
        ImageClassification(data, eval_batch_size=0)
    with pytest.raises(ValueError, match="got 4 for training and 0 for evaluation"):
        ImageClassification(dataclasses.replace(data, eval_labels=labels[:0]))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 5, 8])
def test_image_evaluation_weighs_every_sample_once(size):
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    labels = np.array([0, 1, 0, 1, 0], np.int32)
    task = ImageClassification(ImageData("x", images, labels, images, labels, 2))
    arrays = jax.tree.map(jnp.asarray, task.arrays())

    def model(x, key=None):  # says 1 for every image
        return jnp.stack([jnp.zeros(len(x)), jnp.ones(len(x))], -1)

    batches = [task.eval_batch(arrays, jnp.int32(i), size) for i in range(-(-5 // size))]
    sums = [task.evaluate(model, batch) for batch in batches]
    assert sum(float(s.metrics["accuracy"]) for s in sums) == 2
    assert sum(float(s.weight) for s in sums) == 5
    loss = 3 * np.log1p(np.e) + 2 * np.log1p(1 / np.e)
    assert sum(float(s.loss) for s in sums) == pytest.approx(loss, rel=1e-6)


# ---------------------------------------------------------------------------------------------
# Numbers that go wrong
# ---------------------------------------------------------------------------------------------


def test_a_nan_loss_stops_the_run(tmp_path):
    # Three steps are taken before it, and what follows in the same interval changes nothing.
    model, task = _toy.Toy(), _toy.Regression(poison=3)
    changes = {"log_every": 8, "eval_every": 8, "checkpoint_every": 2}
    with pytest.raises(NonFiniteError, match=r"step 4: the loss is nan.*learning rate.*2\*\*"):
        _toy.run(tmp_path / "run", model=model, task=task, **changes)
    assert steps_in(tmp_path / "run") == [2]
    _, before = _toy.run(tmp_path / "good", stop_at=3, **changes)
    assert_same(model, before)


def test_a_wrong_step_is_not_counted():
    model = _toy.Toy(dropout=0.0)
    programs = Programs(model, _toy.Regression(poison=0), _toy.settings())
    state = programs.first_state(model)
    before = jax.device_get(state)
    for _ in range(2):
        state, _ = programs.step(state)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_nan_in_evaluation_stops_the_run(tmp_path):
    with pytest.raises(NonFiniteError, match="step 4: loss is nan in evaluation"):
        _toy.run(tmp_path / "run", task=_toy.Regression(evaluation_poison=True))
    assert steps_in(tmp_path / "run") == []


def test_a_gradient_that_overflows(tmp_path):
    class Steep(_toy.Regression):
        def loss(self, model, batch, key):
            sums = super().loss(model, batch, key)
            # The square root of 0: value 0, derivative infinite.
            zero = sums.loss - jax.lax.stop_gradient(sums.loss)
            return sums._replace(loss=sums.loss + jnp.sqrt(zero))

    with pytest.raises(NonFiniteError, match="step 1: the gradient is not finite, the loss is"):
        _toy.run(tmp_path / "run", task=Steep())


class Unsteady(_toy.Block):
    """Computes something else every time, as a device that is not deterministic."""

    calls = 0

    def __call__(self, x):
        def noise(x):
            Unsteady.calls += 1
            return np.full((), 0.25 * (Unsteady.calls % 7), np.float32)

        shape = jax.ShapeDtypeStruct((), jnp.float32)
        drawn = jax.pure_callback(noise, shape, jax.lax.stop_gradient(x[0, 0]))
        return super().__call__(x) + jax.lax.stop_gradient(drawn)


def test_an_inverse_that_is_not_exact_stops_the_run(tmp_path):
    model = _toy.Toy(block=Unsteady)
    before = {name: value.copy() for name, value in _toy.parameters(model).items()}
    with pytest.raises(
        InexactInverseError,
        match=r"step 1: .* through stack, the step of block \d was not undone .* for 8 samples"
        r".*tolerance_bits=1.*xla_gpu_deterministic_ops",
    ):
        _toy.run(tmp_path / "run", model=model)
    assert steps_in(tmp_path / "run") == []
    for name, value in _toy.parameters(model).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.slow
def test_the_first_step_says_whether_blocks_are_reversible(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "bdia_jax"):
        _toy.run(tmp_path / "run", steps=1)
    assert "reversible blocks: 3; in the first step 0 states mismatched" in caplog.text


# ---------------------------------------------------------------------------------------------
# Many devices (eight virtual ones: conftest.py)
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_mesh_gives_the_losses_of_one_device(whole, tmp_path):
    result, model = _toy.run(tmp_path / "run", mesh="data=4,fsdp=2")
    for ours, theirs in zip(result.history, whole[1].history, strict=True):
        # Measured: 6e-8. One rounding that falls to the other side of the grid is 1e-4.
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)
        assert ours.get("mismatched", 0) == 0
    kernel = model.stack.stacked.inner.kernel.get_value()
    assert len(kernel.sharding.device_set) == 8
    assert kernel.addressable_shards[0].data.shape in {(3, 8, 16), (3, 16, 8)}


@pytest.mark.slow
def test_a_mesh_resumes_what_another_wrote(whole, tmp_path):
    _toy.run(tmp_path / "run", mesh="data=4,fsdp=2", stop_at=4)
    _, model = _toy.run(tmp_path / "run", mesh="fsdp=8", resume=True, stop_at=6)
    _, model = _toy.run(tmp_path / "run", resume=True)
    ours, theirs = _toy.parameters(model), _toy.parameters(whole[2])
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-3)


def test_the_rule_of_the_shards():
    mesh = training.mesh.parse_mesh("data=4,fsdp=2")
    shapes = {"stacked": (2, 6, 4), "bias": (2, 6), "odd": (2, 3, 5), "vector": (8,), "scalar": ()}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = {n: tuple(s.spec) for n, s in training.mesh.state_shardings(mesh, tree).items()}
    assert specs == {
        "stacked": (None, "fsdp", None),
        "bias": (None, "fsdp"),
        "odd": (),
        "vector": (),
        "scalar": (),
    }
    assert training.mesh.parse_mesh(None) is training.mesh.parse_mesh("") is None


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


def test_the_fingerprint_sees_every_bit_and_no_mesh():
    tree = {
        "a": jax.random.normal(jax.random.key(0), (16, 8)),
        "b": jnp.arange(8, dtype=jnp.bfloat16),
        "c": jnp.int32(3),
        "d": jnp.ones(3, bool),
        "e": jnp.zeros(2, jnp.uint8),
    }
    whole = int(_fingerprint(tree))
    mesh = training.mesh.parse_mesh("data=4,fsdp=2")
    sharded = jax.device_put(tree, training.mesh.state_shardings(mesh, tree))
    assert int(_fingerprint(sharded)) == whole
    for name, leaf in tree.items():
        content = bytearray(np.asarray(leaf).tobytes())
        content[0] ^= 1
        host = np.frombuffer(content, leaf.dtype).reshape(leaf.shape)
        assert int(_fingerprint(tree | {name: jnp.asarray(host)})) != whole, name
    swapped = tree | {"a": tree["a"].at[0].set(tree["a"][1]).at[1].set(tree["a"][0])}
    assert int(_fingerprint(swapped)) != whole


def test_a_step_is_not_saved_twice(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", 2, "accuracy")
    state = State(jnp.int32(5), {"a": jnp.arange(3.0)}, (), jnp.zeros(2, jnp.uint32))
    checkpoints.save(5, state, {}, {"accuracy": 0.5})
    with pytest.raises(CheckpointError, match="step 5 was not saved"):
        checkpoints.save(5, state, {}, {})
    checkpoints.close()


def test_settings_have_defaults_that_fit():
    assert TrainSettings().stop_at is None
