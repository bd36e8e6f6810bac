"""Decoders from folders of ``transformers``, and from GGUF files."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdia_jax.data.chats import ChatTemplate, read_chat_template
from bdia_jax.interop import arrays, families
from bdia_jax.interop.checkpoint import Checkpoint, FolderError
from bdia_jax.interop.folder import Folder
from bdia_jax.interop.gguf import GGUF
from bdia_jax.interop.hub import resolve
from bdia_jax.nn import Decoder, DecoderConfig, quantize_base
from bdia_jax.nn.quantized import Kind, Quantized


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """A folder or a GGUF file, to read from; or a name on the Hugging Face hub."""
    path = resolve(path)
    return GGUF(path) if path.is_file() else Folder(path)


def read_config(path: str | os.PathLike) -> DecoderConfig:
    """The configuration of a folder of ``transformers``, or of a GGUF file.

    Args:
      path: as of :func:`load`; a folder may have a ``config.json`` only.

    Raises:
      FileNotFoundError: without config.json.
      FolderError: for another architecture, settings of one that there is no equivalent of, and
        settings that contradict each other.
    """
    with open_checkpoint(path) as checkpoint:
        return _configuration(checkpoint)


def load(
    path: str | os.PathLike,
    *,
    quantize: Kind | None = None,
    place: arrays.Place = jnp.asarray,
    **settings: Any,
) -> Decoder:
    """A decoder with the weights of a folder of ``transformers``, or of a GGUF file.

    Memory holds one copy of the weights, and the largest stacked array a second time.

    Args:
      path: a folder with ``config.json`` and ``*.safetensors``; a ``*.gguf`` file, of which
        quantized weights are expanded; or a name on the Hugging Face hub, from where the folder is
        downloaded (to the cache of ``huggingface_hub``).
      quantize: nf4, int4 or int8 for kernels of linear layers in so few bits, as of
        :func:`bdia_jax.nn.quantize_base`; one block's kernel is in memory unquantized at a time.
      place: puts an array on its devices; by default, on the default one.
        :func:`bdia_jax.train.placed` splits it over those of a mesh.
      **settings: of :class:`bdia_jax.nn.DecoderConfig`, in place of those that are read:
        ``method``, ``dtype``, ``param_dtype``, ``dropout``, …

    Raises:
      FileNotFoundError: for a folder that does not exist, or has no weights.
      FolderError: for a folder that does not fit, with the name of the tensor.
      ImportError, ValueError: for ``quantize``, as of :func:`bdia_jax.nn.quantize_base`.
    """
    with open_checkpoint(path) as checkpoint:
        config = dataclasses.replace(_configuration(checkpoint), **settings)
        family = families.named(checkpoint.config)
        layout = families.layout(family, config, checkpoint, checkpoint.config)

        def make():
            model = Decoder(config, rngs=nnx.Rngs(0))
            if quantize is not None:
                quantize_base(model, quantize)
            return nnx.split(model, nnx.Any(nnx.Param, Quantized), ...)

        graph, abstract, _ = jax.eval_shape(make)
        rest = jax.jit(lambda: make()[2])()
        flat = dict(nnx.to_flat_state(abstract))
        state = {}
        for keys, leaf in flat.items():
            name = ".".join(map(str, keys))
            if quantize is None or not isinstance(leaf, Quantized):
                given = name, leaf.shape, leaf.dtype, layout[name], checkpoint
                value = arrays.parameter(*given, place)
                state[keys] = leaf.replace(value)
            elif keys[-1] == "codes":
                name = name.removesuffix("codes") + "kernel"
                given = name, leaf.shape, layout[name], checkpoint
                found = arrays.quantized(*given, quantize, place)
                for which, value in found._asdict().items():
                    state[*keys[:-1], which] = flat[*keys[:-1], which].replace(value)
        unused = [name for name in checkpoint.unused() if not name.startswith(family.others)]
        if unused:
            raise FolderError(
                f"{checkpoint.where}: tensors that no parameter is made from: {', '.join(unused)}"
            )
    model = nnx.merge(graph, nnx.from_flat_state([*state.items()]), rest)
    if any(source.rewritten for source in layout.values()):
        # For updates of these weights, which are written as those of the folder.
        model.rewritten = family.name
    return model


def stored_dtype(path: str | os.PathLike) -> str | None:
    """What config.json says that weights are kept in; None if it does not, as of a GGUF file.

    Raises:
      FileNotFoundError: for a folder that does not exist.
    """
    with open_checkpoint(path) as checkpoint:
        return checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))


def load_chat_template(path: str | os.PathLike) -> ChatTemplate | None:
    """The chat template of a folder of ``transformers``, or of a GGUF file; None without one.

    Raises:
      FileNotFoundError: for a folder that does not exist.
      ValueError: for one that is no template.
    """
    with open_checkpoint(path) as checkpoint:
        try:
            return read_chat_template(checkpoint.beside())
        except ValueError as error:
            raise FolderError(f"{checkpoint.where}: {error}") from error


def describe(theirs: DecoderConfig, ours: DecoderConfig) -> str:
    """In which settings two configurations differ; empty if in none."""
    pairs = {
        field.name: (getattr(theirs, field.name), getattr(ours, field.name))
        for field in dataclasses.fields(ours)
    }
    return ", ".join(
        f"{name} = {a!r}, where the model has {b!r}" for name, (a, b) in pairs.items() if a != b
    )


def _configuration(checkpoint: Checkpoint) -> DecoderConfig:
    """That of config.json; but the head is untied if there is one that differs, as in transformers.

    (Since its version 5.)
    """
    config = families.read(checkpoint.config)
    family = families.named(checkpoint.config)
    if not config.tied_head or not checkpoint.has_weights or family.head not in checkpoint:
        return config
    embedding = family.layout(config, checkpoint)["embedding"].name
    same = np.array_equal(checkpoint.get(family.head), checkpoint.get(embedding))
    return config if same else dataclasses.replace(config, tied_head=False)
