"""Networks trained from seeds, each of them once.

A run has a folder of its own, named after the run and a hash of its settings and of the code: what
it finds finished there is its own. One that was interrupted goes on from its checkpoint. Several
processes may work on the same runs: each takes those that no other has in hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import nnx

from bdia_jax import files
from bdia_jax.train import InexactInverseError, NonFiniteError, Task, TrainSettings, train
from measure import records, sources


@dataclasses.dataclass(frozen=True)
class Run:
    """One network, trained from one seed."""

    name: str
    """A part of a file name."""
    settings: dict[str, Any]
    """All that decides what comes out, of JSON's types."""
    train: Callable[[pathlib.Path], dict[str, Any]]
    """Trains in a folder, or goes on there; returns the record."""
    row: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What its row says of it, besides the record."""


def training(
    name: str,
    make: Callable[[], nnx.Module],
    task: Task,
    settings: TrainSettings,
    about: dict[str, Any],
    score: Callable[[Any, pathlib.Path], dict[str, Any]] = lambda model, folder: {},
    row: dict[str, Any] | None = None,
) -> Run:
    """A run of the training loop.

    Args:
      name: of the run.
      make: makes the network.
      task, settings: as in :func:`bdia_jax.train.train`.
      about: of the network and the data; all that decides what comes out, but for the settings.
      score: what else to record, of the trained network and the folder of the run.
      row: what its row says of it, besides the record.
    """

    def trained(folder: pathlib.Path) -> dict[str, Any]:
        model = make()
        parameters = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
        result = train(
            model, task, settings, folder / "run", resume=True, about=about, progress=False
        )
        return {
            "parameters": parameters,
            "seconds": result.seconds,
            "seconds per step": result.seconds_per_step,
            "mismatched": sum(r.get("mismatched", 0) for r in result.history),
            "history": result.history,
        } | score(model, folder)

    told = records.plain({"data": task.name, "about": about, "train": records.plain(settings)})
    return Run(name, told, trained, row or {})


def run_and_write(
    name: str,
    runs: Iterable[Run],
    work: pathlib.Path,
    depends: Iterable[str],
    tell: Callable[[dict[str, Any]], str] = str,
    *,
    settings: Any,
    first: Iterable[dict[str, Any]] = (),
    note: str | None = None,
) -> tuple[list[dict[str, Any]], pathlib.Path]:
    """Trains what is missing, and writes a row of each run; the rows, and their file.

    What there is so far is written after each run.

    Args:
      name: of the result.
      runs, work, depends, tell: as in :func:`run_all`.
      settings: of the command, with the folder ``out``.
      first: rows above those of the runs.
      note: what a page says under the table.
    """
    runs, depends, first = [*runs], [*depends], [*first]

    def written(found: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], pathlib.Path]:
        rows = [*first, *(run.row | found[run.name] for run in runs if run.name in found)]
        missing = len(runs) - len(found)
        lack = f"{missing} of {len(runs)} runs are missing." if missing else None
        told = " ".join(filter(None, (lack, note))) or None
        path = records.write(name, rows, depends, settings=settings, out=settings.out, note=told)
        return rows, path

    return written(run_all(runs, work, depends, tell, so_far=written))


def run_all(
    runs: Iterable[Run],
    work: pathlib.Path,
    depends: Iterable[str],
    tell: Callable[[dict[str, Any]], str] = str,
    *,
    train: bool = True,
    so_far: Callable[[dict[str, dict[str, Any]]], Any] = lambda records: None,
) -> dict[str, dict[str, Any]]:
    """The records of some runs, by name; what another process has in hand is waited for.

    A run that went wrong has an "error" in its record, and nothing else.

    Args:
      runs: of different names.
      work: the folder of their folders.
      depends: patterns of the files whose code decides what comes out.
      tell: what is said of a record.
      train: whether to train what is missing, rather than leave it out.
      so_far: is told all records that there are, by whatever process, after each run of this one:
        they may be the last, on a machine that is lent by the hour.
    """
    if jax.config.jax_compilation_cache_dir is None:
        # Seeds of a network share its programs.
        jax.config.update("jax_compilation_cache_dir", str((work / "compiled").resolve()))
    depends, found = [*depends], {}
    code = sources.digest(depends)
    waiting = {run.name: run for run in runs}
    folders = {name: work / f"{name}-{_hash(run, code)}" for name, run in waiting.items()}
    while waiting:
        later = {}
        for run in waiting.values():
            folder = folders[run.name]
            # with_suffix would cut a name off at the dot of a number.
            with claimed(folder.with_name(f"{folder.name}.lock")) as mine:
                if not mine:
                    later[run.name] = run
                    continue
                if known := _known({run.name: folder}):
                    found |= known
                    continue
                if not train:
                    continue
                found[run.name] = _record(run, folder, depends)
                so_far(_known(folders))
            print(f"{len(found)}/{len(folders)} {run.name}: {tell(found[run.name])}", flush=True)
        if len(later) == len(waiting):
            time.sleep(5)
        waiting = later
    return found


def _known(folders: dict[str, pathlib.Path]) -> dict[str, dict[str, Any]]:
    paths = {name: folder / "found.json" for name, folder in folders.items()}
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.exists()
    }


def _record(run: Run, folder: pathlib.Path, depends: list[str]) -> dict[str, Any]:
    told = records.made(depends)
    made = {name: told[name] for name in ("commit", "clean", "date", "device")}
    made["folder"] = folder.name
    try:
        record = {"error": None} | run.train(folder)
    except (NonFiniteError, InexactInverseError) as error:
        record = {"error": f"{type(error).__name__}: {error}"}
    files.write_json(folder / "settings.json", run.settings)
    files.write_json(folder / "found.json", made | record)
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    return made | record


def _hash(run: Run, code: str) -> str:
    text = json.dumps([code, run.settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@contextlib.contextmanager
def claimed(path: pathlib.Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process, and no other, may work on something; until the block is left.

    With ``wait``, it may in the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def dial(
    methods: Iterable[str], gammas: Iterable[float], signs: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Every method with every γ and its signs, where it has one: fields of a network, by name."""
    gammas, signs = [*gammas], [*signs]
    found = {}
    for method in methods:
        if not method.startswith("bdia"):
            found[method] = {"method": method}
            continue
        for gamma, kind in itertools.product(gammas, signs):
            several = len(gammas) * len(signs) > 1
            name = f"{method}, γ = {gamma:g}, signs: {kind}" if several else method
            found[name] = {"method": method, "gamma": gamma, "signs": kind}
    return found
