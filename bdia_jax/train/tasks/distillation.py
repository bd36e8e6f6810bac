"""Distillation: a network learns what a larger one says of every next token."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Key

from bdia_jax.adjoints import Direct
from bdia_jax.nn.caps import soft_cap
from bdia_jax.nn.chunks import cut, even, sum_of_chunks
from bdia_jax.nn.decoder import Decoder
from bdia_jax.nn.gamma import reversible_stacks
from bdia_jax.nn.lora import freeze
from bdia_jax.nn.losses import Sums, logits
from bdia_jax.nn.stacked import placement_of
from bdia_jax.train.tasks.text import PackedTexts, Tokens

CHUNK = 1024
"""Tokens whose logits, of both networks, exist at a time on a device."""


class Distilled(nnx.Module):
    """A student, which is trained, and its teacher, which is frozen, as it is in evaluation."""

    def __init__(self, student: Decoder, teacher: Decoder):
        """Freezes the teacher, in place.

        Raises:
          ValueError: for other vocabularies, and a teacher with dropout.
        """
        sizes = student.config.vocab_size, teacher.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ValueError(
                "student and teacher must have one vocabulary; they have "
                f"{sizes[0]} and {sizes[1]} tokens"
            )
        if teacher.config.dropout:
            raise ValueError(f"the teacher's dropout must be 0; got {teacher.config.dropout}")
        freeze(teacher)
        for stack in reversible_stacks(teacher):
            stack.step, stack.adjoint, stack.fixed = stack.step.network, Direct(), True
        self.student, self.teacher = student, teacher


class Distillation(PackedTexts):
    """``(1 - α) cross-entropy + α T² KL(teacher_T ‖ student_T)``, over all learned tokens.

    Both distributions are those of logits divided by the temperature T. What is trained is a
    :class:`Distilled`; evaluated is the student's cross-entropy alone.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """

    def __init__(self, *data, alpha: float = 0.5, temperature: float = 1.0, **options):
        """Positional arguments and options are those of :class:`PackedTexts`.

        Raises:
          ValueError: for an alpha outside [0, 1], a temperature that is not positive.
        """
        super().__init__(*data, **options)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1]; got {alpha}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive; got {temperature}")
        self.alpha, self.temperature = alpha, temperature

    def loss(self, model: Distilled, batch: Tokens, key: Key[Array, ""] | None) -> Sums:
        """Sums over all tokens of the batch that are to be learned."""
        where = {"segments": batch.segments, "positions": batch.positions}
        student = model.student.features(batch.tokens, key=key, **where)
        teacher = lax.stop_gradient(model.teacher.features(batch.tokens, **where))
        weights = jnp.ones(batch.tokens.shape) if batch.weights is None else batch.weights
        placement = placement_of(model)
        devices = 1 if placement is None else placement.devices
        size = even(batch.tokens.shape[1], max(1, CHUNK * devices // len(batch.tokens)))
        of_chunk = _OfChunk(
            self.alpha,
            self.temperature,
            (model.student.config.logit_cap, model.teacher.config.logit_cap),
        )
        chunks = tuple(cut(a, size) for a in (student, teacher, batch.targets, weights))
        matrices = model.student.output_matrix(), model.teacher.output_matrix()
        loss, metrics = sum_of_chunks(of_chunk, matrices, chunks, placement)
        return Sums(loss, jnp.sum(weights), jax.tree.map(jnp.sum, metrics))

    def evaluate(self, model: Distilled, batch: Tokens) -> Sums:
        """The student's cross-entropy and accuracy, in evaluation mode."""
        return super().loss(model.student, batch, None)


class _OfChunk(NamedTuple):
    """The loss of a chunk of tokens, and its metrics."""

    alpha: float
    temperature: float
    caps: tuple[float | None, float | None]

    def __call__(self, matrices, chunk):
        *features, targets, weights = chunk
        ours, theirs = map(soft_cap, map(logits, features, matrices), self.caps)
        learned = jax.nn.log_softmax(ours, axis=-1)
        entropy = -jnp.take_along_axis(learned, targets[..., None], axis=-1)[..., 0]
        p, q = (jax.nn.log_softmax(each / self.temperature, axis=-1) for each in (theirs, ours))
        divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        losses = (1 - self.alpha) * entropy + self.alpha * self.temperature**2 * divergence
        metrics = {"cross_entropy": entropy, "accuracy": ours.argmax(-1) == targets}
        return jnp.sum(weights * losses), {
            name: jnp.sum(weights * value) for name, value in metrics.items()
        }
