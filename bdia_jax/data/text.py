"""One long text: to train on, and to evaluate on."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sysconfig

import numpy as np
from jaxtyping import Int32

from bdia_jax.data.fingerprints import fingerprint
from bdia_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class TextData:
    """A long text of tokens to train on, and one to evaluate on, in host memory."""

    name: str
    train: Int32[np.ndarray, "train"]
    eval: Int32[np.ndarray, "eval"]
    vocab_size: int

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of both texts and the size of their vocabulary."""
        return fingerprint((self.train, self.eval, np.asarray(self.vocab_size)))


def python_sources(limit: int = 1_000_000) -> str:
    """Sources of Python's standard library, in the order of their names, up to ``limit`` bytes.

    They differ between versions of Python.
    """
    parts, total = [], 0
    for file in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        raw = file.read_bytes()
        total += len(raw)
        if total > limit:
            break
        parts.append(raw.decode("utf-8", errors="replace"))
    if not parts:
        raise FileNotFoundError(
            f"there are no sources of the standard library in {sysconfig.get_path('stdlib')}; "
            "give a text file"
        )
    return "\n".join(parts)


def split_text(
    name: str, text: str, tokenizer: Tokenizer, *, share: float = 1.0, held_out: float = 0.1
) -> TextData:
    """The end of a text for evaluation, and what is before it for training.

    Each part begins with what the tokenizer puts before a text.

    Args:
      name: of the text.
      text: all of it.
      tokenizer: makes the tokens.
      share: how much of the rest is trained on, from its start.
      held_out: share of the text (of its characters) for evaluation.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1]; got {share}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie in (0, 1); got {held_out}")
    cut = int(len(text) * (1 - held_out))
    parts = text[: int(cut * share)], text[cut:]
    train, evaluation = (np.asarray(tokenizer.prompt_tokens(part), np.int32) for part in parts)
    return TextData(name, train, evaluation, tokenizer.size)
