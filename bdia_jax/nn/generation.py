"""Text from a decoder, or a translation: sampling and beam search with cached keys and values."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from bdia_jax.nn.decoder import Decoder
from bdia_jax.nn.encoder_decoder import EncoderDecoder
from bdia_jax.nn.prompts import (
    NOTHING,
    ends_of,
    index_in,
    is_key,
    left_padded,
    right_padded,
    until,
)


def generate(
    model: Decoder | EncoderDecoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    sources: Sequence[Sequence[int]] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    end: int | Collection[int] | None = None,
    key: Key[Array, ""] | None = None,
) -> list[list[int]]:
    """Continues every prompt, by the standard network (without γ and grid), until all are over.

    Compiled once for each number of prompts, for their longest and that of the sources, rounded up
    to a multiple of 16, for each ``new_tokens``, ``top_k`` and ``end``; and for tokens that are
    drawn, with ``top_p`` and without.

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
      end: token, or tokens, after which a text is over (:attr:`bdia_jax.data.Tokenizer.ends`).
      key: PRNG key, for temperature > 0.

    Returns:
      The new tokens of each prompt, without ``end``.

    Raises:
      TypeError, ValueError: for what does not fit, before anything is computed.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or positive, and finite; got {temperature}")
    if top_k is not None:
        top_k = index_in("top_k", top_k, 1, model.config.vocab_size)
    if not isinstance(top_p, numbers.Real) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1]; got {top_p}")
    if temperature == 0 and (top_k is not None or top_p < 1):
        raise ValueError(
            "top_k and top_p are for tokens that are drawn: give a temperature above 0; got "
            f"temperature=0, top_k={top_k}, top_p={top_p}"
        )
    if temperature > 0 and not is_key(key):
        raise ValueError(
            f"temperature={temperature} draws tokens, which needs a key, jax.random.key(0) for "
            f"instance; got {key!r}"
        )
    ends = ends_of(model, end)
    tokens, present, new_tokens = left_padded(model, prompts, new_tokens)
    padded = right_padded(model, sources, len(prompts))
    found = _generate(
        *nnx.split(model),
        tokens,
        present,
        padded,
        key if temperature > 0 else None,
        jnp.float32(temperature),
        jnp.float32(top_p) if top_p < 1 else None,
        new_tokens=new_tokens,
        top_k=top_k,
        ends=ends,
    )
    return [until(row, ends) for row in np.asarray(found)]


def beam_search(
    model: Decoder | EncoderDecoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    sources: Sequence[Sequence[int]] | None = None,
    beams: int = 4,
    length_penalty: float = 1.0,
    end: int | Collection[int] | None = None,
) -> list[tuple[list[int], float]]:
    """The most probable continuation of every prompt that beam search finds.

    Of each prompt, the ``beams`` most probable unfinished texts are extended by every token. One
    that is among the ``beams`` most probable of all extended ones is finished by ``end``, or by
    its length. The finished text with the highest log probability / length**length_penalty is
    returned (the length counts new tokens, ``end`` included). ``transformers`` finds the same with
    ``early_stopping="never"``.

    Args:
      model, prompts, new_tokens, sources, end: as in :func:`generate`.
      beams: texts that are followed at the same time.
      length_penalty: 0 for the probability itself; the higher, the longer the texts.

    Returns:
      Of each prompt, the new tokens without ``end``, and the score.

    Raises:
      TypeError, ValueError: for what does not fit, before anything is computed.
    """
    ends = ends_of(model, end)
    beams = index_in("beams", beams, 1, model.config.vocab_size // max(2, 1 + len(ends)))
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be finite; got {length_penalty}")
    tokens, present, new_tokens = left_padded(model, prompts, new_tokens)
    padded = right_padded(model, sources, len(prompts))
    found, score = _beam_search(
        *nnx.split(model),
        tokens,
        present,
        padded,
        new_tokens=new_tokens,
        beams=beams,
        length_penalty=float(length_penalty),
        ends=ends,
    )
    return [
        (until(row, ends), float(value))
        for row, value in zip(np.asarray(found), np.asarray(score), strict=True)
    ]


_LEAST = 1e-30
"""A temperature below it is this one, at which only the most probable tokens are drawn."""


def _draw(
    logits: Float[Array, "batch vocab"],
    key: Key[Array, ""] | None,
    temperature: Float[Array, ""],
    top_k: int | None,
    top_p: Float[Array, ""] | None,
) -> Int[Array, "batch"]:
    """The next token of each text; without a key, the most probable one."""
    if key is None:
        return logits.argmax(axis=-1).astype(jnp.int32)
    # Below 0, so that no temperature makes them infinite.
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits = logits / jnp.maximum(temperature, _LEAST)
    if top_k is not None or top_p is not None:
        order = jnp.argsort(-logits, axis=-1)
        weights = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
        counts = jnp.arange(logits.shape[-1]) < (top_k or logits.shape[-1])
        weights = jnp.where(counts, weights, 0)
        if top_p is not None:
            # A token counts if those before it do not make up top_p yet.
            before = jnp.cumsum(weights, axis=-1) - weights
            counts &= before < top_p * weights.sum(axis=-1, keepdims=True)
        # By rank: of equally probable ones, no more than that.
        counts = jnp.broadcast_to(counts, logits.shape)
        kept = jnp.take_along_axis(counts, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(kept, logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _is_end(token: Int[Array, "*texts"], ends: tuple[int, ...]) -> Bool[Array, "*texts"]:
    return jnp.isin(token, jnp.array(ends, jnp.int32))


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


@functools.partial(jax.jit, static_argnums=0, static_argnames=("new_tokens", "top_k", "ends"))
def _generate(
    graph, state, tokens, present, sources, key, temperature, top_p, *, new_tokens, top_k, ends
):
    # A copy: the model keeps its mode.
    model = nnx.merge(graph, state)
    model.eval()
    texts, logits, cache = _start(model, tokens, present, sources, new_tokens)
    lengths = present.sum(axis=1)

    def next_token(logits, i):
        key_i = None if key is None else jax.random.fold_in(key, i)
        return _draw(logits, key_i, temperature, top_k, top_p)

    def goes_on(carry):
        i, _, _, over, _ = carry
        return (i < new_tokens) & ~jnp.all(over)

    def step(carry):
        i, token, cache, over, written = carry
        logits, cache = texts.extend(
            token[:, None], (lengths + i - 1)[:, None], cache, tokens.shape[1] + i - 1
        )
        token = next_token(logits, i)
        written = written.at[:, i].set(jnp.where(over, NOTHING, token))
        return i + 1, token, cache, over | _is_end(token, ends), written

    token = next_token(logits, 0)
    written = jnp.full((len(tokens), new_tokens), NOTHING, jnp.int32).at[:, 0].set(token)
    carry = jnp.int32(1), token, cache, _is_end(token, ends), written
    return jax.lax.while_loop(goes_on, step, carry)[-1]


class _Beams(NamedTuple):
    """Texts of every prompt, ``[batch, beam, ...]``."""

    tokens: Int[Array, "batch beam new"]
    score: Float[Array, "batch beam"]


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("new_tokens", "beams", "length_penalty", "ends"),
)
def _beam_search(
    graph, state, tokens, present, sources, *, new_tokens, beams, length_penalty, ends
):
    # A copy: the model keeps its mode.
    model = nnx.merge(graph, state)
    model.eval()
    batch, length = tokens.shape
    texts, logits, cache = _start(model, tokens, present, sources, new_tokens)
    lengths, texts = jnp.repeat(present.sum(axis=1), beams), texts.repeated(beams)
    logits = jnp.repeat(jnp.asarray(logits), beams, axis=0)
    cache = jax.tree.map(lambda c: jnp.repeat(c, beams, axis=1), cache)
    vocabulary = logits.shape[-1]
    # Enough for as many texts that go on, whatever ends here.
    candidates = max(2, 1 + len(ends)) * beams

    def chosen(i, logits, live, finished):
        """Texts with one more token; and, of those that go on, which text and token they are."""
        scores = jax.nn.log_softmax(logits).reshape(batch, beams, vocabulary)
        scores = (live.score[..., None] + scores).reshape(batch, -1)
        score, index = jax.lax.top_k(scores, candidates)
        parent, token = index // vocabulary, (index % vocabulary).astype(jnp.int32)
        written = jnp.take_along_axis(live.tokens, parent[..., None], axis=1)
        written = written.at[:, :, i].set(token)
        over = _is_end(token, ends) | (i == new_tokens - 1)
        counted = over & (jnp.arange(candidates) < beams)
        normalized = score / (i + 1.0) ** length_penalty
        finished = _best(
            _Beams(
                jnp.concatenate([finished.tokens, written], axis=1),
                jnp.concatenate([finished.score, jnp.where(counted, normalized, -jnp.inf)], axis=1),
            ),
            1,
        )[0]
        live, picked = _best(_Beams(written, jnp.where(over, -jnp.inf, score)), beams)
        parent, token = (jnp.take_along_axis(a, picked, axis=1) for a in (parent, token))
        return live, finished, parent, token

    def goes_on(carry):
        i, live, finished, *_ = carry
        # No text gets more probable: what those that go on can reach at most.
        longest = jnp.where(length_penalty > 0, new_tokens, i + 1.0)
        reached = live.score[:, 0] / longest**length_penalty
        return (i < new_tokens) & jnp.any(reached > finished.score[:, 0])

    def step(carry):
        i, live, finished, parent, token, cache = carry
        rows = (jnp.arange(batch)[:, None] * beams + parent).reshape(-1)
        cache = jax.tree.map(lambda c: c[:, rows], cache)
        logits, cache = texts.extend(
            token.reshape(-1, 1), (lengths + i - 1)[:, None], cache, length + i - 1
        )
        return i + 1, *chosen(i, logits, live, finished), cache

    empty = jnp.full((batch, beams, new_tokens), NOTHING, jnp.int32)
    # One live text at first, or all beams would be the same.
    first = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)
    live = _Beams(empty, jnp.broadcast_to(first, (batch, beams)))
    finished = _Beams(empty[:, :1], jnp.full((batch, 1), -jnp.inf))
    carry = jnp.int32(1), *chosen(jnp.int32(0), logits, live, finished), cache
    _, _, finished, *_ = jax.lax.while_loop(goes_on, step, carry)
    return finished.tokens[:, 0], finished.score[:, 0]


def _best(texts: _Beams, count: int) -> tuple[_Beams, Int[Array, "batch beam"]]:
    """The best, best first; and where they were."""
    score, chosen = jax.lax.top_k(texts.score, count)
    return _Beams(jnp.take_along_axis(texts.tokens, chosen[..., None], axis=1), score), chosen
