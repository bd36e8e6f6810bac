"""Short texts and what of them is learned: completions of prompts, pieces of long texts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from bdia_jax.data.tokenizers import Tokenizer


class Example(NamedTuple):
    """A short text, and which of its tokens are to be learned."""

    tokens: list[int]
    learned: list[bool]


def completion(tokenizer: Tokenizer, prompt: str, text: str) -> Example:
    """A prompt, which is not learned, what follows it, and the end of a text, which are.

    The first tokens are those that a model is later prompted with,
    :meth:`Tokenizer.prompt_tokens`. The others come from the whole, prompt and text tokenized
    together. Where the whole has a token across the boundary (the prompt ends in a space, and
    ``" yes"`` is one token), it is split there: a prompted model cannot write that token, because
    it goes on from the prompt's own last one.
    """
    return completed(tokenizer, prompt, text)[0]


def completed(tokenizer: Tokenizer, prompt: str, text: str) -> tuple[Example, bool]:
    """A prompt and what follows it, as by :func:`completion`, and whether a token is across both.

    That is: whether prompt and text, tokenized together, have a token across the boundary.
    """
    given, whole = tokenizer.prompt_tokens(prompt), tokenizer.prompt_tokens(prompt + text)
    known, tokens = len(given), whole
    if across := whole[:known] != given:
        tokens = given + tokenizer.continuation(text)
        if tokenizer.decode(tokens) != tokenizer.decode(whole):
            # A vocabulary that drops white space cannot go on within a word.
            same = (a == b for a, b in zip(given, whole))
            known, tokens = sum(itertools.takewhile(bool, same)), whole
    if tokens[known:][-1:] != [tokenizer.end]:
        # Some write it themselves.
        tokens = [*tokens, tokenizer.end]
    return Example(tokens, [i >= known for i in range(len(tokens))]), across


def cut_up(whole: Example, begin: tuple[int, ...], length: int) -> Iterator[Example]:
    """Pieces of at most ``length + 1`` tokens; every token but the first is a target once."""
    yield Example(whole.tokens[: length + 1], whole.learned[: length + 1])
    new = length - len(begin)
    for last in range(length, len(whole.tokens) - 1, new):
        some = slice(last + 1, last + 1 + new)
        yield Example(
            [*begin, whole.tokens[last], *whole.tokens[some]],
            [False] * (len(begin) + 1) + whole.learned[some],
        )
