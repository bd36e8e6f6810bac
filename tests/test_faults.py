"""Faults: killed processes, signals, a full disk, checkpoints that are damaged."""

import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import _toy
import numpy as np
import pytest
from _kills import kill_repeatedly

from bdia_jax.train import EXIT_TERMINATED, CheckpointError, loop, read_metrics
from bdia_jax.train.metrics import MetricsWriter
from bdia_jax.train.signals import Stop

TOY = pathlib.Path(_toy.__file__)
KILLS = int(os.environ.get("BDIA_JAX_KILLS", 3))
"""How often a process is killed; experiments/reliability.py asks for more."""
OFTEN = {"steps": 25 + 5 * KILLS, "log_every": 1, "eval_every": 4, "checkpoint_every": 2}


def command(folder, **changes):
    return [sys.executable, str(TOY), str(folder), json.dumps(OFTEN | changes)]


def told(folder):
    return json.loads((folder / "told.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a process says that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    subprocess.run(command(folder), check=True, timeout=300)
    return told(folder)


# ---------------------------------------------------------------------------------------------
# Processes that end early
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stopped_in_one_process_and_resumed_in_another(undisturbed, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(command(folder, stop_at=20), check=True, timeout=300)
    assert len(told(folder)["lines"]) < len(undisturbed["lines"])
    subprocess.run(command(folder), check=True, timeout=300)
    assert told(folder) == undisturbed


def test_killed_at_random_moments(undisturbed, tmp_path, record_property):
    folder = tmp_path / "run"
    kills = kill_repeatedly(command(folder), folder, kills=KILLS)
    record_property("cases", kills.kills)
    record_property("killed while a checkpoint was written", kills.unfinished_checkpoints)
    assert kills.kills == KILLS
    assert told(folder) == undisturbed


def test_sigterm_saves_and_leaves(undisturbed, tmp_path):
    folder = tmp_path / "run"
    # Without checkpoints on the way: what is found later was saved because of the signal.
    changes = {"checkpoint_every": 100_000, "eval_every": 100_000, "log_every": 1}
    process = subprocess.Popen(command(folder, schedule="constant", **changes, steps=100_000))
    try:
        while not read_metrics(folder):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == EXIT_TERMINATED == 143
    finally:
        process.kill()
    (step,) = (int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    assert step == read_metrics(folder)[-1]["step"] < 100_000
    # Resumed, with fewer steps to go, it ends as an undisturbed run does.
    _, resumed = _toy.run(folder, resume=True, schedule="constant", **changes | {"steps": step + 3})
    _, whole = _toy.run(tmp_path / "whole", schedule="constant", **changes | {"steps": step + 3})
    assert _toy.digest(resumed) == _toy.digest(whole)


def test_sigterm_has_its_usual_effect_afterwards(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    _toy.run(tmp_path / "run", steps=1)
    assert signal.getsignal(signal.SIGTERM) is before


# ---------------------------------------------------------------------------------------------
# Damaged checkpoints
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with checkpoints 4 and 8."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    _, model = _toy.run(folder)
    return folder, _toy.digest(model)


def copy(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def data_file(checkpoint):
    """The file that holds the arrays. (Others, some of them larger, may not even be read.)"""
    return max((checkpoint / "state" / "d").iterdir(), key=lambda p: p.stat().st_size)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, pathlib.Path.unlink])
def test_a_damaged_checkpoint_is_put_aside(damage, whole, tmp_path, caplog):
    folder = copy(whole, tmp_path)
    damage(data_file(folder / "checkpoints" / "8"))
    damaged = {p.name: p.read_bytes() for p in (folder / "checkpoints/8").rglob("*") if p.is_file()}
    with caplog.at_level(logging.WARNING, "bdia_jax"):
        _, model = _toy.run(folder, resume=True)
    assert "checkpoint 8" in caplog.text
    assert "can't be read" in caplog.text
    # It went back to step 4, and from there to the same end.
    assert _toy.digest(model) == whole[1]
    assert _toy.lines(folder) == _toy.lines(whole[0])
    aside = folder / "checkpoints-unreadable" / "8"
    assert {p.name: p.read_bytes() for p in aside.rglob("*") if p.is_file()} == damaged
    assert (folder / "checkpoints" / "8").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt", "metadata"])
def test_other_files_cut_short(name, whole, tmp_path):
    folder = copy(whole, tmp_path)
    for path in (folder / "checkpoints" / "8").rglob(name):
        truncate(path)
    _, model = _toy.run(folder, resume=True)
    assert _toy.digest(model) == whole[1]
    assert (folder / "checkpoints-unreadable" / "8").is_dir()


def test_no_checkpoint_that_can_be_read(whole, tmp_path):
    folder = copy(whole, tmp_path)
    for step in (4, 8):
        truncate(data_file(folder / "checkpoints" / str(step)))
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* \(8, 4\)"):
        _toy.run(folder, resume=True)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"4", "8"}


def test_a_checkpoint_half_written_is_no_checkpoint(whole, tmp_path):
    folder = copy(whole, tmp_path)
    (folder / "checkpoints" / "8").rename(folder / "checkpoints" / "8.orbax-checkpoint-tmp")
    _, model = _toy.run(folder, resume=True)
    assert _toy.digest(model) == whole[1]


# ---------------------------------------------------------------------------------------------
# A full disk
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    made = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("room", [100_000, 0])
def test_a_full_disk(room, small_disk, tmp_path, monkeypatch):
    changes = {"about": {"width": 96}}
    _, whole = _toy.run(tmp_path / "whole", model=_toy.Toy(96), **changes)
    folder, filler = small_disk / "run", small_disk / "filler"
    _toy.run(folder, model=_toy.Toy(96), stop_at=4, **changes)
    # Full when the first step has been taken: of room for the lines of metrics but not for a
    # checkpoint of 300 kB, or of none at all.
    first = loop.Run._look_at_first

    def fill(self, model):
        first(self, model)
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - room))

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_look_at_first", fill)
        with pytest.raises(CheckpointError, match=r"could not be written.*last good one is step 4"):
            _toy.run(folder, model=_toy.Toy(96), resume=True, **changes)
    filler.unlink()
    _, model = _toy.run(folder, model=_toy.Toy(96), resume=True, **changes)
    assert _toy.digest(model) == _toy.digest(whole)


def test_metrics_that_cannot_be_written(tmp_path):
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    writer = MetricsWriter(tmp_path, 0, True)
    writer.file.close()
    writer.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115  (closed by close)
    with pytest.raises(OSError, match=r"metrics could not be written.*make room.*/dev/full"):
        writer.write({"step": 1, "split": "train", "loss": 1.0})
    writer.close()


@pytest.mark.slow
def test_a_save_that_fails_is_told_with_the_next_one_or_at_the_end(tmp_path, monkeypatch):
    """As the test before it, where nothing can be mounted: a write that fails."""
    from orbax.checkpoint._src.serialization import type_handlers

    _toy.run(tmp_path / "run", stop_at=4)
    handler = next(
        getattr(type_handlers, n) for n in ("ArrayHandler",) if hasattr(type_handlers, n)
    )

    async def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handler, "serialize", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*last good one is step 4"):
        _toy.run(tmp_path / "run", resume=True)
    monkeypatch.undo()
    result, model = _toy.run(tmp_path / "run", resume=True)
    assert result.step == 8
    assert all(np.isfinite(value).all() for value in _toy.parameters(model).values())


# ---------------------------------------------------------------------------------------------
# Ctrl-C
# ---------------------------------------------------------------------------------------------

QUIET = {"checkpoint_every": 100_000, "eval_every": 100_000, "log_every": 1}
"""Without checkpoints on the way: what is found later was saved because of the signal."""


def begun(folder, **changes):
    """A process that is in the middle of a run."""
    process = subprocess.Popen(
        command(folder, schedule="constant", **QUIET | {"steps": 100_000} | changes),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not read_metrics(folder):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_ctrl_c_saves_and_leaves(tmp_path):
    folder = tmp_path / "run"
    process = begun(folder)
    try:
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode in (-signal.SIGINT, 130)
    (step,) = (int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    assert step == read_metrics(folder)[-1]["step"] < 100_000
    assert f"stopped at step {step}, which is saved: resume to go on" in told
    assert "Ctrl-C: saving, then leaving" in told
    assert f"The run stopped at step {step} of" in (folder / "log.txt").read_text()
    _, resumed = _toy.run(folder, resume=True, schedule="constant", **QUIET | {"steps": step + 2})
    _, whole = _toy.run(tmp_path / "whole", schedule="constant", **QUIET | {"steps": step + 2})
    assert _toy.digest(resumed) == _toy.digest(whole)


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    folder = tmp_path / "run"
    process = begun(folder, slow_save=60)
    try:
        process.send_signal(signal.SIGINT)
        for line in process.stderr:
            if "saving, then leaving" in line:
                break
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode in (-signal.SIGINT, 130)
    assert "Ctrl-C again: leaving at once" in told
    assert not [p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]


def test_a_signal_is_told_while_a_line_is_written(capfd):
    """A file that is being written cannot be written to again, and a log would lose the line."""

    class Busy(logging.StreamHandler):
        def emit(self, record):
            signal.raise_signal(signal.SIGINT)

    log = logging.getLogger("bdia_jax")
    busy = Busy()
    log.addHandler(busy)
    try:
        with Stop() as stop:
            log.warning("a step")
            assert stop
    finally:
        log.removeHandler(busy)
    assert "Ctrl-C: saving, then leaving" in capfd.readouterr().err


def test_ctrl_c_has_its_usual_effect_afterwards(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    _toy.run(tmp_path / "run", steps=1)
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------------------------------------
# Killed while a checkpoint is deleted
# ---------------------------------------------------------------------------------------------


def half_delete(checkpoint):
    """What is left of it: names without data."""
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.parent.name != "about":
            path.unlink()


@pytest.mark.parametrize(
    "damage", [half_delete, lambda c: shutil.rmtree(c / "state"), lambda c: remake(c)]
)
def test_a_checkpoint_half_deleted_is_removed(damage, whole, tmp_path, caplog):
    folder = copy(whole, tmp_path)
    damage(folder / "checkpoints" / "4")
    assert (folder / "checkpoints" / "4").is_dir()
    with caplog.at_level(logging.WARNING, "bdia_jax"):
        _, model = _toy.run(folder, resume=True)
    assert _toy.digest(model) == whole[1]
    assert f"removed {folder / 'checkpoints' / '4'}, which was half deleted" in caplog.text
    assert "half deleted" in (folder / "log.txt").read_text()
    assert {p.name for p in (folder / "checkpoints").iterdir() if any(p.iterdir())} == {"8"}
    assert not (folder / "checkpoints-unreadable").exists()


def remake(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def test_the_newest_checkpoint_is_never_taken_for_half_deleted(whole, tmp_path):
    folder = copy(whole, tmp_path)
    half_delete(folder / "checkpoints" / "8")
    _, model = _toy.run(folder, resume=True)
    assert _toy.digest(model) == whole[1]
    assert (folder / "checkpoints-unreadable" / "8").is_dir()


def test_what_is_left_of_a_deletion_goes(whole, tmp_path):
    folder = copy(whole, tmp_path)
    left = folder / "checkpoints" / "deleting" / "2"
    shutil.copytree(folder / "checkpoints" / "4", left)
    half_delete(left)
    _, model = _toy.run(folder, resume=True)
    assert _toy.digest(model) == whole[1]
    assert not left.exists()


def test_deleted_checkpoints_were_renamed_first(tmp_path, monkeypatch):
    """Every folder under a checkpoint's name is whole, at any moment."""
    removed = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: removed.append(path))
    _toy.run(tmp_path / "run", checkpoint_every=1, keep_last=1, eval_every=8)
    names = [(path.parent.name, path.name) for path in map(pathlib.Path, removed)]
    assert {("deleting", str(step)) for step in range(1, 7)} <= set(names)
    assert all(parent == "deleting" for parent, _ in names)
