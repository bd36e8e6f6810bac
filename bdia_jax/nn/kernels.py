"""Attention kernels: ways to compute ``softmax(q kᵀ / sqrt(dim)) v``.

A new one is a function with the signature of :class:`Kernel`, and an entry in :data:`KERNELS`.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Protocol

import jax
from jaxtyping import Array, Float, Int, Key

from bdia_jax.nn.chunked_attention import chunked_attention

if TYPE_CHECKING:
    from bdia_jax.nn.configs import DecoderConfig


class Kernel(Protocol):
    """Grouped-query attention; each head of keys serves ``head / kv_head`` heads of queries."""

    def __call__(
        self,
        q: Float[Array, "batch query head dim"],
        k: Float[Array, "batch key kv_head dim"],
        v: Float[Array, "batch key kv_head dim"],
        *,
        causal: bool,
        segments: tuple[Int[Array, "batch query"], Int[Array, "batch key"]] | None,
        dropout: float,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "batch query head dim"]:
        """``segments``: a query attends to keys of its own segment only; None for all.

        ``dropout``: probability with which a weight is dropped, which needs a ``key``.
        """
        ...


def library_attention(implementation, q, k, v, *, causal, segments, dropout, key):
    """``jax.nn.dot_product_attention``: a length × length mask for segments, no dropout."""
    if dropout:
        raise ValueError(
            f"attention={implementation!r} has no dropout of weights: use attention='chunked'; got "
            f"dropout={dropout}"
        )
    mask = None
    if segments is not None:
        mask = (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, implementation=implementation
    )


KERNELS: dict[str, Kernel] = {
    "chunked": chunked_attention,
    "xla": functools.partial(library_attention, "xla"),
    "cudnn": functools.partial(library_attention, "cudnn"),
}
"""By the name in a configuration."""


def choose_kernel(config: DecoderConfig, q: Array, k: Array, dropout: float) -> Kernel:
    """The kernel of a configuration; for ``"auto"`` cuDNN's where it can be had, else chunked."""
    if config.attention != "auto":
        return KERNELS[config.attention]
    # Of odd lengths cuDNN's does not take a mask.
    even = q.shape[1] % 2 == k.shape[1] % 2 == 0
    fused = even and not dropout and fusible(config) and has_fused_attention()
    return KERNELS["cudnn" if fused else "chunked"]


def fusible(config: DecoderConfig) -> bool:
    """Whether cuDNN's fused attention can do what is configured, without dropout."""
    return (
        config.dtype in ("bfloat16", "float16")
        and config.size_of_head % 8 == 0
        and config.size_of_head <= 128
    )


def has_fused_attention() -> bool:
    """Whether there is a device with cuDNN's fused attention."""
    if jax.default_backend() != "gpu":
        return False
    # Of AMD's GPUs it is a name, such as gfx942.
    capability = getattr(jax.devices()[0], "compute_capability", "")
    return re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8
