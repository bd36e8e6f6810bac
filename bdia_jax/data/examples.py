"""Short texts: prompts and their completions, or the pieces of a long text."""

from __future__ import annotations

import itertools
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

from bdia_jax.data.reading import holds_records, read_text
from bdia_jax.data.records import read_records
from bdia_jax.data.tokenizers import Tokenizer

LOGGER = logging.getLogger(__name__)

TooLong = Literal["truncate", "split", "error"]


class Example(NamedTuple):
    """A short text, and which of its tokens are to be learned."""

    tokens: list[int]
    learned: list[bool]


def completion(tokenizer: Tokenizer, prompt: str, text: str) -> Example:
    """A prompt, which is not learned, what follows it, and the end of a text, which are.

    The first tokens are those that a model is later prompted with,
    :meth:`Tokenizer.prompt_tokens`. Those after them are of the whole, prompt and text together.
    Where the whole has a token across the boundary (the prompt ends in a space, and ``" yes"`` is
    one token), it is split there: a prompted model cannot say that token, for it has to go on from
    the prompt's own last one.
    """
    return _completion(tokenizer, prompt, text)[0]


def _completion(tokenizer: Tokenizer, prompt: str, text: str) -> tuple[Example, bool]:
    """As :func:`completion`; and whether a token of the whole is across the boundary."""
    given, whole = tokenizer.prompt_tokens(prompt), tokenizer.prompt_tokens(prompt + text)
    known, tokens = len(given), whole
    if across := whole[:known] != given:
        tokens = given + tokenizer.continuation(text)
        if tokenizer.decode(tokens) != tokenizer.decode(whole):
            # A vocabulary that drops white space cannot go on within a word.
            same = (a == b for a, b in zip(given, whole))
            known, tokens = sum(itertools.takewhile(bool, same)), whole
    tokens = [*tokens, tokenizer.end]
    return Example(tokens, [i >= known for i in range(len(tokens))]), across


def read_examples(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    length: int,
    *,
    too_long: TooLong = "truncate",
) -> list[Example]:
    """Texts to fine-tune on, from a file.

    What is cut or left out is counted in a warning of the logger ``bdia_jax``.

    Args:
      path: records with the fields ``prompt`` and ``completion``, of which completions are learned
        (``.jsonl``, ``.ndjson``, ``.json``, ``.csv`` or ``.tsv``, see
        :func:`bdia_jax.data.read_records`); or plain text, which is learned in pieces of ``length``
        tokens. Each piece begins with what the tokenizer puts before a text, and with the last
        token of the piece before, so that every token but the first is learned once.
      tokenizer: makes the tokens.
      length: most tokens of a text that are predicted.
      too_long: what becomes of a record with more tokens than ``length + 1``. ``"truncate"`` keeps
        its first ones; nothing is left to learn where the prompt alone is as long, and it is left
        out. ``"split"`` makes pieces of it, as of plain text, so that all of the completion is
        learned, of which later pieces see less of what is before them. ``"error"`` refuses it.

    Raises:
      FileNotFoundError, IsADirectoryError, PermissionError: if it cannot be opened.
      ValueError: for a file of neither kind, a record that is none, one that is too long with
        ``"error"``, or if all records are left out.
    """
    if too_long not in get_args(TooLong):
        raise ValueError(
            f"too_long must be one of {', '.join(get_args(TooLong))}; got {too_long!r}"
        )
    if length <= (added := len(tokenizer.begin)):
        raise ValueError(
            f"length must be at least {added + 1}, one more token than the tokenizer puts before a "
            f"text; got {length}"
        )
    path = pathlib.Path(path).expanduser()
    if holds_records(path):
        return _from_records(path, tokenizer, length, too_long)
    tokens = [*tokenizer.prompt_tokens(read_text(path)), tokenizer.end]
    whole = Example(tokens, [i >= added for i in range(len(tokens))])
    return list(_pieces(whole, tokenizer.begin, length))


def _from_records(
    path: pathlib.Path, tokenizer: Tokenizer, length: int, too_long: TooLong
) -> list[Example]:
    most = f"{length + 1} tokens (length + 1)"
    examples, cut, left_out, across = [], [], [], []
    for where, (prompt, text) in read_records(path, ("prompt", "completion")):
        if not prompt:
            raise ValueError(
                f"{path}, {where}: the prompt must not be empty; its completion is {text[:80]!r}"
            )
        example, goes_across = _completion(tokenizer, prompt, text)
        if goes_across:
            across.append(where)
        if len(example.tokens) <= length + 1:
            examples.append(example)
            continue
        if too_long == "error":
            raise ValueError(
                f"{path}, {where}: the text has {len(example.tokens)} tokens; allowed are {most}: "
                "give a larger length, a shorter text, or too_long = truncate or split"
            )
        pieces = _pieces(example, tokenizer.begin, length)
        some = [next(pieces)] if too_long == "truncate" else [*pieces]
        learned = [piece for piece in some if any(piece.learned[1:])]
        (cut if learned else left_out).append(where)
        examples += learned
    if not examples:
        raise ValueError(
            f"{path}: no prompt leaves room for its completion in {most}: give a larger length, or "
            "too_long = split"
        )
    done = "truncated to" if too_long == "truncate" else "split into pieces of"
    _warn(path, cut, f"{done} {most}: too_long, length")
    _warn(path, left_out, f"left out, since the prompt alone has {most} or more: length")
    _warn(
        path,
        across,
        "learned with a token of the prompt and one of the completion where a text without that "
        "boundary has one token for both, which is what a pretrained model knows: put the space "
        "between them at the start of the completion, not at the end of the prompt",
    )
    return examples


def _pieces(whole: Example, begin: tuple[int, ...], length: int) -> Iterator[Example]:
    """Pieces of at most ``length + 1`` tokens; every token but the first is a target once."""
    yield Example(whole.tokens[: length + 1], whole.learned[: length + 1])
    new = length - len(begin)
    for last in range(length, len(whole.tokens) - 1, new):
        some = slice(last + 1, last + 1 + new)
        yield Example(
            [*begin, whole.tokens[last], *whole.tokens[some]],
            [False] * (len(begin) + 1) + whole.learned[some],
        )


def _warn(path: pathlib.Path, where: list[str], what: str) -> None:
    if where:
        count = "1 text is" if len(where) == 1 else f"{len(where)} texts are"
        LOGGER.warning("%s: %s %s (%s first)", path, count, what, where[0])
