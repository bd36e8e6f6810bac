"""Cross-entropy over large vocabularies, and other metrics of the next token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bdia_jax.grid import accumulator
from bdia_jax.nn.caps import soft_cap
from bdia_jax.nn.chunks import cut, even, sum_of_chunks, together
from bdia_jax.nn.placement import Placement
from bdia_jax.pinning import alike

METRICS: dict[str, Callable[[Array, Array], Array]] = {
    "accuracy": lambda logits, targets: logits.argmax(-1) == targets,
}
"""Metrics of text: functions of logits [..., vocab] and targets [...], with a value per position. A
new one is an entry here: training and evaluation report it."""


class Sums(NamedTuple):
    """Sums over positions or samples, each times its weight, in float32 (float64).

    Sums of several batches are added; their mean is the mean over all that is in them.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    """The sum of the weights; it must not depend on parameters."""
    metrics: dict[str, Float[Array, ""]]
    """Such as those of :data:`METRICS`."""

    def means(self) -> dict[str, Float[Array, ""]]:
        """The loss and the metrics, divided by the weight; 0 where there is no weight."""
        weight = jnp.where(self.weight == 0, 1, self.weight)
        sums = {"loss": self.loss, **self.metrics}
        return {name: value / weight for name, value in sums.items()}


def logits(
    features: Float[Array, "*batch width"], matrix: Float[Array, "vocab width"]
) -> Float[Array, "*batch vocab"]:
    """``features matrixᵀ``, in float32 (float64); differentiable in reverse mode.

    In bfloat16 the derivative's products are of bfloat16, too, and accumulated likewise; by itself
    JAX would multiply a float32 cotangent, for which the matrix is copied to float32. (In float16
    most of that cotangent would be 0: there it stays in float32.)
    """
    return _logits(*alike(features, matrix))


@jax.custom_vjp
def _logits(features, matrix):
    return _product("...w,vw->...v", features, matrix.astype(features.dtype))


def _logits_forward(features, matrix):
    return _logits(features, matrix), (features, matrix)


def _logits_backward(saved, d_logits):
    features, matrix = saved
    bfloat16 = features.dtype == jnp.bfloat16
    dtype = features.dtype if bfloat16 else accumulator(features.dtype)
    d_logits, rounded = d_logits.astype(dtype), matrix.astype(features.dtype)
    d_features = _product("...v,vw->...w", d_logits, rounded.astype(dtype))
    d_matrix = _product("...v,...w->vw", d_logits, features.astype(dtype))
    return d_features.astype(features.dtype), d_matrix.astype(matrix.dtype)


_logits.defvjp(_logits_forward, _logits_backward)


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=accumulator(a.dtype))


def cross_entropy(
    features: Float[Array, "batch length width"],
    matrix: Float[Array, "vocab width"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"] | None = None,
    *,
    label_smoothing: float = 0.0,
    cap: float | None = None,
    chunk: int | None = None,
    placement: Placement | None = None,
) -> Sums:
    """Cross-entropy of ``targets`` under the logits ``features matrixᵀ``, in chunks of tokens.

    The logits of the whole batch never exist, in the derivative neither, and none are computed
    twice (:func:`bdia_jax.nn.chunks.sum_of_chunks`). Metrics are not differentiated by what the
    logits depend on.

    Args:
      features: what comes out of the last norm.
      matrix: of the output layer; products are accumulated in float32 (float64).
      targets: in [0, vocab), or the loss is NaN; anything where the weight is 0.
      weights: of the positions; None for 1.
      label_smoothing: share of the target that is spread over the vocabulary, in [0, 1).
      cap: of the logits (:func:`bdia_jax.nn.caps.soft_cap`); None for no cap.
      chunk: number of tokens whose logits exist at once on a device (at least one per sequence);
        None for 1,024, or fewer if these have more than 2^25 logits.
      placement: where samples are; None for one device.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1); got {label_smoothing}")
    chunks, weights = _in_chunks(features, matrix, targets, weights, chunk, placement)
    loss, values = sum_of_chunks(_CrossEntropy(label_smoothing, cap), matrix, chunks, placement)
    metrics = {
        name: jnp.sum(weights * together(value, targets.shape[1]).astype(weights.dtype))
        for name, value in values.items()
    }
    return Sums(loss, jnp.sum(weights), metrics)


def log_likelihoods(
    features: Float[Array, "batch length width"],
    matrix: Float[Array, "vocab width"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"] | None = None,
    *,
    cap: float | None = None,
    chunk: int | None = None,
    placement: Placement | None = None,
) -> Float[Array, " batch"]:
    """The log-probability of each sequence, in chunks of tokens; in float32 (float64).

    The derivative computes logits again: a chunk's depends on what comes of all of a sequence.
    Arguments are those of :func:`cross_entropy`.
    """
    chunks, _ = _in_chunks(features, matrix, targets, weights, chunk, placement)
    return _log_likelihoods(cap, placement, *alike(matrix, *chunks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _log_likelihoods(cap, placement, matrix, features, targets, weights):
    del placement

    def of_chunk(chunk):
        features, targets, weights = chunk
        each = soft_cap(logits(features, matrix), cap)
        return -jnp.sum(weights * _entropies(each, targets, weights), axis=1)

    return jnp.sum(lax.map(of_chunk, (features, targets, weights)), axis=0)


def _log_likelihoods_forward(cap, placement, *arguments):
    return _log_likelihoods(cap, placement, *arguments), arguments


def _log_likelihoods_backward(cap, placement, arguments, d):
    """The gradient of a cross-entropy, whose weights are times the cotangents of the sequences."""
    matrix, features, targets, weights = arguments

    def total(matrix, features, weights):
        chunks = features, targets, -d[:, None] * weights
        return sum_of_chunks(_CrossEntropy(0.0, cap), matrix, chunks, placement)[0]

    d_matrix, d_features, d_weights = jax.grad(total, (0, 1, 2))(matrix, features, weights)
    return d_matrix, d_features, None, d_weights


_log_likelihoods.defvjp(_log_likelihoods_forward, _log_likelihoods_backward)


def _in_chunks(features, matrix, targets, weights, chunk, placement):
    """Chunks of features, targets and weights; and all weights.

    Raises:
      ValueError: for shapes that do not fit, and a chunk of no tokens.
    """
    if features.ndim != 3 or targets.shape != features.shape[:2]:
        raise ValueError(
            "features must have the shape [batch, length, width], and targets [batch, length]; "
            f"got {features.shape} and {targets.shape}"
        )
    if not features.size:
        raise ValueError(f"features must not be empty; got the shape {features.shape}")
    if matrix.ndim != 2 or matrix.shape[1] != features.shape[2]:
        raise ValueError(
            f"matrix must have the shape [vocab, {features.shape[2]}]; got {matrix.shape}"
        )
    if chunk is None:
        chunk = max(1, min(1024, 2**25 // matrix.shape[0]))
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; got {chunk}")
    wide = accumulator(features.dtype)
    if weights is None:
        weights = jnp.ones_like(targets, wide)
    elif weights.shape != targets.shape:
        raise ValueError(f"weights must have the shape {targets.shape}; got {weights.shape}")
    weights = weights.astype(wide)
    batch, length, _ = features.shape
    devices = 1 if placement is None else placement.devices
    size = even(length, max(1, chunk * devices // batch))
    return tuple(cut(a, size) for a in (features, targets, weights)), weights


class _CrossEntropy(NamedTuple):
    """Of a chunk of tokens, the sum; and the metrics of each."""

    label_smoothing: float
    cap: float | None

    def __call__(self, matrix, chunk):
        features, targets, weights = chunk
        each = soft_cap(logits(features, matrix), self.cap)
        losses = _entropies(each, targets, weights, self.label_smoothing)
        return jnp.sum(weights * losses), {name: f(each, targets) for name, f in METRICS.items()}


def _entropies(
    each: Float[Array, "batch length vocab"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    label_smoothing: float = 0.0,
) -> Float[Array, "batch length"]:
    """``-log p(target)``; 0 where the weight is 0."""
    norm = jax.nn.logsumexp(each, axis=-1)
    # By comparing, not by indexing: the derivative of that would scatter into a copy of each.
    # A product, not a selection, of which the zeros would be kept for the derivative.
    hit = targets[..., None] == jnp.arange(each.shape[-1], dtype=targets.dtype)[None, None]
    target = jnp.sum(each * hit.astype(each.dtype), axis=-1)
    exists = (targets >= 0) & (targets < each.shape[-1])
    loss = norm - jnp.where(exists, target, jnp.nan)
    if label_smoothing:
        loss += label_smoothing * (target - each.mean(axis=-1))
    # A target that does not exist makes the loss NaN, but where nobody asks for it.
    return jnp.where(weights == 0, 0, loss)
