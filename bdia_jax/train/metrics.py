"""Metrics: a line of JSON each, TensorBoard, and Weights & Biases where that is asked for."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pathlib
from typing import Any

from bdia_jax.files import write_text
from bdia_jax.train.tensorboard import Board
from bdia_jax.train.weights_and_biases import Project


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """All lines of a ``metrics.jsonl`` (or of the one in a run's folder); [] if there is none.

    A last line that a killed process left unfinished is passed over.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


class MetricsWriter:
    """Appends to ``metrics.jsonl`` and to boards that are copies of it, from process 0 only."""

    def __init__(
        self, folder: pathlib.Path, step: int, active: bool, project: Project | None = None
    ):
        """Drops lines after ``step``, which a resumed run is going to write again."""
        self.active, self.project = active, project
        path = folder / "metrics.jsonl"
        self.kept = [record for record in read_metrics(path) if record["step"] <= step]
        if not active:
            return
        write_text(path, "".join(json.dumps(record) + "\n" for record in self.kept))
        # Unbuffered: what a full disk refused must not come back when the file is closed.
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115  (closed by close)
        self.board = Board(folder / "tensorboard", step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """``record`` has "step", "split" and numbers; OSError if the disk is full."""
        if not self.active:
            return
        line = json.dumps(record).encode() + b"\n"
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(
                error.errno,
                f"metrics could not be written ({error.strerror}); make room, and resume",
                str(self.file.name),
            ) from error
        values = {
            f"{record['split']}/{name}": value
            for name, value in record.items()
            if name not in ("step", "split") and math.isfinite(value)
        }
        self.board.write(values, record["step"])
        if self.project is not None:
            self.project.write(values, record["step"])

    def sync(self) -> None:
        """Brings the lines to the disk: a checkpoint must not be there without them."""
        if self.active:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Waits until all is written."""
        if not self.active:
            return
        self.file.close()
        self.board.close()
        if self.project is not None:
            self.project.close()
