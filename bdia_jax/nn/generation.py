"""Text from a decoder, or a translation: sampling and beam search with cached keys and values."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from bdia_jax.nn.decoder import Decoder
from bdia_jax.nn.encoder_decoder import EncoderDecoder


def generate(
    model: Decoder | EncoderDecoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    sources: Sequence[Sequence[int]] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    end: int | None = None,
    key: Key[Array, ""] | None = None,
) -> list[list[int]]:
    """Continues every prompt, by the standard network (without γ and grid).

    Compiled once for each number of prompts and length of the longest one (and, rounded up to a
    multiple of 16, of the longest source).

    Args:
      model: in any mode; dropout is off.
      prompts: token numbers, at least one per prompt; lengths may differ.
      new_tokens: how many to append at most.
      sources: for an encoder-decoder, a text for every prompt, which then is the beginning of its
        translation.
      temperature: 0 for the most probable token each time; else tokens are drawn from the
        softmax of logits / temperature.
      top_k: draw from the most probable k tokens only.
      top_p: draw from the fewest most probable tokens that have at least this probability.
      end: token after which a text is over.
      key: PRNG key, for temperature > 0.

    Returns:
      The new tokens of each prompt, without ``end``.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or positive; got {temperature}")
    if top_k is not None and not 1 <= top_k <= model.config.vocab_size:
        raise ValueError(
            f"top_k must lie in [1, vocab_size = {model.config.vocab_size}]; got {top_k}"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1]; got {top_p}")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} draws tokens, which needs a key; got None")
    tokens, present = _left_padded(model, prompts, new_tokens)
    padded = _right_padded(model, sources, len(prompts))
    draw = _Draw(float(temperature), top_k, float(top_p))
    found = _generate(
        *nnx.split(model),
        tokens,
        present,
        padded,
        jax.random.key(0) if key is None else key,
        new_tokens=new_tokens,
        draw=draw,
        end=end,
    )
    return [_until(row, end) for row in np.asarray(found)]


def beam_search(
    model: Decoder | EncoderDecoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    sources: Sequence[Sequence[int]] | None = None,
    beams: int = 4,
    length_penalty: float = 1.0,
    end: int | None = None,
) -> list[tuple[list[int], float]]:
    """The most probable continuation of every prompt that beam search finds.

    Of each prompt, the ``beams`` most probable unfinished texts are extended by every token. A
    text is finished by ``end``, or by its length; the best ``beams`` finished ones are kept, by
    log probability / length**length_penalty (the length counts new tokens, ``end`` included).

    Args:
      model, prompts, new_tokens, sources, end: as in :func:`generate`.
      beams: texts that are followed at the same time.
      length_penalty: 0 for the probability itself; the higher, the longer the texts.

    Returns:
      Of each prompt, the new tokens without ``end``, and the score.
    """
    if not 1 <= beams <= model.config.vocab_size // 2:
        raise ValueError(
            f"beams must lie in [1, vocab_size / 2 = {model.config.vocab_size // 2}]; got {beams}"
        )
    tokens, present = _left_padded(model, prompts, new_tokens)
    padded = _right_padded(model, sources, len(prompts))
    found, score = _beam_search(
        *nnx.split(model),
        tokens,
        present,
        padded,
        new_tokens=new_tokens,
        beams=beams,
        length_penalty=float(length_penalty),
        end=end,
    )
    return [
        (_until(row, end), float(value))
        for row, value in zip(np.asarray(found), np.asarray(score), strict=True)
    ]


_NOTHING = -1
"""After the end of a text."""


class _Draw(NamedTuple):
    temperature: float
    top_k: int | None
    top_p: float

    def __call__(self, logits: Float[Array, "batch vocab"], key) -> Int[Array, "batch"]:
        if self.temperature == 0:
            return logits.argmax(axis=-1)
        logits = logits / self.temperature
        if self.top_k is not None:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p < 1:
            ordered = -jnp.sort(-logits, axis=-1)
            weights = jax.nn.softmax(ordered)
            # A token counts if those before it do not make up top_p yet.
            counts = jnp.cumsum(weights, axis=-1) - weights < self.top_p
            least = jnp.min(jnp.where(counts, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits)


def _left_padded(
    model: Decoder | EncoderDecoder, prompts, new_tokens
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts that end in the same column; and 1 where there is a token."""
    if not len(prompts):
        raise ValueError("prompts must hold at least one prompt; got none")
    if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 1:
        raise ValueError(f"new_tokens must be an int >= 1; got {new_tokens!r}")
    vocabulary, longest = model.config.vocab_size, max(map(len, prompts))
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"a prompt needs at least one token; prompt {i} has none")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(
                f"tokens must lie in [0, vocab_size = {vocabulary}); prompt {i} has "
                f"{min(prompt)} … {max(prompt)}"
            )
    if longest + new_tokens > model.config.max_length:
        raise ValueError(
            f"prompt and new tokens must fit into max_length = {model.config.max_length}; got "
            f"{longest} + {new_tokens}"
        )
    tokens = np.zeros((len(prompts), longest), np.int32)
    present = np.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
        tokens[i, longest - len(prompt) :] = prompt
        present[i, longest - len(prompt) :] = 1
    return tokens, present


def _right_padded(model, sources, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Sources that begin in the same column; and 1 where there is a token.

    Of a length that is a multiple of 16, or max_length: there is a program for each.
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
    c = model.config
    for i, source in enumerate(sources):
        if not 1 <= len(source) <= c.max_length:
            raise ValueError(
                f"a source must have from 1 to max_length = {c.max_length} tokens; source {i} has "
                f"{len(source)}"
            )
        if min(source) < 0 or max(source) >= c.source_vocab:
            raise ValueError(
                f"tokens must lie in [0, source_vocab = {c.source_vocab}); source {i} has "
                f"{min(source)} … {max(source)}"
            )
    longest = -(-max(map(len, sources)) // 16) * 16
    tokens = np.zeros((count, min(longest, c.max_length)), np.int32)
    present = np.zeros_like(tokens)
    for i, source in enumerate(sources):
        tokens[i, : len(source)], present[i, : len(source)] = source, 1
    return tokens, present


def _until(row: np.ndarray, end: int | None) -> list[int]:
    """The tokens before the end."""
    return [int(t) for t in row if t not in (_NOTHING, end)]


class _Texts(NamedTuple):
    """The network, and what it knows of all texts."""

    model: Decoder | EncoderDecoder
    present: Int[Array, "batch slot"]
    """1 for the slots of the cache that will hold a token."""
    context: tuple[Array, ...] | None
    """Of an encoder-decoder."""

    def extend(self, tokens, positions, cache, start):
        context = () if self.context is None else (self.context,)
        return self.model.extend(tokens, positions, cache, start, self.present, *context)

    def repeated(self, times: int) -> _Texts:
        """Each text some times, one after the other."""
        context = jax.tree.map(lambda c: jnp.repeat(c, times, axis=1), self.context)
        return self._replace(present=jnp.repeat(self.present, times, axis=0), context=context)


def _start(model, tokens, present, sources, new_tokens: int):
    """The texts, the logits after their prompts, and the cache."""
    batch, length = tokens.shape
    slots = length + new_tokens
    positions = jnp.maximum(jnp.cumsum(present, axis=1) - 1, 0)
    present = jnp.concatenate([present, jnp.ones((batch, new_tokens), jnp.int32)], axis=1)
    texts = _Texts(model, present, None if sources is None else model.context(*sources))
    return texts, *texts.extend(tokens, positions, model.new_cache(batch, slots), 0)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("new_tokens", "draw", "end"))
def _generate(graph, state, tokens, present, sources, key, *, new_tokens, draw: _Draw, end):
    # A copy: the model keeps its mode.
    model = nnx.merge(graph, state)
    model.eval()
    texts, logits, cache = _start(model, tokens, present, sources, new_tokens)
    lengths = present.sum(axis=1)

    def step(carry, i):
        logits, cache, over = carry
        token = draw(logits, jax.random.fold_in(key, i)).astype(jnp.int32)
        written = jnp.where(over, _NOTHING, token)
        if end is not None:
            over |= token == end
        logits, cache = texts.extend(
            token[:, None], (lengths + i)[:, None], cache, tokens.shape[1] + i
        )
        return (logits, cache, over), written

    over = jnp.zeros(len(tokens), bool)
    _, written = jax.lax.scan(step, (logits, cache, over), jnp.arange(new_tokens))
    return written.T


class _Beams(NamedTuple):
    """Texts of every prompt, ``[batch, beam, ...]``."""

    tokens: Int[Array, "batch beam new"]
    score: Float[Array, "batch beam"]


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("new_tokens", "beams", "length_penalty", "end"),
)
def _beam_search(graph, state, tokens, present, sources, *, new_tokens, beams, length_penalty, end):
    # A copy: the model keeps its mode.
    model = nnx.merge(graph, state)
    model.eval()
    batch, length = tokens.shape
    texts, logits, cache = _start(model, tokens, present, sources, new_tokens)
    lengths, texts = jnp.repeat(present.sum(axis=1), beams), texts.repeated(beams)
    logits = jnp.repeat(jnp.asarray(logits), beams, axis=0)
    cache = jax.tree.map(lambda c: jnp.repeat(c, beams, axis=1), cache)
    vocabulary = logits.shape[-1]

    def step(carry, i):
        logits, cache, live, finished = carry
        scores = jax.nn.log_softmax(logits).reshape(batch, beams, vocabulary)
        scores = (live.score[..., None] + scores).reshape(batch, -1)
        # Twice as many: half of them may be texts that end here.
        score, index = jax.lax.top_k(scores, 2 * beams)
        parent, token = index // vocabulary, (index % vocabulary).astype(jnp.int32)
        written = jnp.take_along_axis(live.tokens, parent[..., None], axis=1)
        written = written.at[:, :, i].set(token)
        ends = (token == end) if end is not None else jnp.zeros_like(token, bool)
        ends |= i == new_tokens - 1
        normalized = score / (i + 1.0) ** length_penalty
        finished = _best(
            _Beams(
                jnp.concatenate([finished.tokens, written], axis=1),
                jnp.concatenate([finished.score, jnp.where(ends, normalized, -jnp.inf)], axis=1),
            ),
            beams,
        )[0]
        live, chosen = _best(_Beams(written, jnp.where(ends, -jnp.inf, score)), beams)
        parent = jnp.take_along_axis(parent, chosen, axis=1)
        token = jnp.take_along_axis(token, chosen, axis=1)
        rows = (jnp.arange(batch)[:, None] * beams + parent).reshape(-1)
        cache = jax.tree.map(lambda c: c[:, rows], cache)
        logits, cache = texts.extend(
            token.reshape(-1, 1), (lengths + i)[:, None], cache, length + i
        )
        return (logits, cache, live, finished), None

    empty = jnp.full((batch, beams, new_tokens), _NOTHING, jnp.int32)
    # One live text at first, or all beams would be the same.
    first = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)
    live = _Beams(empty, jnp.broadcast_to(first, (batch, beams)))
    finished = _Beams(empty, jnp.full((batch, beams), -jnp.inf))
    carry = (logits, cache, live, finished)
    (_, _, _, finished), _ = jax.lax.scan(step, carry, jnp.arange(new_tokens))
    return finished.tokens[:, 0], finished.score[:, 0]


def _best(texts: _Beams, count: int) -> tuple[_Beams, Int[Array, "batch beam"]]:
    """The best, best first; and where they were."""
    score, chosen = jax.lax.top_k(texts.score, count)
    return _Beams(jnp.take_along_axis(texts.tokens, chosen[..., None], axis=1), score), chosen
