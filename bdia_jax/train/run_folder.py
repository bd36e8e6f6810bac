"""The folder of a run: what may be in it, whose run it is, and its log.

settings.json       what decides the trained weights; compared when the run is resumed
settings.yaml       of a command: all its settings, from which it can be started again
metrics.jsonl       a line per log, evaluation and checkpoint
log.txt             what was told while it was trained
.lock               held by the process that trains
tensorboard/        a copy of the metrics
wandb/, wandb.json  the same for Weights & Biases, and the run's name there; if asked for
checkpoints/        the last few, and the best
index/              where the texts are, of data that are read as the run goes
report.md           what came of it, with report.png
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from bdia_jax.data import fingerprint
from bdia_jax.files import write_json
from bdia_jax.nn.lora import Frozen
from bdia_jax.nn.quantized import Quantized
from bdia_jax.nn.stack import Probe
from bdia_jax.train import settings_file
from bdia_jax.train.settings import TrainSettings
from bdia_jax.train.tasks import Task

try:
    import fcntl
except ImportError:
    # Windows.
    fcntl = None

log = logging.getLogger("bdia_jax")

SETTINGS = "settings.json"
LOG = "log.txt"
LOCK = ".lock"
"""Held by the process that trains."""
INDEX = "index"
"""Made before the run, and taken from there when it is resumed."""
OWN = dict.fromkeys(
    (
        *("optimizer", "learning_rate", "schedule", "warmup_steps", "cooldown_steps"),
        *("weight_decay", "decayed", "clip_norm", "clip_by"),
    ),
    "one given to train()",
)
"""Of the settings, those that an optimizer of one's own does not heed."""
SOME = 8
"""Elements along each axis, at most, by which frozen weights are told from others."""


def check_run_folder(folder: str | pathlib.Path, resume: bool = False) -> pathlib.Path:
    """Whether a run can be made, or resumed, in a folder; call it before anything takes long.

    Args:
      folder: of the run; it need not exist.
      resume: whether a run that is there is to be continued.

    Returns:
      The folder, with ``~`` expanded.

    Raises:
      NotADirectoryError: if the folder, or what it is to be made in, is a file.
      FileExistsError: if there is a run, without ``resume``; or something else.
    """
    folder = pathlib.Path(folder).expanduser()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"the folder of the run must be a folder; {there} is a file")
    if there != folder:
        return folder
    # A process killed at its very start leaves a settings.json.tmp.
    if (folder / SETTINGS).exists():
        if not resume:
            raise FileExistsError(
                f"there is a run in {folder}; continue it with resume=True (--resume), or give "
                "another folder"
            )
    elif {path.name for path in folder.iterdir()} - {SETTINGS + ".tmp", INDEX, LOCK}:
        raise FileExistsError(f"{folder} is not empty, and holds no run; give another folder")
    return folder


def check_room(folder: pathlib.Path, state: PyTree, keep_last: int) -> None:
    """Whether the disk has room for the checkpoints of a run; told before anything is trained.

    Args:
      folder: of the run.
      state: what a checkpoint holds; arrays, or their shapes.
      keep_last: as in :class:`bdia_jax.train.TrainSettings`.

    Raises:
      ValueError: if not even one fits. If one does, but not all that may be there at a time (the
        last, the best, and the one being written), there is a warning.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    most = keep_last + 2
    if (found := check_disk(folder, size, "a checkpoint")) is None:
        return
    free, told = found
    if free < most * size:
        log.warning("%s: %d may be there at a time (keep_last = %d)", told, most, keep_last)
    elif size > 1e9:
        log.info("%s; %d may be there at a time", told, most)


def check_disk(folder: pathlib.Path, size: int, what: str) -> tuple[int, str] | None:
    """The bytes that a folder's disk has free, and a sentence for a log.

    None for no disk, such as /proc, of which the first attempt to write will tell.

    Raises:
      ValueError: if there is no room for ``what``, of so many bytes.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    disk = shutil.disk_usage(there)
    if not disk.total:
        return None
    told = f"{what} takes up to {size / 1e9:.1f} GB, and {there} has {disk.free / 1e9:.1f} GB free"
    if disk.free < size:
        raise ValueError(f"{told}: make room, or give a folder on another disk")
    return disk.free, told


def describe_run(
    settings: TrainSettings,
    model: nnx.Module,
    task: Task,
    about: dict[str, Any] | None,
    own_optimizer: bool,
) -> dict[str, Any]:
    """What decides the weights that come out, as it comes back from JSON."""
    training = settings.described()
    if own_optimizer:
        training |= OWN
    # A task that computes some of its arrays has another name for what it was given.
    arrays = getattr(task, "given", task.arrays)()
    data = {"name": task.name, "best": task.best, "sha256": fingerprint(arrays)}
    frozen = {"sha256": fingerprint(some_of(model, (Frozen, Quantized)))}
    everything = {"train": training, "data": data, "frozen": frozen}
    if others := some_of(model, nnx.Not((nnx.Param, Probe, nnx.RngState, Frozen, Quantized))):
        everything["variables"] = {"sha256": fingerprint(others)}
    everything |= about or {}
    return json.loads(json.dumps(everything, default=str))


def some_of(model: nnx.Module, kinds: Any) -> dict[str, np.ndarray]:
    """Some elements of every variable of some kinds, which are not trained, by its path.

    Of other weights, some are others; and all of a large network would take long to read.
    """
    state = nnx.state(model, kinds)
    found = {
        jax.tree_util.keystr(path): jax.random.key_data(leaf) if _is_typed_key(leaf) else leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }

    @jax.jit
    def some(arrays):
        return {
            name: a[tuple(slice(None, None, max(1, -(-n // SOME))) for n in a.shape)].astype(
                jnp.float32 if jnp.issubdtype(a.dtype, jnp.floating) else jnp.int32
            )
            for name, a in arrays.items()
        }

    picked = some(found)
    if jax.process_count() > 1:
        picked = multihost_utils.process_allgather(picked, tiled=True)
    return jax.device_get(picked)


def _is_typed_key(leaf: Any) -> bool:
    """Whether it is an array of PRNG keys of the new style."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def check_same_run(
    folder: pathlib.Path, described: dict[str, Any], settings: TrainSettings
) -> None:
    """A ``ValueError`` if there is a run in the folder, and it is another one than this."""
    if (found := _run_in(folder)) is not None:
        # A run of a version that did not write it.
        for name in ("frozen", "variables"):
            if name in described:
                found.setdefault(name, described[name])
        if found["train"]["optimizer"] == OWN["optimizer"]:
            # It wrote what the settings said, beside the optimizer.
            found["train"] |= OWN
        _refuse_differences(folder, found, described, settings)


def check_same_settings(
    folder: pathlib.Path, settings: TrainSettings, about: dict[str, dict[str, Any]]
) -> None:
    """What :func:`check_same_run` can tell before there are data, of the settings in ``about``.

    Steps are not compared: how many an epoch has is not known yet.
    """
    if (found := _run_in(folder)) is None:
        return
    training = dataclasses.asdict(settings)
    for uncounted in ("epochs", "steps", "warmup_steps"):
        del training[uncounted]
    described = json.loads(json.dumps({"train": training, **about}))
    some = {
        section: {name: found.get(section, {}).get(name, "nothing") for name in values}
        for section, values in described.items()
    }
    _refuse_differences(folder, some, described, settings)


def _run_in(folder: pathlib.Path) -> dict[str, Any] | None:
    """What decided the weights of the run in a folder; None if there is none."""
    path = folder / SETTINGS
    if not path.exists():
        return None
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        # A setting that did not exist when the run was started had the default's effect.
        found["train"] = TrainSettings().described() | found["train"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} can't be read, so this may be another run: {error}") from error
    return found


def _refuse_differences(
    folder: pathlib.Path, found: dict[str, Any], described: dict[str, Any], settings: TrainSettings
) -> None:
    harmless = {f"train.{name}" for name in settings.harmless()}
    differences = [
        f"{name}: {old!r} there, {new!r} now"
        for name, old, new in _differences(found, described)
        if name not in harmless
    ]
    if differences:
        edited = ""
        if any(difference.startswith("data.sha256") for difference in differences):
            name = described["data"]["name"]
            edited = f" (the data named {name} are not those it was started with)"
        unlike = ("frozen.sha256", "variables.sha256")
        if any(difference.startswith(unlike) for difference in differences):
            edited += " (the weights that are not trained are not those it was started with)"
        raise ValueError(f"the run in {folder} is another one: {'; '.join(differences)}{edited}")


@contextlib.contextmanager
def locked(folder: pathlib.Path, main: bool) -> Iterator[None]:
    """Keeps other processes from training in a folder, which is made; until the block is left.

    Raises:
      FileExistsError: if another process does.
      PermissionError: for a folder that cannot be written.
    """
    if not main or fcntl is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a", encoding="utf-8")  # noqa: SIM115  (it is closed below)
    except OSError as error:
        raise _unwritable(error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"another process is training in {folder}; wait for it, or give another folder"
            ) from None
        except OSError:
            log.debug("%s is on a file system without locks", folder)
        yield


def _unwritable(error: OSError) -> PermissionError:
    return PermissionError(f"the folder of the run cannot be written: {error}")


def make_run_folder(folder: pathlib.Path, described: dict[str, Any], main: bool) -> None:
    """Makes it, and writes the settings."""
    if jax.process_count() > 1:
        # No process may find the folder that another one has just made.
        multihost_utils.sync_global_devices("bdia_jax: folder checked")
    if main:
        try:
            # The first file: by it, the folder is that of a run.
            write_json(folder / SETTINGS, described)
            settings_file.write_kept(folder)
        except OSError as error:
            raise _unwritable(error) from error


@contextlib.contextmanager
def logging_to(folder: pathlib.Path, main: bool) -> Iterator[Callable[[int, str], None]]:
    """Has what the library tells, from INFO up, written to ``log.txt``, too.

    What it gives takes a level and a line, which ``log.txt`` gets at any level, and others only if
    they listened to the library at that level before: there may be many such lines.
    """
    if not main:
        yield lambda level, line: None
        return
    logger, handler = logging.getLogger("bdia_jax"), logging.FileHandler(folder / LOG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level, heard = logger.level, logger.getEffectiveLevel()
    if level == logging.NOTSET:
        # The root logger's level, WARNING, would hold INFO back from every handler.
        logger.setLevel(logging.INFO)

    def tell(level: int, line: str) -> None:
        if level >= heard:
            logger.log(level, "%s", line)
        else:
            handler.handle(logger.makeRecord(logger.name, level, "", 0, line, (), None))

    logger.addHandler(handler)
    try:
        yield tell
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves at which two trees of dicts differ: name, old and new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(
                old.get(key, "nothing"), new.get(key, "nothing"), f"{name}.{key}".lstrip(".")
            )
    elif old != new:
        yield name, old, new
