"""Online back-propagation through a stack of blocks: one scan up, one scan down.

The scan up keeps, of every state that it leaves behind, m + r bits per element and a checksum. The
scan down holds the integers of x_{k+1} and x_k and the cotangents a_{k+1} and a_k. It computes
block k again, takes its step back to find x_{k-1}, and back-propagates through the block:

    up, k = 0 … K-1                             down, k = K-1 … 0
      h       = block_k(x_k)                      h, vjp  = block_k(x_k) and its derivative
      q       = round(2^l [(1-γ) x_k + (1+γ) h])  q       = round(2^l [(1-γ) x_k + (1+γ) h])
      keep s  = (-n_{k-1}) mod 2^m                n_{k-1} = σ (n_{k+1} - q) 2^m - s
      keep checksum(n_{k-1})                      compare checksum(n_{k-1}); NaN if it differs
      n_{k+1} = σ ((n_{k-1} + s) >> m) + q        a_k     += (1-γ) a_{k+1} + vjp((1+γ) a_{k+1})
                                                  a_{k-1} += γ a_{k+1}

A block of several parts takes such a step per part, in one loop body.

The loops hold d = n_k - n_{k-1}, or n_{k+1} - n_k on the way down, beside n_k, so that each is
overwritten in place. Two states would swap places, and compilers would copy both.

Both passes must compute the same q, to the last bit. They run the block as one pinned sub-program
(:mod:`bdia_jax.pinning` says how, and why); everything else is integer arithmetic, or float
arithmetic written so that every compilation rounds it alike (:func:`bdia_jax.maps.pre_rounding`).
Exactness is checked all the same, in every backward pass: that is what the checksum is for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Key, PyTree, UInt, UInt32

from bdia_jax import grid
from bdia_jax.adjoints import BackwardReport
from bdia_jax.arguments import Inputs, Scan, starts_in_range
from bdia_jax.gradients import (
    Cotangents,
    Wanted,
    cotangents_of_inputs,
    filled,
    gradient_of,
    is_zero,
    plus,
    read,
    with_derivative,
    zeros_of_consts,
)
from bdia_jax.memories import fetch, put_away
from bdia_jax.pinning import barrier, fence, pinned_vjp
from bdia_jax.states import checksum, everywhere, in_range, nan_unless, per_sample
from bdia_jax.steps import Down


def online(scan: Scan) -> Callable[[Inputs], tuple[Array, Array]]:
    """The scan as a function whose derivative is online back-propagation."""
    return with_derivative(scan, up, down)


class Kept(NamedTuple):
    """What a step keeps of the state that it leaves behind."""

    side: UInt[Array, "batch *words"] | None
    checksum: UInt32[Array, "batch"]
    witness: tuple[Int32[Array, "batch *shape"], Float[Array, "batch *shape"]] | None
    """The state itself and the value before rounding, for an audit; otherwise None."""


class Saved(NamedTuple):
    """All that the scan down is given.

    What grows with the depth: the parameters, which exist anyway, what the steps keep, and the keys
    of the parts.
    """

    wanted: Wanted
    key: Key[Array, ""] | None
    keys: Key[Array, "blocks parts"] | None
    n_prev: Int32[Array, "batch *shape"]
    n: Int32[Array, "batch *shape"]
    checksums: tuple[UInt32[Array, "batch"], UInt32[Array, "batch"]]
    """Of these two, the last states."""
    finite: Bool[Array, "batch"]
    """Whether all states of a sample were finite, and in range."""
    kept: tuple[Kept, ...]
    """Per part, stacked over the blocks."""
    update_state: PyTree[Array]


def up(scan: Scan, inputs: Inputs, wanted: Inputs | None):
    """Up through the blocks; ``wanted=None`` where there will be no way back."""
    split = Wanted.of(inputs, wanted)

    def block(carry, numbers):
        n, d, finite = carry
        k, key = numbers
        params, kept = read(split.params | split.updated, k), []
        for p in range(len(scan.parts)):
            n_prev = n - d
            sign, part_key = scan.draw(inputs.key, key, k, p)
            if wanted is None:
                h, sign = alone(scan, p, split, params, n, k, part_key, sign)
                n_next, y = scan.step.up(n_prev, n, h, sign)
            else:
                h, _, sign, alive = pinned(scan, p, split, params, n, k, part_key, sign)
                n_next, y = scan.step.up(n_prev, n, h, sign)
                witness = (n_prev, y) if scan.audit else None
                side = put_away(scan.step.keep(n_prev), scan.keep_in)
                kept.append(Kept(side, checksum(n_prev) + alive, witness))
            d, finite = barrier(n_next - n), finite & in_range(y, n_next)
            n = n + d
        return (n, d, finite), tuple(kept)

    n_prev, n = (grid.to_grid(x, scan.step.grid_bits) for x in (inputs.x_prev, inputs.x))
    (n, d, finite), kept = lax.scan(
        block,
        (n, n - n_prev, starts_in_range(scan, inputs)),
        (jnp.arange(scan.blocks), inputs.keys),
    )
    n_prev = n - d
    output = tuple(
        nan_unless(finite, grid.from_grid(n, scan.step.grid_bits, scan.wide)) for n in (n_prev, n)
    )
    checksums = checksum(n_prev), checksum(n)
    return output, Saved(
        split, inputs.key, inputs.keys, n_prev, n, checksums, finite, kept, inputs.update_state
    )


def down(scan: Scan, saved: Saved, cotangents) -> Inputs:
    """Down through the blocks: the cotangents of the inputs."""
    step, wanted = scan.step, saved.wanted
    gradient = gradient_of(scan, wanted, saved.update_state)
    a, a_next = (
        jnp.zeros_like(n, c.aval.dtype) if is_zero(c) else c
        for n, c in zip((saved.n_prev, saved.n), cotangents)
    )
    # Where the output is NaN, so is the gradient; but not of a sample that the loss leaves out.
    left_out = everywhere((a == 0) & (a_next == 0))
    a_next = nan_unless(saved.finite | left_out, a_next)
    for n, expected in zip((saved.n_prev, saved.n), saved.checksums):
        a_next = nan_unless(checksum(n) == expected, a_next)
    wide, waiting = a.dtype, scan.dtype if scan.narrow_cotangents else a.dtype

    def pull(c: Cotangents, intact, sign):
        c = in_dtype(c, wide)
        return step.pull(nan_unless(intact, c.a_next), c.a, sign)

    def block(carry, inputs):
        n, d, c = carry
        k, key, kept = inputs
        blocks, params = gradient.read(c.params, k)
        c, d_params, reports = c._replace(params=None), {}, []
        for p in reversed(range(len(scan.parts))):
            sign, part_key = scan.draw(saved.key, key, k, p)
            h, vjp, sign, alive = pinned(scan, p, wanted, params, n, k, part_key, sign)
            found = step.down(n + d, n, h, sign, fetch(kept[p].side, scan.keep_in))
            n_prev, fits, report = audited(found, n + d, sign, kept[p].witness)
            # Whatever reads n_{k+1} does so before it is overwritten.
            d, fits, report = barrier((n - n_prev, fits, report))
            n = n - d
            # An Euler step cannot be taken back; there q itself is compared with n_{k+1}.
            intact = jnp.where(sign == 0, fits, checksum(n) + alive == kept[p].checksum)
            if not scan.audit:
                report = report._replace(mismatched=jnp.sum(~intact, dtype=jnp.float32))
            reports.append(report)
            d_h, _, _ = pull(c, intact, sign)
            d_part, d_x, d_consts = vjp(d_h)
            # The rest of the cotangents after the derivative, or it would take memory during it.
            d_x, c, intact = barrier((d_x, c, intact))
            _, a, a_prev = pull(c, intact, sign)
            d_params, d_consts = plus(d_params, d_part), plus(c.consts, d_consts)
            c = Cotangents(a + d_x.astype(a.dtype), a_prev, d_consts, None)
            c = in_dtype(c, waiting)
            if p:
                # One part after the other, or both parts' residuals would be alive at once.
                n, d, c, d_params = barrier((n, d, c, d_params))
        blocks = gradient.write(blocks, k, filled(d_params, params))
        return (n, d, c._replace(params=blocks)), of_parts(reports)

    start = Cotangents(a_next, a, zeros_of_consts(wanted), gradient.start())
    (_, _, c), report = lax.scan(
        block,
        (saved.n_prev, saved.n - saved.n_prev, in_dtype(start, waiting)),
        (jnp.arange(scan.blocks), saved.keys, saved.kept),
        reverse=True,
    )
    return cotangents_of_inputs(gradient, wanted, in_dtype(c, wide), report)


def in_dtype(c: Cotangents, dtype) -> Cotangents:
    """The cotangents of the stream in another dtype."""
    a_next, a = jax.tree.map(lambda a: a.astype(dtype), (c.a_next, c.a))
    return c._replace(a_next=a_next, a=a)


def pinned(scan: Scan, p: int, split: Wanted, params, n, k, key, sign):
    """The update of a part, its derivative, the signs, and a value to fold into a checksum."""
    params, x, key, consts, sign = fenced(scan, p, split, params, n, k, key, sign)
    h, vjp, alive = pinned_vjp(scan.parts[p].function, params, x, key, consts)
    # σ is never above 1, but no compiler knows that: it must read the residuals, and the checksum
    # stays as it is.
    return h.astype(scan.wide), vjp, sign, jnp.where(sign > 1, alive, jnp.uint32(0))


def alone(scan: Scan, p: int, split: Wanted, params, n, k, key, sign):
    """The update of a part, and the signs, where there will be no way back."""
    params, x, key, consts, sign = fenced(scan, p, split, params, n, k, key, sign)
    h = fence(scan.parts[p].function(params[0] | params[1], x, key, consts[0] | consts[1]))
    return h.astype(scan.wide), sign


def fenced(scan: Scan, p: int, split: Wanted, params, n, k, key, sign):
    """What a part reads, and the signs, so that nothing before it is fused into it."""
    x = grid.from_grid(n, scan.step.grid_bits, scan.dtype)
    # Sharded like the batch: over explicit mesh axes, a selection wants that of its condition.
    sign += jnp.sum(jnp.zeros_like(n), axis=tuple(range(1, n.ndim)), dtype=sign.dtype)
    params, consts = split.read_by(scan.parts[p], params, k)
    return fence((params, x, key, consts, sign))


def audited(found: Down, n_next, sign, witness):
    """The state to go on from, whether q fits n_{k+1} per sample, and what is told of a step.

    Without a witness, mismatched samples are for the checksums to tell.
    """
    fits = everywhere(found.q == n_next)
    report = BackwardReport(
        jnp.float32(0),
        jnp.sum(found.error != 0, dtype=jnp.float32),
        jnp.max(jnp.abs(found.error)).astype(jnp.float32),
    )
    if witness is None:
        return found.n_prev, fits, report
    n_prev, y = witness
    wrong = jnp.where(per_sample(sign, y) == 0, found.q != n_next, found.n_prev != n_prev)
    report = report._replace(
        mismatched=jnp.sum(wrong, dtype=jnp.float32),
        deviation=jnp.max(jnp.abs(found.y - y)).astype(jnp.float32),
    )
    # On from the true state, so that every step is judged by itself.
    return n_prev, fits, report


def of_parts(reports: list[BackwardReport]) -> BackwardReport:
    """The report of a block, from those of its parts."""
    mismatched, corrected, deviation = map(jnp.stack, zip(*reports))
    return BackwardReport(mismatched.sum(), corrected.sum(), deviation.max())
