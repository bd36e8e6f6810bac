"""Is every integer of every block reconstructed? Counted, for a covering set of settings.

    python experiments/exactness.py                          # at least 6 million integers a case
    python experiments/exactness.py --quick --workers 16     # the same cases, small, side by side

Every pair of settings (type of number, precision of products, dropout, m, signs, r, l, depth,
block, parts as steps, update in the backward pass) meets in one of the cases; models of the library
follow. For each case, three programs run forward and backward:

- *pinned audit*: ``bdia_jax.check_reversible`` compares every integer of every step with the
  state that the forward pass saw; every step starts from the true state, so that an error is
  counted where it arises.
- *gradient*: the training program itself, in which nothing is stored to compare with: its own
  report of the samples whose checksums did not match.
- *naive*: what one writes first (:func:`naive_mismatches`), without barriers: the share of
  integers that it gets wrong from true states, as in the audit, and in the state that it has
  itself reconstructed, from which it really goes on: there errors grow from step to step. (The
  audit needs no second number: nothing wrong in any step means nothing to grow.)

Writes exactness-DEVICE.jsonl. The exit status is 1 if an integer of the pinned scan was
mismatched, or a case left the range of its numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bdia_jax import BackwardReport, Step, check_reversible, grid
from bdia_jax.train import command as commands
from measure import records, sources
from measure.exactness_cases import Case, cases
from measure.side_by_side import in_processes

DEPENDS = (
    *sources.CORE,
    *sources.AUDIT,
    *sources.MODELS,
    *(f"experiments/measure/{name}.py" for name in ("exactness", "exactness_cases", "blocks")),
)


@dataclasses.dataclass(frozen=True)
class Exactness:
    """Is every integer of every block reconstructed? Counted, for a covering set of settings."""

    integers: int = 6_000_000
    """At least so many integers per case; the batch size follows from it."""
    quick: bool = False
    """The same cases with 1,000,000 integers each, and a smaller model."""
    workers: int = 1
    """Processes that the cases are spread over: most of the time is the compiler's."""
    within: float | None = None
    """Seconds after which no further case is begun; what was found until then is written."""
    seed: int = 0
    """Seed of weights, inputs, dropout and γ."""
    out: pathlib.Path | None = None
    """Folder for the results; by default runs/results."""


# ---------------------------------------------------------------------------------------------
# The naive recomputation
# ---------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def naive_mismatches(block, step: Step, params, x, consts, key, from_true_states):
    """Integers that the naive backward pass gets wrong, per block.

    The forward pass scans the plain block; the backward pass takes the update from ``jax.vjp``
    of the block, which it needs anyway. Same steps, same order; what is missing is the pinning.
    """
    parts = block if isinstance(block, tuple) else (block,)
    depth, wide = len(jax.tree.leaves(params)[0]), grid.accumulator(x.dtype)
    numbers = jnp.arange(depth)

    def drawn(k, p):
        sign_key, part_key = jax.random.split(jax.random.fold_in(key, len(parts) * k + p))
        sign = step.sign(sign_key, key, len(x))
        return jnp.where(k + p == 0, 0, sign), part_key

    def read(n):
        return grid.from_grid(n, step.frac_bits, x.dtype)

    def up(carry, inputs):
        n_prev, n = carry
        params, k = inputs
        states = []
        for p, part in enumerate(parts):
            sign, part_key = drawn(k, p)
            h = part(params, read(n), part_key, *consts)
            n_next, _ = step.up(n_prev, n, h.astype(wide), sign)
            states.append((n_prev, step.keep(n_prev)))
            n_prev, n = n, n_next
        return (n_prev, n), states

    def down(carry, inputs):
        n_next, n, a_next, a = carry
        params, k, states = inputs
        d_params, count = jax.tree.map(jnp.zeros_like, params), 0
        for p in reversed(range(len(parts))):
            (sign, part_key), (true_prev, kept) = drawn(k, p), states[p]
            h, vjp = jax.vjp(
                lambda params, x, part=parts[p], key=part_key: part(params, x, key, *consts),
                params,
                read(n),
            )
            found = step.down(n_next, n, h.astype(wide), sign, kept)
            d_h, a, a_prev = step.pull(a_next, a, sign)
            d_here, d_x = vjp(d_h.astype(h.dtype))
            d_params = jax.tree.map(jnp.add, d_params, d_here)
            # The first step is an Euler step, and cannot be taken back: its q is compared.
            first = (sign == 0).reshape(-1, *(1,) * (x.ndim - 1))
            count += jnp.sum(jnp.where(first, found.q != n_next, found.n_prev != true_prev))
            n_prev = jnp.where(from_true_states, true_prev, found.n_prev)
            n_next, n, a_next, a = n, n_prev, a + d_x.astype(wide), a_prev
        return (n_next, n, a_next, a), (d_params, count)

    n = grid.to_grid(x.astype(wide), step.frac_bits)
    (n_prev, n), states = jax.lax.scan(up, (n, n), (params, numbers))
    a = jnp.cos(grid.from_grid(n, step.frac_bits, wide))
    (*_, a), (d_params, wrong) = jax.lax.scan(
        down, (n, n_prev, a, jnp.zeros_like(a)), (params, numbers, states), reverse=True
    )
    return wrong, a, d_params


# ---------------------------------------------------------------------------------------------
# The measurement
# ---------------------------------------------------------------------------------------------


def measure(case: Case, key: jax.Array) -> dict[str, Any]:
    """Counts of one case."""
    started = time.monotonic()
    audits = [
        check_reversible(s.block, s.params, s.x, key=key, consts=s.consts, step=s.step)
        for s in case.stacks
    ]

    def naive(from_true_states: bool) -> int:
        given = [(s.block, s.step, s.params, s.x, s.consts) for s in case.stacks]
        return sum(int(naive_mismatches(*g, key, from_true_states)[0].sum()) for g in given)

    is_report = lambda leaf: isinstance(leaf, BackwardReport)  # noqa: E731
    leaves = jax.tree.leaves(case.gradient(key), is_leaf=is_report)
    reports = [leaf for leaf in leaves if is_report(leaf)]
    return {
        "case": case.settings,
        "compared": sum(a.compared for a in audits),
        "mismatched": sum(a.mismatched for a in audits),
        "samples mismatched in the gradient": sum(int(r.mismatched.sum()) for r in reports),
        "finite": all(a.finite for a in audits),
        "naive, from true states": naive(True),
        "naive, from its own": naive(False),
        "seconds": round(time.monotonic() - started, 1),
    }


COUNTS = (
    "compared",
    "mismatched",
    "samples mismatched in the gradient",
    "naive, from true states",
    "naive, from its own",
)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row per case."""
    names = {"block": "block", "dtype": "type", "precision": "products", "dropout": "dropout"}
    names |= {"m": "m", "signs": "signs", "r": "r", "frac_bits": "l", "depth": "blocks"}
    names |= {"parts_as_steps": "parts", "update_in_backward": "update"}
    header = [*names.values()]
    lines = []
    for row in rows:
        c = {"r": row["case"].get("tolerance_bits")} | row["case"]
        told = [c.get(name, "") for name in names]
        cells = [("yes" * v) if isinstance(v, bool) else str(v) for v in told]
        lines.append([*cells, *(f"{row[name]:,}" for name in COUNTS)])
    sums = [f"{total:,}" for total in totals(rows).values()]
    lines.append(["all", *[""] * (len(names) - 1), *sums])
    return records.markdown([*header, *COUNTS], lines)


def totals(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Sums over all cases."""
    return {name: sum(row[name] for row in rows) for name in COUNTS}


def measured(make: Callable[[], Case], seed: int, until: float) -> dict[str, Any] | None:
    """A row; None if it is too late to begin. A case that cannot be run here is not exact."""
    if time.time() > until:
        return None
    case = make()
    try:
        with jax.default_matmul_precision(case.settings.get("precision", "default")):
            row = measure(case, jax.random.key(seed))
    except jax.errors.JaxRuntimeError as error:
        told = {"finite": False, "error": str(error)[:2000]}
        row = {"case": case.settings} | dict.fromkeys(COUNTS, 0) | told
    print(table([row]).splitlines()[2], row.get("error", ""), flush=True)
    return row


def main(e: Exactness) -> bool:
    """Runs all cases; whether all of them are exact."""
    until = math.inf if e.within is None else time.time() + e.within
    run = functools.partial(measured, seed=e.seed + 1, until=until)
    made = [*cases(1_000_000 if e.quick else e.integers, e.seed, quick=e.quick)]
    # Models take longest, and are begun with.
    found = [*in_processes(run, reversed(made), e.workers)][::-1]
    rows = [row for row in found if row is not None]
    sums = totals(rows)
    exact = all(row["finite"] for row in rows) and not (
        sums["mismatched"] or sums["samples mismatched in the gradient"]
    )
    left_out = len(found) - len(rows)
    note = f"{left_out} of {len(found)} cases were left out for want of time." if left_out else None
    path = records.write("exactness", rows, DEPENDS, settings=e, out=e.out, note=note)
    print(f"\n{table(rows)}\n\n{path}")
    if not exact:
        raise RuntimeError("not exact: see the table")
    return exact


def command() -> None:
    """From the command line."""
    commands.run(main, Exactness, __doc__, told=logging.WARNING)
