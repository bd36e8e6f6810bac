"""The E2E challenge's data: meanings of restaurants as prompts, and texts that say them."""

from __future__ import annotations

import csv
import io
import pathlib
import zipfile


def read(data: pathlib.Path, name: str) -> list[tuple[str, str]]:
    """Prompts and texts of a file of the challenge.

    Raises:
      FileNotFoundError, ValueError: for data without that file, or a file without its columns.
    """
    if data.is_dir():
        if not (data / name).exists():
            raise FileNotFoundError(f"there is no {name} in {data}")
        raw = (data / name).read_bytes()
    else:
        with zipfile.ZipFile(data) as archive:
            inside = [n for n in archive.namelist() if n.rsplit("/", 1)[-1] == name]
            if not inside:
                raise FileNotFoundError(f"there is no {name} in {data}")
            raw = archive.read(inside[0])
    rows = list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"))))
    if not rows or not {"mr", "ref"} <= set(rows[0]):
        raise ValueError(f"{name} must have the columns mr and ref; got {list(rows[:1])}")
    return [(prompt(row["mr"]), " " + row["ref"].strip()) for row in rows]


def prompt(meaning: str) -> str:
    """``name[The Vaults], food[English]`` as ``name : The Vaults | food : English ||``."""
    slots = (slot.split("[", 1) for slot in meaning.rstrip("] ").split("], "))
    return " | ".join(f"{name.strip()} : {value}" for name, value in slots) + " ||"


def grouped(pairs: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Every prompt once, with all its references, in the order of the file."""
    found: dict[str, list[str]] = {}
    for asked, text in pairs:
        found.setdefault(asked, []).append(text.strip())
    return list(found.items())
