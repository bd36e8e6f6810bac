"""The fixed-point grid on which the residual stream lives.

A value ``x`` is stored as the integer ``n = round(x * 2**l)``, where ``l`` is the number of
fractional bits; the spacing of the grid is ``2**-l``. ``l`` may be negative (a grid coarser
than 1). On the grid the BDIA update is integer arithmetic, and integer arithmetic can be
undone exactly (see :mod:`bdia_jax.maps`).

Source: Zhang, Lewis, Kleijn, "On Exact Bit-level Reversible Transformers Without Changing
Architecture", ICML 2025 (arXiv 2407.09093): the quantizer ``Q_l``.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int32

FLOATS = ("float16", "bfloat16", "float32", "float64")
MIN_FRAC_BITS, MAX_FRAC_BITS = -16, 24

# A sample whose state leaves (-LIMIT, LIMIT) is reported as NaN: the sum of two such numbers does
# not leave int32, so that none in the BDIA update wraps around unnoticed.
LIMIT = 2**30


def check_frac_bits(frac_bits: int) -> int:
    """``frac_bits`` itself, or a ``TypeError`` / ``ValueError`` that says what is allowed."""
    if isinstance(frac_bits, bool | Tracer) or not hasattr(frac_bits, "__index__"):
        raise TypeError(
            "frac_bits, the number of fractional bits, must be an integer "
            f"(static, not traced); got {frac_bits!r}"
        )
    frac_bits = frac_bits.__index__()
    if not MIN_FRAC_BITS <= frac_bits <= MAX_FRAC_BITS:
        raise ValueError(
            f"frac_bits must lie in [{MIN_FRAC_BITS}, {MAX_FRAC_BITS}]; got {frac_bits}"
        )
    return frac_bits


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """The float type the update is computed in: float64 for float64, else float32."""
    if jnp.dtype(dtype).name not in FLOATS:
        raise TypeError(
            f"expected a floating-point array ({', '.join(FLOATS)}), got dtype "
            f"{jnp.dtype(dtype).name}"
        )
    return jnp.dtype("float64" if jnp.dtype(dtype).name == "float64" else "float32")


def to_grid(x: Float[Array, "..."], frac_bits: int) -> Int32[Array, "..."]:
    """``n = round(x * 2**frac_bits)``, ties to even.

    Integers have no NaN: NaN becomes 0, and values beyond ``±2**30`` grid steps are clipped
    there. :func:`on_grid` says where that happened; :func:`quantize` returns NaN there.

    Args:
      x: any shape, any floating-point dtype.
      frac_bits: number of fractional bits, an int in [-16, 24].

    Returns:
      int32, the shape of ``x``.
    """
    return round_to_int(scale(x, frac_bits))


def from_grid(
    n: Int32[Array, "..."], frac_bits: int, dtype: jnp.dtype = jnp.float32
) -> Float[Array, "..."]:
    """``x = n * 2**-frac_bits`` in ``dtype``.

    Exact in float64, and in float32 for ``|n| <= 2**24``; otherwise rounded to ``dtype``.
    """
    check_frac_bits(frac_bits)
    if not (hasattr(n, "dtype") and jnp.issubdtype(n.dtype, jnp.integer)):
        raise TypeError(f"from_grid takes integers, got {getattr(n, 'dtype', type(n))}")
    wide = accumulator(dtype)
    return (n.astype(wide) * wide.type(2.0**-frac_bits)).astype(dtype)


def on_grid(x: Float[Array, "..."], frac_bits: int) -> Bool[Array, "..."]:
    """Whether ``x`` has a place on the grid: finite, and within ``±2**30`` steps."""
    return in_range(scale(x, frac_bits))


def straight_through(
    value: Float[Array, "*shape"], carrier: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """``value``, differentiated as if it were ``carrier`` (straight-through estimator).

    To any order, and in forward mode, too. ``value`` must be finite wherever ``carrier`` is; where
    ``carrier`` is not finite the result is NaN.
    """
    # carrier - carrier is exactly 0, as long as both are one array: computed twice, a product and a
    # sum may be contracted to one operation in one of them.
    carrier = lax.optimization_barrier(carrier)
    return lax.stop_gradient(value) + (carrier - lax.stop_gradient(carrier))


def quantize(x: Float[Array, "..."], frac_bits: int) -> Float[Array, "..."]:
    """``Q_l[x] = round(x * 2**l) / 2**l``, with a straight-through gradient.

    What has no place on the grid (NaN, infinity, beyond ``±2**30`` steps) becomes NaN.

    Args:
      x: any shape, any floating-point dtype.
      frac_bits: ``l``, an int in [-16, 24].

    Returns:
      The nearest grid value (ties to even), in the shape and dtype of ``x``.
    """
    y = scale(x, frac_bits)
    q = lax.round(y, lax.RoundingMethod.TO_NEAREST_EVEN) * y.dtype.type(2.0**-frac_bits)
    return straight_through(jnp.where(in_range(y), q, jnp.nan).astype(x.dtype), x)


# Below, y is a value in units of grid steps: y = x * 2**l, in float32 or float64.


def scale(x: Float[Array, "..."], frac_bits: int) -> Float[Array, "..."]:
    """``x`` in grid steps. The factor is a power of two, so that nothing is rounded."""
    check_frac_bits(frac_bits)
    x = jnp.asarray(x)
    wide = accumulator(x.dtype)
    return x.astype(wide) * wide.type(2.0**frac_bits)


def in_range(y: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Whether ``y`` grid steps are finite and within the limit (NaN compares as False)."""
    return jnp.abs(y) < LIMIT


def round_to_int(y: Float[Array, "..."]) -> Int32[Array, "..."]:
    """The nearest integer, ties to even, clipped to ``±2**30``; NaN becomes 0."""
    y = lax.round(y, lax.RoundingMethod.TO_NEAREST_EVEN)
    y = jnp.where(jnp.isnan(y), 0, jnp.clip(y, -LIMIT, LIMIT))
    return y.astype(jnp.int32)
