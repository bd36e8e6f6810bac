"""The settings that fine-tunings of all kinds have in common."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any, Literal

from bdia_jax.gamma import FAIR
from bdia_jax.nn.settings import Method
from bdia_jax.steps import Signs
from bdia_jax.train import TrainSettings

HERE = "here"
"""To plan for what is there."""
STEPS = 500
"""If neither steps nor epochs are given."""
COMMON = TrainSettings(
    learning_rate=5e-5,
    weight_decay=0.01,
    log_every=10,
    eval_every=100,
    checkpoint_every=100,
    keep_last=1,
)


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Of low-rank updates (LoRA)."""

    rank: int = 0
    """Train low-rank updates only, of this rank (and a new head, if there is one); 0 trains all
    weights."""
    alpha: float | None = None
    """Updates are scaled by alpha / rank; None for alpha = rank."""
    targets: tuple[str, ...] = ("q", "v")
    """Linear layers of a block that get one: q, k, v, out, up, down, gate; or names in the folder,
    as for peft: q_proj, all-linear."""
    dora: bool = False
    """Train magnitudes of the columns of these layers apart from their directions (DoRA)."""
    adapter: pathlib.Path | None = None
    """Go on from the updates in this folder, in peft's format, of its rank, alpha and targets; and
    from its head, if it has one."""

    def __post_init__(self):
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = [
            name
            for name in ("rank", "alpha", "targets", "dora")
            if getattr(self, name) != defaults[name]
        ]
        names = ", ".join(f"lora.{name}" for name in given)
        if self.rank < 0:
            raise ValueError(f"lora.rank must be 0 or more; got {self.rank}")
        if self.adapter is not None and given:
            raise ValueError(f"lora.adapter has its own rank, alpha and targets; got {names}, too")
        if self.adapter is None and given and not self.rank:
            raise ValueError(f"{names} is for low-rank updates: give lora.rank, too")

    def __bool__(self) -> bool:
        """Whether low-rank updates are trained."""
        return bool(self.rank) or self.adapter is not None


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """How a pretrained network of any kind is trained."""

    method: Method = "bdia"
    """bdia is taken back, and keeps bits; standard-checkpoint keeps the inputs of blocks."""
    gamma: float | Literal["auto"] = "auto"
    """Magnitude of γ, 2^-m for m bits per activation and block; auto measures which one the network
    tolerates (with the method bdia only)."""
    signs: Signs | None = None
    """Of γ: block, sample, minus or plus; None for what is measured to be best (with a γ of your
    own: sample)."""
    gamma_tolerance: float = 0.01
    """For auto: the share by which γ may raise the loss in training mode."""
    frac_bits: int = 9
    """Fractional bits of the grid."""
    tolerance_bits: int = 0
    """Bits for hardware that is not deterministic."""
    parts_as_steps: bool = False
    """Attention and feed-forward network as steps of their own: less memory for a block's
    derivative, twice the bits."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """What the blocks compute in."""
    dropout: float = 0.0
    """On the embedding, the attention weights and both updates of a block."""
    lora: LowRank = LowRank()
    """Low-rank updates."""
    resume: bool = False
    """Continue the run in the folder, if there is one."""
    plan: str | None = None
    """Do not train: say what the run will need on a device, such as rtx-4090, which you need not
    have (all are in the help of bdia_jax.plan); here for what is there."""

    def __post_init__(self):
        if not 0 < self.gamma_tolerance < math.inf:
            raise ValueError(
                f"gamma_tolerance must be finite and positive; got {self.gamma_tolerance}"
            )
        measured = self.method == "bdia" and self.gamma == "auto"
        if measured and self.signs is not None and self.signs not in FAIR:
            raise ValueError(
                f"gamma='auto' chooses from the signs {', '.join(FAIR)}: give a gamma with "
                f"signs={self.signs!r}"
            )

    @property
    def of_network(self) -> dict[str, Any]:
        """Settings of the network that do not come from its folder."""
        names = ("method", "frac_bits", "tolerance_bits", "parts_as_steps", "dtype", "dropout")
        return {name: getattr(self, name) for name in names} | {
            "gamma": 0.5 if self.gamma == "auto" else self.gamma,
            "signs": self.signs or "sample",
        }
