"""Trains a vision transformer, reversibly or not, on images.

    python experiments/vit.py --out runs/digits                                # a minute or two
    python experiments/vit.py --data cifar10 --data-dir ~/tensorflow_datasets --out runs/cifar10
    python experiments/vit.py --pretrained google/vit-base-patch16-224 --data photos --out runs/mine
    python experiments/vit.py ... --resume                                     # continue

With ``--pretrained``, a pretrained network is fine-tuned, and the options are those of
:mod:`bdia_jax.finetuning.images`: ``vit.py --pretrained x --help``. Without, one is trained from
scratch.

The model defaults to a small one that a CPU trains on digits. That of the BDIA experiments on CIFAR
is ``--model.width 512 --model.hidden 512 --model.heads 8 --model.head-dim 64`` with patches of 4.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import re
import sys
from collections.abc import Sequence

from flax import nnx
from measure import records, vision_tables

from bdia_jax.data import load_image_folder, load_images
from bdia_jax.finetuning import images
from bdia_jax.nn import ViT, ViTConfig
from bdia_jax.train import (
    ImageClassification,
    TrainSettings,
    command,
    plot_curves,
    read_metrics,
    train,
)
from bdia_jax.train.wording import per_step

SMALL = ViTConfig(
    image_size=8, channels=1, patch_size=2, width=64, heads=4, head_dim=16, hidden=128
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Trains a vision transformer, reversibly or not, on images."""

    out: pathlib.Path
    """Folder of the run: settings, metrics, checkpoints, curves."""
    data: str = "digits"
    """digits (embedded), a folder of images by class, or an image classification set of TensorFlow
    Datasets."""
    data_dir: pathlib.Path | None = None
    """Where prepared TFDS sets lie; by default TFDS's own folder."""
    download: bool = False
    """Download and prepare the data set if it is missing (needs TensorFlow)."""
    augment: bool = True
    """Augment the training images: digits move by a pixel, others are cropped and mirrored."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    init_seed: int = 0
    """Seed of the initialization."""
    resume: bool = False
    """Continue the run in the folder, if there is one."""
    results: pathlib.Path | None = None
    """Also write the evaluations as a result (measure.records), into this folder."""
    model: ViTConfig = SMALL
    """The network. Image size, channels and classes are those of the data."""
    train: TrainSettings = dataclasses.field(default_factory=TrainSettings)
    """How to train it."""


def main(experiment: Experiment) -> float:
    """Runs it; the last validation accuracy."""
    e = experiment
    if pathlib.Path(e.data).expanduser().is_dir():
        data = load_image_folder(e.data, e.model.image_size, channels=e.model.channels)
    else:
        data = load_images(e.data, e.data_dir, download=e.download)
    size, _, channels = data.train_images.shape[1:]
    config = dataclasses.replace(
        e.model, image_size=size, channels=channels, num_classes=data.num_classes
    )
    model = ViT(config, rngs=nnx.Rngs(e.init_seed))
    task = ImageClassification(data, augment=e.augment, label_smoothing=e.label_smoothing)
    about = {
        "model": dataclasses.asdict(config),
        "init_seed": e.init_seed,
        "augment": e.augment,
        "label_smoothing": e.label_smoothing,
    }
    try:
        result = train(model, task, e.train, e.out, resume=e.resume, about=about)
    except (SystemExit, KeyboardInterrupt):
        # It was told to stop.
        write_result(e, config)
        raise
    write_result(e, config)
    plot_curves({config.method: e.out}, e.out / "accuracy.png")
    accuracy = result.last("eval", "accuracy")
    print(
        f"{config.method}: validation accuracy {accuracy:.2%} after {result.step} steps, "
        f"{per_step(result.seconds_per_step)}; see {e.out}"
    )
    return accuracy


def write_result(e: Experiment, config: ViTConfig) -> None:
    """What was evaluated so far, over all continuations."""
    if e.results is None:
        return
    found = read_metrics(e.out)
    rows = [{"network": config.method} | line for line in found if line["split"] == "eval"]
    if not rows:
        return
    name = f"vit-{pathlib.Path(e.data).name}-{config.method}-{config.dtype}"
    records.write(name, rows, vision_tables.DEPENDS, settings=e, out=e.results)


def is_pretrained(arguments: Sequence[str]) -> bool:
    """Whether a command line, or the file after --config, names a pretrained network."""
    if any(word.split("=")[0] == "--pretrained" for word in arguments):
        return True
    files = [pathlib.Path(word.removeprefix("--config=")) for word in arguments]
    texts = [f.read_text() for f in files if f.suffix in (".yaml", ".yml") and f.is_file()]
    return any(re.search("^pretrained:", text, re.MULTILINE) for text in texts)


if __name__ == "__main__":
    if is_pretrained(sys.argv[1:]):
        images.command()
    else:
        command.run(main, Experiment, __doc__, told=logging.INFO)
