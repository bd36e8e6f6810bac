"""What a scan is given: checked before any work, and made into closed functions of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jaxtyping import Array, ArrayLike, Float, Int32, Key, PyTree

from bdia_jax import grid
from bdia_jax.adjoints import Adjoint, BackwardReport, Checkpoint, Direct, Online, Update
from bdia_jax.memories import Memory
from bdia_jax.steps import Step

Block = Callable[..., Array]


class Part(NamedTuple):
    """A part of a block, closed: a pure function of arrays that closes over none."""

    function: Callable[[PyTree[Array], Array, Array | None, PyTree[Array]], Array]
    """``function(params_k, x, key, consts)``, with :attr:`Inputs.consts`. Leaves that it does not
    read may be None."""
    params: PyTree[bool]
    """Which leaves of the parameters it reads."""
    consts: PyTree[bool]
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

    params: PyTree[Array]
    """Stacked. Leaves that an update trains are in ``update_params`` instead, and None here."""
    consts: PyTree[Array]
    """The user's, and per part those that it closes over."""
    key: Key[Array, ""] | None
    """For signs that are the same in all blocks."""
    keys: Key[Array, "blocks parts"] | None
    x_prev: Float[Array, "batch *shape"]
    x: Float[Array, "batch *shape"]
    probe: BackwardReport
    update_params: PyTree[Array] = None
    update_state: PyTree[Array] = None


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
    functions = block if isinstance(block, tuple) else (block,)
    if not functions or not all(map(callable, functions)):
        raise TypeError(
            "block must be a function (params_k, x, key_k, *consts) -> h, or a tuple of such "
            f"functions; got {block!r}"
        )
    blocks = _check_params(stacked_params)
    x_prev, x = _check_state(state)
    if isinstance(start, bool) or not hasattr(start, "__index__") or start < 0:
        raise ValueError(f"start, the index of the first block, must be an int >= 0; got {start!r}")
    check_combination(step, adjoint)
    _check_consts(consts)
    key = _check_key(key)
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
    closed = [_close(f, i, params, x_seen, keys, consts) for i, f in enumerate(functions)]
    all_consts = (consts, [captured for _, captured in closed])
    parts = tuple(
        part._replace(
            consts=(part.consts, [[j == i] * len(c) for j, c in enumerate(all_consts[1])])
        )
        for i, (part, _) in enumerate(closed)
    )

    update = None if isinstance(adjoint, Direct) else adjoint.update
    probe = None if isinstance(adjoint, Direct) else adjoint.probe
    _check_probe(probe, blocks)
    if update is not None:
        _check_update(update, params, blocks)
        params = jax.tree.map(
            lambda trained, p: p if trained is None else None,
            update.params,
            params,
            is_leaf=lambda leaf: leaf is None,
        )
    scan = Scan(
        parts,
        blocks,
        x.shape,
        step,
        dtype,
        carried,
        int(start),
        None if update is None else _checked(update.function),
        adjoint.bits if isinstance(adjoint, Checkpoint) else None,
        "device" if isinstance(adjoint, Direct) else adjoint.keep_in,
        isinstance(adjoint, Online) and adjoint.narrow_cotangents,
    )
    inputs = Inputs(
        params,
        all_consts,
        key,
        keys,
        x_prev.astype(carried),
        x.astype(carried),
        BackwardReport.zeros(blocks) if probe is None else probe,
        None if update is None else update.params,
        None if update is None else jax.tree.map(jnp.asarray, update.state),
    )
    return scan, inputs


def check_combination(step: Step, adjoint: Adjoint) -> None:
    """An error for a step that an adjoint cannot differentiate, with those that it can."""
    if not isinstance(step, Step):
        raise TypeError(f"step must be BDIA(...), Midpoint(...) or Euler(...); got {step!r}")
    if not isinstance(adjoint, Adjoint):
        raise TypeError(
            f"adjoint must be Online(...), Checkpoint(...) or Direct(); got {adjoint!r}"
        )
    if isinstance(adjoint, Online):
        if step.gamma == 0:
            raise ValueError(
                f"Online() takes steps back, and {step} has no inverse: use Checkpoint() or "
                "Direct(), or BDIA(...)"
            )
        _ = step.m
        if step.frac_bits is None:
            raise ValueError(
                "Online() takes back steps on the grid: give frac_bits, or use Checkpoint() or "
                f"Direct(); got {step}"
            )
    bits = adjoint.bits if isinstance(adjoint, Checkpoint) else None
    if bits is not None and (step.gamma or step.frac_bits is not None):
        raise ValueError(f"Checkpoint(bits={bits}) is for Euler() without a grid; got {step}")


def _close(function: Block, i: int, params, x, keys, consts) -> tuple[Part, list[Array]]:
    """The i-th part as a function of arrays, and the arrays that it closes over.

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
    _check_result(h, x)

    read = {id(v) for eqn in traced.jaxpr.eqns for v in eqn.invars}
    read |= {id(v) for v in traced.jaxpr.outvars}
    arguments = [id(v) in read for v in traced.jaxpr.invars]
    of_params, of_consts = jax.tree.structure(params_k), jax.tree.structure(shapes)
    reads_params = of_params.unflatten(arguments[: of_params.num_leaves])
    reads_consts = of_consts.unflatten(arguments[len(arguments) - of_consts.num_leaves :])

    # Leaves that are not read may be missing, so that they are no arguments.
    invars = [v for v, is_read in zip(traced.jaxpr.invars, arguments) if is_read]
    reading = traced.jaxpr.replace(invars=invars)

    def closed(params, x, key, consts):
        own, captured = consts
        keys = [] if key is None else [key]
        leaves = [*of_params.flatten_up_to(params), x, *keys, *of_consts.flatten_up_to(own)]
        given = (leaf for leaf, is_read in zip(leaves, arguments) if is_read)
        return eval_jaxpr(reading, captured[i], *given)[0]

    return Part(closed, reads_params, reads_consts), [jnp.asarray(c) for c in traced.consts]


def _draws(trace, params_k, x, consts) -> bool:
    """Whether a block that cannot be traced without a key can be traced with one."""
    try:
        trace(params_k, x, jax.eval_shape(lambda: jax.random.key(0)), consts)
    except Exception:
        return False
    return True


def _checked(function):
    """An update's function that must return arrays like those that it is given."""

    def checked(params_k, d_params_k, state_k):
        found = function(params_k, d_params_k, state_k)
        kinds = [
            [(a.shape, a.dtype) for a in jax.tree.leaves(tree)]
            for tree in ((params_k, state_k), found)
        ]
        if kinds[0] != kinds[1]:
            raise ValueError(
                "update.function must return parameters and state of the shapes and dtypes that "
                f"it was given; got {kinds[1]} for {kinds[0]}"
            )
        return found

    return checked


def _check_update(update: Update, params, blocks: int) -> None:
    is_none = lambda leaf: leaf is None  # noqa: E731
    trained = jax.tree.structure(update.params, is_leaf=is_none)
    if trained != jax.tree.structure(params, is_leaf=is_none):
        raise ValueError(
            "update.params must have the structure of stacked_params, with None for leaves that "
            f"are not trained; got {trained}"
        )
    for name, tree in (("params", update.params), ("state", update.state)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name_of_leaf = f"update.{name}" + jax.tree_util.keystr(path)
            if getattr(leaf, "shape", ())[:1] != (blocks,):
                raise ValueError(
                    f"{name_of_leaf} needs a leading axis of {blocks} blocks; got shape "
                    f"{getattr(leaf, 'shape', None)}"
                )
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"{name_of_leaf} must be a floating-point array (its new value is what a "
                    f"gradient by it gives); got {leaf.dtype}"
                )
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(update.params, is_leaf=is_none),
        jax.tree.leaves(params, is_leaf=is_none),
    ):
        if new is not None and new.shape != old.shape:
            raise ValueError(
                f"update.params{jax.tree_util.keystr(path)} must have the shape of its leaf in "
                f"stacked_params, {old.shape}; got {new.shape}"
            )


def _check_result(h, x) -> None:
    if not isinstance(h, jax.ShapeDtypeStruct):
        raise TypeError(
            "block must return one array, the update h; got a "
            f"{type(h).__name__} of {len(jax.tree.leaves(h))} arrays"
        )
    if h.shape != x.shape:
        raise ValueError(
            f"block must return an update of the shape of x, {x.shape}; got {h.shape}. Blocks that "
            "change the width go between two scans"
        )
    if not jnp.issubdtype(h.dtype, jnp.floating):
        raise TypeError(f"block must return a floating-point update; got dtype {h.dtype}")


def _check_params(stacked_params) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(stacked_params)
    if not leaves:
        raise ValueError("stacked_params holds no array; its leading axis tells the depth")
    depths = {}
    for path, leaf in leaves:
        name = "stacked_params" + jax.tree_util.keystr(path)
        if not hasattr(leaf, "shape"):
            raise TypeError(f"{name} must be an array; got {type(leaf).__name__}")
        if not leaf.shape:
            raise ValueError(f"{name} is a scalar; every leaf needs a leading block axis")
        depths.setdefault(leaf.shape[0], name)
    if len(depths) > 1:
        found = ", ".join(f"{name} has {depth}" for depth, name in depths.items())
        raise ValueError(f"all leaves of stacked_params need as many blocks; got {found}")
    (blocks,) = depths
    if blocks == 0:
        raise ValueError("stacked_params holds 0 blocks; at least 1 is needed")
    return blocks


def _check_state(state):
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"the state is a pair (x_prev, x); got {type(state).__name__}")
    x_prev, x = state
    for name, value in (("x", x), ("x_prev", x_prev)):
        if getattr(getattr(value, "dtype", None), "name", None) not in grid.FLOATS:
            given = getattr(value, "dtype", type(value).__name__)
            raise TypeError(
                f"{name} must be a floating-point array ({', '.join(grid.FLOATS)}); got {given}"
            )
    x_prev, x = jnp.asarray(x_prev), jnp.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"x must have the shape [batch, ..., features]; got {x.shape}")
    if x.size == 0:
        raise ValueError(f"x is empty; got shape {x.shape}")
    if (x_prev.shape, x_prev.dtype) != (x.shape, x.dtype):
        raise ValueError(
            "x_prev and x must be alike; got "
            f"{x_prev.dtype}{list(x_prev.shape)} and {x.dtype}{list(x.shape)}"
        )
    return x_prev, x


def _check_consts(consts) -> None:
    if not isinstance(consts, tuple | list):
        raise TypeError(
            "consts must be a tuple with one entry per extra argument of the block, such as "
            f"consts=(mask,); got {type(consts).__name__}"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(consts):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int | complex):
            name = "consts" + jax.tree_util.keystr(path)
            raise TypeError(f"{name} must be an array or a number; got {type(leaf).__name__}")


def _check_key(key):
    if key is None:
        return None
    if not hasattr(key, "dtype"):
        raise TypeError(f"key must be a PRNG key, as jax.random.key(0); got {type(key).__name__}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32:
            raise TypeError(f"key must be a PRNG key, as jax.random.key(0); got dtype {key.dtype}")
        words = jax.random.key_data(jax.random.key(0)).shape
        if key.shape[-1:] != words:
            raise ValueError(
                f"a raw PRNG key must have the shape {words} of the default generator; "
                f"got {key.shape}"
            )
        key = jax.random.wrap_key_data(key)
    if key.ndim:
        raise ValueError(f"key must be one PRNG key; got an array of keys of shape {key.shape}")
    return key


def _check_probe(probe, blocks: int) -> None:
    if probe is None:
        return
    shapes = {getattr(leaf, "shape", None) for leaf in jax.tree.leaves(probe)}
    if not isinstance(probe, BackwardReport) or shapes != {(blocks,)}:
        raise ValueError(f"probe must be BackwardReport.zeros({blocks}); got {probe!r}")
