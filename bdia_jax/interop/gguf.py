"""GGUF files, of llama.cpp: metadata, quantized weights and a tokenizer in one file.

They are read by the ``gguf`` package, which llama.cpp's authors keep (the extra ``gguf``). Names of
tensors are those that its own table gives to the ones of ``transformers``.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from bdia_jax.data import Tokenizer
from bdia_jax.data.chats import TEMPLATE, TOOL_USE
from bdia_jax.interop import families
from bdia_jax.interop.checkpoint import Checkpoint, FolderError
from bdia_jax.interop.gguf_tokenizer import read_tokenizer, tokenizer_config

_ENDS = (".weight", ".bias")


class Contents(NamedTuple):
    """What a GGUF file holds."""

    metadata: dict[str, Any]
    """Numbers, texts and lists of them, by their names."""
    tensors: dict[str, Any]
    """``gguf.ReaderTensor`` by name: what they hold is read from the file when it is needed."""


def read_gguf(path: str | os.PathLike) -> Contents:
    """What is in a GGUF file.

    Raises:
      ImportError: without the ``gguf`` package.
      FolderError: for a file that is damaged.
    """
    path = pathlib.Path(path)
    about = path.stat()
    return _read(path, about.st_mtime_ns, about.st_size)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Raises:
      ImportError: without the ``gguf`` package.
      FolderError: for a file that is damaged, or a kind of tokenizer that is not known.
    """
    file = GGUF(pathlib.Path(path).expanduser())
    of_messages = file.metadata.get("tokenizer.ggml.eot_token_id")
    return Tokenizer(*file.tokenizer(), frozenset([] if of_messages is None else [of_messages]))


@functools.lru_cache(maxsize=1)
def _read(path: pathlib.Path, modified: int, size: int) -> Contents:
    """Kept, because a vocabulary takes seconds to parse, and is asked for more than once."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "reading GGUF files needs the gguf package, of the extra 'gguf': pip install gguf"
        ) from error
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:
        raise FolderError(f"{path} is damaged, or no GGUF file: {error}") from error
    for name, field in reader.fields.items():
        if field.types == [gguf.GGUFValueType.FLOAT32]:
            # The number that was meant, 1e-05, and not what float32 makes of it in float64.
            metadata[name] = float(str(np.float32(metadata[name])))
    return Contents(metadata, {tensor.name: tensor for tensor in reader.tensors})


class GGUF(Checkpoint):
    """A GGUF file of a family of :mod:`bdia_jax.interop.families`.

    Quantized tensors are expanded to float32 one by one, as they are asked for.

    Raises:
      ImportError: without the ``gguf`` package.
      FolderError: for a file that is damaged, of another architecture, or one of several.
    """

    def __init__(self, path: pathlib.Path):
        contents = read_gguf(path)
        # Only now: without the package, the error above says what to install.
        import gguf

        self.path, self.where = path, str(path)
        self.metadata, self._tensors = contents.metadata, contents.tensors
        self._used: set[str] = set()
        if (count := self.metadata.get("split.count", 1)) > 1:
            raise FolderError(
                f"{path} is one of {count} files: put them together (llama-gguf-split --merge)"
            )
        name = self.metadata.get("general.architecture")
        readable = [known for known, family in families.FAMILIES.items() if family.reads_gguf]
        if name not in readable:
            raise FolderError(
                f"{path}: general.architecture must be one of {', '.join(readable)}; got {name!r}"
            )
        self.family = families.FAMILIES[name]
        of_network = {
            key.removeprefix(f"{name}."): value
            for key, value in self.metadata.items()
            if key.startswith(f"{name}.")
        }
        try:
            architecture = {text: arch for arch, text in gguf.MODEL_ARCH_NAMES.items()}[name]
            self._names = gguf.get_tensor_name_map(architecture, of_network["block_count"])
            self.config: dict[str, Any] = {}
            self.config = {
                "model_type": self.family.name,
                "architectures": [self.family.architecture],
                "vocab_size": self._rows("token_embd.weight"),
                # If the file has a head that is another matrix, it is found out when it is read.
                "tie_word_embeddings": True,
                "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
                "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
                "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
                **self.family.read_gguf(of_network, self),
            }
        except KeyError as error:
            raise FolderError(f"{path} lacks {error} of a {name} model") from None
        except FolderError as error:
            raise FolderError(f"{path}: {error}") from None

    @property
    def has_weights(self) -> bool:
        return True

    def __contains__(self, name: str) -> bool:
        return self._theirs(name) in self._tensors

    def get(self, name: str) -> np.ndarray:
        import gguf

        theirs = self._theirs(name)
        if theirs not in self._tensors:
            raise FolderError(f"{self.path}: the tensor {theirs} ({name}) is missing")
        self._used.add(theirs)
        stored = self._tensors[theirs]
        try:
            tensor = gguf.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError:
            raise FolderError(
                f"{self.path}: the tensor {theirs} is quantized as {stored.tensor_type.name}, "
                "which the gguf package does not expand"
            ) from None
        return self.family.from_gguf(name, tensor, self.config)

    def unused(self) -> list[str]:
        return sorted(set(self._tensors) - self._used)

    def beside(self) -> dict[str, bytes]:
        if "tokenizer.ggml.model" not in self.metadata:
            return {}
        inner, _ = self.tokenizer()
        described = tokenizer_config(self.metadata) | {
            "model_max_length": families.read(self.config).max_length
        }
        files = {
            "tokenizer.json": inner.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(described, indent=2) + "\n",
        }
        if (template := self.metadata.get("tokenizer.chat_template")) is not None:
            files[TEMPLATE] = template
        if (tool_use := self.metadata.get("tokenizer.chat_template.tool_use")) is not None:
            files[TOOL_USE] = tool_use
        return {name: text.encode() for name, text in files.items()}

    def tokenizer(self) -> tuple[tokenizers.Tokenizer, int]:
        """The tokenizer of the file, and the number of the token that ends a text."""
        try:
            return read_tokenizer(self.metadata)
        except FolderError as error:
            raise FolderError(f"{self.path}: {error}") from None

    def _theirs(self, name: str) -> str | None:
        return self._names.get_name(name, try_suffixes=_ENDS)

    def _rows(self, theirs: str) -> int:
        # The package gives sizes as they are stored: columns first.
        return int(self._tensors[theirs].shape[1])
