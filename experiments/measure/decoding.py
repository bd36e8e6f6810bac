"""Beam search for many sequences: in full batches, of those of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bdia_jax.data import Tokenizer


def by_length(
    sequences: list[list[int]],
    size: int,
    search: Callable[[list[list[int]]], Iterable[tuple[list[int], float]]],
    tokenizer: Tokenizer,
) -> list[str]:
    """What is said to each sequence, as one line.

    Args:
      sequences: of tokens; there may be none.
      size: of a batch.
      search: takes a batch; gives tokens and a score for each of its sequences.
      tokenizer: of what is said.
    """
    order, said = sorted(range(len(sequences)), key=lambda i: len(sequences[i])), {}
    for start in range(0, len(order), size or 1):
        some = order[start : start + size]
        # The last batch is filled, so that it needs no program of its own.
        asked = [sequences[i] for i in some] + [sequences[some[-1]]] * (size - len(some))
        for i, (tokens, _) in zip(some, search(asked)):
            said[i] = " ".join(tokenizer.decode(tokens).split())
    return [said[i] for i in range(len(sequences))]
