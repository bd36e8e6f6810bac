"""The forward pass in floats, differentiated by JAX itself.

Steps on the grid carry the integers along: states are the same numbers as those of
:mod:`bdia_jax.online`, and derivatives go straight through the rounding. Other steps (no grid, or a
γ that is no power of two, of which the whole sum is rounded) are computed in floats only.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from bdia_jax import grid
from bdia_jax.arguments import Inputs, Scan, starts_in_range
from bdia_jax.pinning import barrier
from bdia_jax.states import everywhere, in_range, nan_unless


class Carry(NamedTuple):
    """The last two states, from block to block."""

    x_prev: Float[Array, "batch *shape"]
    x: Float[Array, "batch *shape"]
    integers: tuple[Int32[Array, "batch *shape"], Int32[Array, "batch *shape"]] | None
    """Theirs; None for a step that is not exact."""
    finite: Bool[Array, "batch"]


def start(scan: Scan, inputs: Inputs) -> Carry:
    """The states that the scan is given."""
    # The first block of a network ignores x_{-1}: 0 γ would not, where that is not finite.
    x_prev = inputs.x_prev if scan.start else jnp.zeros_like(inputs.x)
    pair, step = (x_prev, inputs.x), scan.step
    if step.frac_bits is None:
        return Carry(*pair, None, jnp.ones(scan.shape[0], bool))
    x_prev, x = (grid.quantize(x, step.frac_bits) for x in pair)
    n_prev, n = (grid.to_grid(x, step.frac_bits) for x in pair)
    integers = (n_prev, n) if step.exact else None
    return Carry(x_prev, x, integers, starts_in_range(scan, inputs))


def advance(scan: Scan, c: Carry, h: Float[Array, "batch *shape"], sign: Int32[Array, "batch"]):
    """The states after a step with the update ``h``."""
    step = scan.step
    if step.frac_bits is None:
        x_next = step.real(c.x_prev, c.x, h, sign)
        return Carry(c.x, x_next, None, c.finite)
    h = h.astype(scan.wide)
    x_next = step.real(c.x_prev, c.x, h, sign)
    if c.integers is None:
        finite = c.finite & everywhere(grid.on_grid(x_next, step.frac_bits))
        return Carry(c.x, grid.quantize(x_next, step.frac_bits), None, finite)
    n_prev, n = c.integers
    n_next, y = step.up(n_prev, n, h, sign)
    exact = grid.from_grid(n_next, step.frac_bits, x_next.dtype)
    x_next = grid.straight_through(exact, x_next)
    return Carry(c.x, x_next, (n, n_next), c.finite & in_range(y, n_next))


def finish(scan: Scan, c: Carry) -> tuple[Array, Array]:
    """The last two states; NaN for samples that left the grid."""
    if scan.step.frac_bits is None:
        return c.x_prev, c.x
    return nan_unless(c.finite, c.x_prev), nan_unless(c.finite, c.x)


def direct(scan: Scan, inputs: Inputs) -> tuple[Array, Array]:
    """The whole scan."""

    def block(c: Carry, block_inputs):
        k, params, key = block_inputs
        for p, part in enumerate(scan.parts):
            sign, part_key = scan.draw(inputs.key, key, k, p)
            seen = params, c.x.astype(scan.dtype), part_key, inputs.consts
            if scan.step.frac_bits is None:
                h = part.function(*seen)
            else:
                # As the blocks of a scan that is taken back: rounded like those.
                h = barrier(part.function(*barrier(seen)))
            c = advance(scan, c, h, sign)
        return c, None

    numbers = jnp.arange(scan.blocks)
    c, _ = lax.scan(block, start(scan, inputs), (numbers, inputs.params, inputs.keys))
    return finish(scan, c)
