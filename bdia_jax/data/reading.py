"""Files as people have them: opened, and decoded to text."""

from __future__ import annotations

import codecs
import os
import pathlib

RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Suffixes of files that hold records with named fields."""

_NOT_TEXT = (
    *(".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"),
    *(".json5", ".jsonc", ".tmx", ".xml", ".yaml", ".yml"),
    *(".arrow", ".avro", ".db", ".feather", ".h5", ".hdf5", ".msgpack", ".orc"),
    *(".npy", ".npz", ".pickle", ".pkl", ".pt", ".safetensors", ".sqlite", ".tfrecord"),
    *(".doc", ".docx", ".epub", ".ods", ".odt", ".pdf", ".rtf", ".xls", ".xlsx"),
)
"""Suffixes of files whose syntax, read as text, would be learned."""

_LFS_POINTER = "version https://git-lfs.github.com/spec/"


def read_text(path: str | os.PathLike) -> str:
    r"""A file of plain text in UTF-8, every line end ``"\n"``.

    Raises:
      FileNotFoundError, IsADirectoryError, PermissionError: if it cannot be opened.
      ValueError: if its suffix says that it is no plain text (``.json``, ``.csv``, ``.parquet``
        …), or if it is empty, or not in UTF-8.
    """
    path = pathlib.Path(path).expanduser()
    if (suffix := path.suffix.lower()) in RECORDS or suffix in _NOT_TEXT:
        raise ValueError(
            f"{path}: a {suffix} file is no plain text, and its syntax would be learned; to learn "
            "it as it stands, give it the suffix .txt"
        )
    return decode(read_bytes(path), str(path)).replace("\r\n", "\n").replace("\r", "\n")


def holds_records(path: str | os.PathLike) -> bool:
    """Whether a file holds records, or else plain text, by its suffix in any case.

    Raises:
      ValueError: for the suffix of something that is neither.
    """
    suffix = pathlib.Path(path).suffix.lower()
    if suffix in _NOT_TEXT:
        raise ValueError(
            f"{path}: the file must hold records ({', '.join(RECORDS)}) or plain text (any other "
            f"suffix, such as .txt, .md or .py, or none); {suffix} is neither. To learn it as it "
            "stands, give it the suffix .txt"
        )
    return suffix in RECORDS


def read_bytes(path: str | os.PathLike) -> bytes:
    """The contents of a file.

    Raises:
      FileNotFoundError, IsADirectoryError, PermissionError: if it cannot be opened.
    """
    path = pathlib.Path(path).expanduser()
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a folder; it must be a file") from None


def decode(raw: bytes, name: str) -> str:
    """Text in UTF-8, without a byte-order mark.

    Args:
      raw: the contents of a file.
      name: of the file, for messages.

    Raises:
      ValueError: for no text, another encoding, or a pointer of Git LFS instead of the file.
    """
    text = decode_part(raw, name)
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text


def decode_part(raw: bytes, name: str, first: int = 1) -> str:
    """A part of a text in UTF-8, without a byte-order mark; it may be empty.

    Args:
      raw: some lines of a file.
      name: of the file, for messages.
      first: number of the first of these lines, for messages.

    Raises:
      ValueError: for no text, another encoding, or a pointer of Git LFS instead of the file.
    """
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{name} is no text in UTF-8, but in UTF-16 or UTF-32: save it in UTF-8")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + first
        raise ValueError(
            f"{name}, line {line}: no text in UTF-8 ({error.reason}, byte "
            f"0x{raw[error.start]:02x}): save it in UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + first
        raise ValueError(
            f"{name}, line {line}: no text in UTF-8, for it has zero bytes, as binary files and "
            "UTF-16 do: save it in UTF-8"
        )
    if text.startswith(_LFS_POINTER):
        raise ValueError(f"{name} is a pointer of Git LFS to a file, not the file: git lfs pull")
    return text
