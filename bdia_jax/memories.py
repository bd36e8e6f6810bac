"""Where a scan keeps what its way back needs: in the device's memory, or in the host's.

What waits in the host's memory is copied there as soon as a block is done, and back when the way
back comes to it. On a GPU or a TPU the compiler has these copies run beside the computation; a CPU
has one memory, and nothing is copied.
"""

from __future__ import annotations

from typing import Literal

import jax
from jaxtyping import Array, PyTree

Memory = Literal["device", "host"]


def put_away(kept: PyTree[Array], memory: Memory) -> PyTree[Array]:
    """What is kept of a block, where it waits."""
    return kept if memory == "device" else jax.device_put(kept, jax.memory.Space.Host)


def fetch(kept: PyTree[Array], memory: Memory) -> PyTree[Array]:
    """What is kept of a block, on the device again."""
    return kept if memory == "device" else jax.device_put(kept, jax.memory.Space.Device)
