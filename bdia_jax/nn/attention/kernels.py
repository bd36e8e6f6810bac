"""Attention by one of several kernels.

To add a kernel, write a function such as :func:`_plain`, and enter it in :data:`KERNELS` and its
name in :data:`KernelName`. Configurations, command lines and their errors take it from there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bdia_jax.grid import accumulator
from bdia_jax.nn.attention.chunked import chunked_attention
from bdia_jax.nn.caps import soft_cap
from bdia_jax.nn.dropout import dropped

MASKED = 2048
"""Most positions of which auto gives cuDNN a mask: it is a matrix, of 4 bytes for each pair of a
query and a key; chunked attention has none."""
KernelName = Literal["auto", "chunked", "xla", "cudnn", "plain"]


def attend(
    q: Float[Array, "batch query head dim"],
    k: Float[Array, "batch key kv_head dim"],
    v: Float[Array, "batch key kv_head dim"],
    *,
    kernel: KernelName = "auto",
    causal: bool = False,
    segments: tuple[Int[Array, "batch query"], Int[Array, "batch key"]] | None = None,
    window: Int[Array, ""] | int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "batch query head dim"]:
    """``softmax(scale q kᵀ) v``.

    Args:
      q, k, v: ``head`` is a multiple of ``kv_head``: each head of keys and values serves that
        many consecutive heads of queries.
      kernel: a name in :data:`KERNELS`; auto: cudnn where it can be had, otherwise chunked. (With
        segments or a window, of sequences that are longer than :data:`MASKED`, also chunked.)
      causal: query i attends to keys 0 … i only.
      segments: numbers of queries and of keys; a query attends to the keys with its number only.
      window: query i attends to keys j with i - j < window only; may be traced. None for all.
      scale: of the scores; by default 1/sqrt(dim).
      cap: soft cap of the scaled scores (:func:`bdia_jax.nn.caps.soft_cap`).
      dropout: probability with which a weight is dropped; needs ``key``.
      key: PRNG key.

    Raises:
      ValueError: for dropout with a kernel that cannot drop, a cap with one that cannot cap.
    """
    if kernel == "auto":
        kernel = _best(q, k, dropout, cap, masked=segments is not None or window is not None)
    chosen = KERNELS[kernel]
    if dropout and not chosen.drops:
        raise ValueError(f"{kernel} attention cannot drop weights; got dropout={dropout}")
    if cap is not None and not chosen.caps:
        raise ValueError(f"{kernel} attention cannot cap scores; got cap={cap}")
    options = _Options(causal, segments, window, scale, cap, dropout, key)
    return chosen.function(q, k, v, options)


class _Options(NamedTuple):
    causal: bool
    segments: tuple[Array, Array] | None
    window: Array | int | None
    scale: float | None
    cap: float | None
    dropout: float
    key: Array | None


def _chunked(q, k, v, o: _Options):
    return chunked_attention(q, k, v, **o._asdict())


def _library(q, k, v, o: _Options, *, implementation: Literal["xla", "cudnn"]):
    mask = None if o.segments is None else _same_segment(*o.segments)
    if o.window is not None:
        within = _within(o.window, q.shape[1], k.shape[1])
        mask = within if mask is None else mask & within
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=o.scale, is_causal=o.causal, implementation=implementation
    )


def _plain(q, k, v, o: _Options):
    """With all heads' matrices of weights."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(a, group, axis=2) for a in (k, v))
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    mask = jnp.ones((1, 1, q.shape[2], k.shape[2]), bool)
    if o.causal:
        mask = jnp.tril(mask)
    if o.segments is not None:
        mask &= _same_segment(*o.segments)
    if o.window is not None:
        mask &= _within(o.window, q.shape[2], k.shape[2])
    scale = q.shape[-1] ** -0.5 if o.scale is None else o.scale
    drop = lambda weights: dropped(weights, o.dropout, o.key)  # noqa: E731
    attended = weighted(q, k, v, scale=scale, cap=o.cap, mask=mask, drop=drop)
    # 0 where a query may not attend to any key.
    return jnp.swapaxes(jnp.where(mask.any(-1, keepdims=True), attended, 0), 1, 2)


class Kernel(NamedTuple):
    """A way to compute attention."""

    function: Callable[[Array, Array, Array, _Options], Array]
    drops: bool
    """Whether it can drop weights."""
    caps: bool
    """Whether it can cap scores."""


KERNELS: dict[str, Kernel] = {
    "chunked": Kernel(_chunked, drops=True, caps=True),
    "xla": Kernel(functools.partial(_library, implementation="xla"), drops=False, caps=False),
    "cudnn": Kernel(functools.partial(_library, implementation="cudnn"), drops=False, caps=False),
    "plain": Kernel(_plain, drops=True, caps=True),
}


def weighted(
    q: Float[Array, "batch head query dim"],
    k: Float[Array, "batch head key dim"],
    v: Float[Array, "batch head key dim"],
    *,
    scale: Float[Array, ""] | float,
    cap: float | None = None,
    mask: Bool[Array, "#batch #head query key"] | None = None,
    drop: Callable[[Array], Array] = lambda weights: weights,
) -> Float[Array, "batch head query dim"]:
    """``drop(softmax(scale q kᵀ)) v``, heads first; the softmax is in float32 (float64).

    Args:
      q, k, v: heads come before positions, which is how matrix products want them.
      scale: of the logits.
      cap: soft cap of the scaled logits.
      mask: where it is False, there is no attending. (Where it is False for all keys, the weights
        are equal.)
      drop: applied to the weights.
    """
    wide = accumulator(q.dtype)
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=wide)
    logits *= jnp.asarray(scale, wide)
    logits = soft_cap(logits, cap)
    if mask is not None:
        # Finite: for infinities, the softmax of a row without any key would be NaN. Added rather
        # than selected, which is the same here, because no derivative then needs the mask.
        logits += jnp.where(mask, jnp.zeros((), wide), jnp.finfo(wide).min)
    weights = drop(jax.nn.softmax(logits).astype(v.dtype))
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v)


def fusible(
    dtype: jnp.dtype,
    head_dim: int,
    lengths: Sequence[int],
    dropout: float,
    cap: float | None,
    *,
    masked: bool = False,
) -> bool:
    """Whether cuDNN's fused attention can do this, and well.

    Args:
      dtype: of queries, keys and values.
      head_dim: features of a head.
      lengths: numbers of queries and of keys. With odd ones, cuDNN takes no mask.
      dropout: of the weights.
      cap: soft cap of the logits.
      masked: whether there are segments or a window.
    """
    if masked and max(lengths) > MASKED:
        return False
    plain = not dropout and cap is None and not any(length % 2 for length in lengths)
    half = dtype in (jnp.bfloat16, jnp.float16)
    return plain and half and head_dim % 8 == 0 and head_dim <= 128


def has_fused_attention() -> bool:
    """Whether there is a device with cuDNN's fused attention."""
    if jax.default_backend() != "gpu":
        return False
    # Of AMD's GPUs it is a name, such as gfx942.
    capability = getattr(jax.devices()[0], "compute_capability", "")
    return re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8


def _best(q, k, dropout: float, cap: float | None, *, masked: bool) -> KernelName:
    lengths = q.shape[1], k.shape[1]
    fused = fusible(q.dtype, q.shape[-1], lengths, dropout, cap, masked=masked)
    return "cudnn" if fused and has_fused_attention() else "chunked"


def _same_segment(of_queries, of_keys) -> Bool[Array, "batch 1 query key"]:
    return (of_queries[:, :, None] == of_keys[:, None, :])[:, None]


def _within(window, queries: int, keys: int) -> Bool[Array, "1 1 query key"]:
    return (jnp.arange(queries)[:, None] - jnp.arange(keys)[None] < window)[None, None]
