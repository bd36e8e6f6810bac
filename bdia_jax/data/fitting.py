"""What becomes of texts that are longer than a sequence, and how many there are."""

from __future__ import annotations

import logging
from typing import Literal, NamedTuple, get_args

from bdia_jax.data.examples import Example, cut_up
from bdia_jax.data.tokenizers import Tokenizer

LOGGER = logging.getLogger(__name__)

TooLong = Literal["truncate", "split", "drop", "error"]


class Found(NamedTuple):
    """A text of a file."""

    where: str
    example: Example
    across: bool = False
    """Whether one token would be of the prompt and of the completion."""
    silent: bool = False
    """Whether its completion is empty."""


class Fitting:
    """Makes texts fit, and counts those that did not."""

    def __init__(self, name: str, tokenizer: Tokenizer, length: int, too_long: TooLong):
        """``name``: of the file. A text may have ``length + 1`` tokens.

        Raises:
          ValueError: for a ``too_long`` that is none, and a length that leaves no room.
        """
        if too_long not in get_args(TooLong):
            raise ValueError(
                f"too_long must be one of {', '.join(get_args(TooLong))}; got {too_long!r}"
            )
        if length <= (added := len(tokenizer.begin)):
            raise ValueError(
                f"length must be at least {added + 1}, one more token than the tokenizer puts "
                f"before a text; got {length}"
            )
        self.name, self.begin, self.length, self.too_long = name, tokenizer.begin, length, too_long
        self.most = f"{length + 1} tokens (length + 1)"
        done = "truncated to" if too_long == "truncate" else "split into pieces of"
        self._cut = _Counted(f"{done} {self.most}: too_long, length")
        self._dropped = _Counted(f"left out, of more than {self.most}: too_long, length")
        self._left_out = _Counted(
            f"left out, since the prompt alone has {self.most} or more: length"
        )
        self._across = _Counted(
            "learned with a token of the prompt and one of the completion where a text without "
            "that boundary has one token for both, which is what a pretrained model knows: put the "
            "space between them at the start of the completion, not at the end of the prompt"
        )
        self._silent = _Counted(
            "learned with an empty completion: the model learns to say nothing there"
        )
        self._all = self._cut, self._dropped, self._left_out, self._across, self._silent

    def fit(self, found: Found) -> list[Example]:
        """What is learned of a text, in pieces that fit; none of it if it is left out.

        Raises:
          ValueError: if it is too long, and that is an error.
        """
        where, example, across, silent = found
        if across:
            self._across.add(where)
        if silent:
            self._silent.add(where)
        if len(example.tokens) <= self.length + 1:
            return [example]
        if self.too_long == "error":
            raise ValueError(
                f"{self.name}, {where}: the text has {len(example.tokens)} tokens; allowed are "
                f"{self.most}: give a larger length, a shorter text, or too_long = truncate, split "
                "or drop"
            )
        if self.too_long == "drop":
            self._dropped.add(where)
            return []
        pieces = cut_up(example, self.begin, self.length)
        some = [next(pieces)] if self.too_long == "truncate" else [*pieces]
        learned = [piece for piece in some if any(piece.learned[1:])]
        (self._cut if learned else self._left_out).add(where)
        return learned

    def nothing(self) -> ValueError:
        """The error for a file of which all is left out."""
        if self._dropped.count and not self._left_out.count:
            return ValueError(
                f"{self.name}: every text has more than {self.most}: give a larger length, or "
                "too_long = truncate or split"
            )
        return ValueError(
            f"{self.name}: no prompt leaves room for its completion in {self.most}: give a larger "
            "length, or too_long = split"
        )

    def forget(self) -> None:
        """Begins to count anew."""
        for counted in self._all:
            counted.count, counted.first = 0, ""

    def tell(self, among: str = "") -> None:
        """Warns of what was cut or left out, as the logger ``bdia_jax``; ``among`` what."""
        for counted in self._all:
            if counted.count:
                texts = "1 text is" if counted.count == 1 else f"{counted.count} texts are"
                LOGGER.warning(
                    "%s: %s%s %s (%s first)", self.name, among, texts, counted.what, counted.first
                )


class _Counted:
    def __init__(self, what: str):
        self.what, self.count, self.first = what, 0, ""

    def add(self, where: str) -> None:
        self.first = self.first or where
        self.count += 1
