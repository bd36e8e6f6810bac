"""What is trained: batches, a loss, and an evaluation, as pure functions."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from bdia_jax.data import images as image_data


class Task(Protocol):
    """Every method but the first two is traced, and must be a pure function of its arguments."""

    name: str
    """Of the data, for messages and settings."""
    best: str
    """The evaluation metric that the best checkpoint is chosen by: the highest, or the lowest
    with a "-" before the name (``"-loss"``)."""

    def arrays(self) -> PyTree[np.ndarray]:
        """The data, to be put on the device once, and given to the other methods."""

    def eval_steps(self) -> int:
        """Number of evaluation batches."""

    def batch(self, arrays: PyTree[Array], key: Key[Array, ""], step: Array, size: int) -> Any:
        """The training batch of a step: a pytree with a leading batch axis.

        ``key`` is the same in every step.
        """

    def loss(
        self, model: nnx.Module, batch: Any, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The mean loss, and means of other metrics."""

    def evaluate(
        self, model: nnx.Module, arrays: PyTree[Array], step: Array
    ) -> tuple[dict[str, Float[Array, ""]], Float[Array, ""]]:
        """Sums of metrics over an evaluation batch, and the number of samples in it."""


class ImageClassification:
    """Cross-entropy and accuracy on an :class:`bdia_jax.data.ImageData`."""

    best = "accuracy"

    def __init__(
        self,
        data: image_data.ImageData,
        *,
        augment: bool = True,
        label_smoothing: float = 0.0,
        eval_batch: int = 256,
    ):
        """``augment`` chooses what is customary for the data set, or nothing."""
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1); got {label_smoothing}")
        if not len(data.train_labels) or not len(data.eval_labels):
            raise ValueError(
                f"both splits need samples; got {len(data.train_labels)} for training and "
                f"{len(data.eval_labels)} for evaluation"
            )
        if eval_batch < 1:
            raise ValueError(f"eval_batch must be at least 1; got {eval_batch}")
        self.data, self.augment, self.label_smoothing = data, augment, label_smoothing
        self.name = data.name
        self.eval_batch = min(eval_batch, len(data.eval_labels))

    def arrays(self) -> dict[str, np.ndarray]:
        """Both splits; what the last evaluation batch lacks is filled with label -1."""
        d = self.data
        missing = -len(d.eval_labels) % self.eval_batch
        mean, std = d.statistics
        return {
            "images": d.train_images,
            "labels": d.train_labels,
            "eval_images": np.pad(d.eval_images, ((0, missing), (0, 0), (0, 0), (0, 0))),
            "eval_labels": np.pad(d.eval_labels, (0, missing), constant_values=-1),
            "mean": mean,
            "std": std,
        }

    def eval_steps(self) -> int:
        """Number of evaluation batches."""
        return -(-len(self.data.eval_labels) // self.eval_batch)

    def batch(self, arrays, key, step, size):
        """Normalized images and labels."""
        order_key, augment_key = jax.random.split(key)
        indices = image_data.batch_indices(order_key, step, size, len(self.data.train_labels))
        images, labels = arrays["images"][indices], arrays["labels"][indices]
        if self.augment:
            images = image_data.augment(jax.random.fold_in(augment_key, step), images, self.name)
        return image_data.normalize(images, arrays["mean"], arrays["std"]), labels

    def loss(self, model, batch, key):
        """Cross-entropy, with label smoothing; accuracy."""
        images, labels = batch
        logits = model(images, key=key)
        targets = jax.nn.one_hot(labels, self.data.num_classes)
        targets = optax.smooth_labels(targets, self.label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, {"accuracy": jnp.mean(logits.argmax(-1) == labels)}

    def evaluate(self, model, arrays, step):
        """Sums of cross-entropy (without smoothing) and of right answers."""
        start = step * self.eval_batch
        images, labels = (
            jax.lax.dynamic_slice_in_dim(arrays[name], start, self.eval_batch)
            for name in ("eval_images", "eval_labels")
        )
        logits = model(image_data.normalize(images, arrays["mean"], arrays["std"]))
        real = labels >= 0
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        right = logits.argmax(-1) == labels
        sums = {"loss": jnp.sum(loss * real), "accuracy": jnp.sum(right & real, dtype=jnp.float32)}
        return sums, jnp.sum(real, dtype=jnp.float32)
