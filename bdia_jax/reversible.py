"""Online back-propagation through a stack of BDIA blocks: one scan forward, one scan back.

The forward scan walks up the blocks and keeps, of every state it leaves behind, one bit per
element and a checksum. The backward scan walks down: at block k it holds the integers of x_{k+1}
and x_k and the cotangents a_{k+1} and a_k, recomputes the block, takes back the step to find
x_{k-1}, and back-propagates through the block it has just recomputed:

    forward, k = 0 … K-1                        backward, k = K-1 … 0
      h       = block_k(x_k)                      h, vjp  = block_k(x_k) and its derivative
      q       = round(2^l [(1-γ) x_k + (1+γ) h])  q       = round(2^l [(1-γ) x_k + (1+γ) h])
      keep s  = (-n_{k-1}) mod 2^m                n_{k-1} = σ (n_{k+1} - q) 2^m - s
      keep checksum(n_{k-1})                      compare checksum(n_{k-1}); NaN if it differs
      n_{k+1} = σ ((n_{k-1} + s) >> m) + q        a_k     += (1-γ) a_{k+1} + vjp((1+γ) a_{k+1})
                                                  a_{k-1} += γ a_{k+1}

The first block has σ = 0: it is the Euler step x_1 = x_0 + Q[h_0], and needs no x_{-1}.

The step is taken back exactly only if both passes compute q to the last bit alike: they run the
block as one pinned sub-program (:mod:`bdia_jax.pinning` says how, and why that is needed), and
everything else is integer arithmetic, or float arithmetic written so that every compilation
rounds it alike (:func:`bdia_jax.maps.pre_rounding`). Exactness is checked all the same, in every
backward pass: that is what the checksum is for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int32, Key, PyTree, UInt, UInt32

from bdia_jax import grid, maps, side_bits
from bdia_jax._arguments import Inputs, Scan, prepare
from bdia_jax.pinning import (
    Derivative,
    Wanted,
    barrier,
    fence,
    merge,
    pinned_vjp,
    reduce_to,
    select,
)

Block = Callable[..., Array]


class BackwardReport(NamedTuple):
    """What the backward pass saw, per block: float32 of shape ``[blocks]`` each.

    Hand :meth:`zeros` to :func:`reversible_scan` as ``probe`` and differentiate with respect to
    it: its "gradient" is the report.
    """

    mismatched: Float[Array, "blocks"]
    """Samples whose reconstructed state is not that of the forward pass."""
    corrected: Float[Array, "blocks"]
    """Roundings that came out otherwise, and were put right by the tolerance bits."""
    deviation: Float[Array, "blocks"]
    """The largest correction, in grid steps."""

    @classmethod
    def zeros(cls, blocks: int) -> BackwardReport:
        return cls(*(jnp.zeros(blocks, jnp.float32) for _ in cls._fields))


class Update(NamedTuple):
    """What is done with a block's gradient as soon as it is known, in the backward pass.

    The stacked gradient then never exists. Two "gradients" take another meaning: that by
    ``stacked_params`` is their new value, and that by ``state`` is its new value.
    """

    function: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    """``function(params_k, d_params_k, state_k)`` returns new parameters and state of one block:
    a step of an optimizer, for instance. Leaves that no gradient is asked for are None."""
    state: PyTree[Float[Array, "blocks ..."]]
    """Floating-point arrays with a leading block axis, such as an optimizer's moments."""


def reversible_scan(
    block: Block,
    stacked_params: PyTree[Array],
    x: Float[Array, "batch *shape"],
    *,
    key: Key[Array, ""] | None = None,
    consts: tuple[PyTree[Array], ...] = (),
    gamma: float = 0.5,
    signs: str = "random",
    frac_bits: int | None = 9,
    tolerance_bits: int = 0,
    backprop: str = "online",
    stored_blocks: int = 0,
    probe: BackwardReport | None = None,
    update: Update | None = None,
) -> Float[Array, "batch *shape"]:
    """Runs ``x`` through a stack of residual blocks with BDIA, and returns the last ``x``.

    Args:
      block: ``block(params_k, x, key_k, *consts)`` returns the update ``h_k(x)``: the network
        without BDIA is ``x = x + block(...)``. Any pure function of shape- and
        batch-preserving ``x``. It may close over arrays, traced ones too.
      stacked_params: a pytree of arrays with a leading block axis of equal length; integer and
        key leaves are given to the block like any others (and get no gradient).
      x: the input of the first block, float16, bfloat16, float32 or float64. The blocks see the
        dtype of ``x``; the state itself is int32, the update is added in float32 (float64).
      key: typed or raw PRNG key. Draws γ's signs, and gives each block a key of its own. May be
        None where neither is needed: ``gamma=0`` and a block that ignores its key.
      consts: pytrees given to every block, differentiable, held once (a mask, an encoder's
        memory).
      gamma: magnitude of γ. ``2**-m`` for online back-propagation (the paper: 0.5), any in
        (0, 1] for ``"stored"``; 0 is the network as inference runs it.
      signs: ``"random"``: γ is + or -, drawn per sample and block; ``"positive"``: always +, which
        needs no key. With ``gamma=1`` that is the reversible mid-point network,
        ``x_{k+1} = x_{k-1} + 2 h_k(x_k)``: another network than the standard one, in inference
        as in training, and without side information.
      frac_bits: number of fractional bits l of the grid, spacing ``2**-l``; None for no grid
        at all (``backprop="stored"`` or ``gamma=0``).
      tolerance_bits: r more bits of side information, which make the reconstruction exact
        where recomputed values differ by less than ``2**(r-1) - 1/2`` grid steps (r = 1: 1/2).
      backprop: ``"online"`` keeps m + r bits per activation and block; reverse mode only.
        ``"stored"`` is plain automatic differentiation of the same forward pass: forward mode,
        second derivatives, and the reference for tests. With ``gamma=0`` there is nothing to
        take back, and ``"online"`` means ``"stored"``.
      stored_blocks: with online back-propagation, the number of blocks at the end of the stack
        that are not taken back: the residuals of their derivatives are kept, as plain automatic
        differentiation keeps them, which costs memory and saves the time of computing these
        blocks again. The states are the same to the last bit, whatever the number.
      probe: differentiate with respect to it for a report of the backward pass.
      update: what to do with the gradient of a block as soon as it is known (online
        back-propagation only).

    Returns:
      The output of the last block, in the shape and dtype of ``x``. A sample in which a state
      was not finite, or left the range ±2**(30 - frac_bits), is NaN.

    In the backward pass a state that is not reconstructed to the last bit turns all gradients
    from that block down into NaN.

    Raises:
      TypeError, ValueError: at trace time, for arguments that do not fit.

    Source: Zhang, Lewis, Kleijn, ICML 2025 (arXiv 2407.09093).
    """
    return reversible_scan_pair(
        block,
        stacked_params,
        (x, x),
        start=0,
        key=key,
        consts=consts,
        gamma=gamma,
        signs=signs,
        frac_bits=frac_bits,
        tolerance_bits=tolerance_bits,
        backprop=backprop,
        stored_blocks=stored_blocks,
        probe=probe,
        update=update,
    )[1].astype(x.dtype)


def reversible_scan_pair(
    block: Block,
    stacked_params: PyTree[Array],
    state: tuple[Float[Array, "batch *shape"], Float[Array, "batch *shape"]],
    *,
    start: int,
    key: Key[Array, ""] | None = None,
    consts: tuple[PyTree[Array], ...] = (),
    gamma: float = 0.5,
    signs: str = "random",
    frac_bits: int | None = 9,
    tolerance_bits: int = 0,
    backprop: str = "online",
    stored_blocks: int = 0,
    probe: BackwardReport | None = None,
    update: Update | None = None,
    compute_dtype: jnp.dtype | None = None,
) -> tuple[Float[Array, "batch *shape"], Float[Array, "batch *shape"]]:
    """:func:`reversible_scan` from state to state, so that a stack can be cut into parts.

    ``pair = reversible_scan_pair(f, head, (x, x), start=0, ...)`` followed by
    ``reversible_scan_pair(f, tail, pair, start=blocks_in_head, ...)`` is the whole stack: with
    the same key, to the bit (of JAX's generators but ``unsafe_rbg``, which draws otherwise for
    another number of blocks).

    Args:
      state: ``(x_{k-1}, x_k)``, of equal shape and dtype. Differentiable in both.
      start: index of the first of these blocks in the whole stack. Block 0 is an Euler step and
        ignores ``x_{-1}``.
      compute_dtype: what the blocks see; by default the dtype of the state.
      block, stacked_params, key, consts, gamma, signs, frac_bits, tolerance_bits, backprop,
        stored_blocks, probe, update: as in :func:`reversible_scan`.

    Returns:
      ``(x_{k-1}, x_k)`` after these blocks, float32 (float64 for a float64 state): wide enough
      to hold the integers of the grid up to 2**24.
    """
    scan, inputs = prepare(
        block,
        stacked_params,
        state,
        start,
        key,
        consts,
        gamma,
        signs,
        frac_bits,
        tolerance_bits,
        backprop,
        stored_blocks,
        probe,
        update,
        compute_dtype,
    )
    if probe is None:
        inputs = inputs._replace(probe=BackwardReport.zeros(len(inputs.params[0])))
    return _online(scan)(inputs) if scan.online else _stored(scan, inputs)


# ---------------------------------------------------------------------------------------------
# What both passes compute alike
# ---------------------------------------------------------------------------------------------


def _signs(scan: Scan, key, k, batch: int) -> tuple[Int32[Array, "batch"], Key[Array, ""] | None]:
    """σ of block k for every sample, 0 for an Euler step; and the key left for the block."""
    sign_key, block_key = (None, None) if key is None else jax.random.split(key)
    sign = jnp.full(batch, int(scan.gamma != 0), jnp.int32)
    if scan.random_signs:
        sign = maps.sample_signs(sign_key, (batch,))
    if scan.starts:
        sign = jnp.where(k == 0, 0, sign)
    return sign, block_key


def _update(scan: Scan, n: Array, h: Array, sign: Array) -> tuple[Array, Array, Array]:
    """γ, the pre-rounding value y in grid steps, and q = round(y)."""
    gamma = _per_sample(sign, n).astype(scan.wide) * scan.wide.type(scan.gamma)
    x = grid.from_grid(n, scan.frac_bits, scan.wide)
    y = grid.scale(maps.pre_rounding(x, h.astype(scan.wide), gamma), scan.frac_bits)
    return gamma, y, grid.round_to_int(y)


def _pinned_block(scan: Scan, wanted: Wanted, n, params, key, consts, sign):
    """The update of a block, its derivative, the signs, and a value to fold into a checksum."""
    x = grid.from_grid(n, scan.frac_bits, scan.dtype)
    # Sharded like the batch: over explicit mesh axes, a selection wants that of its condition.
    sign += jnp.sum(jnp.zeros_like(n), axis=tuple(range(1, n.ndim)), dtype=sign.dtype)
    params, x, key, consts, sign = fence((params, x, key, consts, sign))
    if wanted is None:
        return fence(scan.block(params, x, key, consts)), None, sign, None
    h, derivative, touched = pinned_vjp(scan.block, wanted, params, x, key, consts)
    # σ is never above 1, which no compiler knows: what is touched is read, and changes nothing.
    return h, derivative, sign, jnp.where(sign > 1, touched, jnp.uint32(0))


def checksum(n: Int32[Array, "batch *shape"]) -> UInt32[Array, "batch"]:
    """A hash of each sample's integers, by value and position: the sum of one word per element.

    The word is a bijective function of the element, so that a change of one element always
    shows. Changes of several may cancel, one time in 2^28 or more; they are met again one block
    below, where what is reconstructed from them is compared in turn.
    """
    word = n.astype(jnp.uint32)
    for axis in range(1, n.ndim):
        # The position enters axis by axis: a flat index would reshape, and a reshape may gather.
        position = lax.broadcasted_iota(jnp.uint32, n.shape, axis)
        word += position * jnp.uint32(0x9E3779B1 * 31**axis % 2**32)
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return jnp.sum(word ^ (word >> 16), axis=tuple(range(1, n.ndim)), dtype=jnp.uint32)


def _per_sample(values: Array, like: Array) -> Array:
    """``values`` of shape [batch], shaped to broadcast against ``like``, [batch, ...]."""
    return lax.broadcast_in_dim(values, (like.shape[0],) + (1,) * (like.ndim - 1), (0,))


def _nan_unless(good: Bool[Array, "batch"], x: Float[Array, "batch *shape"]) -> Array:
    """``x``, and NaN in the samples that are not good.

    A sum, because over explicit mesh axes a selection wants the condition sharded like ``x``.
    """
    return x + _per_sample(jnp.where(good, 0, jnp.nan).astype(x.dtype), x)


def _all(condition: Bool[Array, "batch *shape"]) -> Bool[Array, "batch"]:
    """Per sample, whether the condition holds everywhere."""
    return jnp.all(condition, axis=tuple(range(1, condition.ndim)))


def _starts_in_range(scan: Scan, inputs: Inputs) -> Bool[Array, "batch"]:
    """Per sample, whether the grid holds the state that the scan is given."""
    states = (inputs.x,) if scan.starts else (inputs.x_prev, inputs.x)
    return functools.reduce(
        jnp.logical_and, (_all(grid.on_grid(x, scan.frac_bits)) for x in states)
    )


def _in_range(y: Array, n: Array) -> Bool[Array, "batch"]:
    """Per sample, whether a pre-rounding value and a state are finite and within the limit."""
    return _all(grid.in_range(y) & (jnp.abs(n) < grid.LIMIT))


def _split(scan: Scan, inputs: Inputs | _Saved) -> tuple[PyTree[Array], PyTree[Array]]:
    """Numbers and keys of the blocks that are taken back, and of those that are stored."""
    blocks = inputs.params[0].shape[0]
    each = jnp.arange(blocks), inputs.keys
    cut = blocks - scan.stored_blocks
    return jax.tree.map(lambda a: a[:cut], each), jax.tree.map(lambda a: a[cut:], each)


def _read(stacked: PyTree[Array], k) -> PyTree[Array]:
    """The part of block k."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, k, keepdims=False), stacked)


def _write(stacked: PyTree[Array], part: PyTree[Array], k) -> PyTree[Array]:
    """``stacked``, with another part of block k."""
    return jax.tree.map(lambda a, new: lax.dynamic_update_index_in_dim(a, new, k, 0), stacked, part)


# ---------------------------------------------------------------------------------------------
# Online back-propagation
# ---------------------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """All that the backward pass is given.

    What grows with the number of blocks: the parameters, which exist anyway; m + r bits per
    element; and per block a key, and a checksum of 4 bytes per sample. Of the stored blocks, the
    residuals instead.
    """

    params: list[Array]
    consts: list[Array]
    keys: Key[Array, "blocks"]
    n_prev: Int32[Array, "batch *shape"]
    n: Int32[Array, "batch *shape"]
    """The last two states of the blocks that are taken back."""
    checksums_of_last: tuple[UInt32[Array, "batch"], UInt32[Array, "batch"]]
    side: UInt[Array, "blocks batch *words"] | None
    checksums: UInt32[Array, "blocks batch"]
    witness: tuple[Int32[Array, "blocks batch *shape"], Float[Array, "blocks batch *shape"]] | None
    """All states and pre-rounding values, for an audit; otherwise None."""
    derivatives: Derivative
    """Of the stored blocks, stacked; what the blocks are given is not in it."""
    update_state: list[Array]
    wanted: Wanted


class _Down(NamedTuple):
    """What the backward pass takes from block to block."""

    a_next: Float[Array, "batch *shape"]
    """The cotangent of a block's output."""
    a: Float[Array, "batch *shape"]
    """That of its input, as far as it came by the blocks above."""
    d_consts: list[Array]
    stacked: PyTree[Float[Array, "blocks ..."]]
    """The gradient; with an update, the new parameters and its state instead."""
    pending: PyTree[Array] | None
    """Of these, what the block above left behind, and is still to be written."""


def _online(scan: Scan) -> Callable[[Inputs], tuple[Array, Array]]:
    """The scan as a function whose derivative is online back-propagation."""

    @jax.custom_vjp
    def run(inputs: Inputs):
        return _forward(scan, None, inputs)[0]

    def forward(inputs: Inputs):
        flags = jax.tree.map(lambda leaf: leaf.perturbed, inputs, is_leaf=_is_primal)
        wanted = Wanted(tuple(flags.params), tuple(flags.consts))
        inputs = jax.tree.map(lambda leaf: leaf.value, inputs, is_leaf=_is_primal)
        return _forward(scan, wanted, inputs)

    def backward(saved: _Saved, cotangents):
        return (_backward(scan, saved, cotangents),)

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _is_primal(leaf) -> bool:
    return hasattr(leaf, "perturbed")


def _forward(scan: Scan, wanted: Wanted | None, inputs: Inputs):
    """Up through the blocks; ``wanted=None`` where there will be no way back."""
    batch = inputs.x.shape[0]

    def step(carry, block_inputs, stored: bool):
        n_prev, n, finite = carry
        k, key = block_inputs
        sign, key = _signs(scan, key, k, batch)
        params = _read(inputs.params, k)
        h, derivative, sign, alive = _pinned_block(
            scan, wanted, n, params, key, inputs.consts, sign
        )
        _, y, q = _update(scan, n, h, sign)
        n_next = maps.bdia_step(n_prev, q, _per_sample(sign, n), scan.m)
        carry = n, n_next, finite & _in_range(y, n_next)
        if wanted is None:
            return carry, None
        if stored:
            return carry, derivative.computed()
        witness = (n_prev, y) if scan.audit else None
        side = maps.side_information(n_prev, scan.m, scan.tolerance_bits)
        packed = side_bits.pack_bits(side, scan.bits) if scan.bits else None
        return carry, (packed, checksum(n_prev) + alive, witness)

    low, high = _split(scan, inputs)
    n_prev, n = (grid.to_grid(x, scan.frac_bits) for x in (inputs.x_prev, inputs.x))
    start = n_prev, n, _starts_in_range(scan, inputs)
    (n_prev, n, finite), kept = lax.scan(functools.partial(step, stored=False), start, low)
    cut = n_prev, n
    derivatives = None
    if scan.stored_blocks:
        (n_prev, n, finite), derivatives = lax.scan(
            functools.partial(step, stored=True), (n_prev, n, finite), high
        )
    output = tuple(
        _nan_unless(finite, grid.from_grid(n, scan.frac_bits, scan.wide)) for n in (n_prev, n)
    )
    if wanted is None:
        return output, None
    return output, _Saved(
        inputs.params,
        inputs.consts,
        inputs.keys,
        *cut,
        tuple(map(checksum, cut)),
        *kept,
        derivatives,
        inputs.update_state,
        wanted,
    )


def _backward(scan: Scan, saved: _Saved, cotangents) -> Inputs:
    """Down through the blocks: the cotangents of the inputs."""
    batch, features, wanted = saved.n.shape[0], saved.n.shape[-1], saved.wanted
    blocks = len(saved.params[0])

    def descend(down: _Down, k, gamma, derivative: Derivative, old) -> _Down:
        """The cotangents below block k, from those above it."""
        d_params, d_x, d_consts = derivative(down.a_next + gamma * down.a_next)
        a = down.a + (down.a_next - gamma * down.a_next) + d_x.astype(scan.wide)
        d_consts = [
            total + d.astype(total.dtype) for total, d in zip(down.d_consts, d_consts, strict=True)
        ]
        if scan.update is None:
            stacked, pending = _write(down.stacked, d_params, k), None
        else:
            stacked, pending = down.stacked, scan.update(wanted.params, old[0], d_params, old[1])
        return _Down(a, gamma * down.a_next, d_consts, stacked, pending)

    def arrive(down: _Down, k):
        """The parameters of block k; and with an update, those and its state, not updated yet."""
        if scan.update is None:
            return down, _read(saved.params, k), None
        # In place: written is what the block above left behind, and read only after that.
        # Written at once, it would be fused with what reads the old values of all blocks, and
        # XLA would copy those.
        stacked = _write(down.stacked, down.pending, jnp.minimum(k + 1, blocks - 1))
        old = _read(stacked, k)
        fixed = [None if keep else p for keep, p in zip(wanted.params, saved.params, strict=True)]
        params = merge(wanted.params, old[0], _read(fixed, k))
        return down._replace(stacked=stacked), params, old

    def stored_step(down: _Down, block_inputs):
        k, key, derivative = block_inputs
        down, params, old = arrive(down, k)
        sign, _ = _signs(scan, key, k, batch)
        gamma = _per_sample(sign, saved.n).astype(scan.wide) * scan.wide.type(scan.gamma)
        return descend(down, k, gamma, derivative.given(params, saved.consts), old), None

    def step(carry, block_inputs):
        n_next, n, down = carry
        k, key, packed, expected, witness = block_inputs
        down, params, old = arrive(down, k)
        sign, key = _signs(scan, key, k, batch)
        h, derivative, sign, alive = _pinned_block(scan, wanted, n, params, key, saved.consts, sign)
        gamma, y, q = _update(scan, n, h, sign)
        sigma = _per_sample(sign, n)
        side = side_bits.unpack_bits(packed, scan.bits, features) if scan.bits else jnp.uint32(0)
        q, error = _correct(scan, n_next, y, q, side, sigma)
        n_prev = maps.bdia_inverse(n_next, q, side, sigma, scan.m)
        # An Euler step cannot be taken back; there q itself is compared with what came of it.
        intact = jnp.where(sign == 0, _all(q == n_next), checksum(n_prev) + alive == expected)
        down = down._replace(a_next=_nan_unless(intact, down.a_next))
        down = descend(down, k, gamma, derivative, old)
        report = BackwardReport(
            jnp.sum(~intact, dtype=jnp.float32),
            jnp.sum(error != 0, dtype=jnp.float32),
            jnp.max(jnp.abs(error)).astype(jnp.float32),
        )
        if scan.audit:
            true_prev, true_y = witness
            wrong = jnp.where(sigma == 0, q != n_next, n_prev != true_prev)
            report = report._replace(
                mismatched=jnp.sum(wrong, dtype=jnp.float32),
                deviation=jnp.max(jnp.abs(y - true_y)).astype(jnp.float32),
            )
            # On from the true state, so that every block is judged by itself.
            n_prev = true_prev
        return (n, n_prev, down), report

    a, a_next = (
        jnp.zeros_like(n, c.aval.dtype) if isinstance(c, SymbolicZero) else c
        for n, c in zip((saved.n_prev, saved.n), cotangents)
    )
    wanted_params, wanted_consts = (
        select(wanted.params, saved.params),
        select(wanted.consts, saved.consts),
    )
    d_consts = [jnp.zeros_like(c, jnp.promote_types(c.dtype, jnp.float32)) for c in wanted_consts]
    if scan.update is None:
        stacked, pending = [*map(jnp.zeros_like, wanted_params)], None
    else:
        stacked = wanted_params, saved.update_state
        pending = _read(stacked, blocks - 1)
    down = _Down(a_next, a, d_consts, stacked, pending)

    low, high = _split(scan, saved)
    if scan.stored_blocks:
        down, _ = lax.scan(stored_step, down, (*high, saved.derivatives), reverse=True)
    a_next = down.a_next
    for n, expected in zip((saved.n_prev, saved.n), saved.checksums_of_last):
        a_next = _nan_unless(checksum(n) == expected, a_next)
    (_, _, down), report = lax.scan(
        step,
        (saved.n, saved.n_prev, down._replace(a_next=a_next)),
        (*low, saved.side, saved.checksums, saved.witness),
        reverse=True,
    )
    d_params, update_state = down.stacked, []
    if scan.update is not None:
        d_params, update_state = _write(down.stacked, down.pending, 0)
    d_consts = [d.astype(c.dtype) for d, c in zip(down.d_consts, wanted_consts)]
    # Of blocks that are not taken back there is nothing to report.
    report = jax.tree.map(lambda counts: jnp.pad(counts, (0, scan.stored_blocks)), report)
    # Under shard_map every device saw its samples alone; the report is on all of them.
    reductions = (lax.psum, lax.psum, lax.pmax)
    report = BackwardReport(
        *(reduce_to(frozenset(), counts, r) for counts, r in zip(report, reductions))
    )
    return Inputs(
        merge(wanted.params, d_params, [None] * len(wanted.params)),
        merge(wanted.consts, d_consts, [None] * len(wanted.consts)),
        None,
        down.a,
        down.a_next,
        report,
        update_state,
    )


def _correct(scan: Scan, n_next, y, q, side, sigma):
    """``q`` as it was in the forward pass, and by how much the recomputed one was off."""
    if not scan.tolerance_bits:
        return q, jnp.zeros_like(q)
    half = 2 ** (scan.tolerance_bits - 1)
    error = jnp.where(
        sigma == 0,
        jnp.clip(q - n_next, -half, half),
        maps.rounding_error(n_next, q, y - q, side, sigma, scan.m, scan.tolerance_bits),
    )
    return q - error, error


# ---------------------------------------------------------------------------------------------
# Plain automatic differentiation of the same forward pass
# ---------------------------------------------------------------------------------------------


def _stored(scan: Scan, inputs: Inputs) -> tuple[Array, Array]:
    """The same network, differentiated by JAX, straight through the rounding.

    Also the networks that cannot be taken back: γ = 0, a γ that is no power of two (all of the
    sum is rounded then), and none of the grid.
    """
    batch = inputs.x.shape[0]
    gridded = scan.frac_bits is not None
    integers = gridded and (scan.gamma == 0 or maps.is_shift(scan.gamma))

    def step(carry, block_inputs):
        x_prev, x, n_prev, n, finite = carry
        k, params, key = block_inputs
        sign, key = _signs(scan, key, k, batch)
        seen = params, x.astype(scan.dtype), key, inputs.consts
        h = barrier(scan.block(*barrier(seen))) if gridded else scan.block(*seen)
        if scan.gamma == 0:
            x_next = x + h
        else:
            gamma = _per_sample(sign, x).astype(scan.wide) * scan.wide.type(scan.gamma)
            x_next = gamma * x_prev + maps.pre_rounding(x, h, gamma)
        n_next = None
        if integers:
            _, y, q = _update(scan, n, h, sign)
            n_next = maps.bdia_step(n_prev, q, _per_sample(sign, n), scan.m)
            finite &= _in_range(y, n_next)
            exact = grid.from_grid(n_next, scan.frac_bits, scan.wide)
            x_next = grid.straight_through(exact, x_next)
        elif gridded:
            finite &= _all(grid.on_grid(x_next, scan.frac_bits))
            x_next = grid.quantize(x_next, scan.frac_bits)
        return (x, x_next.astype(x.dtype), n, n_next, finite), None

    x_prev, x, finite = inputs.x_prev, inputs.x, jnp.ones(batch, bool)
    if gridded:
        finite = _starts_in_range(scan, inputs)
        x_prev, x = (grid.quantize(x, scan.frac_bits) for x in (x_prev, x))
    n_prev = n = None
    if integers:
        n_prev, n = (grid.to_grid(x, scan.frac_bits) for x in (inputs.x_prev, inputs.x))
    (x_prev, x, _, _, finite), _ = lax.scan(
        step,
        (x_prev, x, n_prev, n, finite),
        (jnp.arange(inputs.params[0].shape[0]), inputs.params, inputs.keys),
    )
    if not gridded:
        return x_prev, x
    return tuple(_nan_unless(finite, x) for x in (x_prev, x))
