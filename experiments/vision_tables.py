"""The vision experiments of the paper as tables, its figures beside ours.

    python experiments/vision_tables.py --quick             # every system on digits; minutes
    python experiments/vision_tables.py --scale reduced --data-dir DIR --table gamma dropout
    python experiments/vision_tables.py --scale paper --data-dir DIR --table baselines
    python experiments/vision_tables.py --scale reduced --report    # tables of what there is

Scales: ``paper`` is the published setting (CIFAR-10, 6 blocks of width 512, batch 128, SET-Adam,
400 epochs; a GPU's work). ``reduced`` is what 2 cores can do with CIFAR-10: large patches, narrow
blocks, a fiftieth of the images, so that networks over-fit as they do in the published setting; it
shows orderings, not the published numbers. ``digits`` is smaller
still. ``--quick`` trains every system once on digits, and fails if one stays under 90 %.

A run is one network, trained from one seed. It leaves one JSON file; what is there is not run
again, what was interrupted continues from its checkpoint, and a run that two tables have in
common is run once. Several of these processes may work on the same tables at the same time: each
takes runs that no other has in hand. The seeds of a system are trained one after the other.

Writes results/vision-SCALE-DATA/: runs/*.json, tables.md and figures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import math
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import command
import jax
import numpy as np
import results
from flax import nnx

from bdia_jax import files
from bdia_jax.data import ImageData, load_images
from bdia_jax.nn import ResNet, ResNetConfig, ViT, ViTConfig
from bdia_jax.train import (
    ImageClassification,
    InexactInverseError,
    NonFiniteError,
    TrainSettings,
    figures,
    train,
)

Config = ViTConfig | ResNetConfig
Table = Literal[
    "baselines",
    "quantization",
    "depth",
    "dropout",
    "gamma",
    "linformer",
    "resnet",
    "capacity",
    "systems",
]


# ---------------------------------------------------------------------------------------------
# What is trained
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scale:
    """A size of everything."""

    data: str
    vit: ViTConfig
    resnet: ResNetConfig
    epochs: int
    train: TrainSettings
    """``steps`` follows from the epochs."""
    images: int | None = None
    """Training images; None for all."""
    evaluations: int = 20
    """Over a run."""
    seeds: int = 3
    augment: bool = True
    """Move, crop and mirror the training images, as is customary for the data."""


SCALES = {
    "paper": Scale(
        data="cifar10",
        vit=ViTConfig(),
        resnet=ResNetConfig(),
        epochs=400,
        train=TrainSettings(
            batch_size=128, optimizer="set-adam", learning_rate=1e-4, clip_norm=None
        ),
        evaluations=100,
    ),
    # Few images, as they are, and seen often: the networks over-fit, as the paper's do after
    # hundreds of epochs.
    "reduced": Scale(
        data="cifar10",
        vit=ViTConfig(patch_size=8, width=64, heads=4, head_dim=16, hidden=64),
        resnet=ResNetConfig(widths=(8, 16, 32), depth=2, groups=4),
        epochs=20,
        train=TrainSettings(
            batch_size=50, optimizer="set-adam", learning_rate=1e-3, clip_norm=None
        ),
        images=1000,
        evaluations=4,
        augment=False,
    ),
    "digits": Scale(
        data="digits",
        vit=ViTConfig(
            image_size=8,
            channels=1,
            patch_size=4,
            width=48,
            depth=4,
            heads=4,
            head_dim=12,
            hidden=96,
            dropout=0.0,
            pool="mean",
            projection=2,
        ),
        resnet=ResNetConfig(image_size=8, channels=1, widths=(8, 16), depth=2, groups=4),
        epochs=40,
        train=TrainSettings(batch_size=64, learning_rate=2e-3, warmup_steps=30),
        evaluations=4,
    ),
}


class Cell(NamedTuple):
    """One network of a table."""

    row: str
    system: str
    """The column; "" if there is one only."""
    config: Config
    optimizer: str | None = None
    """Another than the scale's."""


def both(scale: Scale, row: str, **changes: Any) -> list[Cell]:
    """ViT and BDIA-ViT."""
    return [
        Cell(row, "ViT", _vit(scale, "standard", **changes)),
        Cell(row, "BDIA-ViT", _vit(scale, "bdia", **changes)),
    ]


def _vit(scale: Scale, method: str, **changes: Any) -> ViTConfig:
    return dataclasses.replace(scale.vit, method=method, **changes)


def _resnet(scale: Scale, method: str, **changes: Any) -> ResNetConfig:
    return dataclasses.replace(scale.resnet, method=method, **changes)


def baselines(s: Scale) -> list[Cell]:
    """The systems that the paper compares."""
    methods = {"ViT": "standard", "BDIA-ViT": "bdia", "RevViT": "coupled", "mid-point": "midpoint"}
    return [Cell(name, "", _vit(s, method)) for name, method in methods.items()]


def quantization(s: Scale) -> list[Cell]:
    """Both networks on the grid, in training and in evaluation."""
    return [
        cell
        for l in (9, 5, 0, -2)  # noqa: E741
        for cell in both(s, f"l = {l}", frac_bits=l, quantize_standard=True)
    ]


def depth(s: Scale) -> list[Cell]:
    """As published."""
    return [cell for depth in (6, 10) for cell in both(s, f"{depth} blocks", depth=depth)]


def dropout(s: Scale) -> list[Cell]:
    """As published."""
    return [cell for rate in (0.0, 0.1, 0.2) for cell in both(s, f"dropout {rate}", dropout=rate)]


def gamma(s: Scale) -> list[Cell]:
    """Whether the magnitude matters; 0.6 is no power of two, and cannot be taken back."""
    return [
        Cell("|γ| = 0", "", _vit(s, "standard")),
        Cell("|γ| = 0.25", "", _vit(s, "bdia", gamma=0.25)),
        Cell("|γ| = 0.5", "", _vit(s, "bdia")),
        Cell("|γ| = 0.6", "", _vit(s, "bdia-stored", gamma=0.6)),
    ]


def linformer(s: Scale) -> list[Cell]:
    """Linear attention."""
    return both(s, "linear attention", attention="linear")


def resnet(s: Scale) -> list[Cell]:
    """Three stages of residual blocks."""
    row = f"{s.resnet.depth * len(s.resnet.widths)} residual blocks"
    return [
        Cell(row, "ResNet", _resnet(s, "standard")),
        Cell(row, "BDIA-ResNet", _resnet(s, "bdia")),
    ]


def capacity(s: Scale) -> list[Cell]:
    """Smaller and smaller networks for the same data."""
    cells = []
    for share, blocks in ((1, 1), (2, 2), (4, 3), (8, 3)):
        width, depth = s.vit.width // share, max(2, s.vit.depth // blocks)
        heads = max(1, s.vit.heads // share)
        cells += both(
            s,
            f"width {width}, {depth} blocks",
            width=width,
            depth=depth,
            heads=heads,
            head_dim=width // heads,
            hidden=s.vit.hidden // share,
        )
    return cells


def systems(s: Scale) -> list[Cell]:
    """Everything that there is, once."""
    vits = {
        "ViT": {"method": "standard"},
        "ViT, checkpointed blocks": {"method": "standard-checkpoint"},
        "ViT on the grid, l = 5": {"method": "standard", "frac_bits": 5, "quantize_standard": True},
        "BDIA-ViT": {"method": "bdia"},
        "BDIA-ViT, stored": {"method": "bdia-stored"},
        "BDIA-ViT, dropout 0.1": {"method": "bdia", "dropout": 0.1},
        "BDIA-ViT, l = 5": {"method": "bdia", "frac_bits": 5},
        "BDIA-ViT, |γ| = 0.25": {"method": "bdia", "gamma": 0.25},
        "BDIA-ViT, |γ| = 0.6, stored": {"method": "bdia-stored", "gamma": 0.6},
        "BDIA-ViT, bfloat16": {"method": "bdia", "dtype": "bfloat16"},
        "RevViT": {"method": "coupled"},
        "RevViT, stored": {"method": "coupled-stored"},
        "mid-point": {"method": "midpoint"},
        "mid-point, stored": {"method": "midpoint-stored"},
        "linear attention": {"method": "standard", "attention": "linear"},
        "linear attention, BDIA": {"method": "bdia", "attention": "linear"},
    }
    return [
        *(Cell(name, "", _vit(s, **options)) for name, options in vits.items()),
        Cell("ResNet", "", _resnet(s, "standard")),
        Cell("BDIA-ResNet", "", _resnet(s, "bdia")),
        *(
            Cell(f"BDIA-ViT by {name}", "", _vit(s, "bdia"), name)
            for name in ("adam", "adamw", "set-adam")
            if name != s.train.optimizer
        ),
    ]


TABLES: dict[str, Callable[[Scale], list[Cell]]] = {
    "baselines": baselines,
    "quantization": quantization,
    "depth": depth,
    "dropout": dropout,
    "gamma": gamma,
    "linformer": linformer,
    "resnet": resnet,
    "capacity": capacity,
    "systems": systems,
}

PUBLISHED = {
    "cifar10": {
        "ViT": {"": 88.15},
        "BDIA-ViT": {"": 89.10},
        "l = 5": {"ViT": 87.90, "BDIA-ViT": 89.50},
        "l = 0": {"ViT": 87.76, "BDIA-ViT": 88.47},
        "l = -2": {"ViT": 84.31, "BDIA-ViT": 84.16},
        "6 blocks": {"ViT": 88.15, "BDIA-ViT": 89.10},
        "10 blocks": {"ViT": 88.02, "BDIA-ViT": 89.08},
        "dropout 0.0": {"ViT": 86.27, "BDIA-ViT": 89.20},
        "dropout 0.1": {"ViT": 88.15, "BDIA-ViT": 89.10},
        "dropout 0.2": {"ViT": 87.24, "BDIA-ViT": 88.22},
        "linear attention": {"ViT": 84.16, "BDIA-ViT": 86.6},
        "15 residual blocks": {"ResNet": 92.93, "BDIA-ResNet": 93.61},
    },
    "cifar100": {
        "dropout 0.0": {"ViT": 59.13, "BDIA-ViT": 64.45},
        "dropout 0.1": {"ViT": 61.86, "BDIA-ViT": 66.09},
        "dropout 0.2": {"ViT": 61.68, "BDIA-ViT": 64.24},
    },
}
"""Validation accuracy in % of Zhang, Lewis, Kleijn (ICML 2025): data, row, system."""


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VisionTables:
    """The vision experiments of the paper as tables, its figures beside ours."""

    table: tuple[Table, ...] = ("baselines",)
    """Which tables."""
    scale: Literal["paper", "reduced", "digits"] = "digits"
    """How large everything is."""
    quick: bool = False
    """Every system, once, on digits; the exit status is 1 if one stays under 90 %."""
    report: bool = False
    """Train nothing; tables and figures of the runs that there are."""
    data: str | None = None
    """Another data set than the scale's, such as cifar100."""
    data_dir: pathlib.Path | None = None
    """Where prepared TFDS sets lie; by default TFDS's own folder."""
    images: int | None = None
    """Another number of training images than the scale's."""
    epochs: int | None = None
    """Other than the scale's."""
    seeds: int | None = None
    """Runs of each network, other than the scale's."""
    out: pathlib.Path | None = None
    """Folder of results; by default one in experiments/results, named after scale and data."""
    work: pathlib.Path = pathlib.Path("runs/vision")
    """Folder for checkpoints; a run's is removed when the run is over."""

    def __post_init__(self):
        for name in ("images", "epochs", "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if not self.table:
            raise ValueError(f"table must name one of {', '.join(TABLES)}; got none")

    def chosen(self) -> tuple[str, Scale, tuple[str, ...]]:
        """The scale's name, the scale with all changes, and the tables."""
        name, tables = self.scale, self.table
        if self.quick:
            name, tables = "digits", ("systems",)
        changes = {"seeds": 1} if self.quick else {}
        for field in ("data", "images", "epochs", "seeds"):
            if getattr(self, field) is not None:
                changes[field] = getattr(self, field)
        return name, dataclasses.replace(SCALES[name], **changes), tables


def main(v: VisionTables) -> str:
    """Runs what is missing; the tables."""
    name, scale, tables = v.chosen()
    out = v.out or results.FOLDER / f"vision-{'quick' if v.quick else name}-{scale.data}"
    cells = {table: TABLES[table](scale) for table in tables}
    if not v.report:
        # Seeds of a network share its programs.
        jax.config.update("jax_compilation_cache_dir", str((v.work / "compiled").resolve()))
        data = _share(load_images(scale.data, v.data_dir), scale.images)
        task = ImageClassification(data, augment=scale.augment)
        todo = {}
        for seed in range(scale.seeds):
            for cell in (cell for table in cells.values() for cell in table):
                run = Run.of(cell, seed, scale, data)
                todo[run.name] = run
        run_all(list(todo.values()), task, out / "runs", v.work / out.name)
    text = report(cells, scale, out)
    print(f"\n{text}\n\nSee {out}")
    if v.quick and (failed := under(out / "runs", 0.9)):
        raise RuntimeError(f"below 90 %: {', '.join(failed)}")
    return text


def _share(data: ImageData, images: int | None) -> ImageData:
    """The first images of the training split (a prepared TFDS split is in random order)."""
    if images is None:
        return data
    if images > len(data.train_labels):
        raise ValueError(f"{data.name} has {len(data.train_labels)} training images; got {images}")
    return dataclasses.replace(
        data, train_images=data.train_images[:images], train_labels=data.train_labels[:images]
    )


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """One network, trained from one seed."""

    name: str
    config: Config
    train: TrainSettings
    images: int

    @classmethod
    def of(cls, cell: Cell, seed: int, scale: Scale, data: ImageData) -> Run:
        """The run of a cell of a table; shaped by the data."""
        size, _, channels = data.train_images.shape[1:]
        config = dataclasses.replace(
            cell.config, image_size=size, channels=channels, num_classes=data.num_classes
        )
        images = len(data.train_labels)
        steps = scale.epochs * images // scale.train.batch_size
        every = max(1, steps // scale.evaluations)
        settings = dataclasses.replace(
            scale.train,
            steps=steps,
            eval_every=every,
            checkpoint_every=every,
            keep_last=1,
            log_every=min(every, 100),
            seed=seed,
            **({"optimizer": cell.optimizer} if cell.optimizer else {}),
        )
        return cls(run_name(cell, seed, scale), config, settings, images)

    def settings(self) -> dict[str, Any]:
        """What must be equal for two runs to be the same, as it comes back from JSON."""
        described = {
            "network": type(self.config).__name__.removesuffix("Config"),
            "model": dataclasses.asdict(self.config),
            "train": dataclasses.asdict(self.train),
            "images": self.images,
        }
        return json.loads(json.dumps(described))


def run_name(cell: Cell, seed: int, scale: Scale) -> str:
    """The network, in what it differs from the scale's, and the seed; part of a file name."""
    base = scale.vit if isinstance(cell.config, ViTConfig) else scale.resnet
    parts = [type(cell.config).__name__.removesuffix("Config").lower(), cell.config.method]
    for field in dataclasses.fields(base):
        value = getattr(cell.config, field.name)
        if field.name != "method" and value != getattr(base, field.name):
            parts.append(f"{field.name}={value}")
    if cell.optimizer:
        parts.append(cell.optimizer)
    return "_".join([*parts, f"seed={seed}"])


def run_all(
    runs: list[Run], task: ImageClassification, folder: pathlib.Path, work: pathlib.Path
) -> None:
    """Trains what has no result yet; what another process has in hand is waited for."""
    waiting, done = runs, 0
    while waiting:
        later = []
        for run in waiting:
            path = folder / f"{run.name}.json"
            with claimed(work / f"{run.name}.lock") as mine:
                if not mine:
                    later.append(run)
                    continue
                done += 1
                if path.exists():
                    _check_same(run, path)
                    continue
                found = train_one(run, task, work / run.name)
                files.write_json(path, found)
                shutil.rmtree(work / run.name, ignore_errors=True)
            outcome = found["error"] or f"{found['accuracy']:.2%} in {found['seconds']:.0f} s"
            print(f"{done}/{len(runs)} {run.name}: {outcome}", flush=True)
        if len(later) == len(waiting):
            time.sleep(5)
        waiting = later


@contextlib.contextmanager
def claimed(path: pathlib.Path) -> Iterator[bool]:
    """Whether this process, and no other, may work on something; until the block is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _check_same(run: Run, path: pathlib.Path) -> None:
    found = json.loads(path.read_text())
    # What there was no setting for then, was done as by default now.
    defaults = {"model": type(run.config)(), "train": TrainSettings()}
    for part, now in run.settings().items():
        if part in defaults:
            found[part] = json.loads(json.dumps(dataclasses.asdict(defaults[part]))) | found[part]
        if found[part] != now:
            raise ValueError(
                f"{path} is a run with other settings; give another --out.\n"
                f"{part} there: {found[part]}\n{part} now: {now}"
            )


def train_one(run: Run, task: ImageClassification, folder: pathlib.Path) -> dict[str, Any]:
    """The record of a run; with an "error", and no accuracy, if it went wrong."""
    kind = ViT if isinstance(run.config, ViTConfig) else ResNet
    model = kind(run.config, rngs=nnx.Rngs(run.train.seed))
    record = (
        run.settings()
        | results.machine()
        | {
            "data": task.name,
            "parameters": sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))),
        }
    )
    try:
        about = {"model": dataclasses.asdict(run.config)}
        result = train(model, task, run.train, folder, resume=True, about=about, progress=False)
    except (NonFiniteError, InexactInverseError) as error:
        return record | {"error": f"{type(error).__name__}: {error}"}
    trained = [r for r in result.history if r["split"] == "train"]
    return record | {
        "error": None,
        "accuracy": result.last("eval", "accuracy"),
        "best": result.best,
        "seconds": result.seconds,
        "seconds_per_step": result.seconds_per_step,
        "mismatched": sum(r["mismatched"] for r in trained),
        "train_loss": [[r["step"], r["loss"]] for r in trained],
        "evaluations": [
            {
                "epoch": r["step"] * run.train.batch_size / run.images,
                "seconds": r["seconds"],
                "loss": r["loss"],
                "accuracy": r["accuracy"],
            }
            for r in result.history
            if r["split"] == "eval"
        ],
    }


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A cell, and its runs."""

    cell: Cell
    runs: list[dict[str, Any]]

    def accuracies(self) -> list[float]:
        """In %, seed by seed; NaN for a run that went wrong."""
        return [math.nan if run["error"] else 100 * run["accuracy"] for run in self.runs]

    def mean(self) -> float:
        return statistics.fmean(self.accuracies())

    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one."""
        return statistics.stdev(self.accuracies()) if len(self.runs) > 1 else 0.0


def collect(cells: list[Cell], scale: Scale, folder: pathlib.Path) -> list[Found]:
    """The runs that there are."""
    found = []
    for cell in cells:
        paths = [folder / f"{run_name(cell, seed, scale)}.json" for seed in range(scale.seeds)]
        runs = [json.loads(path.read_text()) for path in paths if path.exists()]
        if runs:
            found.append(Found(cell, runs))
    return found


def report(cells: dict[str, list[Cell]], scale: Scale, out: pathlib.Path) -> str:
    """Tables of all runs that there are, and figures, written to ``out``; the tables."""
    found = {table: collect(c, scale, out / "runs") for table, c in cells.items()}
    found = {table: rows for table, rows in found.items() if rows}
    if not found:
        raise FileNotFoundError(f"there are no runs of {', '.join(cells)} in {out / 'runs'}")
    runs = [run for rows in found.values() for f in rows for run in f.runs]
    parts = [_heading(runs, scale)]
    for table, rows in found.items():
        parts += [f"## {table}", TABLES[table].__doc__, table_of(rows, scale)]
    wrong = {run["error"] for run in runs if run["error"]}
    parts += [f"- {error}" for error in sorted(wrong)]
    text = "\n\n".join(parts)
    files.write_text(out / "tables.md", text + "\n")
    _figures(found, out)
    return text


def _heading(runs: list[dict[str, Any]], scale: Scale) -> str:
    one, sgd = runs[0], runs[0]["train"]
    machines = {(run["device"], run["cores"]) for run in runs}
    counted = sum(run["mismatched"] for run in runs if not run["error"])
    return (
        f"# Validation accuracy in %, {one['data']}\n\n"
        f"{one['images']:,} training images{'' if scale.augment else ' as they are'}, "
        f"{scale.epochs} epochs of {sgd['batch_size']} images "
        f"per step, learning rate {sgd['learning_rate']:g}, {sgd['schedule']}; the accuracy is the "
        f"last one, of the whole evaluation split; {_seeds(scale)}. "
        f"Blocks: {_sizes(scale)}. Machine: "
        + ", ".join(f"{device}, {cores} cores" for device, cores in sorted(machines))
        + f". {len(runs)} results; reconstructed states that did not match: {counted:.0f}."
    )


def _seeds(scale: Scale) -> str:
    if scale.seeds == 1:
        return "seed 0"
    return f"mean ± standard deviation over seeds 0 … {scale.seeds - 1}"


def _sizes(scale: Scale) -> str:
    v, r = scale.vit, scale.resnet
    return (
        f"ViT {v.depth} × width {v.width}, hidden {v.hidden}, {v.heads} heads, patches of "
        f"{v.patch_size}, dropout {v.dropout:g}; ResNet {len(r.widths)} stages × {r.depth}, "
        f"widths {', '.join(map(str, r.widths))}"
    )


def table_of(rows: list[Found], scale: Scale) -> str:
    """Rows and systems; where there are two systems, how much the second is better."""
    names = list(dict.fromkeys(f.cell.system for f in rows))
    by_row: dict[str, dict[str, Found]] = {}
    for f in rows:
        by_row.setdefault(f.cell.row, {})[f.cell.system] = f
    published = PUBLISHED.get(scale.data, {})
    with_paper = any(row in published for row in by_row)
    header = [""]
    for name in names:
        header += [name or "accuracy", *([f"{name} published".strip()] if with_paper else [])]
    if len(names) == 2:
        header.append("difference")
    lines = []
    for row, systems in by_row.items():
        line = [row]
        for name in names:
            f, value = systems.get(name), published.get(row, {}).get(name)
            line.append(_accuracy(f))
            if with_paper:
                line.append("" if value is None else f"{value:.2f}")
        if len(names) == 2:
            line.append(_difference(*(systems.get(name) for name in names)))
        lines.append(line)
    return results.markdown(header, lines)


def _accuracy(f: Found | None) -> str:
    if f is None:
        return ""
    if math.isnan(f.mean()):
        return "not finite"
    return f"{f.mean():.2f}" + (f" ± {f.spread():.2f} ({len(f.runs)})" if len(f.runs) > 1 else "")


def _difference(a: Found | None, b: Found | None) -> str:
    """Of the second to the first, seed by seed."""
    if a is None or b is None:
        return ""
    first, second = _by_seed(a), _by_seed(b)
    differences = [second[seed] - first[seed] for seed in first if seed in second]
    if not differences:
        return ""
    text = f"{statistics.fmean(differences):+.2f}"
    return text + (f" ± {statistics.stdev(differences):.2f}" if len(differences) > 1 else "")


def _by_seed(f: Found) -> dict[int, float]:
    return {run["train"]["seed"]: a for run, a in zip(f.runs, f.accuracies(), strict=True)}


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


def _figures(found: dict[str, list[Found]], out: pathlib.Path) -> None:
    if "baselines" in found:
        plot_curves(found["baselines"], out / "accuracy.png")
    if "quantization" in found:
        levels = {"l = 9": 9, "l = 5": 5, "l = 0": 0, "l = -2": -2}
        plot_over(
            found["quantization"],
            lambda f: levels[f.cell.row],
            "fractional bits l",
            out / "quantization.png",
        )
    if "capacity" in found:
        plot_over(
            found["capacity"],
            lambda f: f.runs[0]["parameters"],
            "parameters",
            out / "capacity.png",
            logarithmic=True,
        )


def plot_curves(rows: list[Found], path: pathlib.Path) -> None:
    """Accuracy over epochs and over seconds: mean over seeds, and from lowest to highest."""
    with figures.figure(path, 2) as axes:
        for i, f in enumerate(rows):
            runs = [run["evaluations"] for run in f.runs if not run["error"]]
            if not runs:
                continue
            accuracy = 100 * np.array([[e["accuracy"] for e in run] for run in runs])
            style = figures.style(i)
            for axis, x in zip(axes, ("epoch", "seconds")):
                xs = np.mean([[e[x] for e in run] for run in runs], axis=0)
                axis.fill_between(
                    xs, accuracy.min(0), accuracy.max(0), alpha=0.15, color=style["color"]
                )
                axis.plot(xs, accuracy.mean(0), label=f.cell.row, **style)
                axis.set_xlabel(x)
        axes[0].set_ylabel("validation accuracy in %")
        axes[-1].legend()


def plot_over(
    rows: list[Found],
    x: Callable[[Found], float],
    label: str,
    path: pathlib.Path,
    *,
    logarithmic: bool = False,
) -> None:
    """The last accuracy over something, per system: mean and standard deviation over seeds."""
    with figures.figure(path) as (axis,):
        for i, system in enumerate(dict.fromkeys(f.cell.system for f in rows)):
            mine = sorted((f for f in rows if f.cell.system == system), key=x)
            axis.errorbar(
                [x(f) for f in mine],
                [f.mean() for f in mine],
                [f.spread() for f in mine],
                label=system,
                capsize=4,
                **figures.style(i),
            )
        axis.set_xlabel(label)
        axis.set_ylabel("validation accuracy in %")
        if logarithmic:
            axis.set_xscale("log")
        axis.legend()


def under(out: pathlib.Path, least: float) -> list[str]:
    """The runs that did not reach an accuracy."""
    runs = [(path.stem, json.loads(path.read_text())) for path in sorted(out.glob("*.json"))]
    return [name for name, run in runs if run["error"] or run["accuracy"] < least]


if __name__ == "__main__":
    command.run(main, VisionTables, __doc__, told=logging.ERROR)
