"""Batches that the host feeds: a run goes on where it was, and on no other data; epochs."""

import json
import logging
import shutil
import sys
import threading
import time

import _toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _kills import kill_repeatedly

from bdia_jax import data
from bdia_jax.train import (
    Fed,
    LanguageModelling,
    MixedTexts,
    PackedTexts,
    TrainSettings,
    in_steps,
)
from bdia_jax.train.feed import Feed, first_batches
from bdia_jax.train.programs import Programs

TOKENIZER = data.byte_tokenizer()


OFTEN = {"steps": 20, "log_every": 1, "eval_every": 4, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of the files, and a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("files")
    _, model = _toy.run(folder / "run", task=_toy.FromFiles(folder), **OFTEN)
    return folder, _toy.digest(model), _toy.lines(folder / "run")


@pytest.mark.slow
def test_a_run_goes_on_where_it_was(whole, tmp_path):
    """Also as one of steps, if it began as one of so many epochs."""
    files, digest, lines = whole
    for changes in ({"steps": None, "epochs": 20 * 8 / 37, "stop_at": 3}, {"stop_at": 14}, {}):
        result, model = _toy.run(
            tmp_path / "run", task=_toy.FromFiles(files), resume=True, **OFTEN | changes
        )
    assert result.step == 20
    assert _toy.digest(model) == digest
    found = _toy.lines(tmp_path / "run")
    # Where a call ended, it evaluated once more.
    assert [line for line in found if line["split"] == "train" or not line["step"] % 4] == lines


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_batches(whole, tmp_path):
    given = json.dumps(OFTEN | {"files": str(whole[0])})
    command = [sys.executable, _toy.__file__, str(tmp_path / "run"), given]
    assert kill_repeatedly(command, tmp_path / "run", kills=1).kills == 1
    told = json.loads((tmp_path / "run" / "told.json").read_text())
    assert (told["parameters"], told["lines"]) == whole[1:]


def test_other_data_are_refused(whole, tmp_path):
    files = shutil.copytree(whole[0], tmp_path / "files")
    path = files / "b.jsonl"
    path.write_text(path.read_text().replace("ccc", "ccd"))
    with pytest.raises(ValueError, match=r"another one: data.sha256: .*not those it was started"):
        _toy.run(files / "run", task=_toy.FromFiles(files), resume=True, **OFTEN)


# ---------------------------------------------------------------------------------------------
# The feed
# ---------------------------------------------------------------------------------------------


class Slow:
    """Feeds the position itself; errors at the fifth."""

    made = 0

    def start(self):
        return 0

    def feed(self, position, size):
        if position == 4:
            raise OSError("the disk is gone")
        self.made += 1
        return np.full(size, position), position + 1

    def fed_shapes(self, size):
        return jax.ShapeDtypeStruct((size,), int)

    def epoch(self):
        return 4


class Endless(Slow):
    def feed(self, position, size):
        return np.full(size, position), position + 1


def test_a_feed_is_ahead_and_knows_where_it_is():
    task, before = Slow(), threading.active_count()
    assert isinstance(task, Fed)
    assert not isinstance(_toy.Regression(), Fed)
    feed = Feed(task, 2, 1)
    while task.made < 3:
        time.sleep(0.001)
    for step in (1, 2):
        # What was made ahead was not taken: a checkpoint must not skip it.
        assert feed.position == step
        assert [*feed.take()] == [step, step]
    feed.take()
    with pytest.raises(OSError, match="the disk is gone"):
        feed.take()
    feed.close()
    # One that is full can be closed, too.
    feed = Feed(Endless(), 1000)
    assert feed.take()[0] == 0
    feed.close()
    assert threading.active_count() == before


def test_the_loss_without_noise_is_of_the_batch_that_is_fed(whole):
    task = _toy.FromFiles(whole[0])
    programs = Programs(_toy.Toy(dropout=0), task, _toy.settings())
    state, fed = programs.first_state(_toy.Toy(dropout=0)), task.feed(task.start(), 8)[0]
    found = float(programs.network_loss(state, fed))
    other = float(programs.network_loss(state, {"x": fed["x"][::-1] + 1}))
    assert found != other
    _, report = programs.step(state, fed)
    assert float(report.sums.weight) == 8


def test_first_batches(whole):
    task = _toy.FromFiles(whole[0])
    found = [*first_batches(task, jax.random.key(0), 3, 2)]
    rows, _ = task.feed(task.start(), 6)
    assert jnp.array_equal(jnp.concatenate([x for x, _ in found]), rows["x"])


# ---------------------------------------------------------------------------------------------
# Epochs
# ---------------------------------------------------------------------------------------------


def packed(count):
    texts = [data.completion(TOKENIZER, "a", "b" * 13) for _ in range(count)]
    return data.pack(texts, 14)


def test_epochs_are_steps(whole, caplog):
    task = PackedTexts("texts", packed(11), packed(1))
    settings = TrainSettings(epochs=3, batch_size=4)
    with caplog.at_level(logging.INFO, "bdia_jax"):
        # A pass is of 2 batches of 4 sequences, and leaves 3 of 11 out.
        assert in_steps(settings, task) == TrainSettings(steps=6, batch_size=4)
    assert "an epoch is 2 steps of 4 sequences; epochs = 3 are 6 steps" in caplog.text
    assert in_steps(TrainSettings(epochs=0.1, batch_size=4), task).steps == 1
    assert in_steps(TrainSettings(steps=7), task) == TrainSettings(steps=7)
    # What is fed leaves nothing out.
    fed = _toy.FromFiles(whole[0])
    assert fed.epoch() == 37
    assert in_steps(TrainSettings(epochs=2, batch_size=8), fed).steps == 9
    text = data.split_text("long", "abc" * 99, TOKENIZER)
    with pytest.raises(ValueError, match=r"the sequences of long are drawn at random.*give steps"):
        in_steps(settings, LanguageModelling(text, 8))


def test_steps_or_epochs():
    with pytest.raises(ValueError, match=r"give steps or epochs, .*got steps=9 and epochs=2"):
        TrainSettings(steps=9, epochs=2)
    for epochs in (0, -1, float("nan"), float("inf"), "3", True):
        with pytest.raises(ValueError, match="epochs must be"):
            TrainSettings(epochs=epochs)
    assert TrainSettings().total_steps == 1000
    assert TrainSettings().or_steps(5).steps == 5
    assert TrainSettings(steps=7).or_steps(5).steps == 7
    assert TrainSettings(epochs=2).or_steps(5).steps is None
    with pytest.raises(ValueError, match="must be made steps of first"):
        TrainSettings(epochs=2).total_steps  # noqa: B018  (it is a property)
    # The schedule ends with the last step of the last epoch.
    task = PackedTexts("texts", packed(8), packed(1))
    given = in_steps(TrainSettings(epochs=5, batch_size=4, learning_rate=1.0), task)
    assert float(given.make_schedule()(10)) == pytest.approx(0, abs=1e-6)
    assert float(given.make_schedule()(9)) > 0


def test_what_a_mix_must_have(whole):
    mix = _toy.FromFiles(whole[0]).mix
    nothing = packed(1)._replace(weights=np.zeros((1, 14), np.float32))
    with pytest.raises(ValueError, match="must have tokens to learn; got none"):
        MixedTexts("mix", mix, nothing)
    with pytest.raises(ValueError, match="eval_batch_size must be at least 1"):
        MixedTexts("mix", mix, packed(1), eval_batch_size=0)


def test_a_feed_that_is_interrupted_waits_for_nobody():
    """A second Ctrl-C may have left a lock of the queue taken, which the thread then waits for."""
    going, let_go = threading.Event(), threading.Event()

    class Stuck(_toy.FromFiles):
        def __init__(self):
            pass

        def start(self):
            return 0

        def feed(self, position, size):
            going.set()
            let_go.wait(60)
            return {}, position + 1

    feed = Feed(Stuck(), 4)
    assert going.wait(60)
    feed.close(wait=False)
    assert feed._thread.is_alive()
    let_go.set()
    feed.close()
    assert not feed._thread.is_alive()
