"""What a computation will need, before it is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Memory(NamedTuple):
    """Bytes of a compiled computation, per device."""

    arguments: int
    """What it is given."""
    results: int
    """What it gives back, but for results that take the place of donated arguments."""
    temporaries: int
    """What lies beside both at the peak: in a training step, mostly activations."""

    @property
    def total(self) -> int:
        """All of it: the peak while it runs."""
        return sum(self)


def compiled_memory(compiled: jax.stages.Compiled) -> Memory:
    """What the compiler says of a computation; ``jax.jit(f).lower(...).compile()`` gives one."""
    if (found := compiled.memory_analysis()) is None:
        raise NotImplementedError("the compiler does not say what memory a program needs")
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes - found.alias_size_in_bytes,
        found.temp_size_in_bytes,
    )


def measure(
    function: Callable[..., Any], *arguments: Any, donate: int | tuple[int, ...] = ()
) -> Memory:
    """Bytes that ``function`` needs, per device; known from compilation alone, nothing is run.

    Args:
      function: compiled by ``jax.jit``; a training step, for instance.
      *arguments: arrays, or ``jax.ShapeDtypeStruct`` in their place.
      donate: numbers of arguments that results may take the place of (``donate_argnums``).
    """
    return compiled_memory(jax.jit(function, donate_argnums=donate).lower(*arguments).compile())


def temporaries(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes of temporary memory that ``function`` needs, at its peak, per device."""
    return measure(function, *arguments).temporaries


def largest(fits: Callable[[int], bool], limit: int = 2**20) -> int:
    """The largest count in [1, limit] that fits, 0 if none does; of few trials, by bisection.

    Args:
      fits: whether a count fits; where one does not, no larger one may.
      limit: where to stop.
    """
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
