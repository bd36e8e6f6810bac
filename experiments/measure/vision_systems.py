"""What the vision experiments train: sizes, and the networks of every table."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

from bdia_jax.nn import ResNetConfig, ViTConfig
from bdia_jax.train import TrainSettings

Config = ViTConfig | ResNetConfig


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
            f"{len(r.widths)} stages of {r.depth}, widths {', '.join(map(str, r.widths))}. A "
            "row may say otherwise."
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
SCALES["few"] = dataclasses.replace(SCALES["reduced"], epochs=100)
SCALES["moved"] = dataclasses.replace(
    SCALES["few"], augment=True, vit=dataclasses.replace(SCALES["few"].vit, dropout=0.0)
)


class Cell(NamedTuple):
    """One network of a table."""

    row: str
    system: str
    """The column; "" if there is one only."""
    config: Config
    optimizer: str | None = None
    """Another than the scale's."""
    augment: bool | None = None
    """Other than the scale's."""


BOTH = {"ViT": {"method": "standard"}, "BDIA-ViT": {"method": "bdia"}}
GRIDS: dict[str, dict[str, dict[str, Any]]] = {
    "quantization": {
        f"l = {bits}": {"frac_bits": bits, "quantize_standard": True} for bits in (9, 5, 0, -2)
    },
    "depth": {f"{depth} blocks": {"depth": depth} for depth in (6, 10)},
    "dropout": {f"dropout {rate}": {"dropout": rate} for rate in (0.0, 0.1, 0.2)},
    "linformer": {"linear attention": {"attention": "linear"}},
    "over-fitting": {
        f"{images}, dropout {rate}": {"augment": augment, "dropout": rate}
        for images, augment in (("as they are", False), ("moved, mirrored", True))
        for rate in (0.0, 0.1)
    },
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
Table = Literal[(*GRIDS, *COLUMNS, "resnet", "capacity")]


def table_cells(table: Table, s: Scale) -> list[Cell]:
    """The networks of a table."""
    columns = {"": COLUMNS.get(table, {})}
    if table in GRIDS or table == "capacity":
        rows = GRIDS.get(table) or smaller(s.vit)
        columns = {
            name: {row: method | changes for row, changes in rows.items()}
            for name, method in BOTH.items()
        }
    cells = []
    for name, rows in columns.items():
        for row, changes in rows.items():
            changes = {"method": "bdia"} | changes
            augment = changes.pop("augment", None)
            network = dataclasses.replace(s.vit, **changes)
            cells.append(Cell(row, name, network, augment=augment))
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
