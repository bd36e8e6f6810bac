"""Small faults put into the library, one at a time: which tests find them, and which survive?

    python tests/mutants.py                     # all; prints a line each, and the survivors
    python tests/mutants.py --only sign         # those whose name, or file, holds "sign"
    python tests/mutants.py --workers 2         # several at a time
    python tests/mutants.py --list              # only checks that every fault can still be put in

A fault is a replacement of text in a copy of the package. The tests named with it are run against
the copy until one fails. Not a test itself: all faults take an hour of one core.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile

import _core_faults
import _outer_faults
from _fault import Fault

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 900
FAULTS = [*_core_faults.FAULTS, *_outer_faults.FAULTS]


def check_test(test: str) -> None:
    """An error if a test that is named does not exist."""
    file, _, name = test.partition("::")
    if not re.search(
        rf"^def {name}\(" if name else "", (ROOT / "tests" / f"{file}.py").read_text(), re.M
    ):
        raise ValueError(f"there is no test {test}")


def text_with(fault: Fault) -> str:
    """The faulty file; an error if the text to be replaced is not in exactly one place."""
    text = (ROOT / "bdia_jax" / f"{fault.file}.py").read_text()
    if (places := text.count(fault.before)) != 1:
        raise ValueError(
            f"{fault.name!r}: the text to be replaced must be in one place of {fault.file}.py; "
            f"got {places}: {fault.before!r}"
        )
    if fault.before == fault.after:
        raise ValueError(f"{fault.name!r} is no fault: it replaces a text by itself")
    return text.replace(fault.before, fault.after)


def made_copy(folder: pathlib.Path) -> pathlib.Path:
    """What the tests need, in a folder of its own."""
    for name in ("bdia_jax", "tests", "experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def finder(tests: tuple[str, ...], copy: pathlib.Path, compiled: pathlib.Path) -> str | None:
    """The first tests that fail on a copy; None if all pass."""
    # Compiled programs are kept by what they compute, so faults may share them.
    env = os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.02",
    }
    for test in tests:
        file, _, name = test.partition("::")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        try:
            run = subprocess.run(
                [*command, f"{copy / 'tests' / file}.py" + f"::{name}" * bool(name)],
                cwd=copy,
                env=env,
                capture_output=True,
                timeout=LIMIT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"{test} (more than {LIMIT_SECONDS} s)"
        # 1: tests failed. 2: so did an import, which a fault may well break.
        if run.returncode in (1, 2):
            return test
        if run.returncode:
            raise RuntimeError(f"pytest could not run {test}: {run.stdout.decode()[-2000:]}")
    return None


def found_by(fault: Fault, copy: pathlib.Path, compiled: pathlib.Path) -> str | None:
    """The first tests that fail on a copy with a fault, which is then mended."""
    path = copy / "bdia_jax" / f"{fault.file}.py"
    right = path.read_text()
    path.write_text(text_with(fault))
    try:
        return finder(fault.tests, copy, compiled)
    finally:
        path.write_text(right)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose name or file holds this")
    parser.add_argument("--workers", type=int, default=1, help="faults at a time")
    parser.add_argument("--list", action="store_true", help="check the replacements, run nothing")
    given = parser.parse_args()
    faults = [f for f in FAULTS if given.only in f.name or given.only in f.file]
    for fault in faults:
        compile(text_with(fault), fault.file, "exec")
        for test in fault.tests:
            check_test(test)
    print(f"{len(faults)} faults can be put in", flush=True)
    if given.list:
        return 0
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        compiled = pathlib.Path(folder) / "compiled"
        copies: queue.Queue[pathlib.Path] = queue.Queue()
        for i in range(given.workers):
            copies.put(made_copy(pathlib.Path(folder) / f"copy-{i}"))

        def found(fault: Fault | None) -> str | None:
            copy = copies.get()
            try:
                if fault is not None:
                    return found_by(fault, copy, compiled)
                every = tuple(dict.fromkeys(test for f in faults for test in f.tests))
                return finder(every, copy, compiled)
            finally:
                copies.put(copy)

        if failing := found(None):
            raise RuntimeError(f"{failing} fails without any fault, and would find all of them")
        with concurrent.futures.ThreadPoolExecutor(given.workers) as workers:
            for fault, by in zip(faults, workers.map(found, faults)):
                print(f"{fault.file}: {fault.name}: {by or 'SURVIVES'}", flush=True)
                survivors += [] if by else [fault.name]
    print(f"{len(survivors)} of {len(faults)} survive: {', '.join(survivors) or 'none'}")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
