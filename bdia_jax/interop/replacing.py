"""Several files of a folder, replaced together: a reader finds the old ones, or the new ones.

New files are written into a sub-folder, ``.saving``. Once they are all on the disk, it is renamed
to ``.saved``: from then on they count. They are then moved to their places one by one, in an order
in which a reader that knows nothing of this finds whole models as far as that is possible; a
reader that asks :func:`newest` always does. After a kill, the next save does the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from bdia_jax.files import write_json

_UNFINISHED, _READY = ".saving", ".saved"
_STEPS = "steps.json"


class Step(NamedTuple):
    """Puts a new file in its place, or removes an old one."""

    kind: Literal["put", "remove"]
    name: str


@contextlib.contextmanager
def new_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write new files into, for :func:`put_in_place`; removed after an error."""
    _finish(folder)
    unfinished = folder / _UNFINISHED
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def put_in_place(folder: pathlib.Path, steps: Sequence[Step]) -> None:
    """Takes the steps, in their order; all of them or none.

    Args:
      folder: that was given to :func:`new_files`.
      steps: one to put each of the new files; a name that is removed may be put later.
    """
    unfinished = folder / _UNFINISHED
    for file in unfinished.iterdir():
        _sync(file)
    write_json(unfinished / _STEPS, list(steps))
    _sync(unfinished)
    unfinished.rename(folder / _READY)
    _sync(folder)
    _finish(folder)


def newest(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Where the file of a name is, or would be, if an interrupted replacement were done."""
    waiting = folder / _READY / name
    if not waiting.parent.is_dir() or waiting.exists():
        return waiting if waiting.exists() else folder / name
    steps = _steps(folder)
    removed = Step("remove", name) in steps and Step("put", name) not in steps
    return waiting if removed else folder / name


def _steps(folder: pathlib.Path) -> list[Step]:
    """Those of a replacement that has begun; none if all have been taken."""
    try:
        text = (folder / _READY / _STEPS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    steps = [Step(*step) for step in json.loads(text)]
    if wrong := [step.name for step in steps if pathlib.PurePath(step.name).name != step.name]:
        raise ValueError(f"{folder / _READY / _STEPS} names {wrong[0]!r}, which is not in {folder}")
    return steps


def _finish(folder: pathlib.Path) -> None:
    """Takes the steps that are left, if there are any; may itself be interrupted anywhere."""
    ready = folder / _READY
    if ready.is_symlink():
        raise ValueError(f"{ready} is a symbolic link, and is not followed: remove it")
    if not ready.is_dir():
        return
    steps = _steps(folder)
    for step in steps:
        waiting = ready / step.name
        if step.kind == "put":
            if waiting.exists():
                waiting.replace(folder / step.name)
        elif waiting.exists() or Step("put", step.name) not in steps:
            # A name that is also put is not removed once its new file is there.
            (folder / step.name).unlink(missing_ok=True)
    _sync(folder)
    (ready / _STEPS).unlink(missing_ok=True)
    ready.rmdir()


def _sync(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
