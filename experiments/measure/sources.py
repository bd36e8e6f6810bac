"""The code that a result depends on, as a hash of what it computes.

Comments and layout do not change the hash, nor does what is refused, and in which words: no number
that was measured depends on it.
"""

from __future__ import annotations

import ast
import hashlib
import io
import pathlib
import subprocess
import tokenize
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).resolve().parents[2]

CORE = tuple(
    f"bdia_jax/{name}.py"
    for name in (
        "grid",
        "maps",
        "side_bits",
        "steps",
        "memories",
        "adjoints",
        "arguments",
        "checks",
        "gradients",
        "states",
        "pinning",
        "online",
        "direct",
        "checkpoint",
        "reversible",
    )
)
"""What a scan computes, forward and backward."""
AUDIT = ("bdia_jax/check.py",)
COUPLED = ("bdia_jax/coupling.py", "bdia_jax/nn/coupled.py")
LAYERS = (
    *(f"bdia_jax/nn/{n}.py" for n in ("stacked", "stack", "updates", "pure", "blocks", "dropout")),
    *(f"bdia_jax/nn/{n}.py" for n in ("chunks", "configs", "placement")),
    *(f"bdia_jax/nn/{n}.py" for n in ("settings", "decoder_config", "positions", "rotary_scaling")),
    *("bdia_jax/nn/linear.py", "bdia_jax/nn/attention/*.py"),
)
"""What models are made of."""
TEXT_LAYERS = (
    *LAYERS,
    *(f"bdia_jax/nn/{n}.py" for n in ("text_blocks", "positions", "decoder", "losses", "caps")),
)
MODELS = (*TEXT_LAYERS, "bdia_jax/nn/encoder_decoder.py", "bdia_jax/nn/vit.py")
ORDINARY_STEP = tuple(
    f"bdia_jax/train/{n}.py"
    for n in ("step", "norms", "optimizers", "blockwise", "rounding", "schedules")
)
"""A training step without updates in the backward pass."""
STEP = (*ORDINARY_STEP, "bdia_jax/train/in_backward.py")
"""A training step. The loop around it changes nothing that is measured."""
TEXTS = tuple(f"bdia_jax/data/{n}.py" for n in ("text", "tokenizers", "packing", "batches"))
"""Texts as batches of tokens."""


def files(patterns: Iterable[str]) -> list[pathlib.Path]:
    """The files that some patterns name, relative to the repository.

    Raises:
      FileNotFoundError: for a pattern that names none.
    """
    found: set[pathlib.Path] = set()
    for pattern in patterns:
        if not (some := [*ROOT.glob(pattern)]):
            raise FileNotFoundError(f"a result depends on {pattern}, and there is no such file")
        found.update(some)
    return sorted(found)


def digest(patterns: Iterable[str]) -> str:
    """A hash of some files' code."""
    found = hashlib.sha256()
    for path in files(patterns):
        code = bare(path.read_text(encoding="utf-8"))
        found.update(f"{path.relative_to(ROOT)}\n{code}\n".encode())
    return found.hexdigest()[:16]


def bare(code: str) -> str:
    """Python without comments, docstrings, white space, and errors with the checks that raise them.

    What is left says what is computed, if nothing is refused. Cut by position, so that every
    version of Python finds the same.
    """
    lines = code.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    cuts = [
        (starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1])
        for token in tokenize.generate_tokens(io.StringIO(code).readline)
        if token.type == tokenize.COMMENT
    ]

    def place(line: int | None, column: int | None) -> int:
        assert line is not None
        # ast counts bytes.
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    for node in ast.walk(ast.parse(code)):
        # Also a string below a field, which documents it.
        text = isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)
        if text or _only_refuses(node):
            ends = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
            cuts.append(ends)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name, call = node.exc.func, node.exc
            cuts.append(
                (
                    place(name.end_lineno, name.end_col_offset),
                    place(call.end_lineno, call.end_col_offset),
                )
            )
    kept, end = [], 0
    for start, stop in sorted(cuts):
        kept.append(code[end:start])
        end = max(end, stop)
    return "".join("".join([*kept, code[end:]]).split())


def _only_refuses(node: ast.AST) -> bool:
    """Whether it is a check that raises an error, and does nothing else."""
    return (
        isinstance(node, ast.If)
        and not node.orelse
        # One that is raised again in a handler decides what is caught.
        and all(isinstance(inner, ast.Raise) and inner.exc is not None for inner in node.body)
        # That would be known afterwards, too.
        and not any(isinstance(inner, ast.NamedExpr) for inner in ast.walk(node.test))
    )


def same_at(commit: str, patterns: Iterable[str]) -> bool:
    """Whether the code of a commit is that which is here."""
    try:
        return all(
            bare(_git("show", f"{commit}:{path.relative_to(ROOT)}"))
            == bare(path.read_text(encoding="utf-8"))
            for path in files(patterns)
        )
    except subprocess.CalledProcessError:
        # A file is new since, or the clone does not reach back so far.
        return False


def commit(patterns: Iterable[str]) -> tuple[str | None, bool | None]:
    """The commit of the repository, and whether some files are as in it; None outside of one."""
    names = [str(path.relative_to(ROOT)) for path in files(patterns)]
    try:
        head = _git("rev-parse", "HEAD")
        return head.strip(), not _git("status", "--porcelain", "--", *names).strip()
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
