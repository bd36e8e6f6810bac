"""The folder of a run: what is refused before anything takes long, whose run it is, and its log."""

import collections
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys

import _toy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bdia_jax.data import TextData
from bdia_jax.nn import Decoder, DecoderConfig, add_lora, quantize_base
from bdia_jax.train import (
    LanguageModelling,
    TrainSettings,
    check_batch_size,
    check_run_folder,
    eval_batch_size,
    read_metrics,
    run_folder,
    train,
)
from bdia_jax.train.run_folder import check_room, fingerprint


def test_a_folder_that_is_free(tmp_path):
    assert check_run_folder(tmp_path) == tmp_path
    new = tmp_path / "a" / "b"
    assert check_run_folder(str(new)) == new
    assert not new.exists()
    # What a process leaves that was killed at its very start.
    (tmp_path / "settings.json.tmp").write_text('{"tra')
    # And one that was to read its data as it goes.
    (tmp_path / "index" / "0").mkdir(parents=True)
    check_run_folder(tmp_path)
    assert check_run_folder("~/no such folder").is_absolute()


def test_a_folder_that_is_not(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(NotADirectoryError, match=r"must be a folder; .*file is a file"):
            check_run_folder(path)
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="not empty, and holds no run"):
            check_run_folder(tmp_path, resume)
    run = tmp_path / "run"
    run.mkdir()
    (run / "settings.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"there is a run in .*--resume"):
        check_run_folder(run)
    assert check_run_folder(run, resume=True) == run


def test_a_disk_without_room(tmp_path, monkeypatch, caplog):
    """Nothing is trained that could not be kept."""
    state = {"a": jax.ShapeDtypeStruct((10, 100), jnp.float32), "b": jnp.zeros(500, jnp.bfloat16)}

    total, used, _ = shutil.disk_usage(tmp_path)

    def free(size):
        monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: Usage(total, used, size))

    free(4999)
    with pytest.raises(ValueError, match=r"takes up to 0\.0 GB, and .* 0\.0 GB free: make room"):
        check_room(tmp_path / "new" / "run", state, 2)
    free(5000)
    check_room(tmp_path, state, 2)
    assert "4 may be there at a time (keep_last = 2)" in caplog.text
    caplog.clear()
    free(20_000)
    check_room(tmp_path, state, 2)
    assert not caplog.text


def test_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("")
    assert str(check_run_folder("new/run")) == "new/run"
    with pytest.raises(FileExistsError, match="not empty"):
        check_run_folder("taken")


Usage = collections.namedtuple("Usage", "total used free")
"""What ``shutil.disk_usage`` returns."""

# ---------------------------------------------------------------------------------------------
# The data belong to the run
# ---------------------------------------------------------------------------------------------


class Edited(_toy.Regression):
    def arrays(self):
        arrays = super().arrays()
        arrays["y"][17] += 1e-3
        return arrays


@pytest.mark.slow
def test_other_data_under_the_same_name(tmp_path):
    folder = tmp_path / "run"
    _toy.run(folder, steps=2, stop_at=1)
    before = {p: p.read_bytes() for p in folder.glob("*.json*")}
    with pytest.raises(
        ValueError,
        match=r"another one: data.sha256: '\w{64}' there, '\w{64}' now "
        r"\(the data named toy are not those it was started with\)",
    ):
        _toy.run(folder, steps=2, task=Edited(), resume=True)
    assert before == {p: p.read_bytes() for p in folder.glob("*.json*")}
    result, _ = _toy.run(folder, steps=2, resume=True)
    assert result.step == 2


@pytest.mark.slow
def test_other_weights_that_are_not_trained(tmp_path):
    """Low-rank updates of another network; and of the same one in few bits."""
    folder = tmp_path / "run"
    settings = TrainSettings(
        steps=2, batch_size=2, log_every=1, eval_every=2, checkpoint_every=1, warmup_steps=0
    )
    tokens = np.arange(100, dtype=np.int32) % 20
    task = LanguageModelling(TextData("numbers", tokens, tokens, 20), 8)
    config = DecoderConfig(vocab_size=20, max_length=8, width=16, depth=2, heads=2)

    def run(seed, few_bits=False, **changes):
        model = Decoder(config, rngs=nnx.Rngs(seed))
        if few_bits:
            quantize_base(model, "int8")
        add_lora(model, 2, rngs=nnx.Rngs(0))
        return train(model, task, dataclasses.replace(settings, **changes), folder, resume=True)

    run(0, stop_at=1)
    with pytest.raises(ValueError, match=r"frozen.sha256: .*weights that are not trained are not"):
        run(1)
    with pytest.raises(ValueError, match=r"frozen.sha256"):
        run(0, few_bits=True)
    assert run(0).step == 2


class RandomFeatures(_toy.Toy):
    """Has a variable that is neither trained nor frozen, nor in a checkpoint."""

    def __init__(self, seed):
        super().__init__()
        key = jax.random.key(seed)
        self.features = nnx.Variable(jax.random.normal(key, (4, 4)))
        # Keys are no numbers, and may be variables, too.
        self.key = nnx.Variable(key)

    def __call__(self, x, key=None):
        return super().__call__(x @ self.features[...], key)


def test_other_variables(tmp_path):
    folder = tmp_path / "run"
    _toy.run(folder, model=RandomFeatures(0), steps=2, stop_at=1)
    with pytest.raises(ValueError, match=r"variables.sha256: .*not trained are not those"):
        _toy.run(folder, model=RandomFeatures(1), steps=2, resume=True)
    assert _toy.run(folder, model=RandomFeatures(0), steps=2, resume=True)[0].step == 2


def test_two_processes_in_a_folder(tmp_path):
    folder = tmp_path / "run"
    with run_folder.locked(folder, main=True):
        for resume in (False, True):
            with pytest.raises(FileExistsError, match="another process is training in"):
                _toy.run(folder, steps=2, resume=resume)
        assert [path.name for path in folder.iterdir()] == [run_folder.LOCK]

        # One that was faster, and of which nothing was there when the other one looked.
    real = run_folder.locked

    @contextlib.contextmanager
    def too_late(*arguments):
        (folder / run_folder.SETTINGS).write_text("{}")
        with real(*arguments):
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bdia_jax.train.loop.locked", too_late)
        with pytest.raises(FileExistsError, match="there is a run in"):
            _toy.run(folder, steps=2)
    (folder / run_folder.SETTINGS).unlink()
    assert _toy.run(folder, steps=2)[0].step == 2


def test_an_optimizer_of_ones_own_is_described_as_such(tmp_path):
    model = _toy.Toy()
    train(model, _toy.Regression(), _toy.settings(steps=1), tmp_path, optimizer=optax.sgd(0.1))
    told = json.loads((tmp_path / "settings.json").read_text())["train"]
    for name in ("optimizer", "learning_rate", "clip_norm"):
        assert told[name] == "one given to train()"


def test_a_run_of_an_older_version_with_an_optimizer_of_ones_own(tmp_path):
    """It kept the settings that the optimizer did not heed."""

    def run(**changes):
        settings = _toy.settings(steps=2, **changes)
        task, optimizer = _toy.Regression(), optax.sgd(0.1)
        return train(_toy.Toy(), task, settings, tmp_path, resume=True, optimizer=optimizer)

    run(stop_at=1)
    path = tmp_path / "settings.json"
    told = json.loads(path.read_text())
    told["train"] |= {"learning_rate": 0.01, "clip_norm": 1.0, "warmup_steps": 0}
    path.write_text(json.dumps(told))
    assert run().step == 2


def test_fingerprints():
    a = {"x": np.arange(6, dtype=np.int32), "y": np.zeros((2, 0))}
    assert fingerprint(a) == fingerprint({"y": a["y"], "x": np.arange(12, dtype=np.int32)[::1][:6]})
    others = [
        {"x": a["x"].reshape(2, 3), "y": a["y"]},
        {"x": a["x"].view(np.float32), "y": a["y"]},
        {"z": a["x"], "y": a["y"]},
        {"x": a["x"][::-1], "y": a["y"]},
        {"x": a["x"]},
    ]
    assert len({fingerprint(tree) for tree in [a, *others]}) == 6
    # Of a view into another array, what is seen counts.
    assert fingerprint(np.arange(8)[::2]) == fingerprint(np.array([0, 2, 4, 6]))


# ---------------------------------------------------------------------------------------------
# Batches and warmup
# ---------------------------------------------------------------------------------------------


def test_more_samples_per_batch_than_there_are(tmp_path):
    task = _toy.Regression()
    task.samples, task.unit = 5, "sequences"
    with pytest.raises(
        ValueError,
        match=r"number of training sequences in toy, 5; got 8: set batch_size "
        r"\(--train.batch-size\) to 5 or less",
    ):
        _toy.run(tmp_path / "run", task=task)
    assert not (tmp_path / "run").exists()
    check_batch_size(task, 5)


def test_an_evaluation_computes_no_more_at_a_time_than_a_step():
    task = _toy.Regression()
    assert (task.eval_batch_size, task.eval_samples) == (32, 64)
    for changes, expected in [
        ({"batch_size": 16}, 16),
        ({"batch_size": 16, "accumulate": 4}, 4),
        ({"batch_size": 64}, 32),
        ({"batch_size": 1, "eval_batch_size": 50}, 50),
        ({"batch_size": 1, "eval_batch_size": 99}, 64),
    ]:
        assert eval_batch_size(task, _toy.settings(**changes)) == expected


def test_a_warmup_bends():
    assert _toy.settings(steps=500, warmup_steps=20).warmup == 20
    assert _toy.settings(steps=3, warmup_steps=20).warmup == 1
    schedule = _toy.settings(steps=3, warmup_steps=20, learning_rate=1.0).make_schedule()
    np.testing.assert_allclose([schedule(i) for i in range(4)], [0, 1, 0.5, 0], atol=1e-6)


@pytest.mark.slow
def test_a_bent_warmup_belongs_to_the_run(tmp_path):
    """Otherwise more steps of a constant schedule would have had another warmup."""
    changes = {"schedule": "constant", "warmup_steps": 6}
    _toy.run(tmp_path / "run", steps=4, **changes)
    with pytest.raises(ValueError, match=r"train.warmup_steps: 2 there, 6 now"):
        _toy.run(tmp_path / "run", steps=20, resume=True, **changes)
    result, _ = _toy.run(
        tmp_path / "run", steps=6, resume=True, schedule="constant", warmup_steps=2
    )
    assert result.step == 6


# ---------------------------------------------------------------------------------------------
# What is told
# ---------------------------------------------------------------------------------------------

EXACT = "reversible blocks: 3; in the first step 0 states mismatched, 0 roundings corrected"


@pytest.mark.slow
def test_the_log(tmp_path):
    folder = tmp_path / "run"
    logger = logging.getLogger("bdia_jax")
    before = logger.level, [*logger.handlers]
    _toy.run(folder, stop_at=4)
    assert EXACT in (folder / "log.txt").read_text()
    _toy.run(folder, resume=True)
    lines = (folder / "log.txt").read_text().splitlines()
    # The lines about losses are read elsewhere: test_feedback.
    told = [line.split("INFO ")[1] for line in lines]
    assert [line for line in told if not line.startswith("step ")] == [
        EXACT,
        "The run stopped at step 4 of 8 (stop_at = 4); it can be resumed.",
        "resumed at step 4",
        EXACT,
        "The run is over, at step 8 of 8.",
    ]
    assert (logger.level, [*logger.handlers]) == before


def test_the_log_has_the_warning_that_ended_a_run(tmp_path):
    with pytest.raises(RuntimeError):
        _toy.run(tmp_path / "run", task=_toy.Regression(poison=0))
    assert (tmp_path / "run" / "log.txt").exists()
    assert read_metrics(tmp_path / "run") == []


@pytest.mark.slow
def test_a_command_tells_it_on_the_terminal(tmp_path):
    """In a process of its own: what imports install at the root logger is part of the test."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, logging, dataclasses, pathlib\n"
        f"sys.path[:0] = [{os.path.dirname(_toy.__file__)!r}, 'experiments']\n"
        "import _toy\nfrom bdia_jax.train import command\n"
        "@dataclasses.dataclass\n"
        "class Settings:\n"
        "    out: pathlib.Path\n"
        "command.run(lambda s: _toy.run(s.out, steps=1), Settings, '', "
        "told=logging.INFO)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(_toy.__file__)))
    ran = subprocess.run(
        [sys.executable, str(script), "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=root,
        check=True,
    )
    assert EXACT + "\n" in ran.stderr
    assert EXACT in (tmp_path / "run" / "log.txt").read_text()
    again = subprocess.run(
        [sys.executable, str(script), "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith("FileExistsError: there is a run in")
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["data"]["name"] == "toy"
