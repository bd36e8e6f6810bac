"""What the commands that fine-tune ask of low-rank updates."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import jax
from flax import nnx

from bdia_jax import interop
from bdia_jax.nn import Decoder, VisionTower, add_lora
from bdia_jax.train import TrainSettings
from bdia_jax.train.placing import check_mesh
from bdia_jax.train.run_folder import check_disk


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


def add_updates(
    lora: LowRank, model: Decoder | VisionTower, path: pathlib.Path, seed: int
) -> list[str]:
    """Adds low-rank updates to a model from a folder; the paths of their layers."""
    targets = interop.lora_targets(model, lora.targets, like=path)
    rngs = nnx.Rngs(seed)
    return add_lora(model, lora.rank, lora.alpha, targets, dora=lora.dora, rngs=rngs)


def check_fits(
    make: Callable[[], Decoder | VisionTower],
    lora: LowRank,
    path: pathlib.Path,
    out: pathlib.Path,
    settings: TrainSettings,
) -> None:
    """Refuses, before data and model are read, what shapes and devices tell.

    Args:
      make: makes a model of the settings; it is only traced.
      lora, path: as of :func:`add_updates`.
      out: folder of the run.
      settings: how it is trained.

    Raises:
      ValueError: for updates that do not fit the model, a mesh that does not fit the devices, and a
        disk without room for the model.
    """
    check_mesh(settings)

    def updated() -> Decoder | VisionTower:
        model = make()
        if lora.rank:
            add_updates(lora, model, path, seed=0)
        return model

    weights = jax.tree.leaves(nnx.state(nnx.eval_shape(updated), nnx.Not(nnx.RngState)))
    check_disk(out, sum(a.size * a.dtype.itemsize for a in weights), "the fine-tuned model")
