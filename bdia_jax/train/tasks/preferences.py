"""Direct preference optimization: of two answers to a prompt, the one that people prefer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from bdia_jax.data.batches import batch_indices
from bdia_jax.data.examples import Example
from bdia_jax.data.packing import pack
from bdia_jax.nn.decoder import Decoder
from bdia_jax.nn.losses import Sums, log_likelihoods
from bdia_jax.nn.stacked import placement_of
from bdia_jax.train.placing import merged, mesh_of, split
from bdia_jax.train.tasks.task import eval_rows

Preference = tuple[Example, Example]
"""The chosen and the rejected answer, each after the prompt."""


class Rivals(NamedTuple):
    """Pairs of answers, the chosen one first."""

    tokens: Int[Array, "pairs 2 length"]
    targets: Int[Array, "pairs 2 length"]
    weights: Float[Array, "pairs 2 length"]
    """1 where the target is a token of the answer, else 0."""
    reference: Float[Array, "pairs 2"]
    """Log-probabilities of the answers by the network before training."""


class Preferences:
    """Loss ``-log σ(β (r_chosen - r_rejected))``, r = log p(answer) - log p_reference(answer).

    The reference is the network before training. What it says of the answers is computed once, so
    that training holds one network.

    Source: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a
    Reward Model", NeurIPS 2023.
    """

    best, unit = "-loss", "pairs"

    def __init__(
        self,
        name: str,
        train: Sequence[Preference],
        evaluation: Sequence[Preference],
        length: int,
        reference: Decoder,
        *,
        beta: float = 0.1,
        eval_batch_size: int = 8,
    ):
        """Computes what the reference says, in evaluation mode.

        Args:
          name: of the data.
          train, evaluation: pairs of answers to one prompt, as :func:`bdia_jax.data.completion`
            makes them.
          length: tokens that are predicted, at most.
          reference: the network that will be trained; it comes back in training mode.
          beta: how far the network may go from the reference: the smaller, the further.
          eval_batch_size: pairs per evaluation batch.

        Raises:
          ValueError: for no pairs, texts that are longer, a beta or a batch that is not positive.
        """
        if not beta > 0:
            raise ValueError(f"beta must be positive; got {beta}")
        if eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1; got {eval_batch_size}")
        if not train or not evaluation:
            raise ValueError(
                f"both splits need pairs; got {len(train)} for training and {len(evaluation)} for "
                "evaluation"
            )
        self.name, self.beta, self.eval_batch_size = name, beta, eval_batch_size
        self.samples, self.eval_samples = len(train), len(evaluation)
        self.train, self.evaluation = (
            _rivals(pairs, length, reference, eval_batch_size) for pairs in (train, evaluation)
        )

    def arrays(self) -> dict[str, Rivals]:
        """Both splits."""
        return {"train": self.train, "eval": self.evaluation}

    def given(self) -> dict[str, Rivals]:
        """Both splits without what the reference says, which rounds otherwise on other devices."""
        return jax.tree.map(
            lambda rivals: rivals._replace(reference=np.zeros(0, np.float32)),
            self.arrays(),
            is_leaf=lambda leaf: isinstance(leaf, Rivals),
        )

    def batch(self, arrays, key, step, size) -> Rivals:
        """Pairs, each once in an epoch."""
        rows = batch_indices(key, step, size, self.samples)
        return jax.tree.map(lambda a: a[rows], arrays["train"])

    def eval_batch(self, arrays, step, size) -> Rivals:
        """Pairs one after the other; those after the last have no weights."""
        rows, exist = eval_rows(step, size, self.eval_samples)
        batch = jax.tree.map(lambda a: a[rows], arrays["eval"])
        return batch._replace(weights=batch.weights * exist[:, None, None])

    def loss(self, model: Decoder, batch: Rivals, key) -> Sums:
        """The loss, how often the chosen answer gains more, and by how much, in nats."""
        found = log_probabilities(model, batch, key)
        chosen, rejected = jnp.unstack(found - batch.reference, axis=1)
        exists = jnp.any(batch.weights > 0, axis=(1, 2)).astype(found.dtype)
        margin = chosen - rejected
        losses = -jax.nn.log_sigmoid(self.beta * margin)
        metrics = {
            "accuracy": jnp.sum(exists * (margin > 0)),
            "margin": jnp.sum(exists * margin),
        }
        return Sums(jnp.sum(exists * losses), jnp.sum(exists), metrics)

    def evaluate(self, model: Decoder, batch: Rivals) -> Sums:
        """The same, in evaluation mode."""
        return self.loss(model, batch, None)


def log_probabilities(model: Decoder, rivals: Rivals, key) -> Float[Array, "pairs 2"]:
    """Of the answers' tokens, summed."""
    pairs, two, length = rivals.tokens.shape
    # The chosen answers, then the rejected: signs of γ alternate over the samples, and of an even
    # number of pairs each pair has one, so that what is odd in it cancels in the margin.
    tokens, targets, weights = (a.swapaxes(0, 1).reshape(two * pairs, length) for a in rivals[:3])
    found = log_likelihoods(
        model.features(tokens, key=key),
        model.output_matrix(),
        targets,
        weights,
        cap=model.config.logit_cap,
        placement=placement_of(model),
    )
    return found.reshape(two, pairs).T


def _rivals(pairs: Sequence[Preference], length: int, reference: Decoder, size: int) -> Rivals:
    """One text to a row; and what the reference says of it."""
    rows = [pack([text], length) for pair in pairs for text in pair]
    shape = (len(pairs), 2, length)
    tokens, targets, weights = (
        np.concatenate([getattr(row, name) for row in rows]).reshape(shape)
        for name in ("tokens", "targets", "weights")
    )
    found = Rivals(tokens, targets, weights, np.zeros(shape[:2], np.float32))  # pyright: ignore
    reference.eval()
    graph, state = nnx.split(reference)
    reference.train()
    mesh = mesh_of(reference)

    @jax.jit
    def said(state, some):
        return log_probabilities(merged(mesh, graph, state), split(mesh, some), None)

    # Batches of one shape, or there would be two programs.
    batches = np.arange(-(-len(pairs) // size) * size).reshape(-1, size) % len(pairs)
    parts = [said(state, jax.tree.map(lambda a: a[rows], found)) for rows in batches]  # noqa: B023
    return found._replace(reference=np.concatenate(parts)[: len(pairs)])
