"""Classification of images by a network that was pretrained on others, of another size."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from bdia_jax.data import batches
from bdia_jax.data.augmentation import Augmentation, augment_to, mix
from bdia_jax.data.batches import of_characters
from bdia_jax.data.images import ImageData, check_classes
from bdia_jax.data.scaling import Scaling, check_size, squares_of
from bdia_jax.nn.losses import Sums
from bdia_jax.train.tasks.images import ImageClassification
from bdia_jax.train.tasks.task import eval_rows

RECIPE = Augmentation()


class ResizedImages(ImageClassification):
    """Images scaled to a network's size, normalized as for its pretraining, and varied."""

    def __init__(
        self,
        data: ImageData,
        size: int,
        mean: Float[np.ndarray, "channel"],
        std: Float[np.ndarray, "channel"],
        *,
        augmentation: Augmentation | None = RECIPE,
        label_smoothing: float = 0.0,
        scaling: Scaling = Scaling(),  # noqa: B008  (a tuple)
        middle: float = 1.0,
        eval_batch_size: int = 64,
    ):
        """Chooses how images are scaled and varied.

        Args:
          data: images of any one size; those of one channel go into each of a network's. Those for
            evaluation may have another size than those for training.
          size: height and width of the network's images, in pixels.
          mean, std: of pixels from 0 to 255 (:func:`bdia_jax.interop.load_normalization`).
          augmentation: how training images are varied; None for not at all.
          label_smoothing: share of the target that is spread over all classes.
          scaling: how whole images become squares (:func:`bdia_jax.interop.load_scaling`); without
            an edge for those of :func:`bdia_jax.data.load_image_folder`, which are squares already.
          middle: share of a training image's sides, around its middle, that is seen where it is
            not cropped, and that an image for evaluation is (:attr:`ImageFolder.middle`).
          eval_batch_size: samples per evaluation batch.

        Raises:
          ValueError: as :class:`ImageClassification`; for a share outside (0, 1], a size below 1,
            statistics that do not fit the images or are no numbers, and an unknown scaling.
        """
        check_size(size)
        scaling.check()
        self.mean, self.std = _statistics(data, mean, std)
        super().__init__(
            data,
            augment=augmentation is not None,
            label_smoothing=label_smoothing,
            eval_batch_size=eval_batch_size,
        )
        if not 0 < middle <= 1:
            raise ValueError(f"middle must lie in (0, 1]; got {middle}")
        if augmentation is not None and augmentation.flip is None:
            augmentation = dataclasses.replace(augmentation, flip=not of_characters(data.name))
        self.size, self.augmentation = size, augmentation
        self.scaling, self.unvaried = scaling, scaling._replace(edge=scaling.edge / middle)

    def arrays(self) -> dict[str, np.ndarray]:
        """Both splits, and the statistics of the pretraining."""
        return super().arrays() | {"mean": self.mean, "std": self.std}

    def batch(self, arrays, key, step, size):
        """Images, labels, the labels of the images mixed in, and the share of the first."""
        order_key, augment_key = jax.random.split(key)
        indices = batches.batch_indices(order_key, step, size, self.samples)
        images, labels = arrays["images"][indices], arrays["labels"][indices]
        share, how = jnp.ones(size), self.augmentation
        if how is None:
            return self.middles(arrays, images), labels, labels[::-1], share
        vary_key, mix_key = jax.random.split(jax.random.fold_in(augment_key, step))
        images = augment_to(vary_key, images, self.size, how, self.unvaried)
        if how.mixup:
            images, share = mix(mix_key, images, how.mixup)
        return (images - arrays["mean"]) / arrays["std"], labels, labels[::-1], share

    def eval_batch(self, arrays, step, size):
        """Whole images, scaled; and labels, -1 for samples after the last."""
        rows, exist = eval_rows(step, size, self.eval_samples)
        images = squares_of(arrays["eval_images"][rows], self.size, self.scaling)
        images = (images - arrays["mean"]) / arrays["std"]
        return images, jnp.where(exist, arrays["eval_labels"][rows], -1)

    def middles(self, arrays, images):
        """Training images as those for evaluation are, normalized with the statistics given."""
        images = squares_of(images, self.size, self.unvaried)
        return (images - arrays["mean"]) / arrays["std"]

    def loss(self, model, batch, key) -> Sums:
        """Cross-entropy with the shares of both labels, smoothed; accuracy by the larger share."""
        images, labels, others, share = batch
        logits = model(images, key=key)
        check_classes(self.name, self.data.num_classes, logits.shape[-1])
        one, other = (jax.nn.one_hot(each, self.data.num_classes) for each in (labels, others))
        targets = share[:, None] * one + (1 - share[:, None]) * other
        targets = optax.smooth_labels(targets, self.label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets)
        right = jnp.float32(logits.argmax(-1) == labels)
        return Sums(loss.sum(), jnp.float32(len(labels)), {"accuracy": right.sum()})


def _statistics(data: ImageData, mean, std) -> list[Float[np.ndarray, "channel"]]:
    """Mean and standard deviation in float32; a ``ValueError`` for what is none of these images."""
    channels = data.train_images.shape[-1]
    found = [np.asarray(values, np.float32) for values in (mean, std)]
    for name, values in zip(("mean", "std"), found, strict=True):
        # Images of one channel go into each of a network's.
        fits = channels == 1 or values.size in (1, channels)
        if values.ndim != 1 or not values.size or not fits:
            raise ValueError(
                f"{name} must have a number for each of {channels} channels, or one; got the shape "
                f"{values.shape}"
            )
        if not np.isfinite(values).all() or (name == "std" and values.min() <= 0):
            kind = "positive numbers" if name == "std" else "numbers"
            raise ValueError(f"{name} must be of finite {kind}; got {values}")
    return found
