"""Is every integer of every block reconstructed? Counted, for a covering set of settings.

    python experiments/exactness.py                          # 100 million integers
    python experiments/exactness.py --quick --workers 16     # the same cases, small, side by side

Every pair of settings (type of number, precision of products, dropout, m, signs, r, l, depth,
block, parts as steps, update in the backward pass) meets in one of the cases; models of the library
follow. For each case, three programs run forward
and backward:

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
import itertools
import logging
import math
import pathlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import command as commands
import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax import (
    BDIA,
    BackwardReport,
    Online,
    Step,
    Update,
    check_reversible,
    grid,
    reversible_scan,
)
from bdia_jax.nn import (
    DecoderConfig,
    EncoderDecoderConfig,
    Probe,
    ViTConfig,
    llama,
)
from measure import records, sources
from measure.blocks import make_block, stacked_params
from measure.networks import KINDS
from measure.side_by_side import in_processes

FACTORS = {
    "dtype": ("float32", "bfloat16", "float16"),
    "dropout": (0.0, 0.1),
    "m": (1, 0, 2, 3, 4),
    "signs": ("block", "sample", "minus", "plus"),
    "r": (0, 1, 2),
    "frac_bits": (9, 5, 0, -2),
    "precision": ("default", "bfloat16", "tensorfloat32", "highest"),
    "depth": (1, 2, 6, 48),
    "block": ("attention", "mlp", "convolution"),
    "parts_as_steps": (False, True),
    "update_in_backward": (False, True),
}
SHAPES = {"attention": (32, 128), "mlp": (32, 128), "convolution": (16, 16, 16)}
"""Of one sample: 4096 elements each."""
DEPENDS = (
    *sources.CORE,
    *sources.AUDIT,
    *sources.MODELS,
    "experiments/measure/exactness.py",
    "experiments/measure/blocks.py",
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
# Cases: what is run
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stack:
    """Blocks, what they are given, and how they are scanned."""

    block: Callable[..., jax.Array] | tuple[Callable[..., jax.Array], ...]
    params: Any
    x: jax.Array
    step: Step
    consts: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table."""

    settings: dict[str, Any]
    stacks: list[Stack]
    gradient: Callable[[jax.Array], Any]
    """From a key to a tree with the reports of the backward pass, by the program that trains."""


def covering(factors: dict[str, tuple]) -> list[dict[str, Any]]:
    """Rows of settings in which every pair of settings meets; greedily few."""
    draw = random.Random(0)

    def pairs(row):
        return set(itertools.combinations(row.items(), 2))

    missing = {
        ((a, x), (b, y))
        for (a, some), (b, others) in itertools.combinations(factors.items(), 2)
        for x, y in itertools.product(some, others)
    }
    chosen = []
    while missing:
        # The best of some: there are too many rows to look at all.
        some = [{name: draw.choice(f) for name, f in factors.items()} for _ in range(300)]
        best = max(some, key=lambda row: len(pairs(row) & missing))
        if pairs(best) & missing:
            chosen.append(best)
            missing -= pairs(best)
    return chosen


def block_case(row: dict[str, Any], integers: int, seed: int) -> Case:
    """A case of the covering set."""
    shape = SHAPES[row["block"]]
    batch = math.ceil(integers / (row["depth"] * math.prod(shape)))
    # On a coarse grid, larger states and updates: otherwise all updates would be rounded to 0.
    scale = max(1.0, 2.0 ** (1 - row["frac_bits"]))
    weights_key, x_key = jax.random.split(jax.random.key(seed))
    x = scale * jax.random.normal(x_key, (batch, *shape))
    params = stacked_params(
        row["block"], weights_key, row["depth"], shape[-1], 2 * shape[-1], gain=scale
    )
    block = make_block(row["block"], dropout=row["dropout"], parts=row["parts_as_steps"])
    step = BDIA(2.0 ** -row["m"], row["signs"], row["frac_bits"], row["r"])
    stack = Stack(block, params, x.astype(row["dtype"]), step)

    def descend(params, grads, state):
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), state

    @jax.jit
    def gradient(params, x, key):
        def loss(probe, params, x):
            update = None
            if row["update_in_backward"]:
                update = Update(descend, params, jnp.zeros(row["depth"]))
            adjoint = Online(probe, update)
            y = reversible_scan(block, params, x, key=key, step=step, adjoint=adjoint)
            return jnp.mean(jnp.sin(y.astype(jnp.float32)))

        report, *_ = gradients = jax.grad(loss, (0, 1, 2))(
            BackwardReport.zeros(row["depth"]), params, x
        )
        return report, gradients

    return Case(row, [stack], lambda key: gradient(params, stack.x, key)[0])


SMALL = {"width": 128, "depth": 6, "dropout": 0.1, "max_length": 128}
TWO = {"width": 128, "dropout": 0.1, "max_length": 128, "source_vocab": 256, "heads": 4}
MODELS: dict[str, Any] = {
    "ViT": ViTConfig(),
    "GPT-2": DecoderConfig(**SMALL),
    "Llama": llama(kv_heads=2, **SMALL),
    "Qwen 2": llama(kv_heads=2, qkv_bias=True, tied_head=True, **SMALL),
    "Qwen 3": llama(kv_heads=2, head_dim=64, qk_norm=True, **SMALL),
    "encoder-decoder": EncoderDecoderConfig(**TWO),
}
"""ViT of the size that is trained on CIFAR, small decoders of all families, and both stacks of an
encoder-decoder."""


def model_case(name: str, settings: dict[str, Any], integers: int, seed: int) -> Case:
    """A model of the library, with dropout."""
    config = dataclasses.replace(MODELS[name], **settings)
    model = KINDS[type(config)](config, rngs=nnx.Rngs(seed))
    stacks = {
        path[-1]: stack for path, stack in nnx.iter_modules(model) if hasattr(stack, "adjoint")
    }
    blocks = sum(stack.depth for stack in stacks.values())
    length = config.length if name == "ViT" else config.max_length
    batch = math.ceil(integers / (blocks * length * config.width))
    key = jax.random.key(seed)
    x = jax.random.normal(key, (batch, length, config.width), config.dtype)
    angles, present = None, jnp.ones((batch, length), jnp.int32)
    if getattr(config, "positions", None) == "rotary":
        angles = model.angles(jnp.broadcast_to(jnp.arange(length), (batch, length)))
    given = {"blocks": () if name == "ViT" else (angles, None)}
    given |= {"encoder": (None, present), "decoder": (x[::-1], present, present)}

    if name == "ViT":
        images = (batch, config.image_size, config.image_size, config.channels)
        inputs = (jax.random.normal(key, images),)
    else:
        sides = 2 if name == "encoder-decoder" else 1
        inputs = tuple(jax.random.randint(key, (sides, batch, length), 0, 256))
    graph, params, probes, rest = nnx.split(model, nnx.Param, Probe, ...)

    @jax.jit
    def gradient(params, probes, inputs, key):
        def loss(probes, params):
            y = nnx.merge(graph, params, probes, rest)(*inputs, key=key)
            return jnp.mean(jnp.sin(y))

        return jax.grad(loss, (0, 1))(probes, params)

    stack = next(iter(stacks.values()))
    about = {"block": name, "m": stack.step.m} | dataclasses.asdict(config) | {"depth": blocks}
    return Case(
        about,
        [Stack(*s.functional(), x, s.step, given[where]) for where, s in stacks.items()],
        lambda key: gradient(params, probes, inputs, key)[0],
    )


def cases(e: Exactness) -> Iterator[Callable[[], Case]]:
    """What makes each of them, anywhere: blocks, then models."""
    integers = 1_000_000 if e.quick else e.integers
    for row in covering(FACTORS):
        yield functools.partial(block_case, row, integers, e.seed)
    for name, dtype, parts in itertools.product(MODELS, ("float32", "bfloat16"), (False, True)):
        settings = {"dtype": dtype, "parts_as_steps": parts}
        if name == "ViT":
            size = {"width": 64, "heads": 2, "head_dim": 32, "hidden": 64} if e.quick else {}
            yield functools.partial(model_case, name, settings | size, integers, e.seed)
        else:
            # γ as for pretrained networks.
            settings |= {"gamma": 1 / 16, "signs": "sample"}
            yield functools.partial(model_case, name, settings, integers // 2, e.seed)


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
    made = [*cases(e)]
    if e.workers > 1:
        # Models take longest, and are begun with.
        found = [*in_processes(run, reversed(made), e.workers)][::-1]
    else:
        found = [*map(run, made)]
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
