"""How far the promise of exactness was put to the test, in one table: cases tried, cases passed.

    python experiments/reliability.py                          # everything: half an hour on 2 cores
    python experiments/reliability.py --only blocks precision  # parts; the rest of the table stays

Block types and precisions are audited on the device at hand (a GPU: also with XLA's deterministic
kernels); everything else is the test-suite, on CPU devices, counted. Writes
results/reliability-DEVICE.json and .md.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Literal
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import results
import tyro
from flax import nnx
from tqdm import tqdm

from bdia_jax import files
from bdia_jax.nn import FeedForward, ReversibleStack, SelfAttention, TransformerBlock

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Suite:
    """A part of the test-suite that answers for a row of the table."""

    title: str
    files: tuple[str, ...]
    keyword: str | None = None
    """Of those files, the tests that pytest's -k picks."""
    environment: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Audits:
    """A row of the table that this script measures itself, on the device at hand."""

    title: str


PARTS: dict[str, Suite | Audits] = {
    "tolerance": Suite(
        "Tolerance bits: noise under, at and over the bound; proofs",
        ("test_maps.py", "test_proofs.py", "test_guard.py"),
        "noise or tolerance or deviation or rule or out_of_reach",
    ),
    "blocks": Audits("Audits of block types, by type of number and tolerance bits"),
    "precision": Audits("Audits by type of number and matrix-multiply precision"),
    "settings": Suite(
        "Gradients are those of the forward pass: blocks, types, options in pairs",
        ("test_exactness.py", "test_reversible.py"),
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
    "bad-input": Suite(
        "Bad input: a sensible error that says what is allowed",
        ("test_bad_input.py", "test_docs.py"),
        "bad_input or command_line",
    ),
}

DETERMINISTIC = {"": "", "deterministic": "--xla_gpu_deterministic_ops=true"}
"""XLA's flags by the name of a variant."""


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Cases tried and cases passed, for everything that should hold."""

    only: tuple[
        Literal[
            "tolerance",
            "blocks",
            "precision",
            "settings",
            "sharding",
            "processes",
            "guard",
            "faults",
            "bad-input",
        ],
        ...,
    ] = ()
    """Parts to run; all by default."""
    out: pathlib.Path = ROOT / "experiments" / "results"
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
    audit: Literal["blocks", "precision"] | None = None
    """Used by the script itself: runs audits in this process, and prints them as JSON."""


def main(reliability: Reliability) -> str:
    """Runs the parts asked for, adds them to the table of this device; the table."""
    device = jax.devices()[0].device_kind
    path = reliability.out / f"reliability-{results.device_slug()}.json"
    table = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    table |= {"device": device, "jax": jax.__version__}
    for part in tqdm(reliability.only or PARTS, desc="parts"):
        started = time.monotonic()
        spec = PARTS[part]
        found = (
            run_suite(spec, reliability) if isinstance(spec, Suite) else audits(part, reliability)
        )
        found |= {"title": spec.title, "seconds": round(time.monotonic() - started, 1)}
        table["parts"][part] = found
        files.write_json(path, table)
    text = markdown(table)
    files.write_text(path.with_suffix(".md"), text)
    print(text)
    return text


# ---------------------------------------------------------------------------------------------
# The test-suite, counted
# ---------------------------------------------------------------------------------------------


def run_suite(suite: Suite, reliability: Reliability) -> dict:
    """Runs tests, and counts them.

    A test that tries many cases says how many, by ``record_property("cases", n)``: all passed if
    the test did. Whatever else it records is kept.
    """
    files = [ROOT / "tests" / file for file in suite.files]
    if missing := [file.name for file in files if not file.exists()]:
        return {"tried": 0, "passed": 0, "notes": [f"not there: {', '.join(missing)}"]}
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            f"--junit-xml={report}",
            "-o",
            "junit_family=xunit1",
            "-p",
            "no:cacheprovider",
        ]
        command += ["-n", str(reliability.jobs)] if reliability.jobs > 1 else []
        command += ["-k", suite.keyword] if suite.keyword else []
        ran = subprocess.run(
            [*command, *map(str, files)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | dict(suite.environment),
        )
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report:\n{ran.stdout}\n{ran.stderr}")
        return count(ElementTree.parse(report))


def count(report: ElementTree.ElementTree) -> dict:
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


class LibraryAttention(nnx.Module):
    """Self-attention by ``jax.nn.dot_product_attention``, which picks the device's own kernel."""

    def __init__(self, width: int, heads: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.heads = heads
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)

    def __call__(self, x):
        """Causal attention over all positions."""
        q, k, v = jnp.split(self.qkv(x).reshape(*x.shape[:2], self.heads, -1), 3, axis=-1)
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))


class LibraryBlock(nnx.Module):
    """Pre-norm, of :class:`LibraryAttention`, with the parameters' type free to choose."""

    def __init__(self, width: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norms = nnx.List([nnx.RMSNorm(width, **types) for _ in range(2)])
        self.attention = LibraryAttention(width, width // 32, **types)
        self.up, self.down = (
            nnx.Linear(width, 4 * width, **types),
            nnx.Linear(4 * width, width, **types),
        )

    def __call__(self, x):
        """The update ``h(x)``."""
        a = self.attention(self.norms[0](x))
        return a + self.down(jax.nn.gelu(self.up(self.norms[1](x + a))))


class ConvBlock(nnx.Module):
    """Two 3 × 3 convolutions, each after a group norm."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.GroupNorm(width, 8, dtype=dtype, rngs=rngs) for _ in range(2)])
        self.convs = nnx.List(
            [nnx.Conv(width, width, (3, 3), dtype=dtype, rngs=rngs) for _ in range(2)]
        )

    def __call__(self, x):
        """The update ``h(x)`` of ``[batch, height, width, channels]``."""
        for norm, conv in zip(self.norms, self.convs):
            x = conv(jax.nn.silu(norm(x)))
        return x


def transformer(width: int, local: bool, *, dtype, rngs: nnx.Rngs) -> TransformerBlock:
    """The library's block, with dropout."""
    attention = functools.partial(
        SelfAttention, width, width // 32, 32, dropout=0.1, local=local, dtype=dtype
    )
    return TransformerBlock(width, attention, hidden=4 * width, dropout=0.1, dtype=dtype, rngs=rngs)


def block_types(width: int, dtype, param_dtype=jnp.float32) -> dict:
    """Makers of blocks, functions of ``nnx.Rngs``, by name."""
    types = {"dtype": dtype}
    return {
        "transformer": functools.partial(_make, transformer, width, False, **types),
        "transformer, locality attention": functools.partial(
            _make, transformer, width, True, **types
        ),
        "transformer, dot_product_attention": functools.partial(
            _make, LibraryBlock, width, param_dtype=param_dtype, **types
        ),
        "feed-forward": functools.partial(
            _make, FeedForward, width, 4 * width, dropout=0.1, **types
        ),
        "convolutions": functools.partial(_make, ConvBlock, width, **types),
    }


def _make(kind, *args, rngs: nnx.Rngs, **options):
    return kind(*args, rngs=rngs, **options)


def cases(part: str) -> Iterator[dict]:
    """The settings of each audit of a part."""
    if part == "blocks":
        for block in block_types(32, jnp.float32):
            for dtype in ("float32", "bfloat16"):
                for r in (0, 1, 2):
                    yield {"block": block, "dtype": dtype, "tolerance_bits": r}
        return
    for block in ("transformer", "transformer, dot_product_attention"):
        for dtype in ("float32", "bfloat16", "float16"):
            for precision in ("default", "bfloat16", "tensorfloat32", "highest"):
                yield {"block": block, "dtype": dtype, "precision": precision}
    yield {
        "block": "transformer, dot_product_attention",
        "dtype": "bfloat16",
        "param_dtype": "bfloat16",
    }


def audit(case: dict, r: Reliability) -> dict:
    """One audit, integer by integer: the settings, and what came out."""
    dtype = jnp.dtype(case["dtype"])
    make = block_types(r.width, dtype, jnp.dtype(case.get("param_dtype", "float32")))
    stack = ReversibleStack(
        lambda rngs: make[case["block"]](rngs=rngs),
        r.depth,
        tolerance_bits=case.get("tolerance_bits", 0),
        rngs=nnx.Rngs(0),
    )
    shape = (r.batch, r.length, r.width)
    if case["block"] == "convolutions":
        shape = (r.batch, 16, 16, r.width)
    x = jax.random.normal(jax.random.key(1), shape, dtype)
    with jax.default_matmul_precision(case.get("precision", "default")):
        found = stack.check_reversible(x, key=jax.random.key(2))
    found = dataclasses.asdict(found) | {"exact": found.exact}
    return case | {"advice" if name == "tolerance_bits" else name: v for name, v in found.items()}


def audits(part: str, reliability: Reliability) -> dict:
    """All audits of a part, each variant of XLA's flags in a process of its own."""
    gpu = jax.default_backend() == "gpu"
    variants = DETERMINISTIC if gpu and part == "blocks" else {"": ""}
    rows = []
    for variant, flags in variants.items():
        sizes = [
            f"--{name}={getattr(reliability, name)}"
            for name in ("depth", "width", "length", "batch")
        ]
        ran = subprocess.run(
            [sys.executable, __file__, "--audit", part, *sizes],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ
            | {
                "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
                # This process holds the device, too.
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            },
        )
        rows += [row | {"xla": variant} for row in json.loads(ran.stdout.splitlines()[-1])]
    passed = sum(row.get("exact", False) for row in rows)
    notes = [
        f"{row['block']}, {row['dtype']}, precision {row.get('precision')}: {row['error']}"
        for row in rows
        if "error" in row
    ]
    # What jax cannot compute on a device at all was not tried.
    tried = len(rows) - sum("not supported" in note for note in notes)
    return {"tried": tried, "passed": passed, "notes": notes, "audits": rows}


def run_audits(part: str, reliability: Reliability) -> None:
    """The audits of a part in this process; prints them as JSON."""
    rows = []
    for case in tqdm(list(cases(part)), desc=part):
        try:
            rows.append(audit(case, reliability))
        except Exception as error:  # A setting that a device does not have is a result, too.
            rows.append(case | {"error": f"{type(error).__name__}: {str(error)[:300]}"})
    print(json.dumps(rows))


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


def markdown(table: dict) -> str:
    """Cases tried and passed; then every audit."""
    lines = [
        f"# Reliability: {table['device']}, jax {table['jax']}",
        "",
        "Audits ran on this device, the tests on CPU devices.",
        "",
        "| | cases tried | cases passed |",
        "|---|---:|---:|",
    ]
    parts = [(name, table["parts"][name]) for name in PARTS if name in table["parts"]]
    lines += [f"| {p['title']} | {p['tried']:,} | {p['passed']:,} |" for _, p in parts]
    notes = [f"- {name}: {note}" for name, part in parts for note in part["notes"]]
    lines += ["", *notes] if notes else []
    for _, part in parts:
        if rows := [row for row in part.get("audits", ()) if "error" not in row]:
            lines += ["", f"## {part['title']}", ""]
            lines += _audit_table(rows)
    return "\n".join(lines) + "\n"


def _audit_table(rows: list[dict]) -> list[str]:
    columns = ("block", "dtype", "param_dtype", "precision", "tolerance_bits", "xla")
    settings = [key for key in columns if any(row.get(key) not in (None, "") for row in rows)]
    heads = {"dtype": "type", "param_dtype": "parameters", "tolerance_bits": "r", "xla": "XLA"}
    results = ["compared", "mismatched", "corrected", "largest deviation (grid steps)"]
    lines = [
        "| " + " | ".join([*(heads.get(key, key) for key in settings), *results]) + " |",
        "|" + "---|" * len(settings) + "---:|" * len(results),
    ]
    for row in rows:
        cells = [str(row.get(key, "")) for key in settings]
        cells += [f"{row['compared']:,}", f"{row['mismatched']:,}", f"{row['corrected']:,}"]
        lines.append("| " + " | ".join([*cells, f"{row['deviation']:.3g}"]) + " |")
    return lines


if __name__ == "__main__":
    given = tyro.cli(Reliability, description=__doc__)
    if given.audit:
        run_audits(given.audit, given)
    else:
        main(given)
