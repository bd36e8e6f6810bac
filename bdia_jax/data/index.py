"""Where the blocks of files are: found once, and kept on disk, however many there are."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import pathlib
import struct
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from bdia_jax.data.blocks import Blocks
from bdia_jax.files import write_json

ABOUT, ENTRIES, COUNTED = "about.json", "blocks", "counted.json"
ENTRY = struct.Struct("<4q")
VERSION = 1
"""Of what stands in these files."""


class Index:
    """The blocks of some files, one file after the other.

    Making it reads all files once: their hash is taken, and every record is checked. It is kept in
    a folder, and taken from there if no file was written to since, by its size and times; what is
    in memory does not grow with the files. Without a folder, it goes with the object.
    """

    def __init__(self, files: Sequence[Blocks], folder: str | os.PathLike | None = None):
        """Finds the blocks.

        Raises:
          ValueError: for a file that is refused, or has no records.
        """
        self.files = files
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="bdia_jax-")
            folder = self._temporary.name
        self.folder = folder = pathlib.Path(folder)
        self.stamps = [_stamp(file.path) for file in files]
        paths = [str(file.path.absolute()) for file in files]
        expected = {"version": VERSION, "files": paths, "stamps": self.stamps}
        about = _read(folder / ABOUT)
        if any(about.get(name) != value for name, value in expected.items()) or not _is_whole(
            folder / ENTRIES, about
        ):
            about = expected | self._make(folder)
            # Last, and at once: a process that is killed before leaves no index.
            write_json(folder / ABOUT, about)
        self.sha256: str = about["sha256"]
        """SHA-256 of the contents of all files, in their order."""
        self.records: int = about["records"]
        self.blocks: int = about["blocks"]
        self.size = sum(size for size, *_ in self.stamps)
        """Bytes of all files."""
        self._lock = threading.Lock()
        self._entries = open(folder / ENTRIES, "rb")  # noqa: SIM115  (as long as the index)

    def entry(self, block: int) -> tuple[int, int, int, int]:
        """File, start and stop of a block, and the number of its first record among all."""
        with self._lock:
            self._entries.seek(ENTRY.size * block)
            return ENTRY.unpack(self._entries.read(ENTRY.size))

    def block_of(self, record: int) -> int:
        """The block that holds a record, by the number of the record among all."""
        numbers = range(self.blocks)
        return bisect.bisect_right(numbers, record, key=lambda block: self.entry(block)[3]) - 1

    def counted(self, key: str) -> int | None:
        """A number about these files that is kept beside the index; None if there is none."""
        return _read(self.folder / COUNTED).get(key)

    def keep(self, key: str, count: int) -> None:
        """Keeps a number about these files beside the index."""
        write_json(self.folder / COUNTED, _read(self.folder / COUNTED) | {key: count})

    def check_unchanged(self, file: int) -> None:
        """A ``ValueError`` if a file was written to since the index was made."""
        path = self.files[file].path
        if _stamp(path) != self.stamps[file]:
            raise ValueError(
                f"{path} has changed while it was read: keep data as they are in a run"
            )

    def _make(self, folder: pathlib.Path) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        sha, blocks, records = hashlib.sha256(), 0, 0
        # Another process may have the old one open: it is replaced, never written to.
        temporary = folder / f"{ENTRIES}.tmp"
        with (
            open(temporary, "wb") as out,
            tqdm(desc="checking the data", unit=" texts", disable=None, leave=False) as bar,
        ):
            for number, file in enumerate(self.files):
                of_file, before = hashlib.sha256(), records
                for start, stop, count in file.cut(of_file):
                    out.write(ENTRY.pack(number, start, stop, records))
                    blocks, records = blocks + 1, records + count
                    bar.update(count)
                if records == before:
                    raise ValueError(f"{file.path} has no records")
                sha.update(of_file.digest())
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(folder / ENTRIES)
        return {"sha256": sha.hexdigest(), "records": records, "blocks": blocks}


def _stamp(path: pathlib.Path) -> list[int]:
    """What tells, without reading a file, whether it was written to: size and times."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _is_whole(entries: pathlib.Path, about: dict[str, Any]) -> bool:
    return entries.is_file() and entries.stat().st_size == ENTRY.size * about["blocks"]


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
