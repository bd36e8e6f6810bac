"""What is trained: batches, a loss, and an evaluation, as pure functions."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from bdia_jax.data import images as image_data
from bdia_jax.data.pairs import PackedPairs
from bdia_jax.data.text import Packed, TextData
from bdia_jax.nn.decoder import Decoder
from bdia_jax.nn.encoder_decoder import EncoderDecoder
from bdia_jax.nn.losses import Sums


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


class Tokens(NamedTuple):
    """A batch of tokens: what a decoder's loss takes."""

    tokens: Int[Array, "batch length"]
    targets: Int[Array, "batch length"]
    weights: Float[Array, "batch length"] | None = None
    segments: Int[Array, "batch length"] | None = None
    positions: Int[Array, "batch length"] | None = None


class _NextToken:
    """The mean cross-entropy of the next token, in nats, and the share that is right."""

    best = "-loss"

    def loss(self, model: nnx.Module, batch, key):
        """Means over all tokens of the batch that are to be learned."""
        sums = self._sums(model, batch, key, training=True)
        # A batch may have nothing to learn: then there is nothing to do.
        weight = jnp.maximum(sums.weight, 1)
        return sums.loss / weight, {"accuracy": sums.correct / weight}

    def _evaluate(self, model: nnx.Module, batch):
        sums = self._sums(model, batch, None, training=False)
        return {"loss": sums.loss, "accuracy": sums.correct}, sums.weight

    def _sums(self, model: Decoder, batch: Tokens, key, training: bool) -> Sums:
        return model.loss(
            batch.tokens,
            batch.targets,
            batch.weights,
            segments=batch.segments,
            positions=batch.positions,
            key=key,
        )


class LanguageModelling(_NextToken):
    """Windows of one long text: random ones in training, one after the other in evaluation."""

    def __init__(self, data: TextData, length: int, *, eval_batch: int = 64):
        """``length`` is the number of tokens that are predicted in a window."""
        for split in ("train", "eval"):
            if len(tokens := getattr(data, split)) <= length:
                raise ValueError(
                    f"a window has {length + 1} tokens (length + 1); the {split} text of "
                    f"{data.name} has {len(tokens)}"
                )
        if eval_batch < 1:
            raise ValueError(f"eval_batch must be at least 1; got {eval_batch}")
        self.data, self.length, self.name = data, length, data.name
        self._windows = (len(data.eval) - 1) // length
        self.eval_batch = min(eval_batch, self._windows)

    def arrays(self) -> dict[str, np.ndarray]:
        """Both texts."""
        return {"train": self.data.train, "eval": self.data.eval}

    def eval_steps(self) -> int:
        """Number of evaluation batches."""
        return -(-self._windows // self.eval_batch)

    def batch(self, arrays, key, step, size):
        """Windows that start anywhere."""
        last = len(self.data.train) - self.length
        starts = jax.random.randint(jax.random.fold_in(key, step), (size,), 0, last)
        return self._cut(arrays["train"], starts)

    def evaluate(self, model, arrays, step):
        """Sums over the tokens of some windows; every token but a last few is in one."""
        window = step * self.eval_batch + jnp.arange(self.eval_batch)
        batch = self._cut(arrays["eval"], jnp.minimum(window, self._windows - 1) * self.length)
        real = jnp.broadcast_to((window < self._windows)[:, None], batch.tokens.shape)
        return self._evaluate(model, batch._replace(weights=real.astype(jnp.float32)))

    def _cut(self, text, starts) -> Tokens:
        windows = text[starts[:, None] + jnp.arange(self.length + 1)]
        return Tokens(windows[:, :-1], windows[:, 1:])


class _Rows(_NextToken):
    """Rows of one shape, each once in an epoch."""

    def __init__(self, name: str, train, evaluation, *, eval_batch: int = 8):
        if eval_batch < 1:
            raise ValueError(f"eval_batch must be at least 1; got {eval_batch}")
        for split, packed in (("training", train), ("evaluation", evaluation)):
            if not packed.weights.any():
                raise ValueError(f"the {split} texts must have tokens to learn; got none")
        self.name, self.train, self.evaluation = name, train, evaluation
        self.eval_batch = min(eval_batch, len(evaluation.tokens))

    def arrays(self) -> dict[str, Any]:
        """Both splits; what the last evaluation batch lacks has nothing to learn."""
        missing = -len(self.evaluation.tokens) % self.eval_batch
        padded = jax.tree.map(lambda a: np.pad(a, ((0, missing), (0, 0))), self.evaluation)
        return {"train": self.train, "eval": padded}

    def eval_steps(self) -> int:
        """Number of evaluation batches."""
        return -(-len(self.evaluation.tokens) // self.eval_batch)

    def batch(self, arrays, key, step, size):
        """Rows, each once in an epoch."""
        rows = image_data.batch_indices(key, step, size, len(self.train.tokens))
        return jax.tree.map(lambda a: a[rows], arrays["train"])

    def evaluate(self, model, arrays, step):
        """Sums over the tokens to learn of some rows."""
        start = step * self.eval_batch
        return self._evaluate(
            model,
            jax.tree.map(
                lambda a: jax.lax.dynamic_slice_in_dim(a, start, self.eval_batch), arrays["eval"]
            ),
        )


class PackedTexts(_Rows):
    """Short texts, many in a row; each attends to itself only."""

    def __init__(self, name: str, train: Packed, evaluation: Packed, *, eval_batch: int = 8):
        """``name`` is that of the data; the splits come from :func:`bdia_jax.data.pack`."""
        super().__init__(name, train, evaluation, eval_batch=eval_batch)


class Translation(_Rows):
    """Texts and their translations, many in a row; each looks into its own source only."""

    def __init__(
        self,
        name: str,
        train: PackedPairs,
        evaluation: PackedPairs,
        *,
        label_smoothing: float = 0.0,
        eval_batch: int = 8,
    ):
        """The splits come from :func:`bdia_jax.data.pack_pairs`; evaluation is not smoothed."""
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1); got {label_smoothing}")
        super().__init__(name, train, evaluation, eval_batch=eval_batch)
        self.label_smoothing = label_smoothing

    def _sums(self, model: EncoderDecoder, batch: PackedPairs, key, training: bool) -> Sums:
        return model.loss(
            batch.source,
            batch.tokens,
            batch.targets,
            batch.weights,
            label_smoothing=self.label_smoothing if training else 0.0,
            source_segments=batch.source_segments,
            segments=batch.segments,
            source_positions=batch.source_positions,
            positions=batch.positions,
            key=key,
        )
