"""Is every integer of every block reconstructed? Counted, for a covering set of settings.

    python experiments/exactness.py            # 100 million integers; ten minutes on 2 cores
    python experiments/exactness.py --quick    # the same cases, small; two minutes

Every pair of settings (type of number, dropout, m, l, depth, block) meets in one of the cases;
models of the library follow. For each case, three programs run forward and backward:

- *pinned audit*: ``bdia_jax.check_reversible`` compares every integer of every block with the
  state that the forward pass saw; every block starts from the true state, so that an error is
  counted where it arises.
- *gradient*: the training program itself, in which nothing is stored to compare with: its own
  report of the samples whose checksums did not match.
- *naive*: what one writes first (:func:`naive_mismatches`), without barriers: the share of
  integers that it gets wrong from true states, as in the audit, and in the state that it has
  itself reconstructed, from which it really goes on: there errors grow from block to block. (The
  audit needs no second number: nothing wrong in any block means nothing to grow.)

Writes results/exactness-DEVICE.json. The exit status is 1 if an integer of the pinned scan was
mismatched, or a case left the range of its numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pathlib
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import results
import tyro
from blocks import BLOCKS, stacked_params
from flax import nnx

from bdia_jax import BackwardReport, check_reversible, grid, maps, reversible_scan
from bdia_jax.nn import (
    Decoder,
    DecoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    Probe,
    ViT,
    ViTConfig,
    llama,
)
from bdia_jax.nn.decoder import rotary_angles

FACTORS = {
    "dtype": ("float32", "bfloat16", "float16"),
    "dropout": (0.0, 0.1),
    "m": (0, 1, 2),
    "frac_bits": (9, 5, 0, -2),
    "depth": (1, 2, 6, 48),
    "block": ("attention", "mlp", "convolution"),
}
SHAPES = {"attention": (32, 128), "mlp": (32, 128), "convolution": (16, 16, 16)}
"""Of one sample: 4096 elements each."""


@dataclasses.dataclass(frozen=True)
class Exactness:
    """Is every integer of every block reconstructed? Counted, for a covering set of settings."""

    integers: int = 6_000_000
    """At least so many integers per case; the batch size follows from it."""
    quick: bool = False
    """The same cases with 1,000,000 integers each, and a smaller model."""
    seed: int = 0
    """Seed of weights, inputs, dropout and γ."""
    out: pathlib.Path | None = None
    """Folder for the results; by default experiments/results."""


# ---------------------------------------------------------------------------------------------
# Cases: what is run
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stack:
    """Blocks, what they are given, and how they are scanned."""

    block: Callable[..., jax.Array]
    params: Any
    x: jax.Array
    gamma: float
    frac_bits: int


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table."""

    settings: dict[str, Any]
    stacks: list[Stack]
    gradient: Callable[[jax.Array], Any]
    """From a key to the reports of the backward pass, by the program that trains."""


def covering(factors: dict[str, tuple]) -> list[dict[str, Any]]:
    """Rows of settings in which every pair of settings meets; greedily few."""
    rows = [dict(zip(factors, row)) for row in itertools.product(*factors.values())]
    # Where several rows are equally good, any, rather than always the first settings.
    random.Random(0).shuffle(rows)

    def pairs(row):
        return set(itertools.combinations(row.items(), 2))

    missing = set().union(*map(pairs, rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(pairs(row) & missing))
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
    block = functools.partial(BLOCKS[row["block"]], dropout=row["dropout"])
    stack = Stack(block, params, x.astype(row["dtype"]), 2.0 ** -row["m"], row["frac_bits"])

    @jax.jit
    def gradient(params, x, key):
        def loss(probe, params, x):
            y = reversible_scan(
                block,
                params,
                x,
                key=key,
                gamma=stack.gamma,
                frac_bits=stack.frac_bits,
                probe=probe,
            )
            return jnp.mean(jnp.sin(y.astype(jnp.float32)))

        report, *_ = gradients = jax.grad(loss, (0, 1, 2))(
            BackwardReport.zeros(row["depth"]), params, x
        )
        return report, gradients

    return Case(row, [stack], lambda key: gradient(params, stack.x, key)[0])


def vit(dtype: str, integers: int, seed: int, quick: bool) -> Case:
    """A vision transformer of the library, of the size that is trained on CIFAR."""
    small = {"width": 64, "heads": 2, "head_dim": 32, "hidden": 64} if quick else {}
    config = ViTConfig(dtype=dtype, **small)
    model = ViT(config, rngs=nnx.Rngs(seed))
    elements = config.depth * (config.patches + 1) * config.width
    image = (config.image_size, config.image_size, config.channels)
    images = jax.random.normal(jax.random.key(seed), (math.ceil(integers / elements), *image))
    x = model.embedding(images, key=jax.random.key(seed)).astype(dtype)
    stack = Stack(*model.blocks.functional(), x, config.gamma, config.frac_bits)
    return model_case({"model": "ViT", **dataclasses.asdict(config)}, model, images, [stack])


FAMILIES: dict[str, DecoderConfig] = {
    "GPT-2": DecoderConfig(),
    "Llama": llama(kv_heads=2),
    "Qwen 2": llama(kv_heads=2, qkv_bias=True, tied_head=True),
    "Qwen 3": llama(kv_heads=2, head_dim=64, qk_norm=True),
}


def decoder(family: str, dtype: str, integers: int, seed: int) -> Case:
    """A small decoder of a family, with dropout."""
    config = dataclasses.replace(
        FAMILIES[family], dtype=dtype, width=128, depth=6, dropout=0.1, max_length=128
    )
    model = Decoder(config, rngs=nnx.Rngs(seed))
    shape = (math.ceil(integers / (config.depth * config.max_length * config.width)), 128)
    tokens = jax.random.randint(jax.random.key(seed), shape, 0, config.vocab_size)
    angles = None
    if config.positions == "rotary":
        angles = rotary_angles(config, jnp.broadcast_to(jnp.arange(128), shape))
    block, params = model.blocks.functional()
    stack = Stack(
        lambda params, x, key: block(params, x, key, angles, None),
        params,
        model.embedding[...][tokens].astype(dtype),
        config.gamma,
        config.frac_bits,
    )
    return model_case({"model": family, **dataclasses.asdict(config)}, model, tokens, [stack])


def encoder_decoder(dtype: str, integers: int, seed: int) -> Case:
    """A small encoder-decoder, with dropout: both its stacks."""
    config = EncoderDecoderConfig(
        source_vocab=256, width=128, heads=4, max_length=128, dropout=0.1, dtype=dtype
    )
    model = EncoderDecoder(config, rngs=nnx.Rngs(seed))
    blocks = config.encoder_depth + config.decoder_depth
    shape = (math.ceil(integers / (blocks * config.max_length * config.width)), 128)
    tokens = jax.random.randint(jax.random.key(seed), (2, *shape), 0, 256)
    present = jnp.ones(shape, jnp.int32)
    x = model.source_embedding[...][tokens].astype(dtype)
    of_encoder, encoder = model.encoder.functional()
    of_decoder, decoder = model.decoder.functional()
    stacks = [
        Stack(
            lambda params, x, key: of_encoder(params, x, key, None, present),
            encoder,
            x[0],
            config.gamma,
            config.frac_bits,
        ),
        Stack(
            lambda params, y, key: of_decoder(params, y, key, x[0], present, present),
            decoder,
            x[1],
            config.gamma,
            config.frac_bits,
        ),
    ]
    settings = {"model": "encoder-decoder", "depth": blocks, **dataclasses.asdict(config)}
    return model_case(settings, model, tokens, stacks, lambda model, t, key: model(*t, key=key))


def model_case(
    settings: dict[str, Any],
    model: nnx.Module,
    data: Any,
    stacks: list[Stack],
    call: Callable[..., Any] = lambda model, data, key: model(data, key=key),
) -> Case:
    """A case of a Flax model and its stacks."""
    graph, params, probes, rest = nnx.split(model, nnx.Param, Probe, ...)

    @jax.jit
    def gradient(params, probes, data, key):
        def loss(probes, params):
            y = call(nnx.merge(graph, params, probes, rest), data, key)
            return jnp.mean(jnp.sin(y))

        return jax.grad(loss, (0, 1))(probes, params)

    def reports(key):
        found = gradient(params, probes, data, key)[0]
        is_report = lambda leaf: isinstance(leaf, BackwardReport)  # noqa: E731
        return [r for r in jax.tree.leaves(found, is_leaf=is_report) if is_report(r)]

    return Case(settings, stacks, reports)


def cases(e: Exactness) -> Iterator[Case]:
    """All of them: blocks, then models."""
    integers = 1_000_000 if e.quick else e.integers
    for row in covering(FACTORS):
        yield block_case(row, integers, e.seed)
    for dtype in ("float32", "bfloat16"):
        yield vit(dtype, integers, e.seed, e.quick)
        for family in FAMILIES:
            yield decoder(family, dtype, integers // 2, e.seed)
        yield encoder_decoder(dtype, integers // 2, e.seed)


# ---------------------------------------------------------------------------------------------
# The naive recomputation
# ---------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def naive_mismatches(scan: tuple, params, x, key, from_true_states):
    """Integers that the naive backward pass gets wrong, per block.

    The forward pass scans the plain block; the backward pass takes the update from ``jax.vjp``
    of the block, which it needs anyway. Same maps, same order; what is missing is the pinning.
    """
    block, gamma_, frac_bits = scan
    m = maps.gamma_shift(gamma_)
    depth, per_sample = len(jax.tree.leaves(params)[0]), (-1,) + (1,) * (x.ndim - 1)
    keys = jax.random.split(key, depth)
    signs = maps.sample_signs(key, (depth, len(x))).at[0].set(0)

    def q_and_gamma(n, h, sign):
        gamma = sign.reshape(per_sample) * jnp.float32(gamma_)
        y = maps.pre_rounding(grid.from_grid(n, frac_bits), h.astype(jnp.float32), gamma)
        return grid.to_grid(y, frac_bits), gamma

    def up(carry, inputs):
        n_prev, n = carry
        params, key, sign = inputs
        h = block(params, grid.from_grid(n, frac_bits, x.dtype), key)
        q, _ = q_and_gamma(n, h, sign)
        n_next = maps.bdia_step(n_prev, q, sign.reshape(per_sample), m)
        return (n, n_next), (n_prev, maps.side_information(n_prev, m))

    def down(carry, inputs):
        n_next, n, a_next, a = carry
        params, key, sign, true_prev, side = inputs
        x_k = grid.from_grid(n, frac_bits, x.dtype)
        h, vjp = jax.vjp(lambda params, x_k: block(params, x_k, key), params, x_k)
        q, gamma = q_and_gamma(n, h, sign)
        n_prev = maps.bdia_inverse(n_next, q, side, sign.reshape(per_sample), m)
        d_params, d_x = vjp(((1 + gamma) * a_next).astype(h.dtype))
        a += (1 - gamma) * a_next + d_x.astype(jnp.float32)
        # The first block is an Euler step, and cannot be taken back: its q is compared.
        wrong = jnp.where(sign.reshape(per_sample) == 0, q != n_next, n_prev != true_prev)
        n_prev = jnp.where(from_true_states, true_prev, n_prev)
        return (n, n_prev, a, gamma * a_next), (d_params, jnp.sum(wrong))

    n = grid.to_grid(x, frac_bits)
    (n_prev, n), (states, side) = jax.lax.scan(up, (n, n), (params, keys, signs))
    a = jnp.cos(grid.from_grid(n, frac_bits))
    (*_, a), (d_params, wrong) = jax.lax.scan(
        down, (n, n_prev, a, jnp.zeros_like(a)), (params, keys, signs, states, side), reverse=True
    )
    return wrong, a, d_params


# ---------------------------------------------------------------------------------------------
# The measurement
# ---------------------------------------------------------------------------------------------


def measure(case: Case, key: jax.Array) -> dict[str, Any]:
    """Counts of one case."""
    started = time.monotonic()
    audits = [
        check_reversible(s.block, s.params, s.x, key=key, gamma=s.gamma, frac_bits=s.frac_bits)
        for s in case.stacks
    ]

    def naive(from_true_states: bool) -> int:
        return sum(
            int(
                naive_mismatches(
                    (s.block, s.gamma, s.frac_bits), s.params, s.x, key, from_true_states
                )[0].sum()
            )
            for s in case.stacks
        )

    reports = jax.tree.leaves(
        jax.tree.map(
            lambda r: int(r.mismatched.sum()),
            case.gradient(key),
            is_leaf=lambda r: isinstance(r, BackwardReport),
        )
    )
    return {
        "case": case.settings,
        "compared": sum(a.compared for a in audits),
        "mismatched": sum(a.mismatched for a in audits),
        "samples_mismatched_in_gradient": sum(reports),
        "finite": all(a.finite for a in audits),
        "naive_mismatched_from_true_states": naive(True),
        "naive_mismatched": naive(False),
        "seconds": round(time.monotonic() - started, 1),
    }


COLUMNS = (
    f"{'dtype':<9}{'drop':>5}{'m':>3}{'l':>4}{'depth':>6} {'block':<12}{'integers':>12}"
    f"{'pinned':>8}{'gradient':>9}   {'naive: of true':>14}{'of its own':>12}{'seconds':>9}"
)


def line(found: dict[str, Any]) -> str:
    """A row of the printed table."""
    c, n = found["case"], found["compared"]
    m = maps.gamma_shift(c["gamma"]) if "gamma" in c else c["m"]
    return (
        f"{c['dtype']:<9}{c['dropout']:>5}{m:>3}{c['frac_bits']:>4}{c['depth']:>6} "
        f"{c.get('model') or c['block']:<12}{n:>12,}{found['mismatched']:>8,}"
        f"{found['samples_mismatched_in_gradient']:>9,}   "
        f"{found['naive_mismatched_from_true_states'] / n:>14.3%}"
        f"{found['naive_mismatched'] / n:>12.3%}{found['seconds']:>9.1f}"
        + ("" if found["finite"] else "  NOT FINITE")
    )


def main(e: Exactness) -> bool:
    """Runs all cases; whether all of them are exact."""
    print(COLUMNS, flush=True)
    found = []
    for case in cases(e):
        found.append(measure(case, jax.random.key(e.seed + 1)))
        print(line(found[-1]), flush=True)
    counts = [name for name, value in found[0].items() if type(value) is int]
    totals = {name: sum(row[name] for row in found) for name in counts}
    exact = all(row["finite"] for row in found) and not (
        totals["mismatched"] or totals["samples_mismatched_in_gradient"]
    )
    path = results.write("exactness", e, {"exact": exact, "totals": totals, "cases": found}, e.out)
    print(
        f"\n{totals['compared']:,} integers compared in {len(found)} cases; mismatched:\n"
        f"{totals['mismatched']:,} by the pinned scan, and "
        f"{totals['samples_mismatched_in_gradient']:,} samples in its gradients\n"
        f"{totals['naive_mismatched_from_true_states']:,} by the naive one from true states, "
        f"{totals['naive_mismatched']:,} from its own\n{path}"
    )
    return exact


if __name__ == "__main__":
    sys.exit(not main(tyro.cli(Exactness, description=__doc__)))
