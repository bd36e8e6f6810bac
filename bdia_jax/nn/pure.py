"""A block, which is a Flax module, as a pure function of its arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key, PyTree

Path = tuple[Any, ...]


def as_function(
    module: nnx.Module, call: Callable[..., PyTree[Array]]
) -> tuple[Callable[..., PyTree[Array]], tuple[nnx.State, nnx.State]]:
    """``call(module, *args)`` as ``function(state, key, *args)``; and the state.

    Every random stream in the module is started afresh from the key, each differently. Without a
    key, to draw from one is an error.

    Returns:
      The function, which raises ``ValueError`` at trace time if the module writes to a variable:
      whatever is written is lost. And the state, a pair of the parameters and the other variables.
    """
    graphdef, params, streams, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)

    def function(state, key: Key[Array, ""] | None, *args):
        def run(state, *args):
            module = nnx.merge(graphdef, state[0], _seeded(streams, key), state[1])
            return call(module, *args), values(nnx.state(module, _KEPT))

        before = values(state[0]) | values(state[1])
        output, after = run(state, *args)
        # A comparison of tracers costs nothing. Flax's transforms replace all variables of the
        # modules that they are given, so that the few suspects are judged by the program.
        if any(before.get(path) is not value for path, value in after.items()):
            _check_unwritten(run, state, args, before)
        return output

    return function, (params, rest)


_KEPT = nnx.Not(nnx.RngState)


def values(state: nnx.State) -> dict[Path, Array]:
    """The arrays by their paths."""
    return {path: leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


class NoKey(nnx.RngKey):
    """Stands where a random stream has no key."""

    def __getitem__(self, index):
        raise ValueError(
            "the blocks draw random numbers (dropout, in training mode), and need a PRNG key: call "
            "the model with key=..., or after model.eval(); got key=None"
        )


def _seeded(streams: nnx.State, key: Key[Array, ""] | None) -> nnx.State:
    """The random streams, started afresh. Without a key they cannot be drawn from."""

    def seeded(i: int, leaf: nnx.Variable) -> nnx.Variable:
        if not isinstance(leaf, nnx.RngKey):
            return leaf.replace(jnp.uint32(0))
        if key is None:
            return NoKey(None, tag=leaf.tag)  # pyright: ignore[reportArgumentType]
        return leaf.replace(jax.random.fold_in(key, i))

    flat = nnx.to_flat_state(streams)
    return nnx.from_flat_state([(path, seeded(i, leaf)) for i, (path, leaf) in enumerate(flat)])


def _check_unwritten(run, state, args, before: dict[Path, Array]) -> None:
    """An error unless every variable comes out of ``run`` as it went in."""
    paths, order = [*before], []

    def outputs(values_in, args):
        order.clear()
        put = dict(zip(paths, values_in))
        halves = (
            nnx.from_flat_state([(path, leaf.replace(put[path])) for path, leaf in flat])
            for flat in map(nnx.to_flat_state, state)
        )
        after = run(tuple(halves), *args)[1]
        order.extend(after)
        return [*after.values()]

    origins = _origins(jax.make_jaxpr(outputs)([*before.values()], args).jaxpr)
    written = [
        path
        for path, origin in zip(order, origins, strict=True)
        if path not in before or origin != paths.index(path)
    ]
    if written:
        names = ", ".join(".".join(map(str, path)) for path in written)
        raise ValueError(
            f"blocks must be pure functions, and cannot write to variables; got one that writes to "
            f"{names}. (For batch statistics: use layer, group or RMS normalization)"
        )


def _origins(jaxpr) -> list[int | None]:
    """Of each output, the number of the input that it is; None for one that is computed."""
    known = {id(v): i for i, v in enumerate(jaxpr.invars)}
    for equation in jaxpr.eqns:
        inner = equation.params.get("jaxpr")
        if inner is None:
            continue
        # Of a call (jit, checkpoint), which may hand an input on.
        for out, origin in zip(equation.outvars, _origins(getattr(inner, "jaxpr", inner))):
            if origin is not None and id(equation.invars[origin]) in known:
                known[id(out)] = known[id(equation.invars[origin])]
    return [known.get(id(v)) for v in jaxpr.outvars]
