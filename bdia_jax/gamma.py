"""Which γ does a network tolerate? Measured before training, by forward passes alone.

γ perturbs a network: little where it was trained from scratch with γ, a lot where it was pretrained
without. The loss in training mode tells how much. The more bits, the smaller γ = 2^-m, and the less
it rises over that of the standard network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bdia_jax import maps
from bdia_jax.steps import BDIA, SIGNS, Euler, Signs, Step

GAMMAS = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)
FAIR = ("block", "sample")
"""Signs with E[γ] = 0, so that training with them trains the standard network."""


class Trial(NamedTuple):
    """The loss with one γ and one kind of signs."""

    gamma: float
    signs: Signs
    loss: float
    rise: float
    """Over the loss of the standard network, as a share of it."""


@dataclasses.dataclass(frozen=True)
class GammaChoice:
    """What :func:`choose_gamma` found."""

    step: BDIA
    """The step to train with: the fewest bits whose rise is within the tolerance."""
    standard: float
    """The loss of the standard network."""
    trials: tuple[Trial, ...]
    """All that was measured."""
    tolerance: float
    """The rise that was allowed, as a share."""

    @property
    def chosen(self) -> Trial:
        """The trial of the chosen step."""
        return next(
            t for t in self.trials if (t.gamma, t.signs) == (self.step.gamma, self.step.signs)
        )

    @property
    def within(self) -> bool:
        """Whether the chosen step's rise is within the tolerance; if not, no rise is smaller."""
        return self.chosen.rise <= self.tolerance

    def __str__(self) -> str:
        """One line for a log."""
        most = max(self.trials, key=lambda t: t.gamma)
        line = (
            f"γ = {_ratio(self.step.gamma)}, a sign per {self.step.signs}, {self.step.m} bits per "
            f"activation and step: loss {self.chosen.loss:.4g} with, {self.standard:.4g} without "
            f"({_ratio(most.gamma)}: {most.loss:.4g})"
        )
        if not self.within:
            line += f"; NOT within {self.tolerance:.1%}: the least rise of all that were tried"
        return line

    def table(self) -> str:
        """Markdown: the loss by γ (rows) and signs (columns), and the rise."""
        kinds = list(dict.fromkeys(t.signs for t in self.trials))
        found = {(t.gamma, t.signs): t for t in self.trials}
        lines = [
            "| γ | bits | " + " | ".join(f"signs: {kind}" for kind in kinds) + " |",
            "|---" * (2 + len(kinds)) + "|",
        ]
        for gamma in dict.fromkeys(t.gamma for t in self.trials):
            cells = [f"{_ratio(gamma)}", f"{maps.gamma_shift(gamma)}"]
            for kind in kinds:
                t = found.get((gamma, kind))
                cells.append("" if t is None else f"{t.loss:.4f} ({t.rise:+.2%})")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append(f"| 0 (standard) | | {self.standard:.4f} |" + " |" * (len(kinds) - 1))
        return "\n".join(lines)


def choose_gamma(
    loss: Callable[..., Float[Array, ""]],
    arguments: Iterable[tuple],
    *,
    gammas: Sequence[float] = GAMMAS,
    signs: Sequence[Signs] = (*FAIR, "minus"),
    tolerance: float = 0.01,
    frac_bits: int = 9,
    tolerance_bits: int = 0,
    exhaustive: bool = True,
    progress: Callable[[Trial], None] = lambda trial: None,
) -> GammaChoice:
    """Measures the loss in training mode by γ and signs, and chooses a step.

    It chooses the fewest bits with which the loss rises by no more than ``tolerance`` over that of
    the standard network. It chooses fair signs only; with others, the weights adapt to a network
    that is not the one handed back.

    Args:
      loss: ``loss(step, *args)``, a scalar; traced twice, whatever the number of trials. It gives
        the step to :func:`bdia_jax.reversible_scan`, with ``adjoint=Direct()``.
      arguments: the ``args`` of some calls, such as ``[(params, batch, key), ...]``, of one shape.
        Losses are averaged over them; a few batches do.
      gammas: powers of two.
      signs: kinds of signs to try.
      tolerance: the rise that is allowed, as a share of the loss.
      frac_bits, tolerance_bits: of the step.
      exhaustive: whether to go on to smaller γ when one is within the tolerance.
      progress: called after each trial.

    Raises:
      TypeError: for a loss whose scan has another adjoint than ``Direct()`` or ``Checkpoint()``.
      ValueError: for arguments that do not fit, for a standard network whose loss is not finite,
        or if the loss is with no γ.
    """
    arguments = [*arguments]
    if not arguments:
        raise ValueError("arguments must hold those of one call at least; got none")
    if not gammas:
        raise ValueError("gammas must hold one power of two at least; got none")
    for gamma in gammas:
        maps.gamma_shift(gamma)
        # Refused now, if it could not be chosen.
        BDIA(gamma, "block", frac_bits, tolerance_bits)
    if unknown := {*signs} - {*SIGNS}:
        raise ValueError(f"signs must be of {', '.join(SIGNS)}; got {', '.join(sorted(unknown))}")
    if not {*signs} & {*FAIR}:
        raise ValueError(f"signs must include one of {', '.join(FAIR)}; got {', '.join(signs)}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive; got {tolerance}")

    def mean(function, *first) -> float:
        return float(np.mean(jax.device_get([function(*first, *args) for args in arguments])))

    standard = mean(jax.jit(lambda *args: loss(Euler(), *args)))
    if not math.isfinite(standard) or not standard:
        raise ValueError(
            "the loss of the standard network, of which a rise is a share, must be finite and not "
            f"0; got {standard}"
        )
    trial = jax.jit(lambda gamma, kind, *args: loss(_Trial(gamma, kind, frac_bits), *args))
    trials = []
    for gamma in sorted(gammas, reverse=True):
        for kind in signs:
            found = mean(trial, jnp.float32(gamma), jnp.int32(SIGNS.index(kind)))
            rise = (found - standard) / abs(standard) if math.isfinite(found) else math.inf
            trials.append(Trial(gamma, kind, found, rise))
            progress(trials[-1])
        if not exhaustive and any(t.rise <= tolerance for t in trials if t.signs in FAIR):
            break
    fair = [t for t in trials if t.signs in FAIR]
    if not any(math.isfinite(t.loss) for t in fair):
        raise ValueError(
            f"the loss is finite without γ ({standard:.4g}), and with none of those tried: states "
            f"are not finite, or leave the range ±2**(30 - frac_bits); got frac_bits = {frac_bits}"
        )
    within = [t for t in fair if t.rise <= tolerance]
    best = min(within, key=lambda t: (-t.gamma, t.rise)) if within else min(fair, key=_rise)
    step = BDIA(best.gamma, best.signs, frac_bits, tolerance_bits)
    return GammaChoice(step, standard, tuple(trials), tolerance)


def _rise(trial: Trial) -> float:
    return trial.rise


def _ratio(gamma: float) -> str:
    return f"1/{round(1 / gamma)}"


@dataclasses.dataclass(frozen=True, eq=False)
class _Trial(Step):
    """BDIA's step with γ and its signs as traced numbers: one program for all trials.

    In floats, rounded to the grid; for forward passes.
    """

    magnitude: Float[Array, ""]
    kind: Int[Array, ""]
    frac_bits: int

    gamma = 1.0
    signs = "block"

    @property
    def m(self) -> int:
        raise TypeError(
            "choose_gamma tries γ as a traced number, whose steps cannot be taken back: give the "
            "scan of the loss adjoint=Direct()"
        )

    @property
    def exact(self) -> bool:
        return False

    def scaled(self, sign, like):
        return super().scaled(sign, like) * self.magnitude.astype(like.dtype)

    def sign(self, block_key, scan_key, batch):
        kinds = [BDIA(signs=kind).sign(block_key, scan_key, batch) for kind in SIGNS]
        return jnp.stack(kinds)[self.kind]
