"""A mix of sources of texts, as an endless sequence of rows, which can be entered anywhere.

Every source gives rows of its own; the shares decide which source is next
(:func:`bdia_jax.data.order.whose_turn`). In its epoch e, the blocks of source i are taken in a
random order, with the seed ``(seed, i, e)``. Blocks with some 256 rows of text make a *window*. The
texts of a window are packed by best fit (:func:`bdia_jax.data.pack`), and its rows are shuffled
again, with the seed ``(seed, i, e, window)``. So every text of a source is seen
once before any is seen again, in another order in each epoch.

Where a sequence stands is a *position*: for every source, how many rows it gave, and the window and
the row that are next. What follows depends on the position alone.

grain can shuffle and mix data sets in this way, but it is not used: the order of a run must not
change with the version of a library, and little code is needed instead (``order.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from bdia_jax.data.order import permuted, shares_of, whose_turn
from bdia_jax.data.packing import Packed, pack
from bdia_jax.data.sources import BYTES_PER_TOKEN, TextsInMemory, TextSource

WINDOW = 256
"""Rows that are packed at a time, about."""


class Place(NamedTuple):
    """Where a source stands."""

    given: int
    """Rows so far."""
    window: int
    """Number of the window of the next row, counted over all epochs."""
    row: int
    """The next row's number in the window."""


class Mix:
    """Rows of several sources, by shares."""

    def __init__(
        self,
        sources: Sequence[TextSource],
        length: int,
        *,
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ):
        """Nothing is read yet.

        Args:
          sources: of texts; one, or several.
          length: of the rows, in tokens.
          weights: shares of the rows that the sources give, up to a factor; None for equal ones. A
            source of weight 0 gives none.
          seed: of all orders; 0 or positive.

        Raises:
          ValueError: for no sources; weights that are negative, not finite, all 0, or of another
            number.
        """
        if not sources:
            raise ValueError("there must be at least one source of texts; got none")
        self.shares = shares_of([1.0] * len(sources) if weights is None else weights, len(sources))
        self.sources, self.length, self.seed = tuple(sources), length, seed
        tokens = WINDOW * length
        self.at_a_time = [
            max(1, round(s.blocks * tokens * BYTES_PER_TOKEN / max(1, s.size))) for s in sources
        ]
        """Blocks of a window, by source."""
        self.windows = [-(-s.blocks // n) for s, n in zip(sources, self.at_a_time)]
        """Windows of an epoch, by source."""
        self._kept: dict[int, tuple[int, Packed]] = {}

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides the rows."""
        made_of = [[s.digest for s in self.sources], self.shares, self.length, self.seed, WINDOW]
        return hashlib.sha256(repr(made_of).encode()).hexdigest()

    def start(self) -> list[Place]:
        """The first position."""
        return [Place(0, 0, 0)] * len(self.sources)

    def take(self, position: Sequence[Sequence[int]], rows: int) -> tuple[Packed, list[Place]]:
        """The rows at a position, and the position behind them.

        Raises:
          ValueError: for a source of which an epoch has nothing to learn, or that has changed.
        """
        places = [Place(*place) for place in position]
        taken = []
        for _ in range(rows):
            i = whose_turn([place.given for place in places], self.shares)
            given, window, row = places[i]
            packed, window, row = self._from(i, window, row)
            taken.append([array[row] for array in packed])
            places[i] = Place(given + 1, window, row + 1)
        return Packed(*map(np.stack, zip(*taken))), places

    def shapes(self, rows: int) -> Packed:
        """Shapes and dtypes of what :meth:`take` gives."""
        shape = (rows, self.length)
        found = Packed(*[jax.ShapeDtypeStruct(shape, np.int32)] * len(Packed._fields))  # pyright: ignore
        return found._replace(weights=jax.ShapeDtypeStruct(shape, np.float32))  # pyright: ignore

    def window(self, source: int, number: int) -> Packed | None:
        """The rows of a window; None if nothing of its texts is learned."""
        s, size = self.sources[source], self.at_a_time[source]
        epoch, window = divmod(number, self.windows[source])
        places = np.arange(window * size, min((window + 1) * size, s.blocks))
        blocks = permuted(places, s.blocks, (self.seed, source, epoch))
        examples = s.read(blocks.tolist())
        if not examples:
            return None
        packed = pack(examples, self.length)
        order = np.arange(len(packed.tokens))
        order = permuted(order, len(order), (self.seed, source, epoch, window))
        return Packed(*(array[order] for array in packed))

    def first_window(self, source: int) -> Packed:
        """The rows that a source gives first, by which one may judge what it has.

        Raises:
          ValueError: for a source that has nothing to learn.
        """
        return self._from(source, 0, 0)[0]

    def epoch_rows(self, source: int) -> int:
        """Rows of a source's first epoch; others have a few more or less, for they are packed anew.

        All texts are read and tokenized, and the source tells what was cut. Of one on disk, the
        number is kept beside its index.
        """
        s, key = self.sources[source], self._key(source)
        if (found := s.counted(key)) is None:
            windows, about = range(self.windows[source]), f"counting the rows of {s.name}"
            with tqdm(windows, about, unit=" windows", disable=None, leave=False) as bar:
                s.forget()
                found = sum(self._rows(source, number) for number in bar)
            s.tell("")
            s.keep(key, found)
        return found

    def known_rows(self, source: int) -> int | None:
        """Rows of a source's first epoch, if they were counted, or all texts are in memory."""
        s = self.sources[source]
        if isinstance(s, TextsInMemory):
            return self.epoch_rows(source)
        return s.counted(self._key(source))

    def _key(self, source: int) -> str:
        return f"{self.sources[source].digest} {self.length} {self.seed} {source} {WINDOW}"

    def _rows(self, source: int, number: int) -> int:
        packed = self.window(source, number)
        return 0 if packed is None else len(packed.tokens)

    def _from(self, source: int, window: int, row: int) -> tuple[Packed, int, int]:
        """The window that has a row, and where in it; that of the next one, if it is over."""
        for number in range(window, window + self.windows[source] + 1):
            if (kept := self._kept.get(source)) is None or kept[0] != number:
                packed = self.window(source, number)
                if packed is None:
                    row = 0
                    continue
                self._kept[source] = kept = number, packed
            if row < len(kept[1].tokens):
                return kept[1], number, row
            row = 0
        raise ValueError(
            f"{self.sources[source].name} has nothing to learn in sequences of {self.length} "
            "tokens: give other texts, a larger length, or too_long = split"
        )
