"""A network that translates, with its vocabularies: asked, scored, saved and loaded."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import sacrebleu
import safetensors.flax
from flax import nnx
from measure import decoding

from bdia_jax import files
from bdia_jax.data import Tokenizer, load_tokenizer, plain
from bdia_jax.nn import EncoderDecoder, EncoderDecoderConfig, beam_search


@dataclasses.dataclass(frozen=True)
class Translator:
    """A network, and the vocabularies of both sides."""

    model: EncoderDecoder
    source: Tokenizer
    target: Tokenizer

    def __call__(
        self, texts: list[str], *, beams: int, length_penalty: float, cut: bool = False
    ) -> list[str]:
        """Translations, by beam search; of nothing, nothing.

        Raises:
          ValueError: for a text that is longer than the network's longest; with ``cut``, its
            beginning is translated.
        """
        longest, end = self.model.config.max_length, self.target.end
        numbers = [self.source.encode(plain(text)) for text in texts]
        if too_long := [i for i, n in enumerate(numbers) if len(n) > longest and not cut]:
            raise ValueError(
                f"a text must have at most {longest} tokens, the network's max_length; text "
                f"{too_long[0] + 1} has {len(numbers[too_long[0]])}: give it in pieces"
            )
        tokens = [some[:longest] for some in numbers if some]

        def search(asked: list[list[int]]) -> list[tuple[list[int], float]]:
            return beam_search(
                self.model,
                [[end]] * len(asked),
                # Few lengths: a program for each.
                min(longest - 1, -(-max(map(len, asked)) // 16) * 16 + 16),
                sources=asked,
                beams=beams,
                length_penalty=length_penalty,
                end=end,
            )

        said = iter(decoding.by_length(tokens, min(64, len(tokens)), search, self.target))
        return [next(said) if some else "" for some in numbers]

    def save(self, folder: pathlib.Path) -> None:
        """Both vocabularies, the weights and the configuration."""
        self.source.save(folder / "source")
        self.target.save(folder / "target")
        arrays = {".".join(map(str, path)): leaf[...] for path, leaf in _params(self.model)}
        # Renamed when complete.
        safetensors.flax.save_file(arrays, folder / "model.safetensors.tmp")
        (folder / "model.safetensors.tmp").rename(folder / "model.safetensors")
        files.write_json(folder / "model.json", dataclasses.asdict(self.model.config))


def load(folder: pathlib.Path) -> Translator:
    """The inverse of :meth:`Translator.save`."""
    settings = EncoderDecoderConfig(
        **json.loads((folder / "model.json").read_text(encoding="utf-8"))
    )
    model = EncoderDecoder(settings, rngs=nnx.Rngs(0))
    arrays = safetensors.flax.load_file(folder / "model.safetensors")
    for path, leaf in _params(model):
        leaf.set_value(arrays[".".join(map(str, path))])
    return Translator(model, load_tokenizer(folder / "source"), load_tokenizer(folder / "target"))


def _params(model: EncoderDecoder) -> Any:
    return nnx.to_flat_state(nnx.state(model, nnx.Param))


def score(said: list[str], references: list[str]) -> dict[str, float]:
    """BLEU and chrF (sacrebleu's defaults), and the share that is right to the letter."""
    return {
        "BLEU": sacrebleu.corpus_bleu(said, [references]).score,
        "chrF": sacrebleu.corpus_chrf(said, [references]).score,
        "exact": float(np.mean([a == b for a, b in zip(said, references, strict=True)])),
    }
