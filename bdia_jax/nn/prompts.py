"""Prompts and sources of generation, checked and filled up."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdia_jax.nn.decoder import Decoder
from bdia_jax.nn.encoder_decoder import EncoderDecoder

ROUND = 16
"""Prompts and sources are filled up to a multiple of so many tokens: there is a program for each
length."""
NOTHING = -1
"""After the end of a text."""


def index_in(name: str, value: Any, least: int, most: int | None = None) -> int:
    """An integer of any kind within bounds, as one of Python."""
    allowed = f">= {least}" if most is None else f"in [{least}, {most}]"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int {allowed}; got {value!r}")
    value = operator.index(value)
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} must be an int {allowed}; got {value}")
    return value


def is_key(key: Any) -> bool:
    """Whether it is a PRNG key, or the words of one."""
    return isinstance(key, jax.Array | np.ndarray) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    )


def ends_of(model: Decoder | EncoderDecoder, end: int | Collection[int] | None) -> tuple[int, ...]:
    """The tokens after which a text is over, in order."""
    given = () if end is None else end if isinstance(end, Collection) else (end,)
    most = model.config.vocab_size - 1
    return tuple(sorted({index_in("end, a token,", token, 0, most) for token in given}))


def _numbers(name: str, text: Any, vocabulary: str, size: int) -> np.ndarray:
    """The tokens of a prompt or a source."""
    try:
        tokens = np.asarray(text)
    except ValueError:
        tokens = np.asarray(None)
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise TypeError(f"a prompt or source is a sequence of ints; {name} is {repr(text)[:80]}")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= size):
        raise ValueError(
            f"tokens must lie in [0, {vocabulary} = {size}); {name} has {tokens.min()} … "
            f"{tokens.max()}"
        )
    return tokens


def left_padded(
    model: Decoder | EncoderDecoder, prompts: Any, new_tokens: Any
) -> tuple[np.ndarray, np.ndarray, int]:
    """Prompts that end in the same column; 1 where there is a token; and ``new_tokens``.

    Of a length that is a multiple of :data:`ROUND`, or the largest that is left.
    """
    if not len(prompts):
        raise ValueError("prompts must hold at least one prompt; got none")
    new_tokens = index_in("new_tokens", new_tokens, 1)
    c, texts = model.config, []
    for i, prompt in enumerate(prompts):
        texts.append(_numbers(f"prompt {i}", prompt, "vocab_size", c.vocab_size))
        if not len(prompt):
            raise ValueError(f"a prompt needs at least one token; prompt {i} has none")
        if len(prompt) + new_tokens > c.max_length:
            raise ValueError(
                f"prompt and new tokens must fit into max_length = {c.max_length}; got "
                f"{len(prompt)} of prompt {i}, and {new_tokens}"
            )
    longest = min(-(-max(map(len, texts)) // ROUND) * ROUND, c.max_length - new_tokens)
    tokens = np.zeros((len(texts), longest), np.int32)
    present = np.zeros_like(tokens)
    for i, text in enumerate(texts):
        tokens[i, longest - len(text) :] = text
        present[i, longest - len(text) :] = 1
    return tokens, present, new_tokens


def right_padded(model, sources, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Sources that begin in the same column; and 1 where there is a token.

    Of a length that is a multiple of :data:`ROUND`, or max_length.
    """
    wanted = isinstance(model, EncoderDecoder)
    if wanted != (sources is not None):
        raise ValueError(
            "an encoder-decoder needs sources, and a decoder has none; got "
            f"{'none' if sources is None else 'sources'} for a {type(model).__name__}"
        )
    if sources is None:
        return None
    if len(sources) != count:
        raise ValueError(f"there must be a source for each of {count} prompts; got {len(sources)}")
    c, texts = model.config, []
    for i, source in enumerate(sources):
        texts.append(_numbers(f"source {i}", source, "source_vocab", c.source_vocab))
        if not 1 <= len(source) <= c.max_length:
            raise ValueError(
                f"a source must have from 1 to max_length = {c.max_length} tokens; source {i} has "
                f"{len(source)}"
            )
    longest = -(-max(map(len, texts)) // ROUND) * ROUND
    tokens = np.zeros((count, min(longest, c.max_length)), np.int32)
    present = np.zeros_like(tokens)
    for i, text in enumerate(texts):
        tokens[i, : len(text)], present[i, : len(text)] = text, 1
    return tokens, present


def until(row: np.ndarray, ends: tuple[int, ...]) -> list[int]:
    """The tokens before the end."""
    return [int(t) for t in row if t not in (NOTHING, *ends)]
