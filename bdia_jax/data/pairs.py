"""Sentence pairs: a text and its translation."""

from __future__ import annotations

import hashlib
import io
import os
import pathlib
import re
import unicodedata
import zipfile
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32

from bdia_jax.data import sets

Pair = tuple[str, str]
"""A text, and its translation."""


# ---------------------------------------------------------------------------------------------
# Where they come from
# ---------------------------------------------------------------------------------------------


def cldr_pairs() -> list[Pair]:
    """English and French names and short phrases of Unicode's locale data, from ``babel``.

    Territories, languages, scripts, currencies, months, days, units and amounts of them
    ("3 kilometers"), and languages of a territory ("Arabic (Egypt)"): about 5,000, no file needed.
    """
    from babel import Locale, localedata
    from babel.units import format_unit

    en, fr = Locale("en"), Locale("fr")
    found: list[Pair] = []
    for kind in ("territories", "languages", "scripts", "variants", "currencies"):
        names, other = getattr(en, kind), getattr(fr, kind)
        found += [(names[code], other[code]) for code in names if code in other]
    for kind in ("months", "days"):
        names, other = (getattr(locale, kind)["stand-alone"]["wide"] for locale in (en, fr))
        found += [(names[number], other[number]) for number in names]
    for name in localedata.locale_identifiers():
        locale = Locale.parse(name)
        if locale.territory or locale.script:
            found.append((locale.get_display_name("en") or "", locale.get_display_name("fr") or ""))
    units = sorted(code for code in en.unit_display_names if code in fr.unit_display_names)
    for i, unit in enumerate(units):
        # One and some; how many is not the same for all, or it could be learned by heart.
        for amount in (1, 2 + i % 7, 10 + i % 31, 100 + 7 * i):
            found.append(tuple(format_unit(amount, unit, locale=locale) for locale in ("en", "fr")))
    return found


def read_pairs(path: str | os.PathLike) -> list[Pair]:
    """Pairs from a file in UTF-8 with a pair per line, separated by a tab.

    Args:
      path: such a file (what follows a second tab is left out), or a ``.zip`` with one in it; a
        name that begins with ``_`` does not count.

    Raises:
      FileNotFoundError, IsADirectoryError, PermissionError: if it cannot be opened.
      ValueError: for a line without a tab, a zip without one such file, or no UTF-8.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                names = [
                    n for n in archive.namelist() if re.search(r"(^|/)[^_/][^/]*\.(txt|tsv)$", n)
                ]
                if len(names) != 1:
                    raise ValueError(
                        f"{path} must hold one .txt or .tsv file; it holds {names or 'none'}"
                    )
                raw = archive.read(names[0])
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is no zip file: {error}") from error
    else:
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    found = []
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        parts = line.rstrip("\r\n").split("\t")
        if len(parts) < 2:
            raise ValueError(
                f"{path}, line {number}: a line must be a text, a tab and its translation; got "
                f"{line[:80]!r}"
            )
        found.append((parts[0], parts[1]))
    if not found:
        raise ValueError(f"{path} is empty")
    return found


def tfds_pairs(
    name: str,
    source: str,
    target: str,
    data_dir: str | os.PathLike | None = None,
    *,
    download: bool = False,
) -> list[Pair]:
    """Pairs of a translation set of TensorFlow Datasets, all its splits together.

    Args:
      name: such as ``"para_crawl/enfr"``.
      source, target: the languages, by the names that the set has for them (``"en"``).
      data_dir, download: as in :func:`load_images`; so are the errors.

    Raises:
      ValueError: also for a set without these languages.
    """
    builder = sets.find(name, data_dir, may_be_missing=download)
    features = builder.info.features
    languages = [*features.keys()] if hasattr(features, "keys") else []
    if not {source, target} <= {*languages}:
        raise ValueError(
            f"{name} must have the languages {source} and {target}; it has "
            f"{', '.join(languages) or 'none'}"
        )
    sets.prepare(builder, name, download)
    return [
        (_text(example[source]), _text(example[target]))
        for split in builder.info.splits
        for example in sets.read(builder, split)
    ]


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


# ---------------------------------------------------------------------------------------------
# Cleaning, and what is held out
# ---------------------------------------------------------------------------------------------


def clean(pairs: Iterable[Pair], *, longest: int | None = None) -> list[Pair]:
    """Pairs without noise, in their order.

    Unicode in its composed form, every run of white space one space (in French, there is a narrow
    one before ``?``); no pair with an empty side, with one of more than ``longest`` characters, or
    with one more than three times as long as the other (but for 20 characters); each pair once.
    """
    found = {}
    for pair in pairs:
        a, b = pair = tuple(" ".join(unicodedata.normalize("NFC", text).split()) for text in pair)
        short, long = sorted((len(a), len(b)))
        if short and long <= 3 * short + 20 and (longest is None or long <= longest):
            found[pair] = None
    return [*found]


def split_pairs(pairs: Sequence[Pair], held_out: float = 0.05) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and pairs to evaluate on; no text is on both sides.

    Pairs that share a text, of either language, directly or through others, stay together. Where
    they go depends on the texts alone, not on their order.

    Args:
      pairs: any.
      held_out: share for evaluation, about.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie in (0, 1); got {held_out}")
    group: dict[tuple[int, str], tuple[int, str]] = {}

    def root(text):
        path = []
        while group.setdefault(text, text) != text:
            path.append(text)
            text = group[text]
        for passed in path:
            group[passed] = text
        return text

    for source, target in pairs:
        a, b = sorted((root((0, source)), root((1, target))))
        group[b] = a
    split: tuple[list[Pair], list[Pair]] = ([], [])
    for source, target in pairs:
        name = root((0, source))
        word = hashlib.sha256(f"{name[0]}{name[1]}".encode()).digest()[:8]
        split[int.from_bytes(word, "big") < held_out * 2**64].append((source, target))
    return split


# ---------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------


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
