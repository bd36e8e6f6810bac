"""Shows that changed code gives the same numbers as the code that a result was made with.

    python experiments/measure/still.py --names small-text-tinyshakespeare-cpu  # some
    python experiments/measure/still.py                                         # all that need it

A result of hours need not be made again because a file that it depends on has a new option. Its
command is run twice, with the code of its commit and with the code that is here, on this machine:
some of its networks, for a few steps, with whole evaluations. Code that computes the same in
another order rounds otherwise. If no number differs by more than a share of :data:`CLOSE`, the
result says by how much, with both commits, and pages no longer say that the code has changed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

HERE = pathlib.Path(__file__).resolve().parents[2]
STEPS = 3
CLOSE = 1e-3
"""Largest difference of two numbers, as a share of the larger one; 0 of integers and words."""
NOTED = ("commit", "clean", "code", "depends", "date", "device", "cores")
"""Of the short run with the code that is here, what a result notes."""
MADE = re.compile("second|commit|clean|date|folder|versions|command|cores|error")
"""Fields that say how a row was made, and when."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What of a command is run."""

    words: str
    """Options that make it short."""
    networks: str = ""
    """A pattern of the runs that are trained; all by default."""
    every: int = 1
    """Of the cases of exactness, one in so many."""
    poor: bool = False
    """Whether the command ends with status 1, since so few steps make no good network."""


PARTS = {
    "small-text": Part("--seeds 1 --gammas 0.5 0.0625"),
    "translation": Part("--seeds 1 --gamma 0.5 0.0625 --decode 20"),
    "vision-quick": Part("--seeds 1", poor=True),
    "vision": Part("--seeds 1"),
    "gamma-finetuning": Part(
        "--seeds 1 --validation 20 --inputs 4",
        "standard-seed|γ-chosen|1-2--block|checkpoints-of-4",
    ),
    "gamma-exactness": Part("--parts exactness --rows 1"),
    "gamma-gradients": Part("--parts gradients --rows 1"),
    "gamma-perturbation": Part("--rows 1"),
    "gamma-cotangents": Part("--rows 1"),
    "few-bits": Part("--seeds 1"),
    # What is compiled, counted or read is the same to the last digit.
    "exactness": Part("", every=11),
    "activations": Part("--values 2 4"),
    "totals-vit": Part("--networks vit --values 2 4 --ways checkpointed BDIA 'BDIA, parts'"),
    "totals": Part("--values 2 4 --ways checkpointed BDIA 'BDIA, parts'"),
    "plans": Part("--ways BDIA"),
    "long-texts": Part("--models llama-1b --ways 'BDIA, chunks' --gammas 0.0625"),
    "same-kernels": Part("--devices h100 --models vit"),
    "odd-files": Part(""),
}


@dataclasses.dataclass(frozen=True)
class Still:
    """Shows that changed code gives the same numbers."""

    names: tuple[str, ...] = ()
    """Files of results, without .jsonl; by default those of code that has changed."""


def main(s: Still) -> None:
    """Compares; notes what is the same in the file of the result.

    Raises:
      ValueError: where a number is another one.
    """
    from measure import pages, records, sources

    for name in s.names or [path.stem for path in pages.stale()]:
        path = records.COMMITTED / f"{name}.jsonl"
        if (part := part_of(name)) is None:
            print(f"{name}: has no short command; make it again")
            continue
        result = records.read(path)
        about = result.about
        made = about.get("again", about)
        depends = made.get("depends", about["depends"])
        if made["clean"] and sources.same_at(made["commit"], depends):
            # Only how code is told from other code has changed.
            made["code"] = sources.digest(depends)
            write(path, about, result.rows)
            print(f"{name}: the code of {made['commit'][:7]} is that which is here")
            continue
        print(f"{name}: {about['commit'][:7]} and the code that is here", flush=True)
        then, now = both(name, about, part)
        shares = differences(then[1:], now[1:])
        at = max(shares, key=lambda at: shares[at])
        if shares[at] > CLOSE:
            old, new = (dict(numbers(lines[1:])).get(at) for lines in (then, now))
            raise ValueError(
                f"{name}: the code that is here gives other numbers: {at}: {old!r}, now {new!r}"
            )
        # Among them what the result depends on now: a module may have been cut in two.
        again = {name: now[0][name] for name in NOTED}
        again |= {"words": part.words, "networks": part.networks, "steps": STEPS}
        again |= {"numbers": len(shares), "within": shares[at]}
        write(path, about | {"again": again}, result.rows)
        print(f"{name}: {len(shares)} numbers are the same, within a share of {shares[at]:.0e}")


def write(path: pathlib.Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A result, as it is kept."""
    from bdia_jax import files

    files.write_text(path, "".join(json.dumps(line) + "\n" for line in [about, *rows]))


def part_of(name: str) -> Part | None:
    """What of a result's command is run."""
    return next((part for start, part in PARTS.items() if name.startswith(start)), None)


def both(name: str, about: dict[str, Any], part: Part) -> tuple[list[Any], ...]:
    """The lines of a short run with the code of a result's commit, and with the code here."""
    with tempfile.TemporaryDirectory() as folder:
        old = pathlib.Path(folder) / "code"
        old.mkdir()
        archive = subprocess.run(
            ["git", "-C", str(HERE), "archive", about["commit"]], check=True, capture_output=True
        )
        subprocess.run(["tar", "-x", "-C", str(old)], input=archive.stdout, check=True)
        return tuple(
            short_run(name, root, about["command"], part, pathlib.Path(folder) / of)
            for of, root in (("then", old), ("now", HERE))
        )


def short_run(
    name: str, root: pathlib.Path, command: str, part: Part, folder: pathlib.Path
) -> list[dict[str, Any]]:
    """The lines that a command writes in a folder, with the code in ``root``."""
    folder.mkdir()
    (folder / "data").symlink_to((HERE / "data").resolve())
    _, script, *words = shlex.split(command)
    child = [sys.executable, __file__, "--in", str(root), part.networks, str(part.every), script]
    done = subprocess.run(
        [*child, *words, *shlex.split(part.words)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
    )
    if done.returncode != 0 and (done.returncode, part.poor) != (1, True):
        done.check_returncode()
    (path,) = folder.glob(f"experiments/results/{name}.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shortened(root: pathlib.Path, networks: str, every: int, script: str, words: list[str]) -> None:
    """Runs a script of the code in ``root``; what it trains, it trains for a few steps."""
    sys.argv = [script, *words]
    sys.path[:1] = [str(root), str(root / "experiments")]
    from bdia_jax import train as training

    whole = training.train

    def few(model: Any, task: Any, settings: Any, *rest: Any, **options: Any) -> Any:
        changes = {"steps": STEPS, "warmup_steps": min(settings.warmup_steps, 1), "log_every": 1}
        changes |= {"eval_every": STEPS, "checkpoint_every": STEPS}
        return whole(model, task, dataclasses.replace(settings, **changes), *rest, **options)

    training.train = few
    from measure import runs

    run_all = runs.run_all

    def some(all_runs: Any, *rest: Any, **options: Any) -> Any:
        chosen = [run for run in all_runs if re.search(networks, run.name)]
        return run_all(chosen, *rest, **options)

    runs.run_all = some
    if every > 1:
        from measure import exactness

        cases = exactness.cases
        exactness.cases = lambda *given, **how: itertools.islice(
            cases(*given, **how), 0, None, every
        )
    runpy.run_path(str(root / script), run_name="__main__")


def numbers(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Everything that is no dictionary or list, and does not say how or when it was made."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not MADE.search(key):
                yield from numbers(inner, f"{at}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from numbers(inner, f"{at}[{i}]")
    else:
        yield at, value


def differences(then: Any, now: Any) -> dict[str, float]:
    """By how much numbers differ, as a share of the larger one; inf where they are no numbers.

    A field of a record that only the code that is here tells is not compared. One that it tells no
    more must have been 0.
    """
    before, after = dict(numbers(then)), dict(numbers(now))
    records = {at.rpartition(".")[0] for at in before}
    more = {at: math.inf for at in after if at.rpartition(".")[0] not in records}
    return {at: share(value, after.get(at, 0.0)) for at, value in before.items()} | more


def share(a: Any, b: Any) -> float:
    """Of the larger one."""
    if a == b:
        return 0.0
    if not isinstance(a, float) or not isinstance(b, float):
        return math.inf
    if math.isnan(a) and math.isnan(b):
        return 0.0
    found = abs(a - b) / max(abs(a), abs(b))
    return math.inf if math.isnan(found) else found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in"]:
        _, _, root, networks, every, script, *words = sys.argv
        shortened(pathlib.Path(root), networks, int(every), script, words)
    else:
        sys.path.insert(0, str(HERE / "experiments"))
        from bdia_jax.train import command

        command.run(main, Still, __doc__, told=logging.WARNING)
