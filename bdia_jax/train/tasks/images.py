"""Classification of images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdia_jax.data import batches
from bdia_jax.data.images import ImageData, check_classes
from bdia_jax.nn.losses import Sums
from bdia_jax.train.tasks.task import eval_rows


class ImageClassification:
    """Cross-entropy and accuracy on an :class:`bdia_jax.data.ImageData`."""

    best, unit = "accuracy", "images"

    def __init__(
        self,
        data: ImageData,
        *,
        augment: bool = True,
        label_smoothing: float = 0.0,
        eval_batch_size: int = 256,
    ):
        """``augment``: whether to augment images as is customary for the data set."""
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1); got {label_smoothing}")
        self.samples, self.eval_samples = len(data.train_labels), len(data.eval_labels)
        if not self.samples or not self.eval_samples:
            raise ValueError(
                f"both splits need samples; got {self.samples} for training and "
                f"{self.eval_samples} for evaluation"
            )
        if eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1; got {eval_batch_size}")
        self.data, self.augment, self.label_smoothing = data, augment, label_smoothing
        self.name, self.eval_batch_size = data.name, eval_batch_size

    def arrays(self) -> dict[str, np.ndarray]:
        """Both splits, and the statistics that images are normalized by."""
        d = self.data
        mean, std = d.statistics
        return {
            "images": d.train_images,
            # With a sign: -1 stands for no label.
            "labels": d.train_labels.astype(np.int32),
            "eval_images": d.eval_images,
            "eval_labels": d.eval_labels.astype(np.int32),
            "mean": mean,
            "std": std,
        }

    def batch(self, arrays, key, step, size):
        """Normalized images and labels, each sample once in an epoch."""
        order_key, augment_key = jax.random.split(key)
        indices = batches.batch_indices(order_key, step, size, self.samples)
        images, labels = arrays["images"][indices], arrays["labels"][indices]
        if self.augment:
            images = batches.augment(jax.random.fold_in(augment_key, step), images, self.name)
        return batches.normalize(images, arrays["mean"], arrays["std"]), labels

    def eval_batch(self, arrays, step, size):
        """Normalized images and labels; -1 for samples after the last."""
        rows, exist = eval_rows(step, size, self.eval_samples)
        images, labels = arrays["eval_images"][rows], arrays["eval_labels"][rows]
        images = batches.normalize(images, arrays["mean"], arrays["std"])
        return images, jnp.where(exist, labels, -1)

    def loss(self, model, batch, key) -> Sums:
        """Cross-entropy, with label smoothing; accuracy."""
        return self._sums(model(batch[0], key=key), batch[1], self.label_smoothing)

    def evaluate(self, model, batch) -> Sums:
        """Cross-entropy, without smoothing; accuracy."""
        return self._sums(model(batch[0]), batch[1], 0.0)

    def _sums(self, logits, labels, smoothing: float) -> Sums:
        check_classes(self.name, self.data.num_classes, logits.shape[-1])
        # All zeros for the label -1, and with it the loss.
        targets = jax.nn.one_hot(labels, self.data.num_classes)
        weights = jnp.float32(labels >= 0)
        loss = optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))
        right = logits.argmax(-1) == labels
        return Sums(
            jnp.sum(weights * loss), jnp.sum(weights), {"accuracy": jnp.sum(weights * right)}
        )
