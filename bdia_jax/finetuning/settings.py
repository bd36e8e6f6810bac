"""What fine-tunings of all kinds have in common: settings, checks, and the run itself."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
from flax import nnx
from tqdm import tqdm

from bdia_jax import interop
from bdia_jax.gamma import FAIR
from bdia_jax.nn import Decoder, VisionTower, add_lora, set_step
from bdia_jax.nn.settings import Method
from bdia_jax.planning import plan, targets
from bdia_jax.steps import BDIA, Signs
from bdia_jax.train import (
    Result,
    Task,
    TrainSettings,
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

HERE = "here"
"""To plan for what is there."""
ASSUMED = 1 / 16
"""γ of a plan, where it is measured before training."""
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

    def set_gamma(
        self,
        model: nnx.Module,
        task: Task,
        settings: TrainSettings,
        out: pathlib.Path,
        batches: int = 2,
    ) -> None:
        """With ``--gamma auto``, has the blocks take steps with the γ that they tolerate.

        It is measured, and a table is shown; or it is that of the run, if that is resumed.

        Args:
          model, task: what is trained.
          settings: how; of one micro-batch, its size.
          out: folder of the run.
          batches: how many to average over.
        """
        if self.method != "bdia" or self.gamma != "auto":
            return
        if before := of_run(out):
            set_step(model, BDIA(**before["step"]))
            return
        print("measuring which γ the model tolerates (--gamma auto)")
        with tqdm(unit=" losses", leave=False) as bar:
            choice = choose_gamma(
                model,
                task,
                settings.batch_size // settings.accumulate,
                batches=batches,
                seed=settings.seed,
                tolerance=self.gamma_tolerance,
                signs=FAIR if self.signs is None else (self.signs,),
                exhaustive=False,
                progress=lambda trial: bar.update(),
            )
        print(f"{choice}\n\n{choice.table()}\n")
        set_step(model, choice.step)


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
      f: a :class:`FineTuning` with ``out``, the folder of the run, and ``train``, the settings.
      model, task: what is trained, and on what.
      about: what the run keeps about itself.
      metric: whose curve is drawn.
      batches: of :meth:`FineTuning.set_gamma`.
      on_evaluation: of :func:`bdia_jax.train.train`.
    """
    f.set_gamma(model, task, f.train, f.out, batches)
    size = eval_batch_size(task, f.train)
    before = evaluate(model, task, eval_batch_size=size)
    raise_if_not_finite(0, before, {"loss"})
    print(f"before: validation loss {before['loss']:.4f}, accuracy {before['accuracy']:.2%}")
    about = about | {"step": dataclasses.asdict(cast(Any, model.blocks.step))}
    result: Result = train(
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
    lora: LowRank, model: Decoder | VisionTower, path: pathlib.Path, seed: int
) -> list[str]:
    """Adds low-rank updates to a model from a folder; the paths of their layers."""
    targets = interop.lora_targets(model, lora.targets, like=path)
    rngs = nnx.Rngs(seed)
    return add_lora(model, lora.rank, lora.alpha, targets, dora=lora.dora, rngs=rngs)


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
