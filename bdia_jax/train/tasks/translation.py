"""Translation: pairs of texts, many in a row."""

from __future__ import annotations

from bdia_jax.data.packing import PackedPairs
from bdia_jax.nn.encoder_decoder import EncoderDecoder
from bdia_jax.nn.losses import Sums
from bdia_jax.train.tasks.text import Rows


class Translation(Rows):
    """Texts and their translations, many in a row; each looks into its own source only."""

    def __init__(
        self,
        name: str,
        train: PackedPairs,
        evaluation: PackedPairs,
        *,
        label_smoothing: float = 0.0,
        eval_batch_size: int = 8,
    ):
        """The splits come from :func:`bdia_jax.data.pack_pairs`; evaluation is not smoothed."""
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1); got {label_smoothing}")
        super().__init__(name, train, evaluation, eval_batch_size=eval_batch_size)
        self.label_smoothing = label_smoothing

    def loss(self, model: EncoderDecoder, batch: PackedPairs, key) -> Sums:
        """Sums over all target tokens, with label smoothing."""
        return self._sums(model, batch, key, self.label_smoothing)

    def evaluate(self, model: EncoderDecoder, batch: PackedPairs) -> Sums:
        """The same in evaluation mode, without smoothing."""
        return self._sums(model, batch, None, 0.0)

    def _sums(self, model, batch, key, label_smoothing: float) -> Sums:
        return model.loss(
            batch.source,
            batch.tokens,
            batch.targets,
            batch.weights,
            label_smoothing=label_smoothing,
            source_segments=batch.source_segments,
            segments=batch.segments,
            source_positions=batch.source_positions,
            positions=batch.positions,
            key=key,
        )
