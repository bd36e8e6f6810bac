"""What a scan is given: checked before any work, and made into closed functions of leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from bdia_jax import grid, maps


class Scan(NamedTuple):
    """What is static about a scan."""

    block: Callable[..., Array]
    """``block(params_k, x, key_k, consts)``: closed, and a function of lists of arrays."""
    dtype: jnp.dtype
    """What the block sees."""
    gamma: float
    frac_bits: int | None
    tolerance_bits: int
    online: bool
    stored_blocks: int
    """How many blocks, from the last one down, keep their residuals and are not taken back."""
    random_signs: bool
    """Whether γ is ±, drawn per sample and block, or + throughout."""
    starts: bool
    """Whether the first of these blocks is the first of the network, an Euler step."""
    audit: bool = False
    """Whether all states are kept, and compared with the reconstructed ones integer by integer."""
    update: Callable[..., tuple[list, list]] | None = None
    """``update(wanted, params_k, d_params_k, state_k)``: new parameters and state, in lists of
    leaves; ``wanted`` says which leaves of the parameters those are."""

    @property
    def m(self) -> int:
        """``γ = σ 2^-m``."""
        return maps.gamma_shift(self.gamma) if self.gamma else 0

    @property
    def bits(self) -> int:
        """Bits of side information per element."""
        return self.m + self.tolerance_bits

    @property
    def wide(self) -> jnp.dtype:
        """What the update is computed in."""
        return grid.accumulator(self.dtype)


class Inputs(NamedTuple):
    """What is not static: every array that a scan reads, leaf by leaf."""

    params: list[Array]
    consts: list[Array]
    keys: Key[Array, "blocks"] | None
    x_prev: Float[Array, "batch *shape"]
    x: Float[Array, "batch *shape"]
    probe: Any
    update_state: list[Array]


def prepare(
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
) -> tuple[Scan, Inputs]:
    """Checks all arguments of a scan; every error names what was given and what is allowed."""
    if not callable(block):
        raise TypeError(
            f"block must be a function (params_k, x, key_k, *consts) -> h; got {block!r}"
        )
    blocks = _check_params(stacked_params)
    x_prev, x = _check_state(state)
    if isinstance(start, bool) or not hasattr(start, "__index__") or start < 0:
        raise ValueError(f"start, the index of the first block, must be an int >= 0; got {start!r}")
    gamma, online = _check_gamma(gamma, frac_bits, backprop)
    if signs not in ("random", "positive"):
        raise ValueError(f'signs must be "random" or "positive"; got {signs!r}')
    random_signs = signs == "random" and gamma != 0
    if frac_bits is not None:
        grid.check_frac_bits(frac_bits)
    maps.check_tolerance_bits(tolerance_bits, maps.gamma_shift(gamma) if online else 0)
    _check_stored_blocks(stored_blocks, blocks)
    if not isinstance(consts, tuple | list):
        raise TypeError(
            "consts must be a tuple with one entry per extra argument of the block, such as "
            f"consts=(mask,); got {type(consts).__name__}"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(consts):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int | complex):
            name = "consts" + jax.tree_util.keystr(path)
            raise TypeError(f"{name} must be an array or a number; got {type(leaf).__name__}")
    key = _check_key(key, gamma if random_signs else 0)
    _check_probe(probe, blocks)
    dtype = jnp.dtype(x.dtype if compute_dtype is None else compute_dtype)
    grid.accumulator(dtype)
    carried = x.dtype if frac_bits is None else grid.accumulator(x.dtype)

    keys = None
    if key is not None:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, start + jnp.arange(blocks))
    pure_block, captured = _close(block, stacked_params, x, dtype, keys, consts)
    scan = Scan(
        pure_block,
        dtype,
        gamma,
        frac_bits,
        tolerance_bits,
        online,
        stored_blocks,
        random_signs,
        start == 0,
        update=_close_update(update, stacked_params, blocks, online),
    )
    inputs = Inputs(
        [jnp.asarray(p) for p in jax.tree.leaves(stacked_params)],
        [jnp.asarray(c) for c in jax.tree.leaves(consts)] + captured,
        keys,
        x_prev.astype(carried),
        x.astype(carried),
        probe,
        [] if update is None else [jnp.asarray(s) for s in jax.tree.leaves(update.state)],
    )
    return scan, inputs


def _close_update(update, stacked_params, blocks: int, online: bool):
    """The function of an update as one of lists of leaves; it sees trees."""
    if update is None:
        return None
    if not online:
        raise ValueError(
            "update is for online back-propagation, which finishes one block's gradient at a time; "
            'got backprop="stored", or gamma=0'
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(update.state):
        name = "update.state" + jax.tree_util.keystr(path)
        if getattr(leaf, "shape", ())[:1] != (blocks,):
            raise ValueError(
                f"{name} needs a leading axis of {blocks} blocks, as the parameters have; got "
                f"shape {getattr(leaf, 'shape', None)}"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{name} must be a floating-point array (its new value is what a gradient by it "
                f"gives); got {leaf.dtype}"
            )
    structure, state_structure = (jax.tree.structure(t) for t in (stacked_params, update.state))

    def closed(wanted: tuple[bool, ...], params: list, d_params: list, state: list):
        def tree(some: list):
            some = iter(some)
            return structure.unflatten([next(some) if keep else None for keep in wanted])

        new_params, new_state = update.function(
            tree(params), tree(d_params), state_structure.unflatten(state)
        )
        new = jax.tree.leaves(new_params), jax.tree.leaves(new_state)
        for old, found in zip((params, state), new, strict=True):
            kinds = [[(a.shape, a.dtype) for a in arrays] for arrays in (old, found)]
            if kinds[0] != kinds[1]:
                raise ValueError(
                    "update.function must return parameters and state of the shapes and dtypes "
                    f"that it was given; got {kinds[1]} for {kinds[0]}"
                )
        return new

    return closed


def _close(block, stacked_params, x, dtype, keys, consts):
    """``block`` as a function of leaves, and the arrays that it closes over.

    Values that a block closes over may be traced, by ``jit`` or by ``grad``. A derivative rule
    must not close over those, so they are made explicit: traced once, the block is its jaxpr.
    """
    params_k = jax.eval_shape(lambda tree: jax.tree.map(lambda p: p[0], tree), stacked_params)
    key_k = None if keys is None else jax.eval_shape(lambda keys: keys[0], keys)
    x = jax.eval_shape(lambda x: x.astype(dtype), x)
    user_consts = jax.eval_shape(lambda consts: consts, tuple(consts))
    traced, h = jax.make_jaxpr(
        lambda params, x, key, consts: block(params, x, key, *consts), return_shape=True
    )(params_k, x, key_k, user_consts)

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

    captured = [jnp.asarray(c) for c in traced.consts]
    own = len(jax.tree.leaves(user_consts))

    def pure_block(params: list, x: Array, key: Array | None, consts: list) -> Array:
        keys = [] if key is None else [key]
        arguments = [*params, x, *keys, *consts[:own]]
        return jax.core.eval_jaxpr(traced.jaxpr, consts[own:], *arguments)[0]

    return pure_block, captured


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
        if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
            given = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{name} must be a floating-point array; got {given}")
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


def _check_gamma(gamma, frac_bits, backprop) -> tuple[float, bool]:
    """γ's magnitude, and whether the scan is taken back."""
    if backprop not in ("online", "stored"):
        raise ValueError(f'backprop must be "online" or "stored"; got {backprop!r}')
    is_number = hasattr(gamma, "__float__") and not getattr(gamma, "ndim", 0)
    if isinstance(gamma, bool | jax.core.Tracer) or not is_number:
        raise TypeError(f"gamma must be a number (static, not traced); got {gamma!r}")
    gamma = float(gamma)
    if not 0 <= gamma <= 1 or math.isnan(gamma):
        raise ValueError(f"gamma, the magnitude of γ, must lie in [0, 1]; got {gamma}")
    if gamma == 0 or backprop == "stored":
        return gamma, False
    maps.gamma_shift(gamma)
    if frac_bits is None:
        raise ValueError(
            "online back-propagation needs the grid: give frac_bits, or keep activations with "
            'backprop="stored"; got frac_bits=None'
        )
    return gamma, True


def _check_stored_blocks(stored_blocks, blocks: int) -> None:
    whole = hasattr(stored_blocks, "__index__") and not isinstance(stored_blocks, bool)
    if not whole or not 0 <= stored_blocks <= blocks:
        raise ValueError(
            f"stored_blocks must be an int in [0, {blocks}], the number of blocks; got "
            f"{stored_blocks!r}"
        )


def _check_key(key, gamma):
    if key is None:
        if gamma != 0:
            raise ValueError(
                f"gamma={gamma} draws a sign per sample and block, which needs a PRNG key; got None"
            )
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


def _check_probe(probe, blocks):
    if probe is None:
        return
    shapes = [getattr(leaf, "shape", None) for leaf in jax.tree.leaves(probe)]
    if type(probe).__name__ != "BackwardReport" or set(shapes) != {(blocks,)}:
        raise ValueError(f"probe must be BackwardReport.zeros({blocks}); got {probe!r}")
