"""Is a block reversible on this machine? Ask before training."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from bdia_jax import maps
from bdia_jax.adjoints import Online
from bdia_jax.arguments import Block, prepare
from bdia_jax.online import down, up
from bdia_jax.steps import BDIA, Step


@dataclasses.dataclass(frozen=True)
class Reversibility:
    """The outcome of :func:`check_reversible`."""

    compared: int
    """Integers reconstructed by the backward pass and compared with those of the forward pass."""
    mismatched: int
    """Of those, how many differ."""
    corrected: int
    """Roundings that the tolerance bits put right."""
    deviation: float
    """The largest difference of a recomputed pre-rounding value, in grid steps."""
    finite: bool
    """Whether all states were finite and in range."""
    tolerance_bits: int | None
    """The setting that this run suggests; None if no number of bits will do."""

    @property
    def exact(self) -> bool:
        """Whether everything was reconstructed to the last bit."""
        return self.finite and self.mismatched == 0

    def __str__(self) -> str:
        """One line for a log."""
        verdict = "exact" if self.exact else "NOT EXACT" if self.finite else "NOT FINITE"
        needed = self.tolerance_bits
        advice = (
            "no tolerance bits will do"
            if needed is None
            else (f"use tolerance_bits={needed}" if needed else "no tolerance bits are needed")
        )
        return (
            f"{verdict}: {self.mismatched:,} of {self.compared:,} integers mismatched, "
            f"{self.corrected:,} roundings corrected, recomputed values differ by at most "
            f"{self.deviation:.3g} grid steps; {advice}"
        )


def check_reversible(
    block: Block | tuple[Block, ...],
    stacked_params: PyTree[ArrayLike],
    x: Float[Array, "batch *shape"],
    *,
    key: Key[Array, ""] | None = None,
    consts: tuple[PyTree[ArrayLike], ...] = (),
    step: Step = BDIA(),  # noqa: B008  (frozen)
) -> Reversibility:
    """Runs blocks up and down once, and compares every integer of every step.

    Keeps all states: use a batch for which plain training would fit. Every step starts from the
    true states, so that an error is counted where it arises, not again in the blocks below.

    Args:
      block, stacked_params, x, key, consts, step: what :func:`bdia_jax.reversible_scan` will be
        given, with :class:`bdia_jax.Online`.

    Returns:
      Counts, the largest deviation, and the tolerance bits to use.

    Raises:
      TypeError: within jit, grad or vmap, where there are no numbers to count.
      ValueError: also for a block that is not a function of its arguments: one that holds other
        arrays each time it is traced, because it draws them from a global generator.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((stacked_params, x, key, consts))):
        raise TypeError("check_reversible counts integers: call it outside of jit, grad and vmap")
    (scan, inputs), (_, again) = (
        prepare(block, stacked_params, (x, x), 0, key, consts, step, Online()) for _ in range(2)
    )
    own = len(jax.tree.leaves(consts))
    captured, once_more = ([*found.consts.values()][own:] for found in (inputs, again))
    if any(isinstance(c, Tracer) for c in captured):
        raise TypeError(
            "check_reversible counts integers: call it outside of jit, grad and vmap, of which the "
            "block holds an array"
        )
    if not _same(captured, once_more):
        raise ValueError(
            "block is not a function of its arguments: traced twice, it holds different constants. "
            "Draw random numbers from key_k, the key that the block is given"
        )
    scan = scan._replace(audit=True)

    @jax.jit
    def audit(inputs):
        wanted = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating), inputs)
        output, saved = up(scan, inputs, wanted)
        report = down(scan, saved, tuple(map(jnp.ones_like, output))).probe
        return report, jnp.all(jnp.isfinite(output[1]))

    report, finite = jax.device_get(audit(inputs))
    deviation = float(np.max(report.deviation))
    return Reversibility(
        compared=scan.blocks * len(scan.parts) * inputs.x.size,
        mismatched=int(report.mismatched.astype(np.int64).sum()),
        corrected=int(report.corrected.astype(np.int64).sum()),
        deviation=deviation,
        finite=bool(finite),
        tolerance_bits=_needed(deviation, step.m) if finite else None,
    )


def _needed(deviation: float, m: int) -> int | None:
    """The least r with ``deviation < 2^(r-1) - 1/2`` (r = 1: < 1/2; r = 0: none at all).

    None if ``m + r`` bits would be more than there are.
    """
    if not math.isfinite(deviation):
        return None
    if deviation < 0.5:
        return int(deviation > 0)
    r = math.floor(math.log2(deviation + 0.5)) + 2
    return r if m + r <= maps.MAX_SIDE_BITS else None


def _same(a: list[Array], b: list[Array]) -> bool:
    """Whether two lists of arrays are alike to the last bit, NaN included."""
    return len(a) == len(b) and all(
        x.dtype == y.dtype and _bytes(x) == _bytes(y) for x, y in zip(a, b, strict=True)
    )


def _bytes(leaf: Array) -> bytes:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()
