"""How to train: the settings of a run, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import optax

from bdia_jax.train.blockwise import Blockwise
from bdia_jax.train.mesh import mesh_shape
from bdia_jax.train.optimizers import (
    OPTIMIZERS,
    Decayed,
    Optimizer,
    make_blockwise,
    make_optimizer,
)
from bdia_jax.train.schedules import SCHEDULES, Schedule, make_schedule

HARMLESS = (
    "log_every",
    "eval_every",
    "eval_batch_size",
    "checkpoint_every",
    "keep_last",
    "patience",
    "stop_at",
    "mesh",
    "wandb",
)
"""Settings that may differ between a run and its continuation: the weights do not depend on them.
(On another mesh sums are rounded otherwise: the weights are then equal to float tolerance.)"""
STEPS = 1000
"""Of a run whose settings give neither steps nor epochs."""


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train."""

    steps: int | None = None
    """Optimizer steps in all. None for what epochs come to, or else for the command's own default
    (in Python: 1000)."""
    epochs: float | None = None
    """Passes over the training data, in place of steps; a fraction may be given. The run tells how
    many steps they are."""
    batch_size: int = 128
    """Samples per step."""
    accumulate: int = 1
    """Micro-batches that a batch is computed in, one after the other; divides batch_size."""
    optimizer: Optimizer = "adamw"
    """By its name; sgd has momentum 0.9. muon is for the blocks' matrices, with AdamW for all
    else, and steps as large as AdamW's; adafactor keeps a row and a column of each matrix."""
    learning_rate: float = 1e-3
    """Highest learning rate."""
    schedule: Schedule = "cosine"
    """constant; cosine or linear: half a cosine, or a line, to 0 at the last step; wsd: constant,
    then a line to 0 over cooldown_steps."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0; never more than half of all steps."""
    cooldown_steps: int | None = None
    """Steps of wsd's line to 0; None for a fifth of all steps."""
    weight_decay: float = 0.0
    """Weight decay, for optimizers that have it (adamw, lion, muon, adafactor)."""
    decayed: Decayed = "matrices"
    """What decays: arrays of two or more axes (that of blocks does not count), or all. Norms and
    biases have one axis."""
    clip_norm: float | None = 1.0
    """The gradient is scaled down to this global norm; None for no clipping."""
    update_in_backward: bool = False
    """Update each block as soon as its gradient is known, so that the gradient of all blocks never
    exists; for stacks that are taken back or checkpointed. If a step goes wrong, a block whose
    gradient is not finite stays as it is, but the blocks above it have taken the step: go on from
    the last checkpoint."""
    clip_by: Literal["previous", "second-pass"] = "previous"
    """With update_in_backward, clip by the norm of the previous step (which is close to this one's,
    and free; the first step only finds the norm), or compute this step's norm in a backward pass of
    its own (as long as the first)."""
    seed: int = 0
    """Of order, augmentation, dropout and γ (the initialization has a seed of its own)."""
    log_every: int = 50
    """Steps between lines about training. Errors are noticed at that rate, too. (There is also a
    line at every evaluation and checkpoint.)"""
    eval_every: int = 500
    """Steps between evaluations; there is one at the end in any case."""
    eval_batch_size: int | None = None
    """Samples per evaluation batch; None for what the task says, but no more than a training step
    computes at a time (batch_size / accumulate), so that evaluation does not need the most
    memory."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is one at the end in any case, and at every evaluation that
    is the best so far."""
    keep_last: int = 2
    """Checkpoints kept, besides the best of those at steps that were evaluated."""
    patience: int | None = None
    """The run ends after so many evaluations in a row that are not better than the best before
    them; None for all steps. Evaluations at multiples of eval_every count."""
    stop_at: int | None = None
    """Save and leave after this step, to be resumed later."""
    mesh: str | None = None
    """Devices, such as data=4,fsdp=2: batches over both, parameters over fsdp."""
    wandb: str | None = None
    """A project of Weights & Biases that gets the metrics, too; needs the package wandb."""

    def __post_init__(self):
        for name in (
            "batch_size",
            "accumulate",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep_last",
        ):
            _check_int(name, getattr(self, name), at_least=1)
        for name in ("steps", "eval_batch_size", "patience", "stop_at"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), at_least=1, or_none=True)
        _check_int("warmup_steps", self.warmup_steps, at_least=0)
        if not isinstance(self.update_in_backward, bool):
            raise ValueError(
                f"update_in_backward must be True or False; got {self.update_in_backward!r}"
            )
        if self.mesh:
            mesh_shape(self.mesh)
        if self.cooldown_steps is not None:
            _check_int("cooldown_steps", self.cooldown_steps, at_least=1, or_none=True)
            if self.schedule != "wsd":
                raise ValueError(
                    f"cooldown_steps needs the schedule wsd; got {self.cooldown_steps} with "
                    f"{self.schedule!r}"
                )
            # Of epochs, the data say how many steps they are; then it is checked.
            if self.epochs is None and self.cooldown_steps > self.total_steps - self.warmup:
                raise ValueError(
                    f"cooldown_steps must be at most the {self.total_steps - self.warmup} steps "
                    f"that follow the warmup; got {self.cooldown_steps}"
                )
        _check_int("seed", self.seed)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate must divide batch_size = {self.batch_size}; got {self.accumulate}"
            )
        for name, allowed in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("decayed", ("matrices", "all")),
            ("clip_by", ("previous", "second-pass")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}"
                )
        if self.wandb is not None and (not isinstance(self.wandb, str) or not self.wandb.strip()):
            raise ValueError(f"wandb must be the name of a project, or None; got {self.wandb!r}")
        if self.epochs is not None:
            _check_number("epochs", self.epochs, "positive, or None")
            if self.steps is not None:
                raise ValueError(
                    "give steps or epochs, and None for the other one: each says how long a run "
                    f"is; got steps={self.steps} and epochs={self.epochs}"
                )
        _check_number("learning_rate", self.learning_rate, "positive")
        _check_number("weight_decay", self.weight_decay, "0 or positive")
        if self.clip_norm is not None:
            _check_number("clip_norm", self.clip_norm, "positive, or None")
        if self.weight_decay and not OPTIMIZERS[self.optimizer].decays:
            decaying = [name for name, recipe in OPTIMIZERS.items() if recipe.decays]
            raise ValueError(
                f"weight_decay needs an optimizer of {', '.join(decaying)}; got "
                f"{self.weight_decay} with {self.optimizer!r}"
            )
        if self.update_in_backward and self.accumulate > 1:
            raise ValueError(
                "update_in_backward takes a step with the gradient of each micro-batch, and cannot "
                f"accumulate: accumulate must be 1; got {self.accumulate}"
            )

    def or_steps(self, steps: int) -> TrainSettings:
        """These settings, with so many steps if they give neither steps nor epochs."""
        open_ended = self.steps is None and self.epochs is None
        return dataclasses.replace(self, steps=steps) if open_ended else self

    @property
    def total_steps(self) -> int:
        """Optimizer steps in all.

        Raises:
          ValueError: for epochs, of which the data say how many steps they are
            (:func:`bdia_jax.train.in_steps`).
        """
        if self.epochs is not None:
            raise ValueError(
                f"epochs={self.epochs} must be made steps of first: in_steps(settings, task)"
            )
        return STEPS if self.steps is None else self.steps

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises: a short run has a short warmup."""
        return min(self.warmup_steps, self.total_steps // 2)

    @property
    def cooldown(self) -> int:
        """Steps in which the learning rate of wsd falls to 0."""
        if self.cooldown_steps is not None:
            return self.cooldown_steps
        return min(-(-self.total_steps // 5), self.total_steps - self.warmup)

    def make_schedule(self) -> optax.Schedule:
        """The learning rate, by step."""
        return make_schedule(
            self.schedule, self.learning_rate, self.total_steps, self.warmup, self.cooldown
        )

    def make_optimizer(self) -> optax.GradientTransformation | Blockwise:
        """The optimizer, with its schedule; and clipping, unless the backward pass updates."""
        schedule = self.make_schedule()
        decay: dict[str, Any] = {"weight_decay": self.weight_decay, "decayed": self.decayed}
        if self.update_in_backward:
            return make_blockwise(self.optimizer, schedule, **decay)
        return make_optimizer(self.optimizer, schedule, **decay, clip_norm=self.clip_norm)

    def described(self) -> dict[str, Any]:
        """What decides the trained weights, for comparing a run with its continuation."""
        found = dataclasses.asdict(self)
        del found["epochs"]
        return found | {"steps": self.total_steps, "warmup_steps": self.warmup}

    def harmless(self) -> set[str]:
        """Settings that may change when the run is resumed."""
        # With a constant schedule, no step depends on how many there are.
        return {*HARMLESS, *(["steps"] if self.schedule == "constant" else [])}


def _check_int(name: str, value: Any, at_least: int | None = None, or_none: bool = False) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or (at_least is not None and value < at_least):
        allowed = "an int" if at_least is None else f"an int >= {at_least}"
        raise ValueError(f"{name} must be {allowed}{', or None' * or_none}; got {value!r}")


def _check_number(name: str, value: Any, allowed: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and {allowed}; got {value!r}")
    if value == 0 and not allowed.startswith("0"):
        raise ValueError(f"{name} must be {allowed}; got {value!r}")
