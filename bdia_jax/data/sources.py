"""Sources of texts that are drawn from at random: in memory, or read as they are drawn."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from bdia_jax.data.blocks import blocks_of
from bdia_jax.data.chats import ChatTemplate
from bdia_jax.data.example_files import check_template, files_of, found_in, whole
from bdia_jax.data.examples import Example, cut_up
from bdia_jax.data.fingerprints import fingerprint
from bdia_jax.data.fitting import Fitting, Found, TooLong
from bdia_jax.data.index import Index
from bdia_jax.data.record_kinds import MESSAGES
from bdia_jax.data.tokenizers import Tokenizer

BYTES_PER_TOKEN = 4
"""Of text, about; it decides how much is read at a time."""
HELD_OUT, HELD_OUT_BYTES = 1000, 2**22
"""Most texts of a source on disk, and bytes of them, that are held out for evaluation."""


class TextSource(Protocol):
    """Texts in blocks, each of which is read on its own."""

    name: str
    digest: str
    """SHA-256 of all that decides the examples."""
    texts: int
    """How many are for training."""
    blocks: int
    size: int
    """Bytes of text, about."""

    def read(self, blocks: Iterable[int]) -> list[Example]:
        """The examples of some blocks, in their order; there may be none."""
        ...

    def tell(self, among: str) -> None:
        """Warns of what was cut or left out since :meth:`forget`, ``among`` which texts."""
        ...

    def forget(self) -> None:
        """Begins anew to count what is cut or left out."""
        ...

    def counted(self, key: str) -> int | None:
        """What was counted of the texts, and kept under this key; None if nothing is."""
        ...

    def keep(self, key: str, count: int) -> None:
        """Keeps a count of the texts under this key."""
        ...


class TextsInMemory:
    """Examples that were read; a block is one of them."""

    def __init__(self, name: str, examples: Sequence[Example]):
        """``name``: of the data, for messages.

        Raises:
          ValueError: for no examples.
        """
        if not examples:
            raise ValueError(f"{name} must have texts for training; it has none")
        self.name, self.texts, self.blocks = name, len(examples), len(examples)
        # As arrays, which take an eighth of the memory of lists.
        self._ends = np.cumsum([0, *(len(example.tokens) for example in examples)])
        self._tokens, self._learned = (
            np.fromiter((x for example in examples for x in example[i]), dtype)
            for i, dtype in enumerate((np.int32, bool))
        )
        self.size = BYTES_PER_TOKEN * len(self._tokens)
        self.digest = fingerprint([self._ends, self._tokens, self._learned])
        self._counts: dict[str, int] = {}

    def read(self, blocks: Iterable[int]) -> list[Example]:
        places = (slice(*self._ends[block : block + 2]) for block in blocks)
        return [Example(self._tokens[at].tolist(), self._learned[at].tolist()) for at in places]

    def tell(self, among: str) -> None:
        """Does nothing: what was cut or left out was told when the texts were read."""

    def forget(self) -> None:
        """Does nothing: what was cut or left out is not counted here."""

    def counted(self, key: str) -> int | None:
        return self._counts.get(key)

    def keep(self, key: str, count: int) -> None:
        self._counts[key] = count


class TextsOnDisk:
    """The texts of files, read and tokenized when they are drawn.

    JSON lines and tables are read by record, Parquet files by row group, plain texts by passages of
    64 KiB. Every record is checked when the source is made (:class:`bdia_jax.data.index.Index`).
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        tokenizer: Tokenizer,
        length: int,
        *,
        too_long: TooLong = "truncate",
        template: ChatTemplate | None = None,
        hold_out: bool = False,
        folder: str | os.PathLike | None = None,
    ):
        """Checks all files, and finds their texts.

        Args:
          paths: files, and folders of files, of the kinds that
            :func:`bdia_jax.data.read_examples` reads, but for ``.json``.
          tokenizer, length, too_long, template: as of :func:`bdia_jax.data.read_examples`.
          hold_out: whether to keep records for evaluation (:meth:`held_out`): every tenth, or
            fewer, evenly spaced, so that there are at most 1,000 of them, of some 4 MB.
          folder: keeps the index, so that a resumed run need not read all files; None to make it
            anew each time.

        Raises:
          FileNotFoundError, PermissionError: for a file that cannot be opened.
          ValueError: for files that :func:`bdia_jax.data.read_examples` refuses; fewer than 10
            records of which some are to be held out.
        """
        given = [pathlib.Path(path).expanduser() for path in paths]
        self.files = [blocks_of(file) for path in given for file in files_of(path)]
        self.name = " + ".join(path.name for path in given)
        self.tokenizer, self.template, self.length = tokenizer, template, length
        self.fitting = Fitting(self.name, tokenizer, length, too_long)
        for file in self.files:
            if file.fields == MESSAGES:
                check_template(str(file.path), template)
        self.index = Index(self.files, folder)
        self.blocks, self.size = self.index.blocks, self.index.size
        records = self.index.records
        if hold_out and records < 10:
            raise ValueError(
                f"{self.name} has {records} records, of which every tenth would be for evaluation: "
                "give more, or eval_data (--eval-data)"
            )
        fewer = max(-(-records // HELD_OUT), -(-self.size // HELD_OUT_BYTES))
        self.every = min(max(10, fewer), records) if hold_out else None
        """The last of so many records is held out."""
        self.texts = records - (records // self.every if self.every else 0)
        made_of = [
            self.index.sha256,
            tokenizer.inner.to_str(),
            tokenizer.end,
            template if template is None else (template.source, template.tokens, _shown(template)),
            (length, too_long, self.every),
        ]
        if template is not None and template.tool_use is not None:
            made_of.append(template.tool_use)
        self.digest = hashlib.sha256(repr(made_of).encode()).hexdigest()

    def read(self, blocks: Iterable[int]) -> list[Example]:
        return self._fitting(blocks, held_out=False)

    def held_out(self) -> list[Example]:
        """The texts for evaluation."""
        if not self.every:
            return []
        numbers = np.arange(self.every - 1, self.index.records, self.every)
        blocks = dict.fromkeys(self.index.block_of(int(number)) for number in numbers)
        return self._fitting(blocks, held_out=True)

    def tell(self, among: str) -> None:
        self.fitting.tell(among)

    def forget(self) -> None:
        self.fitting.forget()

    def counted(self, key: str) -> int | None:
        return self.index.counted(key)

    def keep(self, key: str, count: int) -> None:
        self.index.keep(key, count)

    def _fitting(self, blocks: Iterable[int], held_out: bool) -> list[Example]:
        # Threads, since a tokenizer holds none back; what they find comes in the order of blocks.
        with concurrent.futures.ThreadPoolExecutor() as pool:
            of_blocks = pool.map(functools.partial(self._found, held_out=held_out), blocks)
            return [
                each for texts in of_blocks for text in texts for each in self.fitting.fit(text)
            ]

    def _found(self, block: int, held_out: bool) -> list[Found]:
        number, start, stop, first = self.index.entry(block)
        self.index.check_unchanged(number)
        file, texts = self.files[number], []
        for i, values in enumerate(file.read(start, stop), first):
            if (self.every is not None and i % self.every == self.every - 1) != held_out:
                continue
            name, where = str(file.path), f"record {i + 1}"
            if file.is_text:
                passage = whole(values[0], self.tokenizer, ends=stop == file.path.stat().st_size)
                pieces = cut_up(passage, self.tokenizer.begin, self.length)
                texts += [Found(where, piece) for piece in pieces]
                continue
            tools = self.tokenizer, self.template
            for found in found_in(name, where, file.fields, values, *tools):
                texts.append(found._replace(where=f"{name}, {where}"))
        return texts


def _shown(template: ChatTemplate) -> str:
    """What a template makes of a conversation now: some write the day's date into it."""
    roles = ("user", "assistant")
    try:
        return template.text([{"role": role, "content": role} for role in roles])
    except ValueError:
        return ""
