"""Sentence pairs: a text and its translation."""

from __future__ import annotations

import hashlib
import io
import os
import pathlib
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Sequence

from bdia_jax.data import sets
from bdia_jax.data.reading import decode, holds_records, read_bytes

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
    units = sorted(map(str, {*en.unit_display_names} & {*fr.unit_display_names}))
    for i, unit in enumerate(units):
        # One and some; how many is not the same for all, or it could be learned by heart.
        for amount in (1, 2 + i % 7, 10 + i % 31, 100 + 7 * i):
            english, french = (format_unit(amount, unit, locale=name) for name in ("en", "fr"))
            found.append((english, french))
    return found


def read_pairs(path: str | os.PathLike) -> list[Pair]:
    """Pairs from a file in UTF-8 with a pair per line, separated by a tab.

    Args:
      path: such a file (what follows a second tab is left out), or a ``.zip`` with one in it; a
        name that begins with ``_`` does not count.

    Raises:
      FileNotFoundError, IsADirectoryError, PermissionError: if it cannot be opened.
      ValueError: for a suffix of something else (``.json``, ``.csv``, ``.parquet`` …), a line
        without a tab, numbered texts, a zip without one such file, or no UTF-8.
    """
    path, name = pathlib.Path(path).expanduser(), str(path)
    raw = read_bytes(path)
    if path.suffix.lower() == ".zip":
        raw, name = _unzipped(raw, path)
    elif path.suffix.lower() != ".tsv" and holds_records(path):
        raise ValueError(
            f"{path}: pairs must be in a file of lines with a text, a tab and its translation "
            f"(.txt, .tsv), or a .zip with one; got {path.suffix}"
        )
    found, numbered = [], True
    # Only these end a line: str.splitlines() would also split at characters within a text.
    for number, line in enumerate(re.split(r"\r\n|\n|\r", decode(raw, name)), 1):
        # Files that were put together may each have begun with a byte-order mark.
        line = line.removeprefix("\ufeff")
        if not line.strip():
            continue
        columns = line.split("\t")
        if len(columns) < 2:
            raise ValueError(
                f"{name}, line {number}: a line must be a text, a tab and its translation; got "
                f"{line[:80]!r}"
            )
        numbered = numbered and len(columns) == 4 and (columns[0] + columns[2]).isdecimal()
        found.append((columns[0], columns[1]))
    if numbered:
        raise ValueError(
            f"{name}: a line must be a text, a tab and its translation; got numbers before both, "
            f"as Tatoeba's lists have them: keep the second and the fourth column"
        )
    return found


def _unzipped(raw: bytes, path: pathlib.Path) -> tuple[bytes, str]:
    """The one file of pairs in a zip, which is not unpacked to disk, and its name."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            names = [
                n for n in archive.namelist() if re.search(r"(^|/)[^_/][^/]*\.(txt|tsv)$", n, re.I)
            ]
            if len(names) != 1:
                raise ValueError(
                    f"{path} must hold one .txt or .tsv file; it holds {names or 'none'}"
                )
            return archive.read(names[0]), f"{path}, {names[0]}"
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no zip file: {error}") from error
    except (EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        # Cut off, compressed in another way, encrypted, or damaged.
        raise ValueError(f"{path} cannot be unpacked: {error}") from error


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


def plain(text: str) -> str:
    """Unicode in its composed form, every run of white space one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def clean(pairs: Iterable[Pair], *, longest: int | None = None) -> list[Pair]:
    """Pairs without noise, in their order.

    As :func:`plain` makes them (in French, there is a narrow space before ``?``); no pair with an
    empty side, with one of more than ``longest`` characters, or with one more than three times as
    long as the other (but for 20 characters); each pair once.
    """
    found = {}
    for pair in pairs:
        a, b = pair = tuple(map(plain, pair))
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
