"""Hugging Face folders: config.json, ``*.safetensors``, and what belongs to them.

A folder may come from anywhere, so nothing in it leads out of it: names in an index are names of
files in the folder itself, and symbolic links stay inside (but for those of the hub's own cache).
Nothing is executed: weights are read from safetensors files alone.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from typing import Any

import numpy as np

from bdia_jax.data.chats import TEMPLATES
from bdia_jax.files import leads_out
from bdia_jax.interop import replacing
from bdia_jax.interop.checkpoint import Checkpoint, FolderError

CONFIG = "config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    "vocab.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files that belong to the weights: of the tokenizer, of chats, of generation, of images."""
NOT_READ = {
    "adapter_config.json": "an adapter, which must be merged into the weights first (with peft: "
    "merge_and_unload, then save_pretrained)",
    "quantize_config.json": "quantized weights (GPTQ); only those that are not can be read",
    "quant_config.json": "quantized weights (AWQ); only those that are not can be read",
}
"""Files of folders that are refused, and what such a folder holds."""
_LEFT_ALONE = (
    "attn.bias",
    "attn.masked_bias",
    "attention.bias",
    "attention.masked_bias",
    "rotary_emb.inv_freq",
    "position_ids",
)
"""Ends of the names of masks, frequencies and counts in old files, which are computed here."""
_FLOATS = ("F64", "F32", "F16", "BF16")


def check_kind(folder: pathlib.Path) -> None:
    """An error for a folder with an adapter, or with quantized weights."""
    for name, what in NOT_READ.items():
        if (folder / name).exists():
            raise FolderError(f"{folder} holds {what}: there is {name}")


def file_in(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A file of a folder, whether it exists or not.

    Raises:
      FolderError: for a name that is not that of a file in the folder itself, and for a symbolic
        link to a file elsewhere.
    """
    if name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
        raise FolderError(f"{folder}: {name!r} is not the name of a file in this folder")
    return _inside(replacing.newest(folder, name), folder)


def _inside(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The path itself, unless a symbolic link leads out of the folder."""
    if (real := leads_out(path, folder)) is not None:
        raise FolderError(
            f"{path} is a symbolic link to {real}, outside the folder, and is not followed: put "
            "the file itself there"
        )
    return path


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object that a file in JSON holds.

    Raises:
      FileNotFoundError: if there is no such file.
      FolderError: for no JSON, or JSON that is no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}") from None
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FolderError(f"{path} must hold an object; it holds {str(value)[:80]}")
    return value


def indexed_files(folder: pathlib.Path) -> list[str]:
    """Names of the files that the index of a folder names; none without an index.

    Raises:
      FolderError: for an index that is damaged, or a symbolic link that leads out of the folder.
    """
    path = file_in(folder, INDEX)
    if not path.exists():
        return []
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise FolderError(f"{path}: weight_map must map names of tensors to names of files")
    return sorted(set(names.values()))


class Folder(Checkpoint):
    """A folder of ``transformers``.

    Raises:
      FileNotFoundError: without config.json.
      FolderError: for a folder with an adapter, or with quantized weights; for a config.json that
        is damaged, or a symbolic link that leads out of the folder.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self.where = path, str(path)
        check_kind(path)
        self.config = read_json(file_in(path, CONFIG))
        self._files = contextlib.ExitStack()
        self._tensors: dict[str, Any] | None = None
        self._used: set[str] = set()

    def __exit__(self, *_) -> None:
        self._files.close()

    @property
    def has_weights(self) -> bool:
        return bool(self._weights())

    def __contains__(self, name: str) -> bool:
        return name in self._opened()

    def get(self, name: str) -> np.ndarray:
        if name not in self._opened():
            raise FolderError(f"{self.path}: the tensor {name} is missing")
        self._used.add(name)
        return self._opened()[name].get_tensor(name)

    def unused(self) -> list[str]:
        return sorted(
            name for name in set(self._opened()) - self._used if not name.endswith(_LEFT_ALONE)
        )

    def beside(self) -> dict[str, bytes]:
        paths = {name: file_in(self.path, name) for name in BESIDE}
        # The only ones in a folder of their own.
        for path in sorted((self.path / TEMPLATES).glob("*.jinja")):
            paths[f"{TEMPLATES}/{path.name}"] = _inside(path, self.path)
        return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}

    def _weights(self) -> list[pathlib.Path]:
        """As ``transformers`` looks for them: one file, or else those that the index names."""
        if (named := self.config.get("transformers_weights")) not in (None, WHOLE):
            raise FolderError(
                f"{self.path}: transformers_weights in config.json must be {WHOLE}; got {named!r}"
            )
        if (whole := file_in(self.path, WHOLE)).exists():
            return [whole]
        if names := indexed_files(self.path):
            paths = [file_in(self.path, name) for name in names]
            if missing := [path.name for path in paths if not path.is_file()]:
                raise FolderError(
                    f"{self.path / INDEX} names {', '.join(missing)}, which are not there"
                )
            return paths
        return [file_in(self.path, p.name) for p in sorted(self.path.glob("model*.safetensors"))]

    def _opened(self) -> dict[str, Any]:
        """Names of tensors, and the open file of each."""
        if self._tensors is not None:
            return self._tensors
        from safetensors import safe_open

        paths = self._weights()
        if not paths:
            raise FileNotFoundError(
                f"there is no {WHOLE} and no {INDEX} in {self.path}; other formats of weights, "
                "such as *.bin, are not read"
            )
        found: dict[str, Any] = {}
        where: dict[str, str] = {}
        for path in paths:
            try:
                file = self._files.enter_context(safe_open(path, framework="numpy"))
            except Exception as error:
                raise FolderError(f"{path} is damaged, or no safetensors file: {error}") from error
            for name in file.keys():  # noqa: SIM118
                if name in found:
                    raise FolderError(
                        f"the tensor {name} is in two files: {where[name]} and {path.name}"
                    )
                kind = file.get_slice(name).get_dtype()
                if kind not in _FLOATS and not name.endswith(_LEFT_ALONE):
                    raise FolderError(
                        f"{path}: the tensor {name} is quantized, or no weight: its dtype must be "
                        f"one of {', '.join(_FLOATS)}; got {kind}"
                    )
                found[name], where[name] = file, path.name
        self._tensors = found
        return found
