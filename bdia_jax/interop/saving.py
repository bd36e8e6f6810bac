"""Folders that ``transformers`` loads, written whole."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from bdia_jax.data.chats import TEMPLATE, TEMPLATES, named_templates
from bdia_jax.files import write_json
from bdia_jax.interop import arrays, families
from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.families import Source
from bdia_jax.interop.folder import (
    BESIDE,
    CONFIG,
    INDEX,
    WHOLE,
    check_kind,
    indexed_files,
    read_json,
)
from bdia_jax.interop.models import describe, open_checkpoint
from bdia_jax.interop.replacing import Step, new_files, put_in_place
from bdia_jax.nn import Decoder, DecoderConfig, Frozen, QuantizedLinear
from bdia_jax.nn.settings import DTYPES, check_dtype
from bdia_jax.nn.stack import check_standard

TOKENIZER_CONFIG = "tokenizer_config.json"
SHARD_BYTES = 2 * 2**30
"""Files are written up to this size, one in memory at a time."""
_NOT_KEPT = ("auto_map", "transformers_weights")
"""Settings of a config.json about files that are not written."""


def save(
    model: Decoder,
    folder: str | os.PathLike,
    *,
    dtype: str | None = None,
    like: str | os.PathLike | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that ``transformers`` loads.

    A model that was in the folder before is replaced as a whole: after an interrupted save,
    :func:`load` finds either the old model or the new one.

    Args:
      model: without low-rank updates (:func:`bdia_jax.nn.merge_lora`).
      folder: is made; what is in it beside a model stays.
      dtype: float32, bfloat16, float16 or float64; by default that of the parameters.
      like: what the model was loaded from (a folder, or a GGUF file). Its config.json is kept where
        it does not contradict, and its tokenizer, chat template and generation_config.json are
        written, in place of any that were in the folder. None leaves these files as they are, and
        writes the network as that of the first family that has it: Granite's, ERNIE's and some of
        Phi-3's as Llama's. (The decoder of a Gemma 3 that sees images is written as a text model
        either way.)
      config: contents of a config.json, in place of that of ``like``.

    Raises:
      ValueError: for a configuration that no family has, one of another model, an unknown dtype, a
        model with low-rank updates or a quantized base (:func:`bdia_jax.nn.expand_base`), or one
        that is trained by :class:`bdia_jax.Midpoint`.
      FolderError: for a folder with an adapter, which loaders would apply to the saved weights.
    """
    check_standard(model.blocks, "transformers knows")
    folder = pathlib.Path(folder).expanduser()
    dtype = dtype or model.config.param_dtype
    check_dtype(dtype)
    beside = None
    if like is not None:
        with open_checkpoint(like) as checkpoint:
            beside = checkpoint.beside()
            config = checkpoint.config if config is None else config
    written = _config_json(model.config, config, dtype)
    family = families.named(written)
    layout = families.layout(family, model.config, None, written)
    tensors = arrays.tensors(parameters_of(model, layout), layout, DTYPES[dtype])
    replace_model(folder, tensors, written, beside)


def _config_json(
    config: DecoderConfig, given: Mapping[str, Any] | None, dtype: str
) -> dict[str, Any]:
    """What is written: what was given, if it is of such a model."""
    plain = families.write(config)
    written = dict(plain if given is None else families.named(given).alone(given))
    # Weights may be untied that were loaded from a folder which says they are tied.
    written["tie_word_embeddings"] = config.tied_head
    if differences := describe(families.read(written), families.read(plain)):
        raise ValueError(f"config is of another model: {differences}")
    for name in _NOT_KEPT:
        written.pop(name, None)
    return written | {"dtype": dtype, "torch_dtype": dtype}


def parameters_of(model: nnx.Module, layout: Mapping[str, Source]) -> dict[str, jax.Array]:
    """The parameters of a model, frozen ones among them, by their paths with dots.

    Args:
      model: without low-rank updates.
      layout: of its configuration: where each parameter is found.

    Raises:
      ValueError: for a model that has other parameters than the layout.
    """
    parameters = {
        ".".join(map(str, path)): leaf.get_value()
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, Frozen)))
    }
    if any(isinstance(module, QuantizedLinear) for _, module in nnx.iter_modules(model)):
        raise ValueError(
            "the model's base is quantized: expand it (bdia_jax.nn.expand_base), and merge "
            "low-rank updates, before saving"
        )
    if set(layout) != set(parameters):
        raise ValueError(
            "the model has other parameters than its configuration: "
            f"{', '.join(sorted(set(layout) ^ set(parameters)))}; merge low-rank updates before "
            "saving"
        )
    return parameters


def replace_model(
    folder: pathlib.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    config: dict[str, Any],
    beside: Mapping[str, bytes] | None,
) -> None:
    """Writes a model into a folder, in place of the one that was there, if there was one.

    After an interruption, our loaders find either the old model or the new one, and others a whole
    model or none.

    Args:
      folder: is made; what is in it beside a model stays.
      tensors: by name; taken one at a time.
      config: contents of its config.json.
      beside: contents of the files that belong to the weights, by name, in place of any that were
        there; None leaves these as they are.

    Raises:
      FolderError: for a folder with an adapter, or with quantized weights.
    """
    check_kind(folder)
    beside = None if beside is None else _flat(beside, folder)
    with new_files(folder) as new:
        before = _weights_before(folder)
        weights = _write_weights(tensors, new, avoid=before)
        write_json(new / CONFIG, config)
        for name, content in (beside or {}).items():
            (new / name).write_bytes(content)
        put_in_place(folder, _steps_of(folder, new, weights, before, beside))


def _write_weights(
    tensors: Iterable[tuple[str, np.ndarray]], folder: pathlib.Path, avoid: set[str]
) -> list[str]:
    """Writes one file; or several, and their index.

    Returns:
      Names of the files, in the order in which they are to be put in place.
    """
    from safetensors.numpy import save_file

    parts: list[pathlib.Path] = []
    index: dict[str, int] = {}
    shard: dict[str, np.ndarray] = {}
    total = 0

    def write() -> None:
        index.update(dict.fromkeys(shard, len(parts)))
        parts.append(folder / f"part-{len(parts)}")
        save_file(shard, parts[-1], metadata={"format": "pt"})
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(a.nbytes for a in shard.values()) + tensor.nbytes > SHARD_BYTES:
            write()
        shard[name] = tensor
        total += tensor.nbytes
    write()
    if len(parts) == 1:
        parts[0].rename(folder / WHOLE)
        return [WHOLE]
    # Files of a model that is still being used are not overwritten one by one.
    prefixes = itertools.chain(["model"], (f"model-{i}" for i in itertools.count(2)))
    for prefix in prefixes:
        names = [f"{prefix}-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
        if not avoid & set(names):
            break
    for part, name in zip(parts, names):
        part.rename(folder / name)
    write_json(
        folder / INDEX,
        {
            "metadata": {"total_size": total},
            "weight_map": {name: names[i] for name, i in sorted(index.items())},
        },
    )
    return [*names, INDEX]


def _weights_before(folder: pathlib.Path) -> set[str]:
    """Names of the files with weights that are in a folder."""
    shard = re.compile(r"model-(\d+-)?\d{5}-of-\d{5}\.safetensors")
    found = {path.name for path in folder.iterdir() if shard.fullmatch(path.name)}
    # An index that cannot be read is replaced all the same.
    with contextlib.suppress(FolderError):
        found |= set(indexed_files(folder))
    # An index may name anything: nothing outside the folder is removed, and nothing but weights.
    ours = {name for name in found if re.fullmatch(r"[^/\\]+\.safetensors", name)}
    return {name for name in {*ours, WHOLE, INDEX} if (folder / name).exists()}


def _steps_of(
    folder: pathlib.Path,
    new: pathlib.Path,
    weights: list[str],
    before: set[str],
    beside: Mapping[str, bytes] | None,
) -> list[Step]:
    """An order in which readers that know nothing of it find a whole model, or none.

    Loaders prefer ``model.safetensors`` to an index, and an index to files that it does not name.
    So other weights count from the moment at which the whole file is put or removed, or else the
    index is put; what is removed after that, nobody reads. Where old weights and new files do not
    go together, there is no config.json meanwhile.
    """
    others = list(beside or {})
    steps = [Step("put", name) for name in [*weights, *others]]
    removed = sorted(before - set(weights))
    if beside is not None:
        removed += [name for name in BESIDE if name not in beside and (folder / name).exists()]
    together = _same_network(folder / CONFIG, new / CONFIG) and all(
        _same_content(folder / name, new / name) for name in others
    )
    if (folder / CONFIG).exists() and not together:
        steps.insert(0, Step("remove", CONFIG))
    return [*steps, *(Step("remove", name) for name in removed), Step("put", CONFIG)]


def _flat(beside: Mapping[str, bytes], folder: pathlib.Path) -> dict[str, bytes]:
    """Files without those that are in a folder of their own, whose templates others then hold.

    With such a file, ``transformers`` would not look for templates in the settings: a folder that
    has them all keeps them.

    Raises:
      FolderError: for a folder that has others, or only some of them.
    """
    apart = {name: beside[name] for name in beside if name.startswith(f"{TEMPLATES}/")}
    flat = {name: content for name, content in beside.items() if name not in apart}
    there = sorted((folder / TEMPLATES).glob("*.jinja"))
    for path in there:
        if apart.get(f"{TEMPLATES}/{path.name}") != path.read_bytes():
            raise FolderError(
                f"{path} is of another model, whose template would be used: remove it, or save to "
                "another folder"
            )
    if len(there) == len(apart):
        return flat
    if there:
        raise FolderError(
            f"{there[0].parent} lacks some templates of the model, which would be looked for only "
            "there: remove it, or save to another folder"
        )
    config = json.loads(flat.get(TOKENIZER_CONFIG, b"{}"))
    named = named_templates(beside, config)
    config["chat_template"] = [{"name": name, "template": named[name]} for name in named]
    flat.pop(TEMPLATE, None)
    return flat | {TOKENIZER_CONFIG: json.dumps(config, indent=2).encode()}


def _same_network(old: pathlib.Path, new: pathlib.Path) -> bool:
    try:
        return families.read(read_json(old)) == families.read(read_json(new))
    except (OSError, FolderError):
        return False


def _same_content(old: pathlib.Path, new: pathlib.Path) -> bool:
    return not old.exists() or old.read_bytes() == new.read_bytes()
