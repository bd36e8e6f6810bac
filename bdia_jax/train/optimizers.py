"""Optimizers and learning-rate schedules, by optax."""

from __future__ import annotations

from collections.abc import Callable

import optax

from bdia_jax.nn.stack import is_stacked
from bdia_jax.optim import set_adam

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": lambda rate, decay: optax.adam(rate),
    "adamw": lambda rate, decay: optax.adamw(rate, weight_decay=decay),
    "set-adam": lambda rate, decay: set_adam(rate, is_stacked=is_stacked),
    "sgd": lambda rate, decay: optax.sgd(rate, momentum=0.9),
}
SCHEDULES = ("constant", "cosine")


def make_schedule(name: str, rate: float, steps: int, warmup_steps: int) -> optax.Schedule:
    """Linear from 0 over ``warmup_steps``, then constant, or a half cosine to 0 at ``steps``."""
    if name == "cosine":
        after = optax.cosine_decay_schedule(rate, max(steps - warmup_steps, 1))
    else:
        after = optax.constant_schedule(rate)
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """The optimizer called ``name``, after clipping by the global norm of the gradient."""
    optimizer = OPTIMIZERS[name](schedule, weight_decay)
    if clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
