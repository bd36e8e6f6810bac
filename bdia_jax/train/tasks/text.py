"""Language modelling: windows of a long text, or many short texts in a row."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bdia_jax.data.batches import batch_indices
from bdia_jax.data.packing import Packed
from bdia_jax.data.text import TextData
from bdia_jax.nn.decoder import Decoder
from bdia_jax.nn.losses import Sums
from bdia_jax.train.tasks.task import eval_rows


class Tokens(NamedTuple):
    """A batch of tokens: what a decoder's loss takes."""

    tokens: Int[Array, "batch length"]
    targets: Int[Array, "batch length"]
    weights: Float[Array, "batch length"] | None = None
    segments: Int[Array, "batch length"] | None = None
    positions: Int[Array, "batch length"] | None = None


class NextToken:
    """The cross-entropy of the next token, in nats, and other metrics, over all learned tokens."""

    best, unit = "-loss", "sequences"

    def loss(self, model: Decoder, batch: Tokens, key) -> Sums:
        """Sums over all tokens of the batch that are to be learned."""
        return model.loss(
            batch.tokens,
            batch.targets,
            batch.weights,
            segments=batch.segments,
            positions=batch.positions,
            key=key,
        )

    def evaluate(self, model: Decoder, batch: Tokens) -> Sums:
        """The same, in evaluation mode."""
        return self.loss(model, batch, None)


class LanguageModelling(NextToken):
    """Windows of one long text: random ones in training, one after the other in evaluation."""

    samples = None

    def __init__(self, data: TextData, length: int, *, eval_batch_size: int = 64):
        """``length`` is the number of tokens that are predicted in a window."""
        for split in ("train", "eval"):
            if len(tokens := getattr(data, split)) <= length:
                raise ValueError(
                    f"a window has {length + 1} tokens (length + 1); the {split} text of "
                    f"{data.name} has {len(tokens)}"
                )
        if eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1; got {eval_batch_size}")
        self.data, self.length, self.name = data, length, data.name
        self.eval_samples = (len(data.eval) - 1) // length
        self.eval_batch_size = eval_batch_size

    def arrays(self) -> dict[str, np.ndarray]:
        """Both texts."""
        return {"train": self.data.train, "eval": self.data.eval}

    def batch(self, arrays, key, step, size) -> Tokens:
        """Windows that start anywhere."""
        last = len(self.data.train) - self.length
        starts = jax.random.randint(jax.random.fold_in(key, step), (size,), 0, last)
        return self._cut(arrays["train"], starts)

    def eval_batch(self, arrays, step, size) -> Tokens:
        """Windows one after the other; every token but the last few is in one."""
        windows, exist = eval_rows(step, size, self.eval_samples)
        batch = self._cut(arrays["eval"], windows * self.length)
        weights = jnp.broadcast_to(exist[:, None], batch.tokens.shape)
        return batch._replace(weights=weights.astype(jnp.float32))

    def _cut(self, text, starts) -> Tokens:
        windows = text[starts[:, None] + jnp.arange(self.length + 1)]
        return Tokens(windows[:, :-1], windows[:, 1:])


class Rows(NextToken):
    """Rows of one shape, each once in an epoch: pytrees of arrays [rows, ...] with ``weights``."""

    def __init__(self, name: str, train: Any, evaluation: Any, *, eval_batch_size: int = 8):
        if eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1; got {eval_batch_size}")
        for split, packed in (("training", train), ("evaluation", evaluation)):
            if not packed.weights.any():
                raise ValueError(f"the {split} texts must have tokens to learn; got none")
        self.name, self.train, self.evaluation = name, train, evaluation
        self.samples, self.eval_samples = len(train.tokens), len(evaluation.tokens)
        self.eval_batch_size = eval_batch_size

    def arrays(self) -> dict[str, Any]:
        """Both splits."""
        return {"train": self.train, "eval": self.evaluation}

    def batch(self, arrays, key, step, size):
        """Rows, each once in an epoch."""
        rows = batch_indices(key, step, size, self.samples)
        return jax.tree.map(lambda a: a[rows], arrays["train"])

    def eval_batch(self, arrays, step, size):
        """Rows one after the other."""
        rows, exist = eval_rows(step, size, self.eval_samples)
        batch = jax.tree.map(lambda a: a[rows], arrays["eval"])
        return batch._replace(weights=batch.weights * exist[:, None])


class PackedTexts(Rows):
    """Short texts, many in a row; each attends to itself only."""

    def __init__(self, name: str, train: Packed, evaluation: Packed, *, eval_batch_size: int = 8):
        """``name`` is that of the data; the splits come from :func:`bdia_jax.data.pack`."""
        super().__init__(name, train, evaluation, eval_batch_size=eval_batch_size)
