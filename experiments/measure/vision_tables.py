"""The vision experiments of the paper as tables, its figures beside ours.

    python experiments/vision_tables.py --quick             # every system on digits; minutes
    python experiments/vision_tables.py --scale reduced --data-dir DIR --table gamma dropout
    python experiments/vision_tables.py --scale paper --data-dir DIR --table baselines

Scales: ``paper`` is the published setting (CIFAR-10, 6 blocks of width 512, batch 128, SET-Adam,
400 epochs; a GPU's work). ``reduced`` is what 2 cores can do with CIFAR-10: large patches, narrow
blocks, a fiftieth of the images, as they are and seen often, so that networks over-fit as the
published ones do after hundreds of epochs; it shows orderings, not the published numbers.
``digits`` is smaller still. ``--quick`` trains every system once on digits, and fails if one stays
under 90 %.

A run is one network, trained from one seed; a run that two tables have in common is run once. What
is there, finished by the same code, is not run again (:mod:`measure.runs`).

Writes vision-SCALE-DATA-DEVICE.jsonl.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import pathlib
import statistics
from typing import Any, Literal, NamedTuple

import command as commands
from flax import nnx

from bdia_jax.data import ImageData, load_images
from bdia_jax.nn import ResNet, ResNetConfig, ViT, ViTConfig
from bdia_jax.train import ImageClassification, TrainSettings
from measure import records, sources
from measure.runs import Run, run_all, training

Config = ViTConfig | ResNetConfig
Table = Literal[
    "baselines",
    "quantization",
    "depth",
    "dropout",
    "gamma",
    "signs",
    "linformer",
    "resnet",
    "capacity",
    "systems",
]
DEPENDS = (
    *sources.CORE,
    *sources.COUPLED,
    *sources.LAYERS,
    "bdia_jax/nn/vit.py",
    "bdia_jax/nn/resnet.py",
    "bdia_jax/data/images.py",
    "bdia_jax/data/batches.py",
    *sources.STEP,
    "bdia_jax/train/tasks/images.py",
    "experiments/measure/vision_tables.py",
)


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

    @property
    def about(self) -> str:
        """A line under a table."""
        v, r, t = self.vit, self.resnet, self.train
        images = "all" if self.images is None else f"{self.images:,}"
        return (
            f"{self.data}, {images} training images{'' if self.augment else ' as they are'}, "
            f"{self.epochs} epochs of {t.batch_size} images per step, {t.optimizer}, learning rate "
            f"{t.learning_rate:g}, {t.schedule}; validation accuracy at the end, seeds 0 to "
            f"{self.seeds - 1}. ViT: {v.depth} blocks of width {v.width}, hidden {v.hidden}, "
            f"{v.heads} heads, patches of {v.patch_size}, dropout {v.dropout:g}. ResNet: "
            f"{len(r.widths)} stages of {r.depth}, widths {', '.join(map(str, r.widths))}."
        )


SMALL = ViTConfig(
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
)
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
    "reduced": Scale(
        data="cifar10",
        vit=ViTConfig(patch_size=8, width=64, heads=4, head_dim=16, hidden=64),
        resnet=ResNetConfig(widths=(8, 16, 32), depth=2, groups=4),
        epochs=50,
        train=TrainSettings(
            batch_size=50, optimizer="set-adam", learning_rate=1e-3, clip_norm=None
        ),
        images=1000,
        evaluations=4,
        augment=False,
    ),
    "digits": Scale(
        data="digits",
        vit=SMALL,
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


BOTH = {"ViT": {"method": "standard"}, "BDIA-ViT": {"method": "bdia"}}
GRIDS: dict[str, dict[str, dict[str, Any]]] = {
    "quantization": {
        f"l = {bits}": {"frac_bits": bits, "quantize_standard": True} for bits in (9, 5, 0, -2)
    },
    "depth": {f"{depth} blocks": {"depth": depth} for depth in (6, 10)},
    "dropout": {f"dropout {rate}": {"dropout": rate} for rate in (0.0, 0.1, 0.2)},
    "linformer": {"linear attention": {"attention": "linear"}},
}
"""Tables of both systems: what is changed in each row."""
COLUMNS: dict[str, dict[str, dict[str, Any]]] = {
    "baselines": BOTH | {"RevViT": {"method": "coupled"}, "mid-point": {"method": "midpoint"}},
    # 0.6 is no power of two, and cannot be taken back.
    "gamma": {
        "|γ| = 0": {"method": "standard"},
        "|γ| = 0.25": {"gamma": 0.25},
        "|γ| = 0.5": {},
        "|γ| = 0.6": {"method": "bdia-direct", "gamma": 0.6},
    },
    "signs": {"standard": {"method": "standard"}}
    | {
        f"γ = 1/{n}, signs: {signs}": {"gamma": 1 / n, "signs": signs}
        for n in (2, 4, 8, 16)
        for signs in ("block", "sample")
    },
    "systems": BOTH
    | {
        "ViT, checkpointed blocks": {"method": "standard-checkpoint"},
        "ViT on the grid, l = 5": BOTH["ViT"] | {"frac_bits": 5, "quantize_standard": True},
        "BDIA-ViT, direct": {"method": "bdia-direct"},
        "BDIA-ViT, parts as steps": {"parts_as_steps": True},
        "BDIA-ViT, dropout 0.1": {"dropout": 0.1},
        "BDIA-ViT, l = 5": {"frac_bits": 5},
        "BDIA-ViT, |γ| = 0.25": {"gamma": 0.25},
        "BDIA-ViT, |γ| = 0.6, direct": {"method": "bdia-direct", "gamma": 0.6},
        "BDIA-ViT, a sign per sample": {"signs": "sample"},
        "BDIA-ViT, bfloat16": {"dtype": "bfloat16"},
        "RevViT": {"method": "coupled"},
        "RevViT, direct": {"method": "coupled-direct"},
        "mid-point": {"method": "midpoint"},
        "mid-point, direct": {"method": "midpoint-direct"},
        "linear attention": BOTH["ViT"] | {"attention": "linear"},
        "linear attention, BDIA": {"attention": "linear"},
    },
}
"""Tables of one column: what is changed of BDIA-ViT in each row. Systems is everything, once."""


def table_cells(table: Table, s: Scale) -> list[Cell]:
    """The networks of a table."""
    columns = {"": COLUMNS.get(table, {})}
    if table in GRIDS or table == "capacity":
        rows = GRIDS.get(table) or smaller(s.vit)
        columns = {
            name: {row: method | changes for row, changes in rows.items()}
            for name, method in BOTH.items()
        }
    cells = [
        Cell(row, name, dataclasses.replace(s.vit, **({"method": "bdia"} | changes)))
        for name, rows in columns.items()
        for row, changes in rows.items()
    ]
    if table in ("resnet", "systems"):
        row = f"{s.resnet.depth * len(s.resnet.widths)} residual blocks"
        for name, method in (("ResNet", "standard"), ("BDIA-ResNet", "bdia")):
            network = dataclasses.replace(s.resnet, method=method)
            cells.append(Cell(*((row, name) if table == "resnet" else (name, "")), network))
    if table == "systems":
        others = {"adam", "adamw", "set-adam"} - {s.train.optimizer}
        bdia = dataclasses.replace(s.vit, method="bdia")
        cells += [Cell(f"BDIA-ViT by {name}", "", bdia, name) for name in sorted(others)]
    return cells


def smaller(c: ViTConfig) -> dict[str, dict[str, Any]]:
    """Rows of smaller and smaller networks for the same data."""
    rows = {}
    for share, blocks in ((1, 1), (2, 2), (4, 3), (8, 3)):
        width, depth, heads = c.width // share, max(2, c.depth // blocks), max(1, c.heads // share)
        size = {"width": width, "depth": depth, "heads": heads, "head_dim": width // heads}
        rows[f"width {width}, {depth} blocks"] = size | {"hidden": c.hidden // share}
    return rows


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
    """Train nothing; tables of the runs that this code has finished in the work folder."""
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
    """Folder of the results; by default runs/results."""
    work: pathlib.Path = pathlib.Path("runs/vision")
    """Folder of the runs."""

    def __post_init__(self):
        for name in ("images", "epochs", "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if not self.table:
            raise ValueError("table must name at least one table; got none")

    def chosen(self) -> tuple[str, Scale, tuple[Table, ...]]:
        """The name of the result, the scale with all changes, and the tables."""
        name, tables = self.scale, self.table
        if self.quick:
            name, tables = "digits", ("systems",)
        changes = {"seeds": 1} if self.quick else {}
        for field in ("data", "images", "epochs", "seeds"):
            if getattr(self, field) is not None:
                changes[field] = getattr(self, field)
        scale = dataclasses.replace(SCALES[name], **changes)
        return f"vision-{'quick' if self.quick else name}-{scale.data}", scale, tables


def main(v: VisionTables) -> str:
    """Runs what is missing; the tables."""
    name, scale, tables = v.chosen()
    data = _share(load_images(scale.data, v.data_dir), scale.images)
    task = ImageClassification(data, augment=scale.augment)
    cells = [(table, cell) for table in tables for cell in table_cells(table, scale)]
    runs = {
        (cell, seed): run_of(cell, seed, scale, task)
        for seed in range(scale.seeds)
        for _, cell in cells
    }
    found = run_all(
        {run.name: run for run in runs.values()}.values(),
        v.work,
        DEPENDS,
        lambda r: r["error"] or f"{accuracy(r):.2%} in {r['seconds']:.0f} s",
        train=not v.report,
    )
    if not found:
        raise FileNotFoundError(f"this code has finished no run of {', '.join(tables)} in {v.work}")
    published = PUBLISHED.get(scale.data, {})
    rows = [
        {
            "table": table,
            "row": cell.row,
            "system": cell.system,
            "seed": seed,
            "published": published.get(cell.row, {}).get(cell.system),
        }
        | found[runs[cell, seed].name]
        for table, cell in cells
        for seed in range(scale.seeds)
        if runs[cell, seed].name in found
    ]
    path = records.write(name, rows, DEPENDS, settings=v, out=v.out, note=scale.about)
    text = all_tables(rows)
    print(f"\n{scale.about}\n\n{text}\n\nSee {path}")
    if v.quick and (failed := [r["row"] for r in rows if not accuracy(r) >= 0.9]):
        raise RuntimeError(f"below 90 %: {', '.join(failed)}")
    return text


def accuracy(record: dict[str, Any]) -> float:
    """The last one; NaN of a run that went wrong."""
    found = [r["accuracy"] for r in record.get("history", ()) if r["split"] == "eval"]
    return found[-1] if found else math.nan


def _share(data: ImageData, images: int | None) -> ImageData:
    """The first images of the training split (a prepared TFDS split is in random order)."""
    if images is None:
        return data
    if images > len(data.train_labels):
        raise ValueError(f"{data.name} has {len(data.train_labels)} training images; got {images}")
    return dataclasses.replace(
        data, train_images=data.train_images[:images], train_labels=data.train_labels[:images]
    )


def run_of(cell: Cell, seed: int, scale: Scale, task: ImageClassification) -> Run:
    """The run of a cell of a table; shaped by the data."""
    data = task.data
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
        log_every=every,
        seed=seed,
        **({"optimizer": cell.optimizer} if cell.optimizer else {}),
    )
    kind = ViT if isinstance(config, ViTConfig) else ResNet
    return training(
        run_name(cell, seed, scale),
        lambda: kind(config, rngs=nnx.Rngs(seed)),
        task,
        settings,
        {"model": records.plain(config), "images": images, "augment": scale.augment},
    )


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


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def all_tables(rows: list[dict[str, Any]]) -> str:
    """Every table, under its name."""
    names = dict.fromkeys(row["table"] for row in rows)
    return "\n\n".join(
        f"*{name}*\n\n{table([r for r in rows if r['table'] == name])}" for name in names
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Rows and systems; where there are two systems, how much the second is better."""
    systems = [*dict.fromkeys(row["system"] for row in rows)]
    with_paper = any(row["published"] is not None for row in rows)
    header = ["%"]
    for name in systems:
        header += [name or "accuracy", *([f"{name} published".strip()] if with_paper else [])]
    if len(systems) == 2:
        header.append("difference")
    lines = []
    for label in dict.fromkeys(row["row"] for row in rows):
        line, accuracies = [label], []
        for name in systems:
            some = [row for row in rows if (row["row"], row["system"]) == (label, name)]
            of_seed = {row["seed"]: 100 * accuracy(row) for row in some}
            accuracies.append(of_seed)
            wrong = any(map(math.isnan, of_seed.values()))
            text = records.spread([*of_seed.values()], 2) if some else ""
            line.append("not finite" if wrong else text)
            if with_paper:
                value = some[0]["published"] if some else None
                line.append("" if value is None else f"{value:.2f}")
        if len(systems) == 2:
            line.append(difference(*accuracies))
        lines.append(line)
    return records.markdown(header, lines)


def difference(first: dict[int, float], second: dict[int, float]) -> str:
    """Of the second to the first, seed by seed."""
    found = [second[seed] - first[seed] for seed in first if seed in second]
    if not found or any(map(math.isnan, found)):
        return ""
    text = f"{statistics.fmean(found):+.2f}"
    return text + (f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else "")


def command() -> None:
    """From the command line."""
    commands.run(main, VisionTables, __doc__, told=logging.ERROR)
