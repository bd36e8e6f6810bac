"""The run of a fine-tuning, of whatever network: checks, updates, γ, training; or its plan."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
from flax import nnx
from tqdm import tqdm

from bdia_jax import interop
from bdia_jax.finetuning.settings import HERE
from bdia_jax.gamma import FAIR
from bdia_jax.nn import Decoder, VisionTower, add_lora, set_step
from bdia_jax.planning import plan, targets
from bdia_jax.steps import BDIA
from bdia_jax.train import (
    Task,
    choose_gamma,
    eval_batch_size,
    evaluate,
    plot_curves,
    restore_best,
    train,
)
from bdia_jax.train.errors import raise_if_not_finite
from bdia_jax.train.mesh import parse_mesh
from bdia_jax.train.placing import check_mesh
from bdia_jax.train.run_folder import check_disk
from bdia_jax.train.wording import per_step

ASSUMED = 1 / 16
"""γ of a plan, where it is measured before training."""


class Outcome(NamedTuple):
    """What came of a fine-tuning."""

    before: dict[str, float]
    """Metrics of the network that was given, with its new head if it has one."""
    after: dict[str, float]
    """Of the weights of the best evaluation, which the network has now."""
    told: str
    """How long it took, in words."""

    @property
    def losses(self) -> dict[str, float]:
        """The loss before; loss and accuracy after."""
        after = {name: self.after[name] for name in ("loss", "accuracy")}
        return {"loss before": self.before["loss"], **after}


def fine_tune(
    f: Any,
    model: Decoder | VisionTower,
    task: Task,
    about: dict[str, Any],
    *,
    metric: str,
    batches: int = 2,
    on_evaluation: Callable[[nnx.Module, int], None] | None = None,
) -> Outcome:
    """Chooses γ, trains, and goes back to the best evaluation.

    Args:
      f: a :class:`.settings.FineTuning` with ``out``, the folder of the run, and ``train``, how to
        train.
      model, task: what is trained, and on what.
      about: what the run keeps about itself.
      metric: whose curve is drawn.
      batches: of :func:`set_gamma`.
      on_evaluation: of :func:`bdia_jax.train.train`.
    """
    set_gamma(f, model, task, batches)
    size = eval_batch_size(task, f.train)
    before = evaluate(model, task, eval_batch_size=size)
    raise_if_not_finite(0, before, {"loss"})
    print(f"before: validation loss {before['loss']:.4f}, accuracy {before['accuracy']:.2%}")
    about = about | {"step": dataclasses.asdict(cast(Any, model.blocks.step))}
    result = train(
        model,
        task,
        f.train,
        f.out,
        resume=f.resume,
        about={"fine-tuning": about},
        on_evaluation=on_evaluation,
    )
    plot_curves({f.method: f.out}, f.out / f"{metric}.png", metric=metric)
    best = restore_best(f.out, model)
    after = evaluate(model, task, eval_batch_size=size)
    seconds = per_step(result.seconds_per_step)
    return Outcome(before, after, f"after {result.step} steps ({seconds}), best at step {best}")


def set_gamma(f: Any, model: Decoder | VisionTower, task: Task, batches: int) -> None:
    """With ``--gamma auto``, has the blocks take steps with the γ that they tolerate.

    It is measured, and a table is shown; or it is that of the run, if that is resumed.

    Args:
      f: as of :func:`fine_tune`.
      model, task: what is trained.
      batches: how many to average over.
    """
    if f.method != "bdia" or f.gamma != "auto":
        return
    if before := of_run(f.out):
        set_step(model, BDIA(**before["step"]))
        return
    print("measuring which γ the model tolerates (--gamma auto)")
    with tqdm(unit=" losses", leave=False) as bar:
        choice = choose_gamma(
            model,
            task,
            f.train.batch_size // f.train.accumulate,
            batches=batches,
            seed=f.train.seed,
            tolerance=f.gamma_tolerance,
            signs=FAIR if f.signs is None else (f.signs,),
            exhaustive=False,
            progress=lambda trial: bar.update(),
        )
    print(f"{choice}\n\n{choice.table()}\n")
    set_step(model, choice.step)


def of_run(out: pathlib.Path) -> dict[str, Any]:
    """What the run in a folder keeps of its fine-tuning; {} if there is none."""
    path = out / "settings.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return told.get("fine-tuning", {})


def tell_needs(
    f: Any, make: Callable[[], Decoder | VisionTower], task: Task, length: int
) -> dict[str, float]:
    """Prints what a run will need, as its programs are compiled for a device; nothing is run.

    Args:
      f: as of :func:`fine_tune`, with a ``plan``.
      make: makes the model; it is only traced.
      task: with its data, which lie on the device.
      length: positions of a sample.

    Returns:
      The same, in bytes.
    """
    model = nnx.eval_shape(make)
    if f.method == "bdia" and f.gamma == "auto":
        measured = of_run(f.out).get("step", {})
        if not measured:
            print(f"planned is γ = {ASSUMED:g}: --gamma auto measures it before training")
        step = cast(Any, model.blocks.step)
        set_step(model, dataclasses.replace(step, **(measured or {"gamma": ASSUMED})))
    devices = devices_of(f)
    need = plan.need_of(f.method, model, task, f.train, length, devices=devices)
    kind = (devices or jax.devices())[0].device_kind
    print(f"compiled for {kind}, nothing was trained\n\n{plan.table([need])}")
    return {**dataclasses.asdict(need), "run": need.run}


def devices_of(f: Any) -> Sequence[jax.Device] | None:
    """What a plan is compiled for; None for what is there."""
    return None if f.plan == HERE else targets.devices(f.plan)


def described(f: Any, *without: str) -> dict[str, Any]:
    """What decides what comes out of a run, but for how it is trained, as JSON has it."""
    told = json.loads(json.dumps(dataclasses.asdict(f), default=str))
    return {n: told[n] for n in told if n not in {"train", "resume", "plan", "out", *without}}


def add_updates(
    f: Any,
    model: Decoder | VisionTower,
    path: pathlib.Path,
    tell: Callable[[str], None] = lambda told: None,
) -> bool:
    """Gives a model from a folder the low-rank updates that are trained; whether there are any.

    Args:
      f: as of :func:`fine_tune`.
      model: without updates.
      path: of its folder.
      tell: is told of which layers.
    """
    lora = f.lora
    if lora.adapter is not None:
        paths = interop.load_adapter(model, lora.adapter, like=path)
        tell(f"low-rank updates of {', '.join(paths)}, from {lora.adapter}")
    elif lora.rank:
        layers = interop.lora_targets(model, lora.targets, like=path)
        rngs = nnx.Rngs(f.train.seed)
        paths = add_lora(model, lora.rank, lora.alpha, layers, dora=lora.dora, rngs=rngs)
        tell(f"low-rank updates of {', '.join(paths)}")
    return bool(lora)


def check_fits(f: Any, make: Callable[[], Decoder | VisionTower]) -> None:
    """Refuses, before data and model are read, what shapes and devices tell.

    Args:
      f: as of :func:`fine_tune`.
      make: makes the model; it is only traced.

    Raises:
      ValueError: for updates that do not fit the model, a mesh that does not fit the devices, and a
        disk without room for the model.
    """
    model = nnx.eval_shape(make)
    if f.plan is not None:
        parse_mesh(f.train.mesh, devices_of(f))
        return
    check_mesh(f.train)
    weights = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.RngState)))
    check_disk(f.out, sum(a.size * a.dtype.itemsize for a in weights), "the fine-tuned model")
