"""Learning rates by step, by optax."""

from __future__ import annotations

from typing import Literal, get_args

import optax

Schedule = Literal["constant", "cosine", "linear", "wsd"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)


def make_schedule(
    name: str, rate: float, steps: int, warmup_steps: int, cooldown_steps: int = 0
) -> optax.Schedule:
    """Linear from 0 to ``rate`` over ``warmup_steps``, then by its name.

    constant
        stays there.
    cosine, linear
        half a cosine, or a line, to 0 at ``steps``.
    wsd
        stays there, then a line to 0 over the last ``cooldown_steps`` (warmup, stable, decay: Hu
        et al., "MiniCPM", 2024).
    """
    left = max(steps - warmup_steps, 1)
    stable = max(left - cooldown_steps, 0)
    after = {
        "constant": lambda: optax.constant_schedule(rate),
        "cosine": lambda: optax.cosine_decay_schedule(rate, left),
        "linear": lambda: optax.linear_schedule(rate, 0.0, left),
        "wsd": lambda: optax.linear_schedule(rate, 0.0, left - stable, stable),
    }[name]()
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])
