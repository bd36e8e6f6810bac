"""What a computation will need, before it is run."""

from __future__ import annotations

import math
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


def largest_by_line(size: Callable[[int], float], limit: float, most: int) -> int:
    """A count in [1, most] whose size is at most ``limit``, the largest one; 0 if there is none.

    Sizes are almost linear in the count, so that few of them are asked for: each guess is where the
    line through two known ones meets the limit. Whatever they are, the answer is a count that fits,
    and one that is larger by a hundredth, or by 1, does not.

    Args:
      size: of a count; it may be expensive. Infinite where all that is known is that it does not
        fit.
      limit: for sizes.
      most: the largest count that is of interest.
    """
    known = {1: size(1)}
    if known[1] > limit:
        return 0
    fits, fails, guess = 1, most + 1, min(8, most)
    while fails - fits > max(1, fits // 100):
        guess = min(max(guess, fits + 1), fails - 1)
        known[guess] = size(guess)
        if known[guess] <= limit:
            fits = guess
        else:
            fails = guess
        other = fails if fails in known else max(n for n in known if n < fits)
        if math.isinf(known[other]):
            guess = (fits + fails) // 2
            continue
        slope = (known[other] - known[fits]) / (other - fits)
        guess = fits + int((limit - known[fits]) / slope) if slope > 0 else fails - 1
    return fits
