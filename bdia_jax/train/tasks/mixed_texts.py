"""Language modelling on texts that the host feeds: of several sources, or of more than fits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bdia_jax.data.mix import Mix
from bdia_jax.data.packing import Packed
from bdia_jax.train.tasks.fed import FED
from bdia_jax.train.tasks.text import NextToken, Rows


class MixedTexts(NextToken):
    """Rows of a :class:`bdia_jax.data.Mix`, in its order; the evaluation is in memory."""

    samples = None

    def __init__(self, name: str, mix: Mix, evaluation: Packed, *, eval_batch_size: int = 8):
        """``evaluation`` comes from :func:`bdia_jax.data.pack`."""
        if eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1; got {eval_batch_size}")
        if not evaluation.weights.any():
            raise ValueError("the evaluation texts must have tokens to learn; got none")
        self.name, self.mix, self.evaluation = name, mix, evaluation
        self.eval_samples, self.eval_batch_size = len(evaluation.tokens), eval_batch_size

    def arrays(self) -> dict[str, Packed | np.ndarray]:
        """The evaluation, and a digest of what is fed."""
        digest = np.frombuffer(bytes.fromhex(self.mix.digest), np.uint8)
        return {"eval": self.evaluation, "digest": digest}

    def batch(self, arrays, key, step, size) -> Packed:
        """The rows that the step was fed."""
        return arrays[FED]

    eval_batch = Rows.eval_batch

    def start(self) -> list[list[int]]:
        """Before the first row."""
        return [[*place] for place in self.mix.start()]

    def feed(self, position: Sequence[Sequence[int]], size: int) -> tuple[Packed, list[list[int]]]:
        """Rows, and where the next ones begin."""
        rows, behind = self.mix.take(position, size)
        return rows, [[*place] for place in behind]

    def fed_shapes(self, size: int) -> Packed:
        """Of ``size`` rows."""
        return self.mix.shapes(size)

    def epoch(self) -> int:
        """As many rows as all sources have that give any; reads and tokenizes all texts."""
        drawn = [i for i, share in enumerate(self.mix.shares) if share]
        return sum(map(self.mix.epoch_rows, drawn))
