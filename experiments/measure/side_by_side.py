"""Work done side by side, for machines with more cores than one program takes to be compiled."""

from __future__ import annotations

import fcntl
import multiprocessing
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any


def in_processes(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int, *, fresh: bool = False
) -> Iterator[Any]:
    """``map`` in new processes, which trace side by side, too; results come in order.

    On a GPU they have to share its memory: XLA_PYTHON_CLIENT_PREALLOCATE=false.

    Args:
      function: of a module, or a ``functools.partial`` of one.
      items: what it is given. These and results go from process to process.
      workers: processes at a time; one, if none is to be fresh, is this process.
      fresh: whether every item has a process of its own.
    """
    if workers == 1 and not fresh:
        yield from map(function, items)
        return
    spawn, most = multiprocessing.get_context("spawn"), 1 if fresh else None
    with futures.ProcessPoolExecutor(workers, spawn, max_tasks_per_child=most) as pool:
        yield from pool.map(function, items)


def in_threads(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> list[Any]:
    """``map`` in threads: they compile side by side, and trace one after the other."""
    with futures.ThreadPoolExecutor(workers) as pool:
        return [*pool.map(function, items)]


class Turn:
    """A device that several processes get ready for together, and have to themselves in turns.

    A process that makes a turn is getting ready, until it enters it. As long as one is getting
    ready, nobody has the device: a compiler tries kernels on it, and would disturb.
    """

    def __init__(self, path: pathlib.Path | None):
        """``path``: of a file that the processes have in common; None: there are no others."""
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "w")  # noqa: SIM115
            fcntl.flock(self._file, fcntl.LOCK_SH)

    def __enter__(self) -> None:
        if self._file is not None:
            # Given back first: two who hold on to a share would wait for each other for ever.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()
