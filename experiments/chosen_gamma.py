"""``--gamma auto``: the γ that a pretrained network tolerates, measured before it is trained."""

from __future__ import annotations

import json
import pathlib

from flax import nnx
from tqdm import tqdm

from bdia_jax.gamma import FAIR
from bdia_jax.steps import BDIA, Signs
from bdia_jax.train import Task, TrainSettings, choose_gamma


def chosen_step(
    model: nnx.Module,
    task: Task,
    settings: TrainSettings,
    out: pathlib.Path,
    *,
    signs: Signs | None,
    tolerance: float,
    batches: int = 2,
) -> BDIA:
    """The step with that γ, and a table of what was measured; that of the run, if it is resumed.

    Args:
      model, task: what is trained.
      settings: how; of one micro-batch, its size.
      out: folder of the run.
      signs: of γ; None for those that perturb least.
      tolerance: by which share γ may raise the loss.
      batches: how many to average over.
    """
    described = out / "settings.json"
    if described.exists():
        return BDIA(**json.loads(described.read_text())["fine-tuning"]["step"])
    print("measuring which γ the model tolerates (--gamma auto)")
    with tqdm(unit="trial", leave=False) as bar:
        choice = choose_gamma(
            model,
            task,
            settings.batch_size // settings.accumulate,
            batches=batches,
            seed=settings.seed,
            tolerance=tolerance,
            signs=FAIR if signs is None else (signs,),
            exhaustive=False,
            progress=lambda trial: bar.update(),
        )
    print(f"{choice}\n\n{choice.table()}\n")
    return choice.step
