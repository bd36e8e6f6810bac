"""Packing: many short texts, or pairs of texts, in rows of one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32

from bdia_jax.data.examples import Example
from bdia_jax.data.fingerprints import fingerprint


class Packed(NamedTuple):
    """Short texts, packed into rows of one length."""

    tokens: Int32[np.ndarray, "rows length"]
    """0 where there is none."""
    targets: Int32[np.ndarray, "rows length"]
    """The next token of the same text; 0 where there is none."""
    weights: Float[np.ndarray, "rows length"]
    """1 where the target is to be learned, else 0; float32."""
    segments: Int32[np.ndarray, "rows length"]
    """Numbers of the texts in a row, from 1; 0 where there is none."""
    positions: Int32[np.ndarray, "rows length"]
    """The place of a token in its text, from 0."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all arrays; computed anew each time."""
        return fingerprint(self._asdict())


class PackedPairs(NamedTuple):
    """Pairs of token sequences, many in a row: one shape, whatever their lengths are.

    A row has ``length`` tokens of sources, and as many of targets; 0 where there is none. Segments
    are the numbers of the pairs in a row, from 1; 0 where there is none.
    """

    source: Int32[np.ndarray, "rows length"]
    source_segments: Int32[np.ndarray, "rows length"]
    source_positions: Int32[np.ndarray, "rows length"]
    tokens: Int32[np.ndarray, "rows length"]
    """The end token, which begins a translation, and the translation."""
    targets: Int32[np.ndarray, "rows length"]
    """The next token: the translation, and the end token."""
    weights: Float[np.ndarray, "rows length"]
    """1 where there is a target; float32."""
    segments: Int32[np.ndarray, "rows length"]
    positions: Int32[np.ndarray, "rows length"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all arrays; computed anew each time."""
        return fingerprint(self._asdict())


def pack(examples: Sequence[Example], length: int) -> Packed:
    """Packs texts into as few rows as the best-fit-decreasing rule finds.

    The longest text goes first; each goes into the fullest row that has room for it.

    Args:
      examples: texts of at least 2 and at most ``length + 1`` tokens (the last is a target only).
      length: of the rows.

    Raises:
      ValueError: for no texts, or one that is too short, or too long.
    """
    sizes = [len(example.tokens) - 1 for example in examples]
    if not sizes:
        raise ValueError("there must be at least one text; got none")
    if min(sizes) < 1 or max(sizes) > length:
        wrong = [i for i, size in enumerate(sizes) if not 1 <= size <= length]
        raise ValueError(
            f"texts must have from 2 to {length + 1} tokens (length + 1); text {wrong[0]} has "
            f"{sizes[wrong[0]] + 1}, and {len(wrong) - 1} more do not fit"
        )
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        room = next((r for r in range(sizes[i], length + 1) if with_room[r]), None)
        if room is None:
            room = length
            rows.append([])
            with_room[room].append(len(rows) - 1)
        row = with_room[room].pop()
        rows[row].append(i)
        with_room[room - sizes[i]].append(row)
    packed = Packed(*(np.zeros((len(rows), length), np.int32) for _ in Packed._fields))
    packed = packed._replace(weights=packed.weights.astype(np.float32))
    for row, texts in enumerate(rows):
        start = 0
        for segment, i in enumerate(texts, 1):
            tokens, where = examples[i].tokens, (row, slice(start, start + sizes[i]))
            packed.tokens[where], packed.targets[where] = tokens[:-1], tokens[1:]
            packed.weights[where] = examples[i].learned[1:]
            packed.segments[where], packed.positions[where] = segment, np.arange(sizes[i])
            start += sizes[i]
    return packed


def pack_pairs(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], length: int, *, end: int
) -> PackedPairs:
    """Packs pairs of token sequences into rows, in their order: first fit, of the last 64 rows.

    Args:
      pairs: sources of 1 to ``length`` tokens, and translations of at most ``length - 1``.
      length: of both sides of a row.
      end: token that begins and ends a translation.

    Raises:
      ValueError: for no pairs, or one that does not fit.
    """
    if not len(pairs):
        raise ValueError("there must be at least one pair; got none")
    rows: list[list[int]] = []
    room: list[list[int]] = []
    for i, (source, target) in enumerate(pairs):
        sizes = len(source), len(target) + 1
        if not 1 <= sizes[0] <= length or sizes[1] > length:
            raise ValueError(
                f"sources must have from 1 to {length} tokens (length), and translations at most "
                f"{length - 1}; pair {i} has {sizes[0]} and {sizes[1] - 1}"
            )
        fits = (
            r
            for r in range(max(0, len(rows) - 64), len(rows))
            if room[r][0] >= sizes[0] and room[r][1] >= sizes[1]
        )
        row = next(fits, None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append([length, length])
        rows[row].append(i)
        room[row] = [left - size for left, size in zip(room[row], sizes)]
    packed = PackedPairs(*(np.zeros((len(rows), length), np.int32) for _ in PackedPairs._fields))
    packed = packed._replace(weights=packed.weights.astype(np.float32))
    for row, members in enumerate(rows):
        at, to = 0, 0
        for segment, i in enumerate(members, 1):
            source, target = pairs[i]
            where = row, slice(at, at + len(source))
            packed.source[where] = source
            packed.source_segments[where] = segment
            packed.source_positions[where] = np.arange(len(source))
            where = row, slice(to, to + len(target) + 1)
            packed.tokens[where] = [end, *target]
            packed.targets[where] = [*target, end]
            packed.weights[where] = 1
            packed.segments[where] = segment
            packed.positions[where] = np.arange(len(target) + 1)
            at, to = at + len(source), to + len(target) + 1
    return packed
