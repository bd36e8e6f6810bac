"""Fine-tunes a pretrained vision transformer (ViT, DINOv2, CLIP, SigLIP) reversibly, on images.

    python -m bdia_jax.finetune_images --pretrained ./vit-base --data photos --out runs/mine
    python -m bdia_jax.finetune_images --pretrained ./dinov2-small --data cifar10 --out runs/cifar10
    python -m bdia_jax.finetune_images ... --lora.rank 8                   # low-rank updates only
    python -m bdia_jax.finetune_images ... --resume                        # continue

``experiments/vit.py --pretrained ...`` is the same command.

The data is a folder that has a folder of images for each class (of any size, depth and format), or
a set of TensorFlow Datasets. Images are scaled and normalized as in the pretraining. What comes
out, ``runs/mine/model``, is a folder that ``transformers`` loads, with the weights of the best
evaluation and the names of the classes.

The network gets a new head, which is first fitted to what the network makes of some images. Then
the γ that it tolerates is measured by a few forward passes (``--gamma auto``).
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable

import numpy as np
from flax import nnx

from bdia_jax import interop
from bdia_jax.data import (
    Augmentation,
    ImageData,
    class_names,
    load_image_folder,
    load_images,
)
from bdia_jax.data.scaling import Scaling
from bdia_jax.finetuning.run import add_updates, check_fits, described, fine_tune, tell_needs
from bdia_jax.finetuning.settings import COMMON, STEPS, FineTuning
from bdia_jax.nn import (
    VisionTower,
    VisionTowerConfig,
    merge_lora,
    unfreeze,
)
from bdia_jax.train import (
    ResizedImages,
    TrainSettings,
    check_batch_size,
    check_run_folder,
    fit_head,
    place_on_mesh,
)
from bdia_jax.train.command import run
from bdia_jax.train.run_folder import check_same_settings

SOME = dataclasses.replace(COMMON, batch_size=32, warmup_steps=50)
BATCHES = 8
"""By which γ is chosen: an image has one loss, where a text has one for each token."""
LARGER = 9 / 8
"""Training images of a folder have so many times as many pixels a side as the network's, for crops.
"""


@dataclasses.dataclass(frozen=True)
class Given:
    """What must be given; first in --help."""

    pretrained: str
    """A Hugging Face folder, or a name on the hub: ViT, DINOv2, CLIP or SigLIP."""
    data: str
    """A folder of images by class (perhaps in train and validation); digits; or an image
    classification set of TensorFlow Datasets."""
    out: pathlib.Path
    """Folder of the run; the fine-tuned model will be its folder "model"."""


@dataclasses.dataclass(frozen=True)
class FineTuneImages(FineTuning, Given):
    """Fine-tunes a pretrained vision transformer reversibly, on images."""

    data_dir: pathlib.Path | None = None
    """Where prepared TFDS sets lie; by default TFDS's own folder."""
    download: bool = False
    """Download and prepare the data set if it is missing (needs TensorFlow)."""
    image_size: int | None = None
    """Height and width of the network's images; None for the pretraining's. Learned positions are
    interpolated."""
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    """How training images are varied."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    head_images: int = 1000
    """The new head is first fitted to at most this many training images. 0 for a head of zeros, by
    whose loss γ cannot be chosen."""
    train: TrainSettings = SOME
    """How to train; 500 steps, unless steps or epochs are given."""

    def __post_init__(self):
        super().__post_init__()
        if self.method == "bdia" and self.gamma == "auto" and not self.head_images:
            raise ValueError(
                "a head of zeros has the same loss with every γ: give gamma, or head_images above "
                f"0; got gamma={self.gamma!r}, head_images={self.head_images}"
            )


def main(f: FineTuneImages) -> dict[str, float]:
    """Runs it; validation loss and accuracy before and after."""
    if f.plan is None:
        f = dataclasses.replace(f, out=check_run_folder(f.out, f.resume))
    path = interop.resolve(f.pretrained)
    pretrained = interop.read_vision_config(path)
    about = described(f)
    if f.plan is None:
        check_same_settings(f.out, f.train, {"fine-tuning": about})
    check_before(f, path, pretrained)
    mean, std = interop.load_normalization(path)
    size = f.image_size or pretrained.image_size
    data, names, scaling = images(f, path, size, pretrained.channels)
    task = ResizedImages(
        data,
        size,
        mean,
        std,
        augmentation=f.augmentation,
        label_smoothing=f.label_smoothing,
        scaling=scaling,
        middle=getattr(data, "middle", 1.0),
    )
    check_batch_size(task, f.train.batch_size)
    print(
        f"{task.samples} images of {data.num_classes} classes; {task.eval_samples} for evaluation"
    )
    f = dataclasses.replace(f, train=f.train.or_steps(STEPS))
    if f.plan is not None:
        classes = data.num_classes
        length = dataclasses.replace(pretrained, image_size=size).length
        return tell_needs(f, lambda: made(f, path, pretrained, classes), task, length)
    model = load(f, path, data.num_classes, size)
    # An adapter may have one.
    if f.head_images and not np.any(model.head.kernel[...]):
        right = fit_head(model, task, f.head_images, seed=f.train.seed)
        print(f"new head: {right:.2%} of the images that it was fitted to are classified rightly")
    found = fine_tune(f, model, task, about, metric="accuracy", batches=BATCHES)
    if f.lora:
        interop.save_adapter(model, f.out / "adapter", like=path)
        print(f"the low-rank updates and the head alone are in {f.out / 'adapter'}")
        merge_lora(model)
    interop.save_vision(model, f.out / "model", like=path, labels=names)
    before, after = found.before, found.after
    print(
        f"{found.told}: validation accuracy {before['accuracy']:.2%} -> {after['accuracy']:.2%}, "
        f"loss {before['loss']:.4f} -> {after['loss']:.4f}. Saved to {f.out / 'model'}"
    )
    return found.losses


def images(
    f: FineTuneImages, pretrained: pathlib.Path, size: int, channels: int
) -> tuple[ImageData, list[str], Scaling]:
    """The data, the names of its classes, and how its images become squares."""
    scaling = interop.load_scaling(pretrained)
    if pathlib.Path(f.data).expanduser().is_dir():
        folder = load_image_folder(f.data, size, larger=LARGER, scaling=scaling, channels=channels)
        # Its images are squares already.
        return folder, [*folder.class_names], scaling._replace(edge=1.0)
    if f.data.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"the folder of images must exist; got {f.data!r}")
    data = load_images(f.data, f.data_dir, download=f.download)
    found = data.train_images.shape[-1]
    if found not in (1, channels):
        raise ValueError(f"images must have {channels} channels, or one; got {found}")
    return data, class_names(f.data, f.data_dir), scaling


def check_before(f: FineTuneImages, path: pathlib.Path, config: VisionTowerConfig) -> None:
    """Refuses what can be refused before images and network are read.

    Raises:
      ValueError: for settings that do not fit the network, and a disk without room for it.
    """
    check_fits(f, lambda: made(f, path, config))


def made(
    f: FineTuneImages, path: pathlib.Path, config: VisionTowerConfig, num_classes: int | None = None
) -> VisionTower:
    """The network with what is trained of it, and any weights; for what its shapes tell."""
    size = f.image_size or config.image_size
    classes = config.num_classes if num_classes is None else num_classes
    config = dataclasses.replace(config, image_size=size, num_classes=classes, **f.of_network)
    return with_updates(f, VisionTower(config, rngs=nnx.Rngs(0)), path)


def load(f: FineTuneImages, path: pathlib.Path, num_classes: int, size: int) -> VisionTower:
    """The network with a new head, and with what is trained of it; where it is trained."""
    model = interop.load_vision(path, num_classes=num_classes, image_size=size, **f.of_network)
    with_updates(f, model, path, print)
    place_on_mesh(model, f.train.mesh)
    return model


def with_updates(
    f: FineTuneImages,
    model: VisionTower,
    path: pathlib.Path,
    tell: Callable[[str], None] = lambda told: None,
) -> VisionTower:
    """The network, of which low-rank updates and the head are trained, or all weights."""
    if add_updates(f, model, path, tell):
        # It is new, or goes with the updates.
        unfreeze(model.head)
    return model


def command() -> None:
    """Runs :func:`main` from the command line."""
    run(main, FineTuneImages, __doc__, told=logging.INFO)
