"""Low-rank updates in the format of ``peft``: a folder with the updates alone, in and out."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdia_jax.files import write_json
from bdia_jax.interop import arrays, families, replacing
from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.families.family import BLOCKS
from bdia_jax.interop.folder import file_in, read_json
from bdia_jax.interop.models import open_checkpoint
from bdia_jax.nn import Decoder, add_lora
from bdia_jax.nn.lora import LowRankLinear

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.(\d+)\.(.+)\.lora_([AB])(?:\.default)?\.weight")
"""Of a tensor: what is before the number of a block, that number, the layer, and which matrix."""
_AS_USUAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "alora_invocation_tokens": (None,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "megatron_config": (None,),
    # Others change the weights that are not in the adapter.
    "init_lora_weights": (True, False, None, "gaussian"),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "target_parameters": (None, []),
}
"""Settings of peft with another meaning than that of :class:`bdia_jax.nn.LowRankLinear`."""


def save_adapter(model: Decoder, folder: str | os.PathLike, *, like: str | os.PathLike) -> None:
    """Writes the low-rank updates of a model to a folder that ``peft`` loads.

    Args:
      model: of :func:`bdia_jax.nn.add_lora`, before they are merged.
      folder: is made; an adapter that is in it is replaced.
      like: what the model was loaded from; says how its layers are called.

    Raises:
      ValueError: for a model without low-rank updates, updates of several ranks or scales, or of a
        layer that is a part of another one there (GPT-2's queries).
    """
    from safetensors.numpy import save_file

    layers = _layers(model)
    if not layers:
        raise ValueError("the model has no low-rank updates; make them by bdia_jax.nn.add_lora")
    kinds = {(layer.a[...].shape[-1], layer.scale) for layer in layers.values()}
    if len(kinds) > 1:
        raise ValueError(f"all updates must have one rank and scale; got {sorted(kinds)}")
    ((rank, scale),) = kinds
    family, layout = _layout(model, like)
    tensors, targets, outputs_first = {}, set(), set()
    for name, layer in layers.items():
        source = layout[f"{name}.kernel"]
        if source.span is not None:
            raise ValueError(
                f"{name} is a part of {source.name} in a folder of {family.name}, of which peft "
                "has no updates: merge them into the weights (bdia_jax.nn.merge_lora), and save "
                "the whole model"
            )
        theirs = source.name.removesuffix(".weight")
        targets.add(theirs.rpartition("{}.")[2])
        outputs_first.add(source.transposed)
        b = arrays.original(np.asarray(layer.b[...], np.float32), source)
        for matrix, value in (("A", np.asarray(layer.a[...], np.float32)), ("B", b)):
            for block, each in enumerate(value):
                key = f"{_PREFIX}{theirs.format(block)}.lora_{matrix}.weight"
                tensors[key] = np.ascontiguousarray(each.T)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(like),
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": sorted(targets),
        "fan_in_fan_out": outputs_first == {False},
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    folder = pathlib.Path(folder).expanduser()
    with replacing.new_files(folder) as new:
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        write_json(new / CONFIG, config)
        steps = [replacing.Step("put", name) for name in (WEIGHTS, CONFIG)]
        replacing.put_in_place(folder, steps)


def load_adapter(
    model: Decoder, folder: str | os.PathLike, *, like: str | os.PathLike | None = None
) -> list[str]:
    """Gives a model the low-rank updates of an adapter, to train on or to merge.

    Args:
      model: of :func:`bdia_jax.interop.load`; all else in it is frozen, as by
        :func:`bdia_jax.nn.add_lora`.
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
      like: what the model was loaded from; needed for families whose weights are rewritten when
        they are read (Granite, ERNIE).

    Returns:
      The paths of the layers in their blocks.

    Raises:
      FileNotFoundError: without these files.
      FolderError: for an adapter of another kind, or one that does not fit the model.
      ValueError: without ``like``, where it is needed.
    """
    if like is None and (kind := getattr(model, "rewritten", None)):
        raise ValueError(
            f"the weights of {kind} are rewritten when they are read, and its updates must be "
            "likewise: give like, the folder that the model was loaded from"
        )
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    config = read_json(file_in(folder, CONFIG))
    for name, allowed in _AS_USUAL.items():
        if name in config and config[name] not in allowed:
            raise FolderError(
                f"{folder / CONFIG}: {name} must be {allowed[0]}; got {config[name]!r}"
            )
    if like is None:
        layout = families.family_of(model.config).layout(model.config, None)
    else:
        _, layout = _layout(model, like)
    found = _matrices(folder, _names(layout))
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise FolderError(f"{folder / CONFIG} must have r and lora_alpha; got {rank}, {alpha}")
    if config.get("use_rslora"):
        # There, the scale is alpha / √rank.
        alpha *= rank**0.5
    linear: dict[str, Any] = {".".join(map(str, p)): m for p, m in nnx.iter_modules(model)}
    for (name, which), value in found.items():
        blocks, inputs, outputs = linear[name].kernel.shape
        expected = (blocks, rank, inputs) if which == "A" else (blocks, outputs, rank)
        if value.shape != expected:
            raise FolderError(
                f"{folder}: with r = {rank}, lora_{which} of {name} must have the shape "
                f"{expected[1:]} in each of {blocks} blocks; got {value.shape[1:]} in "
                f"{len(value)}"
            )
    targets = tuple(dict.fromkeys(name.removeprefix(BLOCKS) for name, _ in found))
    paths = add_lora(model, rank, float(alpha), targets, rngs=nnx.Rngs(0))
    for name, layer in _layers(model).items():
        a, b = (found[name, which].swapaxes(1, 2) for which in "AB")
        b = arrays.rewritten(b, layout[f"{name}.kernel"])
        for matrix, value in ((layer.a, a), (layer.b, b)):
            matrix[...] = jnp.asarray(value, matrix[...].dtype)
    return paths


def _layout(
    model: Decoder, like: str | os.PathLike
) -> tuple[families.Family, dict[str, families.Source]]:
    """The family of what a model was loaded from, and where its parameters are found there."""
    with open_checkpoint(like) as checkpoint:
        family = families.named(checkpoint.config)
        return family, families.layout(family, model.config, None, checkpoint.config)


def _layers(model: nnx.Module) -> dict[str, LowRankLinear]:
    """The layers with updates, by their names in a layout."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, LowRankLinear)
    }


def _names(layout: Mapping[str, families.Source]) -> dict[tuple[str, str], str]:
    """Our names of layers by theirs: what is before and behind the number of a block."""
    names = {}
    for ours, source in layout.items():
        if source.span is None and ours.endswith(".kernel") and "{}" in source.name:
            before, _, behind = source.name.removesuffix(".weight").partition(".{}.")
            names[before, behind] = ours.removesuffix(".kernel")
    return names


def _matrices(
    folder: pathlib.Path, names: Mapping[tuple[str, str], str]
) -> dict[tuple[str, str], np.ndarray]:
    """Matrices by our name of a layer and A or B, with a leading block axis."""
    from safetensors.numpy import load_file

    path = file_in(folder, WEIGHTS)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; adapters in other formats are not read")
    try:
        tensors = load_file(path)
    except Exception as error:
        raise FolderError(f"{path} is damaged, or no safetensors file: {error}") from error
    blocks: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for key, tensor in tensors.items():
        match = _NAME.fullmatch(key)
        layer = None if match is None else names.get((match[1], match[3]))
        if match is None or layer is None:
            raise FolderError(
                f"{path}: {key} is no update of a linear layer of the model's blocks, which are "
                f"{', '.join(behind for _, behind in names)}"
            )
        blocks.setdefault((layer, match[4]), {})[int(match[2])] = tensor
    if not blocks:
        raise FolderError(f"{path} has no updates")
    found = {}
    for (layer, which), each in blocks.items():
        count = len(next(iter(blocks.values())))
        other = blocks.get((layer, "B" if which == "A" else "A"), {})
        if sorted(each) != [*range(count)] or sorted(other) != [*range(count)]:
            raise FolderError(
                f"{path}: {layer} must have both matrices in every block, from 0 to {count - 1}; "
                f"lora_{which} is there for {sorted(each)}"
            )
        if len(shapes := {tensor.shape for tensor in each.values()}) > 1:
            raise FolderError(
                f"{path}: lora_{which} of {layer} must have one shape in all blocks; got "
                f"{', '.join(map(str, sorted(shapes)))}"
            )
        found[layer, which] = np.stack([each[i] for i in range(count)])
    return found
