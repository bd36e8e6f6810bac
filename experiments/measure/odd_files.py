"""Files and folders that differ from what is expected: what a user gets who brings one.

    python experiments/measure/odd_files.py

Each is made, and given to the function that reads it. What can only mean one thing is read as it is
meant; everything else is an error that names the file, before any work starts. Writes
odd-files-DEVICE.jsonl; the exit status is 1 if something else happened.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


from bdia_jax.train import command
from measure import records
from measure.odd_data import DATA
from measure.odd_models import CHECKPOINTS, MODELS

DEPENDS = (
    "bdia_jax/data/*.py",
    "bdia_jax/interop/*.py",
    "bdia_jax/interop/families/*.py",
    "bdia_jax/train/*.py",
    "bdia_jax/train/tasks/*.py",
    *(f"experiments/measure/{n}.py" for n in ("odd_files", "odd_data", "odd_models", "e2e_data")),
)
CASES = (*DATA, *MODELS, *CHECKPOINTS)
REFUSALS = (ValueError, FileNotFoundError, NotADirectoryError)


@dataclasses.dataclass(frozen=True)
class OddFiles:
    """Files and folders that differ from what is expected: what a user gets."""

    out: pathlib.Path | None = None
    """Folder of the table; by default runs/results."""


def main(o: OddFiles) -> str:
    """Tries all; the table. Exit status 1 if something else happened than is right."""
    rows = [*tried()]
    path = records.write("odd-files", rows, DEPENDS, out=o.out)
    text = table(rows)
    print(f"\n{text}\n\nSee {path}")
    if not all(row["right"] for row in rows):
        sys.exit(1)
    return text


def counted(out: pathlib.Path) -> dict[str, Any]:
    """How many were tried and came out right; writes the table, too."""
    rows = [*tried()]
    records.write("odd-files", rows, DEPENDS, out=out)
    notes = [f"{row['kind']}: {row['what']}: {row['told']}" for row in rows if not row["right"]]
    return {"tried": len(rows), "passed": sum(row["right"] for row in rows), "notes": notes}


def tried() -> Iterator[dict[str, Any]]:
    """A row per case: what happened, and whether that is right."""
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            place = pathlib.Path(folder).resolve()
            try:
                read, told = True, case.use(place)
            except REFUSALS as error:
                read, told = False, str(error)
            except Exception as error:
                read, told = None, f"{type(error).__name__}: {error}"
        told = " ".join(told.replace(f"{place}/", "").replace(str(place), "it").split())
        row = {"kind": case.kind, "what": case.what, "read": read, "told": told}
        yield row | {"right": read == case.read}


def table(rows: list[dict[str, Any]]) -> str:
    """What each gets."""
    lines = [
        [
            row["kind"],
            row["what"],
            ("read: " if row["read"] else "refused: ")
            + textwrap.shorten(row["told"], 242, placeholder=" …"),
        ]
        for row in rows
    ]
    return records.markdown(["given", "that is", "what happens"], lines)


if __name__ == "__main__":
    command.run(main, OddFiles, __doc__, told=logging.ERROR)
