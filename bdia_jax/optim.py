"""SET-Adam: Adam with a narrower range of step sizes, as an optax transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32, PyTree


class ScaleBySetAdamState(NamedTuple):
    """Steps taken, and the moments of Adam."""

    count: Int32[Array, ""]
    mu: PyTree[Array]
    nu: PyTree[Array]


def scale_by_set_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-18,
    tau: float = 0.5,
    *,
    is_stacked: Callable[[tuple], bool] | None = None,
) -> optax.GradientTransformation:
    """Adam whose second moments are scaled down, and translated towards zero, tensor by tensor.

    With Adam's moments m and v of a tensor of d elements, after t steps:

        ṽ      = v (Σv)² / (d Σv²)
        w      = sqrt(ṽ / (1 - b2^t) + eps)
        update = m / (1 - b1^t) / (w - tau min(w))

    Args:
      b1, b2: decay of the moments, in [0, 1).
      eps: positive; inside the root.
      tau: share of the smallest w that is taken off, in [0, 1).
      is_stacked: tells, from the path of a leaf (as ``jax.tree_util`` gives it), whether its
        first axis counts blocks: each block is then a tensor of its own. None: no leaf is.

    Source: Zhang, "On Suppressing Range of Adaptive Stepsizes of Adam to Improve Generalisation
    Performance", 2023 (arXiv 2302.01029).
    """
    for name, value in (("b1", b1), ("b2", b2), ("tau", tau)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1); got {value}")
    if not eps > 0:
        raise ValueError(f"eps must be positive; got {eps}")

    def init(params):
        # Buffers of their own: a training step that donates its state overwrites both.
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return ScaleBySetAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)

        def step(path, m, v):
            stacked = is_stacked is not None and is_stacked(path)
            axes = tuple(range(int(stacked), m.ndim))
            return _step(m, v, count, axes)

        return jax.tree_util.tree_map_with_path(step, mu, nu), ScaleBySetAdamState(count, mu, nu)

    def _step(m, v, count, axes):
        # (Σv)² / (d Σv²), as mean² / mean of squares of v / max(v): v² would underflow.
        scaled = v / jnp.maximum(jnp.max(v, axes, keepdims=True), jnp.finfo(v.dtype).tiny)
        mean, square = (jnp.mean(s, axes, keepdims=True) for s in (scaled, scaled**2))
        suppressed = v * jnp.where(square > 0, mean**2 / jnp.where(square > 0, square, 1), 0)
        w = jnp.sqrt(suppressed / (1 - b2**count) + eps)
        return m / (1 - b1**count) / (w - tau * jnp.min(w, axes, keepdims=True))

    return optax.GradientTransformation(init, update)


def set_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-18,
    tau: float = 0.5,
    *,
    is_stacked: Callable[[tuple], bool] | None = None,
) -> optax.GradientTransformation:
    """The optimizer: :func:`scale_by_set_adam`, and the learning rate."""
    return optax.chain(
        scale_by_set_adam(b1, b2, eps, tau, is_stacked=is_stacked),
        optax.scale_by_learning_rate(learning_rate),
    )
