"""Times of :mod:`measure.costs`, and what a device had in use while it worked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from bdia_jax import grid, maps
from bdia_jax.planning import memory
from bdia_jax.planning.ways import Way
from bdia_jax.states import checksum, in_range
from bdia_jax.train.step import State
from measure import memory as peaks
from measure import timing
from measure.cost_tables import Rows
from measure.networks import NETWORKS, Network
from measure.side_by_side import Turn, in_processes, in_threads
from measure.ways import BASES, WAYS

if TYPE_CHECKING:
    from measure.costs import Costs


def steps(c: Costs, name: str) -> Rows:
    """Every way, in turns; of each type of number."""
    sized = {}
    for dtype in c.dtypes:
        network = NETWORKS[name](dtype, c.device_sized)
        sized[dtype] = {n: (network, way) for n, way in c.chosen(network).items()}
    return timed(c, sized)


def equal(c: Costs, name: str) -> Rows:
    """The largest batch of every way that fits, and its throughput."""
    network, sized = NETWORKS[name](c.dtypes[0], c.device_sized), {}
    for way, how in c.chosen(network).items():

        def fits(batch: int, how=how) -> bool:
            larger = dataclasses.replace(network, batch=batch)
            return peaks.training_step(larger, how) <= c.fit * 1e9

        try:
            batch = memory.largest(fits)
        except jax.errors.JaxRuntimeError:
            continue
        if batch:
            sized[way] = dataclasses.replace(network, batch=batch), how
    return timed(c, {c.dtypes[0]: sized})


def timed(c: Costs, sized: dict[str, dict[str, tuple[Network, Way]]]) -> Rows:
    """Seconds per step, in turns, and peak memory; by type of number and way."""
    turn, states, rows = Turn(c.turn), {}, []
    ready = {dtype: all_prepared(c, some, states) for dtype, some in sized.items()}
    with turn:
        samples = {
            dtype: timing.in_turns({n: s for n, (_, s) in some.items() if s is not None}, c.rounds)
            for dtype, some in ready.items()
        }
    for dtype, some in ready.items():
        found = timing.summary(samples[dtype], BASES)
        for name, (told, _) in some.items():
            network, _ = sized[dtype][name]
            row = {"dtype": dtype, "way": name, "batch": network.batch, "length": network.length}
            rows.append(row | told | found.get(name, {}))
            if name in found:
                per_second = network.batch * network.length / found[name]["seconds"]
                rows[-1]["per second"] = per_second
    return rows


Prepared = tuple[dict[str, Any], Callable[[], Any] | None]
"""The peak of a step, and what takes one; or the error, and nothing, of a way that this device has
not, or has no room for."""


def all_prepared(
    c: Costs, sized: dict[str, tuple[Network, Way]], states: dict[Any, State]
) -> dict[str, Prepared]:
    """Compiled, side by side, and tried, one after the other."""

    def compiled(name: str) -> Prepared:
        try:
            peak, step = prepared(*sized[name], states)
        except jax.errors.JaxRuntimeError as error:
            return {"error": _first_line(error)}, None
        return {"peak": peak}, step

    found = dict(zip(sized, in_threads(compiled, sized, c.workers), strict=True))
    for name, (told, step) in found.items():
        try:
            jax.block_until_ready(step and step())
        except jax.errors.JaxRuntimeError as error:
            found[name] = told | {"error": _first_line(error)}, None
    return found


def prepared(network: Network, way: Way, states: dict[Any, State]) -> tuple[int, Callable[[], Any]]:
    """The peak of a step, which is compiled for it; and a function that takes a step."""
    programs, step = timing.step_of(*network.prepared(way), states)
    return peaks.of_step(programs), step


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def in_use(c: Costs, name: str) -> Rows:
    """What the device itself had in use at most: a process per way, since it counts for each."""
    asked = [
        dataclasses.replace(c, networks=(name,), dtypes=(dtype,), ways=(way,))
        for dtype in c.dtypes
        for way in c.chosen(NETWORKS[name](dtype, c.device_sized))
    ]
    return [*in_processes(most_in_use, asked, c.workers, fresh=True)]


def most_in_use(c: Costs) -> dict[str, Any]:
    """A row: of the one way that is asked for, after some steps."""
    network = NETWORKS[c.networks[0]](c.dtypes[0], c.device_sized)
    row: dict[str, Any] = {"dtype": c.dtypes[0], "way": c.ways[0], "batch": network.batch}
    row["length"] = network.length
    try:
        row["peak"], step = prepared(network, WAYS[c.ways[0]], {})
        for _ in range(3):
            jax.block_until_ready(step())
    except jax.errors.JaxRuntimeError as error:
        return row | {"error": _first_line(error)}
    # A CPU does not count.
    found = jax.devices()[0].memory_stats() or {}
    return row | {"in use": found.get("peak_bytes_in_use")}


def besides(c: Costs, name: str) -> Rows:
    """What both loops do besides a block, apart from it; and a whole step, per block."""
    network, how = NETWORKS[name](c.dtypes[0], c.device_sized), WAYS["BDIA"]
    step = how.step
    config = network.config
    positions = network.elements // network.batch // config.width
    x = jax.random.normal(jax.random.key(0), (network.batch, positions, config.width), config.dtype)
    wide = grid.accumulator(x.dtype)
    n = grid.to_grid(x.astype(wide), step.frac_bits)
    sign = maps.sample_signs(jax.random.key(1), network.batch)

    @jax.jit
    def up(n_prev, n, h):
        n_next, y = step.up(n_prev, n, h.astype(wide), sign)
        x = grid.from_grid(n_next, step.frac_bits, h.dtype)
        return x, n_next, step.keep(n_prev), checksum(n_prev), in_range(y, n_next)

    @jax.jit
    def down(n_next, n, h, kept, expected, a_next, a, d_x):
        found = step.down(n_next, n, h.astype(wide), sign, kept)
        intact = checksum(found.n_prev) == expected
        d_h, a, a_prev = step.pull(a_next, a + d_x.astype(wide), sign)
        x = grid.from_grid(found.n_prev, step.frac_bits, h.dtype)
        return x, found.n_prev, intact, d_h.astype(h.dtype), a, a_prev

    _, n_next, kept, expected, _ = up(n, n, x)
    a = x.astype(wide)
    samples = timing.in_turns(
        {
            "forward, besides a block": lambda: up(n, n, x),
            "backward, besides a block": lambda: down(n_next, n, x, kept, expected, a, a, x),
            "step, by blocks": prepared(network, how, {})[1],
        },
        c.rounds,
    )
    samples["step, by blocks"] = [s / config.depth for s in samples["step, by blocks"]]
    whole = np.median(samples["step, by blocks"])
    return [
        {"what": name, "seconds": float(np.median(s)), "share": float(np.median(s) / whole)}
        for name, s in samples.items()
    ]
