"""Makes results that pages show again, by the commands that made them; then writes the pages.

    python experiments/measure/results.py --list                             # what there is
    python experiments/measure/results.py                                    # all: a day
    python experiments/measure/results.py --names exactness-cpu chats-cpu    # some

Data lie in data/. A command that fails, for want of data or of a package, stops no other.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import shlex
import subprocess
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


from bdia_jax.train import command
from measure import pages, records, sources


@dataclasses.dataclass(frozen=True)
class Results:
    """Makes results that pages show again; then writes the pages."""

    names: tuple[str, ...] = ()
    """Files of results, without .jsonl; all by default."""
    list: bool = False
    """Only tell the commands, and how long each took."""


def main(r: Results) -> None:
    """Runs every command once, however many results it gives.

    Raises:
      ValueError: for a name that no result has.
      SystemExit: at the end, if a command failed.
    """
    there = {path.stem: path for path in sorted(records.COMMITTED.glob("*.jsonl"))}
    if unknown := [name for name in r.names if name not in there]:
        raise ValueError(f"results are {', '.join(there)}; got {', '.join(unknown)}")
    lasted: dict[str, float] = {}
    for path in [there[name] for name in r.names or there]:
        result = records.read(path)
        line = result.about["command"]
        lasted[line] = max(lasted.get(line, 0), seconds(result))
    failed = []
    for line, took in lasted.items():
        print(f"{line}  # {took / 60:.0f} minutes", flush=True)
        if r.list:
            continue
        done = subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=sources.ROOT)
        if done.returncode:
            failed.append(f"status {done.returncode}: {line}")
        pages.main()
    if failed:
        sys.exit("\n".join(failed))


def seconds(result: records.Result) -> float:
    """How long it took: its command, or all its runs, of which some may have been there before."""
    rows: list[dict[str, Any]] = result.rows
    runs = {row["folder"]: row["seconds"] for row in rows if "folder" in row and "seconds" in row}
    return max(result.about["seconds"], sum(runs.values()))


if __name__ == "__main__":
    command.run(main, Results, __doc__, told=logging.WARNING)
