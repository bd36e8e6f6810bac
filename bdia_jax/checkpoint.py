"""Back-propagation with a checkpoint per step: a block's input is kept, the block computed again.

    up, k = 0 … K-1                        down, k = K-1 … 0
      keep x_k                               _, vjp  = block_k(x_k) and its derivative
      h       = block_k(x_k)                 a_k     += (1-γ) a_{k+1} + vjp((1+γ) a_{k+1})
      x_{k+1} = step(x_{k-1}, x_k, h)        a_{k-1} += γ a_{k+1}

This is a loop of its own, rather than ``jax.checkpoint`` within :mod:`bdia_jax.direct`: it can take
an optimizer's step of a block as soon as its gradient is known, and keep inputs in fewer bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Key, PyTree, UInt

from bdia_jax import direct
from bdia_jax.adjoints import BackwardReport
from bdia_jax.arguments import Inputs, Scan
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
from bdia_jax.pinning import barrier
from bdia_jax.side_bits import pack_bits, unpack_bits

GROUP = 64
"""Features that share a scale, where checkpoints are rounded."""


def checkpointed(scan: Scan) -> Callable[[Inputs], tuple[Array, Array]]:
    """The scan as a function whose derivative computes each block again from its kept input."""
    return with_derivative(scan, up, down)


class Saved(NamedTuple):
    """All that the scan down is given."""

    wanted: Wanted
    key: Key[Array, ""] | None
    keys: Key[Array, "blocks parts"] | None
    kept: tuple[PyTree[Array], ...]
    """Per part, stacked over the blocks: what the block saw, rounded or not."""
    update_state: PyTree[Array]


def up(scan: Scan, inputs: Inputs, wanted: Inputs | None):
    """Up through the blocks; ``wanted=None`` where there will be no way back."""
    split = Wanted.of(inputs, wanted)
    pin = barrier if scan.step.frac_bits is not None else lambda tree: tree

    def block(c: direct.Carry, numbers):
        k, key = numbers
        params, kept = read(split.params | split.updated | split.fixed_params, k), []
        for p, part in enumerate(scan.parts):
            sign, part_key = scan.draw(inputs.key, key, k, p)
            x = c.x.astype(scan.dtype)
            if wanted is not None:
                some = x if scan.checkpoint_bits is None else rounded(x, scan.checkpoint_bits)
                kept.append(put_away(some, scan.keep_in))
            h = pin(part.function(*pin((params, x, part_key, inputs.consts))))
            c = direct.advance(scan, c, h, sign)
        return c, tuple(kept)

    numbers = jnp.arange(scan.blocks), inputs.keys
    c, kept = lax.scan(block, direct.start(scan, inputs), numbers)
    return direct.finish(scan, c), Saved(split, inputs.key, inputs.keys, kept, inputs.update_state)


def down(scan: Scan, saved: Saved, cotangents) -> Inputs:
    """Down through the blocks: the cotangents of the inputs."""
    step, wanted, bits = scan.step, saved.wanted, scan.checkpoint_bits
    gradient = gradient_of(scan, wanted, saved.update_state)

    def block(c: Cotangents, inputs):
        k, key, kept = inputs
        blocks, params = gradient.read(c.params, k)
        c, d_params = c._replace(params=None), {}
        for p, part in reversed([*enumerate(scan.parts)]):
            sign, part_key = scan.draw(saved.key, key, k, p)
            (some, fixed), (consts, fixed_consts) = wanted.read_by(part, params, k)
            x = fetch(kept[p], scan.keep_in)
            if p < len(scan.parts) - 1:
                # One part after the other, or both parts' residuals would be alive at once.
                x, c, d_params = barrier((x, c, d_params))
            if bits is not None:
                x = restored(x, bits, scan.shape[-1], scan.dtype)

            def run(
                some, x, consts, part=part, fixed=fixed, fixed_consts=fixed_consts, key=part_key
            ):
                return part.function(some | fixed, x, key, consts | fixed_consts)

            h, vjp = jax.vjp(run, some, x, consts)
            d_h, a, a_prev = step.pull(c.a_next, c.a, sign)
            d_part, d_x, d_consts = vjp(d_h.astype(h.dtype))
            d_params = plus(d_params, d_part)
            c = Cotangents(a + d_x.astype(a.dtype), a_prev, plus(c.consts, d_consts), None)
        blocks = gradient.write(blocks, k, filled(d_params, params))
        return c._replace(params=blocks), None

    # Zeros like another cotangent are sharded like it, and vary over the same axes of a mesh.
    (like, *_) = [c for c in cotangents if not is_zero(c)] or [jnp.zeros(scan.shape)]
    a, a_next = (jnp.zeros_like(like, c.aval.dtype) if is_zero(c) else c for c in cotangents)
    if step.gamma == 0 and is_zero(cotangents[0]):
        a = None
    start = Cotangents(a_next, a, zeros_of_consts(wanted), gradient.start())
    c, _ = lax.scan(block, start, (jnp.arange(scan.blocks), saved.keys, saved.kept), reverse=True)
    return cotangents_of_inputs(gradient, wanted, c, BackwardReport.zeros(scan.blocks))


def rounded(
    x: Float[Array, "*batch features"], bits: int
) -> tuple[UInt[Array, "*batch words"], BFloat16[Array, "*batch groups"]]:
    """``x`` in so many bits per element, packed, and a scale per group of features."""
    groups = _in_groups(x.astype(jnp.float32))
    highest = 2 ** (bits - 1) - 1
    scale = (jnp.max(jnp.abs(groups), axis=-1) / highest).astype(jnp.bfloat16)
    steps = groups / jnp.where(scale == 0, 1, scale).astype(jnp.float32)[..., None]
    levels = jnp.clip(jnp.round(steps), -highest, highest) + highest
    return pack_bits(levels.reshape(*x.shape[:-1], -1).astype(jnp.uint32), bits), scale


def restored(kept, bits: int, features: int, dtype: jnp.dtype) -> Float[Array, "*batch features"]:
    """What :func:`rounded` kept."""
    packed, scale = kept
    padded = scale.shape[-1] * GROUP
    levels = unpack_bits(packed, bits, padded).astype(jnp.float32) - (2 ** (bits - 1) - 1)
    groups = levels.reshape(*scale.shape, GROUP) * scale.astype(jnp.float32)[..., None]
    return groups.reshape(*scale.shape[:-1], padded)[..., :features].astype(dtype)


def _in_groups(x: Float[Array, "*batch features"]) -> Float[Array, "*batch groups 64"]:
    """The features in groups of 64, the last one filled up with zeros."""
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % GROUP)]
    return jnp.pad(x, padding).reshape(*x.shape[:-1], -1, GROUP)
