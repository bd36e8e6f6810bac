"""Sets of TensorFlow Datasets: found, prepared and read, the latter without TensorFlow."""

from __future__ import annotations

import difflib
import importlib.util
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

Builder = Any
"""A ``tfds.core.DatasetBuilder``, whose own annotations allow too much to be checked."""


def find(
    name: str,
    data_dir: str | os.PathLike | None,
    *,
    may_be_missing: bool = False,
    embedded: tuple[str, ...] = (),
) -> Builder:
    """TFDS's description of a set, from its code, or else from the files of a prepared set.

    Args:
      name: ``name``, ``name/config`` or ``name:version``.
      data_dir: where prepared sets lie; None for TFDS's own folder.
      may_be_missing: whether that folder need not be there.
      embedded: names that are no sets of TFDS, for messages.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.constants import DATA_DIR
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    if data_dir is not None:
        data_dir = pathlib.Path(data_dir).expanduser()
        _check_folder(data_dir, may_be_missing)
    folder = data_dir or DATA_DIR
    try:
        # Anything else, such as "huggingface:mnist", TFDS would look up in the internet.
        if not (isinstance(name, str) and re.fullmatch(r"\w+(/[\w.+-]+)?(:[\d.*]+)?", name)):
            raise DatasetNotFoundError
        return tfds.builder(name, data_dir=data_dir)
    except DatasetNotFoundError:
        known = [*embedded, *tfds.list_builders(with_community_datasets=False)]
        close = difflib.get_close_matches(str(name).lower(), known)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        there = pathlib.Path(folder) / re.split("[/:]", str(name))[0]
        if re.fullmatch(r"\w+", there.name) and there.is_dir():
            hint = (
                f"; {there} is there, but not this version of it, or not whole (with "
                "dataset_info.json and features.json)"
            )
        raise ValueError(
            f"unknown data set {name!r}: neither embedded ({', '.join(embedded) or 'none is'}), "
            "nor a name of TensorFlow Datasets (name, name/config or name:version; "
            f"tfds.list_builders() lists the names), nor prepared in {folder}{hint}"
        ) from None
    except ImportError as error:
        raise ModuleNotFoundError(
            f"TensorFlow Datasets cannot open {name!r} without a package: {error}"
        ) from error
    except Exception as error:
        # A version or a configuration that there is not, or a file of a prepared set that is
        # damaged: each has an exception type of its own.
        raise ValueError(
            f"TensorFlow Datasets cannot open {name!r} in {folder}: {error}"
        ) from error


def _check_folder(folder: pathlib.Path, may_be_missing: bool) -> None:
    if not folder.exists():
        if may_be_missing:
            return
        raise FileNotFoundError(f"data_dir must be an existing folder; got {str(folder)!r}")
    if not folder.is_dir():
        raise NotADirectoryError(f"data_dir must be a folder; got the file {str(folder)!r}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise PermissionError(f"data_dir must be readable; no permission to read {str(folder)!r}")


def prepare(builder: Builder, name: str, download: bool) -> None:
    """Sees to it that a set is there: as it is, or (on request) downloaded."""
    if builder.is_prepared():
        return
    if not download:
        others = sorted(
            info.parent.name
            for info in pathlib.Path(builder.data_dir).parent.glob("*/dataset_info.json")
        )
        hint = f" (there is version {' and '.join(others)}: ask for name:version)" if others else ""
        raise FileNotFoundError(
            f"{name} is not prepared: looked in {builder.data_dir}{hint}. Give the folder of "
            "prepared sets as data_dir, or ask for it to be downloaded with download=True"
        )
    missing = [
        package
        for package in ("tensorflow", "importlib_resources")
        if importlib.util.find_spec(package) is None
    ]
    if missing:
        raise ModuleNotFoundError(
            f"{name} is not prepared (looked in {builder.data_dir}), and preparing it for the "
            f"first time needs {' and '.join(missing)}: "
            'pip install "bdia_jax[prepare]" (reading a prepared set needs neither)'
        )
    try:
        # array_record can be read at random, and without TensorFlow.
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        # No connection, a wrong checksum, a full disk, files to be fetched by hand: each has an
        # exception type of its own.
        raise RuntimeError(
            f"{name} could not be downloaded and prepared: {type(error).__name__}: {error}"
        ) from error


def read(builder: Builder, split: str) -> Iterator[dict[str, Any]]:
    """The examples of a prepared set, in their order."""
    try:
        source = builder.as_data_source(split=split)
        about = f"{builder.name}, {split}"
        with tqdm(
            total=len(source), desc=about, unit=" examples", disable=None, leave=False
        ) as bar:
            # Many at a time: one by one takes more than twice as long.
            for start in range(0, len(source), 1000):
                some = source.__getitems__([*range(start, min(start + 1000, len(source)))])
                yield from some
                bar.update(len(some))
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.name} in {builder.data_dir} was prepared as "
            f"{builder.info.file_format.value}, which needs TensorFlow to be read; needed is "
            "array_record: prepare it again in another data_dir with download=True"
        ) from error
    except RuntimeError as error:
        raise OSError(
            f"{builder.name} in {builder.data_dir} is damaged: {error}. Delete that folder, and "
            "prepare the set again"
        ) from error
