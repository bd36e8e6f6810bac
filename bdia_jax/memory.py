"""What a computation will need, before it is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def temporaries(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes of temporary memory that ``function`` needs, at its peak, per device.

    What lies beside its arguments and results: in a training step, mostly activations. Known
    from compilation alone; nothing is run.

    Args:
      function: compiled by ``jax.jit``.
      *arguments: arrays, or ``jax.ShapeDtypeStruct`` in their place.
    """
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes
