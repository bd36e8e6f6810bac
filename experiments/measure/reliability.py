"""How far the promise of exactness was put to the test, in one table: cases tried, cases passed.

    python experiments/reliability.py                          # everything
    python experiments/reliability.py --only blocks precision  # parts; the rest of the table stays

Block types and precisions are audited on the device at hand; everything else is the test-suite, on
CPU devices, counted. Writes reliability-DEVICE.jsonl.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, Literal
from xml.etree import ElementTree

import jax
from tqdm import tqdm

from bdia_jax import BDIA, check_reversible
from bdia_jax.train import command as commands
from measure import odd_files, records, sources
from measure.blocks import PARTS as BLOCKS
from measure.blocks import make_block, stacked_params


@dataclasses.dataclass(frozen=True)
class Suite:
    """A part of the test-suite that answers for a row of the table."""

    title: str
    files: tuple[str, ...] = ()
    """None of what this script measures itself, on the device at hand."""
    keyword: str | None = None
    """Of those files, the tests that pytest's -k picks."""
    environment: tuple[tuple[str, str], ...] = ()


PARTS: dict[str, Suite] = {
    "tolerance": Suite(
        "Tolerance bits: noise under, at and over the bound; proofs",
        ("test_maps.py", "test_proofs.py", "test_guard.py"),
        "noise or tolerance or deviation or rule or out_of_reach",
    ),
    "blocks": Suite("Audits of block types, by type of number and tolerance bits"),
    "precision": Suite("Audits by type of number and matrix-multiply precision"),
    "settings": Suite(
        "Gradients are those of the forward pass: blocks, types, options in pairs",
        ("test_exactness.py", "test_reversible.py", "test_adjoints.py", "test_parts.py"),
    ),
    "sharding": Suite("Eight devices: data, fully sharded, tensor parallel", ("test_sharding.py",)),
    "processes": Suite("Two processes", ("test_distributed.py",)),
    "guard": Suite(
        "Guard under attack: flipped bits, exchanged states, other keys and parameters",
        ("test_guard.py",),
        "not noise",
    ),
    "faults": Suite(
        "SIGKILL at twenty random moments, SIGTERM, full disk, damaged checkpoints",
        ("test_faults.py",),
        environment=(("BDIA_JAX_KILLS", "20"),),
    ),
    "files": Suite("Files and folders that differ from what is expected: read right, or refused"),
    "bad-input": Suite(
        "Bad input: a sensible error that says what is allowed",
        ("test_bad_input.py", "test_docs.py"),
        "bad_input or command_line",
    ),
}
Part = Literal[tuple(PARTS)]

DEPENDS = (
    *sources.CORE,
    *sources.AUDIT,
    "experiments/measure/reliability.py",
    "experiments/measure/blocks.py",
    *odd_files.DEPENDS,
    *dict.fromkeys(f"tests/{file}" for suite in PARTS.values() for file in suite.files),
)


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Cases tried and cases passed, for everything that should hold."""

    only: tuple[Part, ...] = ()
    """Parts to run; all by default."""
    out: pathlib.Path = records.FOLDER
    """Folder for the table."""
    jobs: int = 2
    """Tests that run at the same time."""
    depth: int = 6
    """Blocks of an audited stack."""
    width: int = 256
    """Features of an audited stack."""
    length: int = 64
    """Positions of an audited stack."""
    batch: int = 8
    """Samples of an audit."""


def main(r: Reliability) -> str:
    """Runs the parts asked for, adds them to what this code found of the others; the table."""
    path, rows = records.path_of("reliability", r.out), {}
    if path.exists() and (before := records.read(path)).about["code"] == sources.digest(DEPENDS):
        rows = {row["part"]: row for row in before.rows}
    for part in tqdm(r.only or PARTS, desc="parts"):
        started, suite = time.monotonic(), PARTS[part]
        if suite.files:
            found = run_suite(suite, r.jobs)
        else:
            found = odd_files.counted(r.out) if part == "files" else audits(part, r)
        seconds = round(time.monotonic() - started, 1)
        rows[part] = {"part": part, "title": suite.title, "seconds": seconds} | found
        some = [rows[part] for part in PARTS if part in rows]
        records.write("reliability", some, DEPENDS, settings=r, out=r.out)
    text = table(some)
    print(f"\n{text}\n\nSee {path}")
    return text


# ---------------------------------------------------------------------------------------------
# The test-suite, counted
# ---------------------------------------------------------------------------------------------


def run_suite(suite: Suite, jobs: int) -> dict[str, Any]:
    """Runs tests, and counts them.

    A test that tries many cases says how many, by ``record_property("cases", n)``: all passed if
    the test did. Whatever else it records is kept.
    """
    files = [sources.ROOT / "tests" / file for file in suite.files]
    if missing := [file.name for file in files if not file.exists()]:
        return {"tried": 0, "passed": 0, "notes": [f"not there: {', '.join(missing)}"]}
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "junit.xml"
        options = "-q -o junit_family=xunit1 -p no:cacheprovider" + f" -n {jobs}" * (jobs > 1)
        only = ["-k", suite.keyword] if suite.keyword else []
        words = [*options.split(), f"--junit-xml={report}", *only, *map(str, files)]
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", *words],
            cwd=sources.ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | dict(suite.environment),
        )
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report:\n{ran.stdout}\n{ran.stderr}")
        return count(ElementTree.parse(report))


def count(report: ElementTree.ElementTree) -> dict[str, Any]:
    """Cases of a JUnit report: tried and passed, what was skipped or failed, what was recorded."""
    tried = passed = tests = 0
    notes, recorded = [], {}
    for test in report.iter("testcase"):
        label = f"{test.get('classname').rpartition('.')[2]}::{test.get('name')}"
        properties = {p.get("name"): p.get("value") for p in test.iter("property")}
        if (skipped := test.find("skipped")) is not None:
            notes.append(f"skipped: {label}: {skipped.get('message')}")
            continue
        cases = int(properties.pop("cases", 1))
        broken = test.find("failure") is not None or test.find("error") is not None
        tests, tried, passed = tests + 1, tried + cases, passed + cases * (not broken)
        if broken:
            notes.append(f"failed: {label}")
        if properties:
            recorded[label] = properties
    return {"tests": tests, "tried": tried, "passed": passed, "notes": notes, "recorded": recorded}


# ---------------------------------------------------------------------------------------------
# Audits, on the device at hand
# ---------------------------------------------------------------------------------------------


def cases(part: Part) -> Iterator[dict[str, Any]]:
    """The settings of each audit of a part."""
    if part == "blocks":
        for block, dtype, r in itertools.product(BLOCKS, ("float32", "bfloat16"), (0, 1, 2)):
            yield {"block": block, "dtype": dtype, "tolerance_bits": r}
        return
    for block, dtype, precision in itertools.product(
        ("attention", "dot_product_attention"),
        ("float32", "bfloat16", "float16"),
        ("default", "bfloat16", "tensorfloat32", "highest"),
    ):
        yield {"block": block, "dtype": dtype, "precision": precision}
    yield {"block": "attention", "dtype": "bfloat16", "parameters": "bfloat16"}


def audit(case: dict[str, Any], r: Reliability) -> dict[str, Any]:
    """One audit, integer by integer: the settings, and what came out."""
    kind = case["block"]
    params = stacked_params(kind, jax.random.key(0), r.depth, r.width, 4 * r.width)
    params = jax.tree.map(lambda p: p.astype(case.get("parameters", "float32")), params)
    positions = (16, 16) if kind == "convolution" else (r.length,)
    x = jax.random.normal(jax.random.key(1), (r.batch, *positions, r.width), case["dtype"])
    with jax.default_matmul_precision(case.get("precision", "default")):
        found = check_reversible(
            make_block(kind, dropout=0.1),
            params,
            x,
            key=jax.random.key(2),
            step=BDIA(tolerance_bits=case.get("tolerance_bits", 0)),
        )
    told = {"compared": found.compared, "mismatched": found.mismatched}
    told |= {"corrected": found.corrected, "deviation": found.deviation}
    return case | told | {"exact": found.exact}


def audits(part: Part, r: Reliability) -> dict[str, Any]:
    """All audits of a part. A setting that a device does not have was not tried."""
    rows, notes, missing = [], [], 0
    for case in tqdm([*cases(part)], desc=part):
        try:
            rows.append(audit(case, r))
        except Exception as error:
            told = ", ".join(map(str, case.values()))
            notes.append(f"{told}: {type(error).__name__}: {str(error)[:300]}")
            missing += "not supported" in notes[-1]
    tried = len(rows) + len(notes) - missing
    passed = sum(row["exact"] for row in rows)
    return {"tried": tried, "passed": passed, "notes": notes, "audits": rows}


def table(rows: list[dict[str, Any]]) -> str:
    """Cases tried and passed."""
    lines = [[row["title"], f"{row['tried']:,}", f"{row['passed']:,}"] for row in rows]
    sums = [f"{sum(row[name] for row in rows):,}" for name in ("tried", "passed")]
    return records.markdown(["", "cases tried", "cases passed"], [*lines, ["all", *sums]])


def command() -> None:
    """From the command line."""
    commands.run(main, Reliability, __doc__, told=logging.WARNING)
