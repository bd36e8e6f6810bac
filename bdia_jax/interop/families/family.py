"""What a family of networks is: one subclass says how other libraries write its models."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np

from bdia_jax.interop.checkpoint import Checkpoint, FolderError
from bdia_jax.nn import DecoderConfig

Config = Mapping[str, Any]
"""The contents of a config.json."""
BLOCKS = "blocks.stacked."
"""Where a decoder of ours keeps the parameters of its blocks, each with a leading block axis."""

KIND = (
    *("norm", "norm_place", "zero_centered_norm", "parallel", "feed_forward"),
    *("experts", "experts_per_token", "normalized_shares"),
    *("positions", "rope_theta", "rope_scaling", "rotary_dim", "rotated"),
    *("window", "windowed", "window_rope_theta"),
    *("qkv_bias", "out_bias", "ffn_bias", "qk_norm", "qk_norm_whole"),
    *("attention_scale", "attention_cap", "logit_cap", "embedding_scale"),
)
"""Settings of a :class:`bdia_jax.nn.DecoderConfig` that make a kind of network."""


class Source(NamedTuple):
    """Where a parameter of ours is found."""

    name: str
    """The name of the tensor; with ``{}`` for the number of the block, and of an expert in it."""
    transposed: bool = False
    """Whether it is stored as ``[outputs, inputs]``; ours are ``[inputs, outputs]``."""
    span: tuple[int, int] | None = None
    """First entry of their last axis that is ours, and the one behind the last; None for all."""
    groups: int = 1
    """How many equal groups their last axis consists of, each of which has that span."""
    experts: int | None = None
    """How many tensors, one for each expert, ours has, one behind the other."""
    heads: int | None = None
    """How many heads our last axis has, where features 2i and 2i + 1 of each are rotated together;
    ours are i and i + dim/2."""
    scale: float = 1.0
    """What the tensor is multiplied with."""

    @property
    def rewritten(self) -> bool:
        """Whether numbers are multiplied, or change places within a matrix."""
        return self.heads is not None or self.scale != 1.0


@runtime_checkable
class Names(Protocol):
    """Names of tensors."""

    def __contains__(self, name: str, /) -> bool: ...


class Family(abc.ABC):
    """How ``transformers`` and llama.cpp write the models of one kind."""

    name: ClassVar[str]
    """``model_type`` in config.json; and llama.cpp's name of the architecture."""
    architecture: ClassVar[str]
    """The class in ``transformers``."""

    head: ClassVar[str] = "lm_head.weight"
    """The tensor of a head that is not tied."""
    as_many_heads: ClassVar[bool] = False
    """Whether there are as many heads of keys as of queries, together as wide as the stream."""
    others: ClassVar[tuple[str, ...]] = ()
    """How names of tensors begin that belong to another network in the folder."""
    reads_gguf: ClassVar[bool] = True
    """Whether GGUF files are read."""

    def alone(self, c: Config) -> Config:
        """The config.json of a folder with this network alone, which is what is written."""
        return c

    def scales(self, c: Config, tied_head: bool) -> dict[str, float]:
        """What tensors are multiplied with, by the name of our parameter; 1 of all others.

        Args:
          c: contents of a config.json.
          tied_head: whether the head is the embedding.
        """
        return {}

    @abc.abstractmethod
    def read(self, c: Config) -> DecoderConfig:
        """A configuration of ours from that of ``transformers``.

        Raises:
          KeyError: for a setting that is missing.
          FolderError: for one that there is no equivalent of.
        """

    def has(self, config: DecoderConfig) -> bool:
        """Whether such networks are of this family: what it writes of one reads back as it."""
        c = config
        if self.as_many_heads and (c.num_kv_heads, c.heads * c.size_of_head) != (c.heads, c.width):
            return False
        try:
            back = self.read(self.whole(config))
        except (FolderError, ValueError):
            return False
        return kind_of(back) == kind_of(config)

    def whole(self, config: DecoderConfig) -> dict[str, Any]:
        """All that is in the config.json of a network."""
        return {
            "model_type": self.name,
            "architectures": [self.architecture],
            "vocab_size": config.vocab_size,
            "tie_word_embeddings": config.tied_head,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **self.write(config),
        }

    @abc.abstractmethod
    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Settings of a config.json, but for those that all families have.

        The inverse of :meth:`read`.
        """

    @abc.abstractmethod
    def layout(self, config: DecoderConfig, names: Names | None) -> dict[str, Source]:
        """Where each parameter of ours is found, the head of a network without a tied one aside.

        Args:
          config: of the network.
          names: those that are there, if it is read; None if it is written.
        """

    def read_gguf(self, metadata: Mapping[str, Any], tensors: Checkpoint) -> dict[str, Any]:
        """The contents of a config.json, from a GGUF file.

        Args:
          metadata: names without that of the architecture: ``block_count``, not
            ``llama.block_count``.
          tensors: of the file.

        Returns:
          What :meth:`write` returns.

        Raises:
          KeyError: for metadata that are missing.
          FolderError: for a network that there is no equivalent of.
        """
        raise FolderError(f"GGUF files of {self.name} are not read")

    def from_gguf(self, name: str, tensor: np.ndarray, c: Config) -> np.ndarray:
        """Undoes what llama.cpp does to a tensor when it writes it.

        Args:
          name: in ``transformers``.
          tensor: as it is stored.
          c: contents of a config.json.
        """
        return tensor


def kind_of(config: DecoderConfig) -> dict[str, Any]:
    """The settings that make its kind of network; alike of networks that are alike."""
    found = {name: getattr(config, name) for name in KIND}
    if config.window is not None and config.rope_scaling is None:
        # Where nothing is scaled, blocks with a window may also have the base of the others.
        found["window_rope_theta"] = config.window_rope_theta or config.rope_theta
    return found


def spans(*sizes: int) -> list[tuple[int, int]]:
    """Where parts of some sizes lie, one behind the other."""
    ends = list(itertools.accumulate(sizes))
    return list(zip([0, *ends], ends))


def expect(c: Config, name: str, allowed: tuple, default: Any) -> None:
    """An error unless a setting is one of some values."""
    if c.get(name, default) not in allowed:
        raise FolderError(
            f"config.json: {name} must be {' or '.join(map(str, allowed))}; got {c[name]!r}"
        )


def check_types(config: DecoderConfig) -> None:
    """A ``TypeError`` or ``ValueError`` for what no network can have: "false", 0, or no number."""
    stretched = config.rope_scaling
    for of in (config, *([] if stretched is None else [stretched])):
        for field in dataclasses.fields(of):
            value = getattr(of, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise TypeError(f"{field.name} must be true or false; got {value!r}")
            # A probability may be 0.
            if field.type == "float" and field.name != "dropout":
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise TypeError(f"{field.name} must be a number; got {value!r}")
                if not 0 < value < math.inf:
                    raise ValueError(f"{field.name} must be positive; got {value!r}")


@contextlib.contextmanager
def reading(family: str) -> Iterator[None]:
    """Turns what goes wrong while a config.json is read into a :class:`FolderError`.

    Args:
      family: the name of the family of networks, for messages.

    Raises:
      FolderError: in place of a ``KeyError``, for a setting that is missing; in place of other
        errors that settings of another type, or those that make no network, lead to.
    """
    try:
        yield
    except FolderError:
        raise
    except KeyError as error:
        raise FolderError(f"config.json of a {family} model lacks {error}") from None
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise FolderError(f"config.json of a {family} model: {error}") from error


def agree(places: Mapping[str, Any]) -> Any:
    """The value that several places of a config.json give; None if all of them are None.

    Raises:
      FolderError: with the names of two that contradict each other.
    """
    given = {place: value for place, value in places.items() if value is not None}
    for place, value in given.items():
        first = next(iter(given))
        if value != given[first]:
            raise FolderError(
                f"config.json contradicts itself: {first} is {given[first]!r}, {place} is {value!r}"
            )
    return next(iter(given.values()), None)
