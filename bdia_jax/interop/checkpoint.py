"""What every place that weights are read from has in common."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np


class FolderError(ValueError):
    """A folder (or a GGUF file) of weights is incomplete, contradicts itself, or is not read."""


class Checkpoint(abc.ABC):
    """Weights, and what belongs to them, under the names that ``transformers`` has for them.

    A context manager: files are open inside.
    """

    config: dict[str, Any]
    """The contents of a config.json."""
    where: str
    """For messages."""

    @property
    @abc.abstractmethod
    def has_weights(self) -> bool:
        """Whether there are weights, and not the configuration alone."""

    @abc.abstractmethod
    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""

    @abc.abstractmethod
    def get(self, name: str) -> np.ndarray:
        """A tensor, read into memory.

        Raises:
          FolderError: if there is none.
        """

    @abc.abstractmethod
    def unused(self) -> list[str]:
        """Tensors that nobody has asked for, but for those that every loader leaves alone."""

    @abc.abstractmethod
    def beside(self) -> dict[str, bytes]:
        """The files of a folder that belong to the weights: the tokenizer's, the chat template."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        return None
