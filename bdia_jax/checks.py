"""Checks of what a scan is given: errors that name what was given, and what is allowed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdia_jax import grid
from bdia_jax.adjoints import Adjoint, BackwardReport, Checkpoint, Online, Update
from bdia_jax.steps import Step


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


def check_update(update: Update, params, blocks: int) -> None:
    """Parameters like the scan's own, and floating-point state, each with a block axis."""
    if not isinstance(update, Update) or not callable(update.function):
        raise TypeError(f"update must be Update(function, params, state); got {update!r}")
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
        if new is not None and (new.shape, new.dtype) != (old.shape, old.dtype):
            raise ValueError(
                f"update.params{jax.tree_util.keystr(path)} must have the shape and dtype of its "
                f"leaf in stacked_params, {old.dtype}{list(old.shape)}; got "
                f"{new.dtype}{list(new.shape)}"
            )


def check_result(h, x) -> None:
    """What a block returns, as shapes: one update like ``x``."""
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


def check_params(stacked_params) -> int:
    """Arrays with one and the same leading axis, of at least one block; how many there are."""
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


def check_state(state):
    """``(x_prev, x)`` as arrays, alike."""
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


def check_consts(consts) -> None:
    """A tuple of trees of arrays and numbers."""
    if not isinstance(consts, tuple | list):
        raise TypeError(
            "consts must be a tuple with one entry per extra argument of the block, such as "
            f"consts=(mask,); got {type(consts).__name__}"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(consts):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int | complex):
            name = "consts" + jax.tree_util.keystr(path)
            raise TypeError(f"{name} must be an array or a number; got {type(leaf).__name__}")


def check_key(key):
    """One PRNG key, of the new style; None stays None."""
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


def check_probe(probe, blocks: int) -> None:
    """Zeros of as many blocks, or None."""
    if probe is None:
        return
    shapes = {getattr(leaf, "shape", None) for leaf in jax.tree.leaves(probe)}
    if not isinstance(probe, BackwardReport) or shapes != {(blocks,)}:
        raise ValueError(f"probe must be BackwardReport.zeros({blocks}); got {probe!r}")


def is_none(leaf: Any) -> bool:
    """For ``is_leaf``."""
    return leaf is None
