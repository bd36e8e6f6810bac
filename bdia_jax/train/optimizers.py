"""Optimizers and learning-rate schedules, by optax.

A new optimizer is a name in :data:`Optimizer` and an entry in :data:`OPTIMIZERS`: settings, command
lines and tests take it from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import optax

from bdia_jax.nn.stack import is_stacked
from bdia_jax.optim import set_adam

Optimizer = Literal["adam", "adamw", "set-adam", "sgd"]
Schedule = Literal["constant", "cosine"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)


class Recipe(NamedTuple):
    """How an optimizer is made."""

    make: Callable[[optax.Schedule, float], optax.GradientTransformation]
    """Of a learning rate and a weight decay."""
    decays: bool = False
    """Whether it has weight decay; otherwise only 0 is allowed."""


OPTIMIZERS: dict[str, Recipe] = {
    "adam": Recipe(lambda rate, _: optax.adam(rate)),
    "adamw": Recipe(lambda rate, decay: optax.adamw(rate, weight_decay=decay), decays=True),
    "set-adam": Recipe(lambda rate, _: set_adam(rate, is_stacked=is_stacked)),
    "sgd": Recipe(lambda rate, _: optax.sgd(rate, momentum=0.9)),
}


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
    optimizer = OPTIMIZERS[name].make(schedule, weight_decay)
    if clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
