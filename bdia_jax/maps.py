"""The BDIA step and its inverse, on integers. No loops, no blocks, no floats.

BDIA (bidirectional integration approximation) averages the Euler step of one residual block
with the backward Euler step of the block before it:

    x_{k+1} = γ x_{k-1} + (1 - γ) x_k + (1 + γ) h_k(x_k),        γ = σ 2^-m,  σ ∈ {-1, 0, +1}

On the grid (:mod:`bdia_jax.grid`, n = x 2^l) this becomes, with two's complement int32
arithmetic (which wraps around),

    q        = round(2^l [(1 - γ) x_k + (1 + γ) h_k(x_k)])       the pre-rounding value, rounded
    s        = (-n_{k-1}) mod 2^m                                side information, m bits
    n_{k+1}  = σ ((n_{k-1} + s) >> m) + q                        bdia_step
    n_{k-1}  = σ (n_{k+1} - q) 2^m - s                           bdia_inverse

**Proposition.** For every m ≥ 0, every σ ∈ {-1, +1} and all int32 values of n_{k-1} and q,
``bdia_inverse(bdia_step(n_{k-1}, q), q, s) = n_{k-1}``.

*Proof.* All arithmetic is modulo 2^32. Adding q and multiplying by σ = ±1 are bijections of
the integers modulo 2^32, and σ σ = 1, so that σ (n_{k+1} - q) = (n_{k-1} + s) >> m =: a. By
the choice of s, n_{k-1} + s is a multiple of 2^m; an arithmetic shift to the right by m drops
m zero bits and a shift to the left by m puts them back, so that a 2^m = n_{k-1} + s modulo
2^32, also where n_{k-1} + s has wrapped around (the shift to the left discards the copies of
the sign that the shift to the right had put in). Subtracting s gives n_{k-1}. ∎

The same is proved by a bit-vector solver over all inputs in ``tests/test_proofs.py``. For
m = 0 (γ = ±1) no side information is needed; σ = +1 is then the reversible mid-point network
x_{k+1} = x_{k-1} + 2 h_k(x_k). For σ = 0 (the Euler step) n_{k+1} = q, and n_{k-1} is gone.

**Tolerance bits.** The inverse needs q exactly. Hardware that is not deterministic recomputes
q' = q + e. With t = (-n_{k-1}) mod 2^(m+r), r bits more than s, the inverse corrects itself:
t = s + (t >> m) 2^m, hence a = -(t >> m) modulo 2^r is known, and so is
σ e = a - σ (n_{k+1} - q') modulo 2^r. That leaves one e in (-2^(r-1), 2^(r-1)), or the two
signs of 2^(r-1); there the right one is told by the side of q' on which the recomputed
pre-rounding value y' lies. The reconstruction is exact whenever |y' - y| < 2^(r-1) - 1/2 (for
r = 1: < 1/2) grid steps.

*Proof.* q = round(y), q' = round(y'), so that |e| ≤ |y' - y| + 1 < 2^(r-1) + 1/2, that is
|e| ≤ 2^(r-1) (r = 1: |e| < 3/2, so |e| ≤ 1), and e is known up to the sign of ±2^(r-1). Let
e = q' - q = -2^(r-1). Then y ≥ q - 1/2 = q' + 2^(r-1) - 1/2 and
y' > y - 2^(r-1) + 1/2 ≥ q': y' lies above q'. For e = +2^(r-1) it lies below, likewise.
(r = 1: y ≥ q' + 1/2 and y' > y - 1/2 ≥ q'.) ∎

Source: Zhang, Lewis, Kleijn, ICML 2025 (arXiv 2407.09093) for the method and its one side bit;
general m and the tolerance bits are this library's.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Int32, Key, UInt32

MAX_SIDE_BITS = 16


def is_shift(gamma: float) -> bool:
    """Whether ``gamma`` is ``2**-m`` with m in 0 … 16."""
    return any(gamma == 2.0**-m for m in range(MAX_SIDE_BITS + 1))


def gamma_shift(gamma: float) -> int:
    """``m`` for ``gamma = 2**-m``; a ``ValueError`` where there is none in 0 … 16."""
    if is_shift(gamma):
        return -round(math.log2(gamma))
    raise ValueError(
        f"gamma must be a power of two, 2**-m with m in 0 … {MAX_SIDE_BITS}, to be undone exactly "
        f"(1, 0.5, 0.25, …); got {gamma!r}. Other magnitudes in (0, 1] can be differentiated by "
        "Checkpoint() or Direct()"
    )


def check_tolerance_bits(tolerance_bits: int, m: int) -> int:
    """``tolerance_bits`` itself, or an error that says what is allowed."""
    if isinstance(tolerance_bits, bool | Tracer) or not hasattr(tolerance_bits, "__index__"):
        raise TypeError(
            f"tolerance_bits must be an integer (static, not traced); got {tolerance_bits!r}"
        )
    if not 0 <= tolerance_bits <= MAX_SIDE_BITS - m:
        raise ValueError(
            f"tolerance_bits must lie in [0, {MAX_SIDE_BITS - m}] for gamma = 2**-{m}; "
            f"got {tolerance_bits}"
        )
    return tolerance_bits.__index__()


def pre_rounding(
    x: Float[Array, "..."], h: Float[Array, "..."], gamma: Float[Array, "..."]
) -> Float[Array, "..."]:
    """``(1 - γ) x_k + (1 + γ) h_k(x_k)``, of which ``q`` is the rounding.

    Written with products by γ = ±2^-m only, which are exact: a compiler that contracts a
    product and a sum into one operation, in one pass and not in the other, changes nothing.
    """
    return (x - gamma * x) + (h + gamma * h)


def sample_signs(key: Key[Array, ""], batch: int) -> Int32[Array, "batch"]:
    """Independent, fair signs σ ∈ {-1, +1}, one per training sample.

    E[σ] = 0: on average over σ, a step is the Euler step from the same two states.
    """
    return 2 * jax.random.bernoulli(key, 0.5, (batch,)).astype(jnp.int32) - 1


def alternating_signs(key: Key[Array, ""], batch: int) -> Int32[Array, "batch"]:
    """Fair signs σ ∈ {-1, +1}, alternating over the samples: half of a batch has each.

    Effects that are odd in σ cancel within each batch, not only on average over batches.
    """
    return sample_signs(key, 1) * (1 - 2 * (jnp.arange(batch, dtype=jnp.int32) % 2))


def side_information(
    n_prev: Int32[Array, "..."], m: int, tolerance_bits: int = 0
) -> UInt32[Array, "..."]:
    """``t = (-n_{k-1}) mod 2^(m + r)``: the m + r bits to keep of a state that is overwritten."""
    return (-n_prev).astype(jnp.uint32) & jnp.uint32(2 ** (m + tolerance_bits) - 1)


def bdia_step(
    n_prev: Int32[Array, "..."], q: Int32[Array, "..."], sign: Int[Array, "..."], m: int
) -> Int32[Array, "..."]:
    """``n_{k+1} = σ ((n_{k-1} + s) >> m) + q`` with ``s = (-n_{k-1}) mod 2^m``.

    Args:
      n_prev: the integers of ``x_{k-1}``.
      q: the integers of ``Q[(1 - γ) x_k + (1 + γ) h_k(x_k)]``.
      sign: σ in {-1, 0, +1}, broadcastable against the others.
      m: ``γ = σ 2^-m``.
    """
    s = side_information(n_prev, m).astype(jnp.int32)
    return sign * ((n_prev + s) >> m) + q


def bdia_inverse(
    n_next: Int32[Array, "..."],
    q: Int32[Array, "..."],
    side: UInt32[Array, "..."],
    sign: Int[Array, "..."],
    m: int,
) -> Int32[Array, "..."]:
    """``n_{k-1} = σ (n_{k+1} - q) 2^m - s``, the exact inverse of :func:`bdia_step` for σ = ±1.

    ``side`` is what :func:`side_information` gave; its tolerance bits, if any, are ignored here
    (see :func:`rounding_error`).
    """
    s = (side & jnp.uint32(2**m - 1)).astype(jnp.int32)
    return ((sign * (n_next - q)) << m) - s


def rounding_error(
    n_next: Int32[Array, "..."],
    q: Int32[Array, "..."],
    remainder: Float[Array, "..."],
    side: UInt32[Array, "..."],
    sign: Int[Array, "..."],
    m: int,
    tolerance_bits: int,
) -> Int32[Array, "..."]:
    """The error ``e`` of a recomputed ``q``, from the tolerance bits: ``q - e`` is the true one.

    Args:
      n_next, side, sign, m: as in :func:`bdia_inverse`; ``side`` with m + r bits.
      q: the recomputed integers, ``round(y')``.
      remainder: ``y' - q``, in [-1/2, 1/2].
      tolerance_bits: r ≥ 1.

    Returns:
      int32 in [-2^(r-1), 2^(r-1)]; right whenever ``|y' - y| < 2^(r-1) - 1/2`` (r = 1: < 1/2).
    """
    half = 2 ** (tolerance_bits - 1)
    a_known = -(side >> m).astype(jnp.int32)
    a = sign * (n_next - q)
    # e modulo 2^r, moved to [-2^(r-1), 2^(r-1)).
    e = ((sign * (a_known - a) + half) & (2 * half - 1)) - half
    return jnp.where((e == -half) & (remainder < 0), half, e)
