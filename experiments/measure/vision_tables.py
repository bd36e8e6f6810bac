"""The vision experiments of the paper as tables, its figures beside ours.

    python experiments/vision_tables.py --quick             # every system on digits: 45 minutes
    python experiments/vision_tables.py --scale reduced --data-dir DIR --table gamma dropout
    python experiments/vision_tables.py --scale few --data-dir DIR --table over-fitting
    python experiments/vision_tables.py --scale paper --data-dir DIR --table baselines

Scales: ``paper`` is the published setting (CIFAR-10, 6 blocks of width 512, batch 128, SET-Adam,
400 epochs; a GPU's work). ``reduced`` is what 2 cores can do with CIFAR-10: large patches, narrow
blocks, a fiftieth of the images, as they are and seen often, so that networks over-fit as the
published ones do after hundreds of epochs; it shows orderings, not the published numbers. ``few``
goes on for twice as long, until networks know their images by heart. ``moved`` is ``few`` with
images moved and mirrored, and without dropout. ``digits`` is smaller still.
``--quick`` trains every system once on digits, and fails if one stays under 90 %.

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
from typing import Any, Literal

from flax import nnx

from bdia_jax.data import ImageData, load_images
from bdia_jax.nn import ResNet, ViT, ViTConfig
from bdia_jax.train import ImageClassification
from bdia_jax.train import command as commands
from measure import records, sources
from measure.runs import Run, run_all, training
from measure.vision_systems import SCALES, Cell, Scale, Table, table_cells

DEPENDS = (
    *sources.CORE,
    *sources.COUPLED,
    *sources.LAYERS,
    "bdia_jax/nn/vit.py",
    "bdia_jax/nn/resnet.py",
    "bdia_jax/data/images.py",
    "bdia_jax/data/batches.py",
    *sources.ORDINARY_STEP,
    "bdia_jax/train/tasks/images.py",
    "experiments/measure/vision_tables.py",
    "experiments/measure/vision_systems.py",
)


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
    scale: Literal["paper", "reduced", "few", "moved", "digits"] = "digits"
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
    cells = [(table, cell) for table in tables for cell in table_cells(table, scale)]
    runs = {
        (cell, seed): run_of(cell, seed, scale, data)
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


def accuracy(record: dict[str, Any], split: str = "eval") -> float:
    """The last one; NaN of a run that went wrong. That of "train" is of training mode."""
    found = [r["accuracy"] for r in record.get("history", ()) if r["split"] == split]
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


def run_of(cell: Cell, seed: int, scale: Scale, data: ImageData) -> Run:
    """The run of a cell of a table; shaped by the data."""
    augment = scale.augment if cell.augment is None else cell.augment
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
        ImageClassification(data, augment=augment),
        settings,
        {"model": records.plain(config), "images": images, "augment": augment},
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
    if cell.augment not in (None, scale.augment):
        parts.append("augmented" if cell.augment else "as-they-are")
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
    """Rows and systems; of two systems, how much the second is better, and how they train."""
    systems = [*dict.fromkeys(row["system"] for row in rows)]
    with_paper = any(row["published"] is not None for row in rows)
    header = ["%"]
    for name in systems:
        header += [name or "accuracy", *([f"{name} published".strip()] if with_paper else [])]
    if len(systems) == 2:
        header += ["difference", *(f"{name}, training" for name in systems)]
    lines = []
    for label in dict.fromkeys(row["row"] for row in rows):
        line, accuracies, training = [label], [], []
        for name in systems:
            some = [row for row in rows if (row["row"], row["system"]) == (label, name)]
            trained = [100 * accuracy(row, "train") for row in some]
            training.append(records.spread(trained, 2) if some else "")
            of_seed = {row["seed"]: 100 * accuracy(row) for row in some}
            accuracies.append(of_seed)
            wrong = any(map(math.isnan, of_seed.values()))
            text = records.spread([*of_seed.values()], 2) if some else ""
            line.append("not finite" if wrong else text)
            if with_paper:
                value = some[0]["published"] if some else None
                line.append("" if value is None else f"{value:.2f}")
        if len(systems) == 2:
            line += [difference(*accuracies), *training]
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
