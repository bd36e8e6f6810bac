"""What a scan is given, made into closed functions of arrays (:mod:`bdia_jax.checks` checks it)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jaxtyping import Array, ArrayLike, Bool, Float, Int32, Key, PyTree

from bdia_jax import grid
from bdia_jax.adjoints import Adjoint, BackwardReport, Checkpoint, Direct, Online, Update
from bdia_jax.checks import (
    check_combination,
    check_consts,
    check_key,
    check_params,
    check_probe,
    check_result,
    check_state,
    check_update,
    is_none,
)
from bdia_jax.memories import Memory
from bdia_jax.states import everywhere
from bdia_jax.steps import Step

Block = Callable[..., Array]
Leaves = dict[int, Array]
"""Leaves of a pytree by their numbers; some may be missing. Nothing else is inside a scan: a user's
node may refuse to hold anything but arrays."""


class Part(NamedTuple):
    """A part of a block, closed: a pure function of arrays that closes over none."""

    function: Callable[[Leaves, Array, Array | None, Leaves], Array]
    """``function(params_k, x, key, consts)``. Leaves that it does not read may be missing."""
    params: frozenset[int]
    """Which leaves of :attr:`Inputs.params` it reads."""
    consts: frozenset[int]
    """Which leaves of :attr:`Inputs.consts` it reads."""


class Scan(NamedTuple):
    """What is static about a scan."""

    parts: tuple[Part, ...]
    blocks: int
    shape: tuple[int, ...]
    """Of a state: [batch, ...]."""
    step: Step
    dtype: jnp.dtype
    """What the blocks see."""
    wide: jnp.dtype
    """What states are carried in, and the update is added in."""
    start: int
    """Index of the first of these blocks in the network."""
    update: Callable | None
    """The function of an :class:`bdia_jax.Update`."""
    checkpoint_bits: int | None = None
    keep_in: Memory = "device"
    """Where what is kept of a block waits."""
    narrow_cotangents: bool = False
    """Whether the cotangents of the stream have the dtype that the blocks see."""
    audit: bool = False
    """Whether all states are kept, and compared with the reconstructed ones integer by integer."""

    def draw(self, scan_key, keys, k, p: int) -> tuple[Int32[Array, "batch"], Array | None]:
        """σ of every sample in part p of block k, and the key that is left for the part.

        Args:
          scan_key: for signs that are the same in all blocks.
          keys: of the parts of block k; None without a key.
        """
        sign_key, part_key = (None, None) if keys is None else jax.random.split(keys[p])
        sign = self.step.sign(sign_key, scan_key, self.shape[0])
        if self.start == 0 and p == 0:
            sign = jnp.where(k == 0, 0, sign)
        return sign, part_key


class Inputs(NamedTuple):
    """What is not static: every array that a scan reads."""

    params: Leaves
    """Stacked, but for those that an update trains, which are in ``update_params``."""
    consts: Leaves
    """The user's, and after them those that the parts close over."""
    key: Key[Array, ""] | None
    """For signs that are the same in all blocks."""
    keys: Key[Array, "blocks parts"] | None
    x_prev: Float[Array, "batch *shape"]
    x: Float[Array, "batch *shape"]
    probe: BackwardReport
    update_params: Leaves | None = None
    update_state: PyTree[Array] = None


def starts_in_range(scan: Scan, inputs: Inputs) -> Bool[Array, "batch"]:
    """Per sample, whether the grid holds the state that the scan is given."""
    fits = everywhere(grid.on_grid(inputs.x, scan.step.grid_bits))
    if scan.start:
        fits &= everywhere(grid.on_grid(inputs.x_prev, scan.step.grid_bits))
    return fits


def prepare(
    block: Block | tuple[Block, ...],
    stacked_params: PyTree[ArrayLike],
    state: tuple[Array, Array],
    start: int,
    key: Array | None,
    consts: tuple[PyTree[ArrayLike], ...],
    step: Step,
    adjoint: Adjoint,
    compute_dtype: Any = None,
) -> tuple[Scan, Inputs]:
    """Checks all arguments of a scan; every error names what was given and what is allowed."""
    # A tuple that can be called, such as a NamedTuple with the method, is one block.
    functions = (block,) if callable(block) else block
    if not isinstance(functions, tuple) or not functions or not all(map(callable, functions)):
        raise TypeError(
            "block must be a function (params_k, x, key_k, *consts) -> h, or a tuple of such "
            f"functions; got {block!r}"
        )
    blocks = check_params(stacked_params)
    x_prev, x = check_state(state)
    if isinstance(start, bool) or not hasattr(start, "__index__") or start < 0:
        raise ValueError(f"start, the index of the first block, must be an int >= 0; got {start!r}")
    start = start.__index__()
    check_combination(step, adjoint)
    check_consts(consts)
    key = check_key(key)
    if step.draws and key is None:
        raise ValueError(
            f"{step} draws a sign per sample, which needs a PRNG key; got key=None (signs "
            '"minus" and "plus" need none)'
        )
    dtype = jnp.dtype(x.dtype if compute_dtype is None else compute_dtype)
    carried = x.dtype if step.frac_bits is None else grid.accumulator(x.dtype)
    grid.accumulator(dtype)

    keys = None
    if key is not None:
        numbers = jnp.arange(blocks * len(functions)) + start * len(functions)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers).reshape(blocks, -1)
        # Of what the blocks draw with, no number is as high.
        key = jax.random.fold_in(key, np.uint32(2**32 - 1))
    params = jax.tree.map(jnp.asarray, stacked_params)
    consts = jax.tree.map(jnp.asarray, tuple(consts))
    # With the mesh axes over which x varies or is sharded, which its shape alone does not tell.
    x_seen = jax.eval_shape(lambda x: x.astype(dtype), x)
    all_consts, parts = jax.tree.leaves(consts), []
    for function in functions:
        part, captured = _close(function, params, x_seen, keys, consts, len(all_consts))
        all_consts += captured
        parts.append(part)

    update = None if isinstance(adjoint, Direct) else adjoint.update
    probe = None if isinstance(adjoint, Direct) else adjoint.probe
    check_probe(probe, blocks)
    leaves, trained = dict(enumerate(jax.tree.leaves(params))), None
    if update is not None:
        check_update(update, params, blocks)
        # None may also stand in the parameters themselves, where it is no leaf.
        pairs = zip(*(jax.tree.leaves(t, is_leaf=is_none) for t in (update.params, params)))
        slots = enumerate(new for new, old in pairs if old is not None)
        trained = {i: leaf for i, leaf in slots if leaf is not None}
        leaves = {i: leaf for i, leaf in leaves.items() if i not in trained}
    scan = Scan(
        tuple(parts),
        blocks,
        x.shape,
        step,
        dtype,
        carried,
        start,
        None if update is None else _of_leaves(update),
        adjoint.bits if isinstance(adjoint, Checkpoint) else None,
        "device" if isinstance(adjoint, Direct) else adjoint.keep_in,
        isinstance(adjoint, Online) and adjoint.narrow_cotangents,
    )
    inputs = Inputs(
        leaves,
        dict(enumerate(all_consts)),
        key,
        keys,
        x_prev.astype(carried),
        x.astype(carried),
        BackwardReport.zeros(blocks) if probe is None else probe,
        trained,
        None if update is None else jax.tree.map(jnp.asarray, update.state),
    )
    return scan, inputs


def _close(function: Block, params, x, keys, consts, first: int) -> tuple[Part, list[Array]]:
    """A part as a function of arrays, and the arrays that it closes over, from number ``first`` on.

    Values that a block closes over may be traced, by ``jit`` or by ``grad``. A derivative rule
    must not close over those, so they are made explicit: traced once, the block is its jaxpr.
    """
    params_k = jax.eval_shape(lambda tree: jax.tree.map(lambda p: p[0], tree), params)
    key_k = None if keys is None else jax.eval_shape(lambda keys: keys[0, 0], keys)
    trace = jax.make_jaxpr(
        lambda params, x, key, consts: function(params, x, key, *consts), return_shape=True
    )
    shapes = jax.eval_shape(lambda consts: consts, consts)
    try:
        traced, h = trace(params_k, x, key_k, shapes)
    except Exception as error:
        if key_k is None and _draws(trace, params_k, x, shapes):
            raise ValueError(
                "the block draws random numbers with its key, and needs a PRNG key; got key=None"
            ) from error
        raise
    check_result(h, x)

    read = {id(v) for eqn in traced.jaxpr.eqns for v in eqn.invars}
    read |= {id(v) for v in traced.jaxpr.outvars}
    arguments = [id(v) in read for v in traced.jaxpr.invars]
    of_params, of_consts = (range(len(jax.tree.leaves(tree))) for tree in (params_k, shapes))
    captured = range(first, first + len(traced.consts))

    # Leaves that are not read may be missing, so that they are no arguments.
    invars = [v for v, is_read in zip(traced.jaxpr.invars, arguments) if is_read]
    reading = traced.jaxpr.replace(invars=invars)

    def closed(params, x, key, consts):
        key = [] if key is None else [key]
        leaves = [*map(params.get, of_params), x, *key, *map(consts.get, of_consts)]
        given = (leaf for leaf, is_read in zip(leaves, arguments) if is_read)
        return eval_jaxpr(reading, [consts[i] for i in captured], *given)[0]

    reads_params = zip(of_params, arguments)
    reads_consts = zip(of_consts, arguments[len(arguments) - len(of_consts) :])
    part = Part(
        closed,
        frozenset(i for i, is_read in reads_params if is_read),
        frozenset(i for i, is_read in reads_consts if is_read) | {*captured},
    )
    return part, [jnp.asarray(c) for c in traced.consts]


def _draws(trace, params_k, x, consts) -> bool:
    """Whether a block that cannot be traced without a key can be traced with one."""
    try:
        trace(params_k, x, jax.eval_shape(lambda: jax.random.key(0)), consts)
    except Exception:
        return False
    return True


def _of_leaves(update: Update) -> Callable[[Leaves, Leaves, PyTree], tuple[Leaves, PyTree]]:
    """An update's function of leaves; it must return arrays like those that it is given."""
    structure = jax.tree.structure(update.params)

    def function(params_k: Leaves, d_params_k: Leaves, state_k):
        given, d_given = (structure.unflatten(some.values()) for some in (params_k, d_params_k))
        found = update.function(given, d_given, state_k)
        kinds = [
            [(a.shape, a.dtype) for a in jax.tree.leaves(tree)]
            for tree in ((given, state_k), found)
        ]
        if kinds[0] != kinds[1]:
            raise ValueError(
                "update.function must return parameters and state of the shapes and dtypes that "
                f"it was given; got {kinds[1]} for {kinds[0]}"
            )
        params, state = found
        return dict(zip(params_k, jax.tree.leaves(params), strict=True)), state

    return function
