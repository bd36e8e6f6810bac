"""Attention that never holds the queries × keys matrix."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from bdia_jax.grid import accumulator
from bdia_jax.nn.caps import soft_cap
from bdia_jax.nn.chunks import cut, even, together
from bdia_jax.nn.dropout import dropped
from bdia_jax.pinning import alike, barrier


def chunked_attention(
    q: Float[Array, "batch query head dim"],
    k: Float[Array, "batch key kv_head dim"],
    v: Float[Array, "batch key kv_head dim"],
    *,
    causal: bool = False,
    offset: Int[Array, ""] | int = 0,
    segments: tuple[Int[Array, "batch query"], Int[Array, "batch key"]] | None = None,
    window: Int[Array, ""] | int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
    chunk: int = 128,
) -> Float[Array, "batch query head dim"]:
    """``softmax(scale q kᵀ) v``, going over the keys in chunks; differentiable in q, k and v.

    Memory, of the derivative too, is that of q, k, v, the result, and one chunk of the weights:
    the softmax is accumulated chunk by chunk, and the weights are computed a second time in the
    backward pass. (Rabe, Staats, "Self-attention Does Not Need O(n²) Memory", 2021; the form of
    the derivative: Dao, Fu, Ermon, Rudra, Ré, "FlashAttention", 2022.) Softmax and sums are in
    float32 (float64).

    Args:
      q, k, v: ``head`` is a multiple of ``kv_head``: each head of keys and values serves that
        many consecutive heads of queries (grouped-query attention).
      causal: query i attends to keys 0 … i + offset only.
      offset: position of the first query among the keys, for ``causal`` and ``window``.
      segments: numbers of queries and of keys; a query attends to the keys with its number only.
        (For padding: 1 where there is something, 0 where there is not.)
      window: query i attends to keys j with i + offset - j < window only; may be traced.
      scale: of the logits; by default 1/sqrt(dim).
      cap: soft cap of the scaled logits (:func:`bdia_jax.nn.caps.soft_cap`).
      dropout: probability with which a weight is dropped; needs ``key``.
      key: PRNG key.
      chunk: most keys that are looked at together.

    Returns:
      The attended values, in the dtype of ``q``; 0 where a query may not attend to any key.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "q, k, v must have the shapes [batch, query, head, dim] and [batch, key, kv_head, "
            f"dim]; got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[2] % k.shape[2] or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            "q and k must have equal batch and dim, and kv_head must divide head; "
            f"got {q.shape} and {k.shape}"
        )
    if not q.size or not k.size:
        raise ValueError(f"q and k must not be empty; got {q.shape} and {k.shape}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; got {chunk}")
    if dropout and key is None:
        raise ValueError(f"dropout={dropout} draws random numbers and needs a key; got None")
    if segments is not None:
        shapes = tuple(s.shape for s in segments)
        if shapes != (q.shape[:2], k.shape[:2]):
            raise ValueError(
                f"segments must have the shapes {q.shape[:2]} and {k.shape[:2]}; got {shapes}"
            )
    options = _Options(
        causal,
        segments is not None,
        float(q.shape[-1] ** -0.5 if scale is None else scale),
        cap,
        float(dropout),
        even(k.shape[1], chunk),
        k.shape[1],
    )
    q_segments, k_segments = segments or (None, None)
    rest = _Rest(
        jnp.asarray(offset, jnp.int32),
        None if window is None else jnp.asarray(window, jnp.int32),
        q_segments,
        k_segments,
        key if dropout else None,
    )
    batch, queries, heads, dim = q.shape
    grouped = q.reshape(batch, queries, k.shape[2], heads // k.shape[2], dim)
    attended: Any = _attend(options, *alike(grouped, k, v), rest)
    return attended.reshape(q.shape)


class _Options(NamedTuple):
    causal: bool
    segmented: bool
    scale: float
    cap: float | None
    dropout: float
    chunk: int
    keys: int


class _Rest(NamedTuple):
    """What is not differentiated."""

    offset: Int[Array, ""]
    window: Int[Array, ""] | None
    q_segments: Int[Array, "batch query"] | None
    k_segments: Int[Array, "batch key"] | None
    key: Key[Array, ""] | None


class _Chunk(NamedTuple):
    """Some consecutive keys."""

    number: Int[Array, ""]
    k: Float[Array, "batch chunk kv_head dim"]
    v: Float[Array, "batch chunk kv_head dim"]
    segments: Int[Array, "batch chunk"] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, q, k, v, rest: _Rest):
    return _forward(options, q, k, v, rest)[0]


def _forward(options: _Options, q, k, v, rest: _Rest):
    """The result, and what the derivative needs.

    With logits s and the largest so far m, the sums of exp(s - m) v and of exp(s - m) are scaled
    down whenever a larger logit comes.
    """

    def step(carry, chunk: _Chunk):
        total, norm, highest = carry
        s = _logits(options, q, chunk, rest)
        higher = jnp.maximum(highest, s.max(axis=-1))
        # Where nothing was allowed so far, both are -inf.
        shrink = jnp.exp(jnp.where(highest == -jnp.inf, -jnp.inf, highest - higher))
        p = jnp.exp(s - jnp.where(higher == -jnp.inf, 0, higher)[..., None])
        norm = norm * shrink + p.sum(axis=-1)
        p = _drop(options, p, chunk, rest)
        pv = _matmul("bkgqc,bckd->bkgqd", p.astype(v.dtype), chunk.v)
        return (total * shrink[..., None] + pv, norm, higher), None

    rest = _unknown(rest, q)
    # From q, so that it is sharded like it.
    zeros = jnp.moveaxis(jnp.zeros_like(q, accumulator(q.dtype)), 1, 3)
    start = (zeros, zeros[..., 0], jnp.full_like(zeros[..., 0], -jnp.inf))
    (total, norm, highest), _ = lax.scan(step, start, _chunks(options, k, v, rest))
    some = norm > 0
    out = jnp.moveaxis(total / jnp.where(some, norm, 1)[..., None], 3, 1).astype(q.dtype)
    log_norm = jnp.where(some, highest + jnp.log(jnp.where(some, norm, 1)), jnp.inf)
    return out, (q, k, v, rest, out, log_norm)


def _backward(options: _Options, saved, d_out):
    """With weights p and D = Σ out · d_out: d_s = p (d_p - D), where d_p = d_out · v.

    Of logits s that are capped at c, times the slope of the cap, 1 - (s/c)².
    """
    q, k, v, rest, out, log_norm = saved
    d_out = d_out.astype(q.dtype)
    inner = jnp.einsum("bqkgd,bqkgd->bkgq", out, d_out, preferred_element_type=accumulator(q.dtype))

    def step(d_q, chunk: _Chunk):
        s = _logits(options, q, chunk, rest)
        p = jnp.exp(s - log_norm[..., None])
        d_v = _matmul("bkgqc,bqkgd->bckd", _drop(options, p, chunk, rest).astype(q.dtype), d_out)
        d_p = _matmul("bqkgd,bckd->bkgqc", d_out, chunk.v)
        d_p = _drop(options, d_p, chunk, rest)
        d_s = p * (d_p - inner[..., None]) * options.scale
        if options.cap is not None:
            d_s *= 1 - jnp.square(jnp.where(s == -jnp.inf, 0, s) / options.cap)
        d_s = d_s.astype(q.dtype)
        d_q += _matmul("bkgqc,bckd->bqkgd", d_s, chunk.k)
        d_k = _matmul("bkgqc,bqkgd->bckd", d_s, q)
        return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    rest = _unknown(rest, q)
    zeros = jnp.zeros_like(q, accumulator(q.dtype))
    d_q, (d_k, d_v) = lax.scan(step, zeros, _chunks(options, k, v, rest))
    d_k, d_v = (together(d, k.shape[1]) for d in (d_k, d_v))
    return d_q.astype(q.dtype), d_k, d_v, None


_attend.defvjp(_forward, _backward)


def _unknown(rest: _Rest, q) -> _Rest:
    """``rest``, of which nothing is known before ``q`` is.

    Under ``jax.checkpoint``, what does not depend on differentiated values is kept rather than
    computed again: the masks of all chunks, each as large as all weights.
    """
    return rest._replace(offset=barrier((rest.offset, q))[0])


def _logits(options: _Options, q, chunk: _Chunk, rest: _Rest):
    """Scaled products of all queries and a chunk of keys; -inf where there is no attending."""
    s = soft_cap(_matmul("bqkgd,bckd->bkgqc", q, chunk.k) * options.scale, options.cap)
    allowed = _allowed(options, q, chunk, rest)
    return s if allowed is None else jnp.where(allowed, s, -jnp.inf)


def _allowed(options: _Options, q, chunk: _Chunk, rest: _Rest) -> Bool[Array, "..."] | None:
    """Which queries may attend to which keys of a chunk; None for all to all."""
    keys = chunk.number * options.chunk + jnp.arange(options.chunk)
    conditions = []
    if options.causal:
        positions = rest.offset + jnp.arange(q.shape[1])
        conditions.append((keys[None] <= positions[:, None])[None])
    if rest.window is not None:
        positions = rest.offset + jnp.arange(q.shape[1])
        conditions.append((positions[:, None] - keys[None] < rest.window)[None])
    if rest.q_segments is not None and chunk.segments is not None:
        conditions.append(rest.q_segments[:, :, None] == chunk.segments[:, None, :])
    if options.keys % options.chunk:
        conditions.append((keys < options.keys)[None, None])
    if not conditions:
        return None
    return functools.reduce(jnp.logical_and, conditions)[:, None, None]


def _drop(options: _Options, weights, chunk: _Chunk, rest: _Rest):
    """Dropout, alike in both passes."""
    if rest.key is None:
        return weights
    return dropped(weights, options.dropout, jax.random.fold_in(rest.key, chunk.number))


def _chunks(options: _Options, k, v, rest: _Rest) -> _Chunk:
    """The keys cut into chunks, to be scanned over."""
    k, v = (cut(a, options.chunk) for a in (k, v))
    segments = None if rest.k_segments is None else cut(rest.k_segments, options.chunk)
    return _Chunk(jnp.arange(len(k)), k, v, segments)


def _matmul(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=accumulator(a.dtype))
