"""What a run tells: lines, samples, the best model, an early end, boards, and a page at the end."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import types

import _toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bdia_jax.train import (
    TrainSettings,
    loop,
    memory,
    read_metrics,
    report,
    restore_best,
    run,
    wording,
)
from bdia_jax.train import pace as paces
from bdia_jax.train.pace import Pace
from bdia_jax.train.programs import Programs
from bdia_jax.train.result import best_of, evaluations, without_better
from bdia_jax.train.run_folder import logging_to

UNSTEADY = {
    # The rate is such that the loss goes up and down.
    "schedule": "constant",
    "optimizer": "sgd",
    "learning_rate": 0.7,
    "clip_norm": 5.0,
    "keep_last": 1,
    "log_every": 100,
    "eval_every": 1,
    "checkpoint_every": 100,
}


def losses(result):
    """Those of evaluations, by step."""
    return {r["step"]: r["loss"] for r in result.history if r["split"] == "eval"}


def steps_in(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run in one go: folder, result, model."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, *_toy.run(folder)


# ---------------------------------------------------------------------------------------------
# How fast
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(paces, "time", types.SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_samples_and_tokens_per_second(clock):
    clock.seconds = 100.0
    pace = Pace("sequences", 8, 50.0)
    assert not pace.has_begun
    # The first step is compiled: it is not timed.
    assert pace.lap(1, [7.0]) == {}
    pace.begin(1)
    clock.seconds += 4
    # Of the weights, those of the two steps that were timed.
    assert pace.lap(3, [7.0, 100.0, 300.0]) == {"per_second": 4.0, "tokens_per_second": 100.0}
    assert (pace.seconds(), pace.seconds_per_step()) == (54.0, 2.0)
    # An evaluation, which is left out.
    clock.seconds += 1000
    pace.begin(3)
    clock.seconds += 1
    assert pace.lap(4, [50.0]) == {"per_second": 8.0, "tokens_per_second": 50.0}


def test_images_are_their_own_weights(clock):
    pace = Pace("images", 8, 0.0)
    pace.begin(1)
    clock.seconds += 2
    assert pace.lap(2, [8.0]) == {"per_second": 4.0}


def test_the_time_left(clock):
    pace = Pace("images", 8, 0.0)
    assert pace.left(0, 10) is None
    pace.begin(1)
    assert pace.left(1, 10) is None
    clock.seconds += 6
    assert pace.left(3, 10) == 21
    # An evaluation that was compiled.
    clock.seconds += 500
    pace.begin(3)
    pace.forget()
    clock.seconds += 2
    assert pace.left(4, 10) == 12


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


class Device:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        if isinstance(self.stats, Exception):
            raise self.stats
        return self.stats


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        ([{"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 7, "bytes_in_use": 9}], 7),
        ([None, {"bytes_in_use": 9}, {"peak_bytes_in_use": 3}], 3),
        ([None], None),
        ([jax.errors.JaxRuntimeError("UNIMPLEMENTED"), NotImplementedError()], None),
    ],
)
def test_the_peak_of_the_devices(stats, expected, monkeypatch):
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [Device(s) for s in stats])
    assert memory.peak_bytes() == expected


def test_the_peak_is_told_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "peak_bytes", lambda: 10_340_000_000)
    result, _ = _toy.run(tmp_path / "run", steps=2)
    (line,) = [r for r in result.history if r["split"] == "train"]
    assert line["peak_bytes"] == 10_340_000_000
    log = (tmp_path / "run/log.txt").read_text()
    assert re.search(r"step 2 of 2: loss .*; \S+ samples/s, 10\.3 GB at most", log)
    assert "| 10.3 GB at most |" in (tmp_path / "run/report.md").read_text()


# ---------------------------------------------------------------------------------------------
# Lines
# ---------------------------------------------------------------------------------------------


def test_the_words_for_numbers():
    assert [wording.number(n) for n in (0, 0.51234, 4.9e-05, 12.345, 999.9, 12345.6)] == [
        "0",
        "0.5123",
        "4.9e-05",
        "12.35",
        "999.9",
        "12,346",
    ]
    seconds = (0.04, 9.94, 9.96, 59.4, 59.6, 185, 3599.7, 7620, 4e6)
    assert [wording.duration(s) for s in seconds] == [
        "0.0 s",
        "9.9 s",
        "10 s",
        "59 s",
        "1 min 0 s",
        "3 min 5 s",
        "1 h 0 min",
        "2 h 7 min",
        "1,111 h 6 min",
    ]


def test_a_line_about_training():
    record = {"step": 50, "split": "train", "seconds": 9.0, "loss": 2.34567, "network_loss": 2.25}
    record |= {"learning_rate": 4.9e-05, "mismatched": 0.0, "corrected": 2.0}
    told = "step 50 of 500: loss 2.346, network loss 2.25, learning rate 4.9e-05, corrected 2"
    assert wording.about_training(record, 500, "sequences", None) == told
    record |= {"per_second": 12.3, "tokens_per_second": 4510.0, "peak_bytes": 10_340_000_000}
    assert wording.about_training(record, 500, "sequences", 200.0) == (
        f"{told}; 12.3 sequences/s, 4,510 tokens/s, 3 min 20 s left, 10.3 GB at most"
    )
    assert wording.beside_a_bar(record, "sequences") == (
        "loss 2.346, network loss 2.25, 4,510 tokens/s"
    )


def test_a_line_about_an_evaluation():
    first = {"step": 2, "split": "eval", "seconds": 1.0, "loss": 2.5, "accuracy": 0.25}
    second = first | {"step": 4, "accuracy": 0.125}
    told = "step 2 of 9, evaluation: loss 2.5, accuracy 0.25; the best so far"
    assert wording.about_evaluation(first, 9, first, "accuracy") == told
    told = "step 4 of 9, evaluation: loss 2.5, accuracy 0.125; the best is accuracy 0.25 at step 2"
    assert wording.about_evaluation(second, 9, first, "accuracy") == told


def test_lines_in_the_log(whole):
    lines = (whole[0] / "log.txt").read_text().splitlines()
    about = [re.search(r"INFO step (\d) of 8(: loss|, evaluation: loss) (\S+),", x) for x in lines]
    told = [(int(m[1]), "train" if m[2][0] == ":" else "eval", m[3]) for m in about if m]
    assert told == [
        (r["step"], r["split"], wording.number(r["loss"])) for r in read_metrics(whole[0])
    ]
    assert all("network loss" in x and "learning rate" in x for x in lines if "of 8: " in x)
    # After the first two steps there is a rate, and before the last a time.
    assert re.search(r"step 4 of 8: .* samples/s, .* left", "\n".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize(("progress", "level"), [(True, "DEBUG"), (False, "INFO")])
def test_lines_are_quiet_beside_a_bar(progress, level, tmp_path, caplog, capsys, monkeypatch):
    train = loop.train
    monkeypatch.setattr(_toy, "train", lambda *a, **k: train(*a, **k, progress=progress))
    with caplog.at_level(logging.DEBUG, "bdia_jax"):
        _toy.run(tmp_path / "run", steps=2)
    levels = {r.getMessage()[:14]: r.levelname for r in caplog.records}
    assert levels["step 2 of 2: l"] == level
    assert levels["step 2 of 2, e"] == "INFO"
    assert f"{level} step 2 of 2: loss" in (tmp_path / "run/log.txt").read_text()
    # The bar shows the same.
    assert ("network loss" in capsys.readouterr().err) == progress


@pytest.mark.parametrize(
    ("level", "heard"),
    [
        (logging.NOTSET, []),
        (logging.INFO, ["info"]),
        (logging.DEBUG, ["debug", "info"]),
        (logging.ERROR, []),
    ],
)
def test_others_hear_what_they_listened_to_before(level, heard, tmp_path, caplog):
    logger = logging.getLogger("bdia_jax")
    before, root = logger.level, logging.getLogger().level
    logger.setLevel(level)
    logging.getLogger().setLevel(logging.WARNING)
    try:
        with logging_to(tmp_path, True) as tell:
            tell(logging.DEBUG, "debug")
            tell(logging.INFO, "info")
        with logging_to(tmp_path, False) as tell:
            tell(logging.ERROR, "of another process")
    finally:
        logger.setLevel(before)
        logging.getLogger().setLevel(root)
    assert [r.getMessage() for r in caplog.records] == heard
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ")[-2:] for line in lines] == [["DEBUG", "debug"], ["INFO", "info"]]


# ---------------------------------------------------------------------------------------------
# The best, and an early end
# ---------------------------------------------------------------------------------------------


def evaluated(*values, every=2):
    return [{"step": every * i, "split": "eval", "loss": v} for i, v in enumerate(values, 1)]


def test_evaluations_without_a_better_one():
    def count(*values, every=2, metric="-loss"):
        return without_better(evaluated(*values), metric, every)

    assert [count(), count(3.0), count(3.0, 2.0), count(2.0, 3.0)] == [0, 0, 0, 1]
    assert count(2.0, 1.0, 3.0, 1.5) == 2
    # As good is no better.
    assert count(2.0, 2.0, 2.0) == 2
    assert count(2.0, 1.0, metric="loss") == 1
    # Of every other evaluation.
    assert count(2.0, 1.0, 1.5, 3.0, 0.5, 4.0, every=4) == 2
    # An evaluation that there was because the run was stopped neither counts nor is a best.
    extra = {"step": 5, "split": "eval", "loss": 0.0}
    history = [*evaluated(2.0, 3.0), extra, {"step": 6, "split": "train", "loss": 0.0}]
    assert without_better(history, "-loss", 2) == 1
    assert best_of(evaluated(3.0, 1.0, 1.0), "-loss") == {"step": 4, "split": "eval", "loss": 1.0}
    assert best_of([], "-loss") is None


@pytest.mark.slow
def test_the_best_evaluation_has_a_checkpoint(tmp_path):
    folder = tmp_path / "run"
    result, model = _toy.run(folder, **UNSTEADY)
    found = losses(result)
    best = min(found, key=found.get)
    assert 1 < best < 8, "this test wants a best between checkpoints"
    assert (result.best, result.best_step) == (found[best], best)
    assert steps_in(folder) == [best, 8]
    assert restore_best(folder, model) == best
    _, expected = _toy.run(tmp_path / "expected", stop_at=best, **UNSTEADY)
    assert _toy.digest(model) == _toy.digest(expected)


@pytest.mark.slow
def test_the_first_of_equals_is_the_best(tmp_path, monkeypatch):
    """It is what is told, and what is kept and restored."""
    same = iter([0.5, 0.25, 0.25, 0.5, 0.25, 0.5])
    monkeypatch.setattr(Programs, "evaluate", lambda self, params: {"loss": next(same)})
    every = {"steps": 6, "eval_every": 1, "checkpoint_every": 1, "keep_last": 1}
    result, model = _toy.run(tmp_path / "run", **every)
    assert best_of(evaluations(result.history), "-loss")["step"] == 2
    assert (result.best_step, steps_in(tmp_path / "run")) == (2, [2, 6])
    assert restore_best(tmp_path / "run", model) == 2


@pytest.mark.slow
def test_the_best_before_a_resumption_is_known(tmp_path):
    """A worse one after it is not saved, and does not end the run with another best."""
    whole, _ = _toy.run(tmp_path / "whole", **UNSTEADY)
    found = losses(whole)
    best = min(found, key=found.get)
    folder = tmp_path / "run"
    _toy.run(folder, stop_at=best + 1, **UNSTEADY)
    result, _ = _toy.run(folder, resume=True, **UNSTEADY)
    assert (result.best_step, steps_in(folder)) == (best, [best, 8])
    assert _toy.lines(folder) == _toy.lines(tmp_path / "whole")


PATIENT = UNSTEADY | {"steps": 40, "eval_every": 2, "patience": 2}


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    """A run that stopped early: folder, result, model."""
    folder = tmp_path_factory.mktemp("early") / "run"
    return folder, *_toy.run(folder, **PATIENT)


@pytest.mark.slow
def test_a_run_stops_early(early, tmp_path):
    folder, result, model = early
    assert result.step < 36, "this test wants an early end"
    found = losses(result)
    best = min(found, key=found.get)
    assert [*found] == list(range(2, result.step + 1, 2))
    assert result.step == best + 2 * 2
    assert steps_in(folder) == [best, result.step]
    told = (
        f"The run stopped early, at step {result.step} of 40: the last 2 evaluations were not "
        f"better than one before them (patience = 2); the best is step {best}."
    )
    assert told in (folder / "log.txt").read_text()
    assert told in (folder / "report.md").read_text()
    # Until then it is the run that would have gone on.
    changes = PATIENT | {"patience": None, "stop_at": result.step}
    _, other = _toy.run(tmp_path / "other", **changes)
    assert _toy.digest(model) == _toy.digest(other)


@pytest.mark.slow
@pytest.mark.parametrize("before_the_end", [1, 4])
def test_a_run_that_was_interrupted_stops_early_at_the_same_step(before_the_end, early, tmp_path):
    """Also after an odd step, where it was evaluated once more."""
    _, whole, model = early
    folder = tmp_path / "run"
    stopped, _ = _toy.run(folder, stop_at=whole.step - before_the_end, **PATIENT)
    assert stopped.step == whole.step - before_the_end
    resumed, other = _toy.run(folder, model=_toy.Toy(seed=5), resume=True, **PATIENT)
    assert resumed.step == whole.step
    assert _toy.digest(other) == _toy.digest(model)


@pytest.mark.slow
def test_a_run_that_stopped_early_goes_on_with_more_patience(early, tmp_path):
    folder = shutil.copytree(early[0], tmp_path / "run")
    again, model = _toy.run(folder, resume=True, **PATIENT)
    assert (again.step, _toy.digest(model)) == (early[1].step, _toy.digest(early[2]))
    more, _ = _toy.run(folder, resume=True, **PATIENT | {"patience": 3})
    assert more.step > early[1].step


# ---------------------------------------------------------------------------------------------
# What is done at evaluations
# ---------------------------------------------------------------------------------------------


def run_with(hook, folder, monkeypatch, **changes):
    train = loop.train
    with monkeypatch.context() as patch:
        patch.setattr(_toy, "train", lambda *a, **k: train(*a, **k, on_evaluation=hook))
        return _toy.run(folder, **changes)


def test_a_function_sees_the_model_of_every_evaluation(whole, tmp_path, monkeypatch):
    x, seen = jnp.asarray(_toy.Regression().arrays()["x"]), []

    def hook(model, step):
        # Without dropout: in evaluation mode, twice the same.
        first, second = model(x), model(x)
        assert np.array_equal(first, second)
        seen.append((step, _toy.digest(model)))
        # What it does to the model does not matter.
        nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))

    _, model = run_with(hook, tmp_path / "run", monkeypatch)
    assert [step for step, _ in seen] == [4, 8]
    assert _toy.digest(model) == _toy.digest(whole[2]) == seen[-1][1]
    assert _toy.lines(tmp_path / "run") == _toy.lines(whole[0])


@pytest.mark.slow
def test_a_function_that_fails_ends_a_run_that_is_saved(whole, tmp_path, monkeypatch):
    def hook(model, step):
        raise RuntimeError(f"no more after {step}")

    with pytest.raises(RuntimeError, match="no more after 4"):
        run_with(hook, tmp_path / "run", monkeypatch)
    assert steps_in(tmp_path / "run") == [4]
    _, model = _toy.run(tmp_path / "run", resume=True)
    assert _toy.digest(model) == _toy.digest(whole[2])


@pytest.mark.slow
def test_nothing_is_waited_for_after_a_second_ctrl_c(tmp_path, monkeypatch):
    """It may have come in a queue or a file, whose lock is never given back then."""

    shown = []

    def press(model, step):
        shown.extend(on_the_board(tmp_path / "run"))
        raise KeyboardInterrupt

    for kept in (loop.MetricsWriter, loop.Checkpoints):
        for name in {"close", "abandon"} & vars(kept).keys():
            monkeypatch.setattr(kept, name, lambda self, name=name: pytest.fail(name))
    with pytest.raises(KeyboardInterrupt):
        run_with(press, tmp_path / "run", monkeypatch)
    assert read_metrics(tmp_path / "run")[-1]["step"] == 4
    # Written when it was told: nobody closes the file.
    assert shown[-1][0] == 4


# ---------------------------------------------------------------------------------------------
# TensorBoard
# ---------------------------------------------------------------------------------------------


def told_of(records):
    return [
        (r["step"], {f"{r['split']}/{k}": v for k, v in r.items() if k not in ("step", "split")})
        for r in records
    ]


def events(folder):
    """The events of all files; a record is its length, a checksum, itself, a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def on_the_board(folder):
    """What TensorBoard shows: a session hides what earlier ones say of its steps."""
    shown = []
    for event in events(folder):
        if event.HasField("session_log"):
            shown = [(step, values) for step, values in shown if step < event.step]
        if event.HasField("summary"):
            shown.append((event.step, {v.tag: v.simple_value for v in event.summary.value}))
    return shown


@pytest.mark.slow
def test_metrics_are_on_the_board(tmp_path):
    folder = tmp_path / "run"
    _toy.run(folder, stop_at=6, log_every=1)
    # As if the last steps had not been saved.
    shutil.rmtree(folder / "checkpoints/6")
    _toy.run(folder, resume=True, log_every=1)
    shown, expected = on_the_board(folder), told_of(read_metrics(folder))
    assert [step for step, _ in shown] == [step for step, _ in expected]
    for (_, found), (_, values) in zip(shown, expected, strict=True):
        assert found == pytest.approx(values, rel=1e-6)


@pytest.mark.slow
def test_a_full_disk_stops_the_board_only(whole, tmp_path, monkeypatch, caplog):
    from tensorboardX.event_file_writer import EventsWriter

    def full(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(EventsWriter, "flush", full)
    _, model = _toy.run(tmp_path / "run")
    assert _toy.digest(model) == _toy.digest(whole[2])
    (warning,) = [r.getMessage() for r in caplog.records if "TensorBoard" in r.getMessage()]
    assert "nothing more is written for TensorBoard: [Errno 28] No space left" in warning


# ---------------------------------------------------------------------------------------------
# Weights & Biases
# ---------------------------------------------------------------------------------------------


class FakeRun:
    def __init__(self, fails):
        self.told, self.finished, self.fails = [], 0, fails

    def log(self, values, step):
        if self.fails:
            raise OSError("the network is gone")
        self.told.append((step, values))

    def finish(self):
        self.finished += 1


class FakeWandb(types.ModuleType):
    def __init__(self, online=True, offline=True, fails=False):
        super().__init__("wandb")
        self.works, self.fails, self.begun, self.runs = (online, offline), fails, [], []

    def init(self, **given):
        self.begun.append(given)
        if not self.works[given.get("mode") == "offline"]:
            raise RuntimeError("no network")
        self.runs.append(FakeRun(self.fails))
        return self.runs[-1]


@pytest.mark.slow
def test_metrics_are_told_to_weights_and_biases(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = tmp_path / "run"
    _toy.run(folder, wandb="mine", stop_at=4)
    _toy.run(folder, wandb="mine", resume=True)
    first, second = fake.begun
    assert first["project"] == "mine"
    assert (first["name"], first["dir"], first["resume"]) == ("run", str(folder), "allow")
    assert first["config"] == json.loads((folder / "settings.json").read_text()) | {
        "train": first["config"]["train"]
    }
    # The same run goes on there.
    assert first["id"] == second["id"]
    told = [*fake.runs[0].told, *fake.runs[1].told]
    assert told == told_of(read_metrics(folder))
    assert [run.finished for run in fake.runs] == [1, 1]
    # Another project has a run of its own.
    (folder / "wandb.json").write_text("{")
    _toy.run(folder, wandb="other", resume=True)
    assert fake.begun[2]["id"] != first["id"]


def test_without_the_package_nothing_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"wandb = 'mine' needs the package wandb: pip install"):
        _toy.run(tmp_path / "run", wandb="mine")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fake", "warning", "told"),
    [
        (FakeWandb(online=False), "by: wandb sync", 3),
        (FakeWandb(online=False, offline=False), "nothing is told to Weights & Biases", 0),
        (FakeWandb(fails=True), "nothing more is told to Weights & Biases: the network is", 0),
    ],
)
def test_without_a_network_the_run_goes_on(fake, warning, told, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", fake)
    result, _ = _toy.run(tmp_path / "run", wandb="mine", steps=4)
    assert result.step == 4
    assert sum(warning in r.getMessage() for r in caplog.records) == 1
    assert sum(len(run.told) for run in fake.runs) == told


# ---------------------------------------------------------------------------------------------
# The page at the end
# ---------------------------------------------------------------------------------------------


def test_the_report(whole):
    folder, result, _ = whole
    text = (folder / "report.md").read_text()
    assert text.startswith("# Run run\n\nThe run is over, at step 8 of 8.\n")
    for told in (
        "| model | Toy, 945 parameters trained |",
        "| method | BDIA(gamma=0.5, signs='block'",
        "| data | toy, 64 samples for evaluation |",
        "| batches | 8 samples |",
        "| optimizer | adamw, learning rate 0.01 |",
        f"× {jax.devices()[0].device_kind} |",
        f"jax {jax.__version__}",
        "| command | `python ",
        " samples/s (median) |",
        "![Losses](report.png)",
        "learning_rate: 0.01\n",
        "  name: toy\n",
    ):
        assert told in text
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    found = losses(result)
    for step, loss in found.items():
        is_best = step == min(found, key=found.get)
        (row,) = [
            line for line in text.splitlines() if re.match(rf"\| \**{step}\** \| .*\d s", line)
        ]
        assert row.endswith("| best |") == is_best
        assert wording.number(loss) in row


def test_a_long_table_is_cut():
    records = [
        {"step": i, "split": "eval", "seconds": float(i), "loss": abs(i - 501.0)}
        for i in range(1, 1001)
    ]
    table = report.evaluation_table(records, "-loss")
    rows = [
        int(re.sub(r"[|*]", " ", x.replace(",", "")).split()[0]) for x in table.splitlines()[2:-2]
    ]
    assert len(rows) <= report.MOST_ROWS
    assert rows == sorted(rows)
    assert (rows[0], rows[-1]) == (1, 1000)
    assert "| **501** | **8 min 21 s** | **0** | best |" in table
    assert table.endswith(f"{1000 - len(rows)} evaluations between are left out.")
    assert report.evaluation_table([], "-loss") == "There was none."


def test_a_report_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch, caplog):
    def fails(*_):
        raise OSError("no room")

    monkeypatch.setattr(report, "plot_losses", fails)
    result, _ = _toy.run(tmp_path / "run", steps=2)
    assert result.step == 2
    assert "report.md could not be written: no room" in caplog.text


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_has_a_report(tmp_path, monkeypatch):
    def hook(model, step):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        run_with(hook, tmp_path / "run", monkeypatch)
    told = "The run stopped at step 4 of 8 (it was told to); it can be resumed."
    assert told in (tmp_path / "run/report.md").read_text()


@pytest.mark.slow
def test_figures_leave_pyplot_alone(tmp_path):
    """In a notebook, the way that figures are shown must stay."""
    script = (
        "import sys, pathlib; from bdia_jax.train import figures; "
        f"figures.plot_losses([], pathlib.Path({str(tmp_path / 'a.png')!r})); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "a.png").exists()


def test_settings_that_may_change():
    assert {"patience", "wandb"} <= TrainSettings().harmless()
