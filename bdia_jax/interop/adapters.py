"""Low-rank updates of a model, to and from a folder of ``peft``.

Where one matrix there is several of ours (GPT-2's queries, keys and values), its update has their
ranks together: ``A = [A_q; A_k]``, and ``B`` has ``B_q`` and ``B_k`` where their outputs are, and
zeros elsewhere. An update of such a matrix that ``peft`` trained is one of each of ours, with the
same ``A``.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from bdia_jax.interop import adapter_files, arrays, families
from bdia_jax.interop.adapter_files import Adapter, LowRankUpdate, Place
from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.families import Source
from bdia_jax.interop.families.family import BLOCKS
from bdia_jax.interop.hub import resolve
from bdia_jax.interop.models import open_checkpoint
from bdia_jax.interop.vision import families as vision
from bdia_jax.interop.vision.models import NOT_OURS, VisionFolder
from bdia_jax.nn import Decoder, VisionTower
from bdia_jax.nn.lora import (
    DecomposedLinear,
    LowRankKind,
    LowRankLinear,
    add_updates,
    norms,
    unfreeze,
    weights,
)

_HEAD = "classifier"
_SIZES = ("width", "depth", "heads", "num_kv_heads", "size_of_head", "hidden")
Layout = Mapping[str, Source]
"""Where every parameter of a model is found."""


def save_adapter(
    model: Decoder | VisionTower, folder: str | os.PathLike, *, like: str | os.PathLike
) -> None:
    """Writes the low-rank updates of a model to a folder that ``peft`` loads.

    The head of a vision tower, if it is trained, is written whole (``modules_to_save``).

    Args:
      model: of :func:`bdia_jax.nn.add_lora`, before they are merged.
      folder: is made; an adapter that is in it is replaced.
      like: what the model was loaded from; says how its layers are called. (Those of vision
        towers as by version 5 of ``transformers``.)

    Raises:
      ValueError: for a model without low-rank updates, or some with magnitudes (DoRA) and some
        without; for ``like`` of other sizes. Where several of its layers are one matrix there: for
        updates of several scales.
    """
    linear = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    layers = {n: module for n, module in linear.items() if isinstance(module, LowRankLinear)}
    if not layers:
        raise ValueError("the model has no low-rank updates; make them by bdia_jax.nn.add_lora")
    if len({type(layer) for layer in layers.values()}) > 1:
        raise ValueError("all updates must have magnitudes (DoRA), or none; got both")
    layout, modules = _known(model, like)
    adapter = Adapter({}, {}, {})
    for place, names in _places(modules).items():
        parts = {name: layers[name] for name in names if name in layers}
        if not parts:
            continue
        others = {name: linear[name] for name in names if name not in parts}
        adapter.updates[place] = _together(parts, others, layout)
        if len(names) > 1:
            end = 0
            for name, part in parts.items():
                adapter.rows[name] = end, (end := end + part.a.shape[-1])
    outputs_first = {layout[f"{name}.kernel"].transposed for name in layers}
    settings = {
        "base_model_name_or_path": str(like),
        "fan_in_fan_out": outputs_first == {False},
    }
    if not isinstance(model, VisionTower):
        settings["task_type"] = "CAUSAL_LM"
    elif isinstance(model.head.kernel, nnx.Param):
        settings["modules_to_save"] = [_HEAD]
        for name, parameter in _of_head(model).items():
            adapter.whole[f"{_HEAD}.{name}"] = np.asarray(parameter[...], np.float32).T
    adapter_files.write(pathlib.Path(folder).expanduser(), adapter, settings)


def load_adapter(
    model: Decoder | VisionTower,
    folder: str | os.PathLike,
    *,
    like: str | os.PathLike | None = None,
) -> list[str]:
    """Gives a model the low-rank updates of an adapter, to train on or to merge.

    Args:
      model: of :func:`bdia_jax.interop.load`, or :func:`bdia_jax.interop.load_vision`; all else in
        it is frozen, as by :func:`bdia_jax.nn.add_lora`, but for a head that is in the folder.
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
      like: what the model was loaded from; needed for vision towers, for families whose weights
        are rewritten when they are read (Granite, ERNIE), and where another family has the same
        network under other names (Phi-3 is a Llama, too, and Gemma 3 may be with images).

    Returns:
      The paths of the layers in their blocks.

    Raises:
      FileNotFoundError: without these files.
      FolderError: for an adapter of another kind, or one that does not fit the model.
      ValueError: without ``like``, where it is needed; for a model that has low-rank updates.
    """
    if any(isinstance(module, LowRankLinear) for _, module in nnx.iter_modules(model)):
        raise ValueError(
            "the model has low-rank updates already: merge them first (bdia_jax.nn.merge_lora)"
        )
    if like is None and isinstance(model, VisionTower):
        raise ValueError("for a vision tower, give like, the folder that it was loaded from")
    if like is None and (kind := getattr(model, "rewritten", None)):
        raise ValueError(
            f"the weights of {kind} are rewritten when they are read, and its updates must be "
            "likewise: give like, the folder that the model was loaded from"
        )
    folder = pathlib.Path(folder).expanduser()
    layout, names = _known(model, like)
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    # Before version 5 of transformers, modules were called as tensors are.
    places = _places(_tensors(layout)) | _places(names)
    of_images = {"module": _HEAD, "ignored": NOT_OURS} if isinstance(model, VisionTower) else {}
    hint = "; give like, what the model was loaded from" if like is None else ""
    adapter = adapter_files.read(folder, places, **of_images, hint=hint)
    of_head = _of_head(model) if adapter.whole and isinstance(model, VisionTower) else {}
    for name, parameter in of_head.items():
        value = adapter.whole.get(f"{_HEAD}.{name}")
        if value is None or value.T.shape != parameter.shape:
            raise FolderError(
                f"{folder}: {_HEAD}.{name} must have the shape {parameter.shape[::-1]}; got "
                f"{'none' if value is None else value.shape}"
            )
    kinds: dict[str, LowRankKind] = {}
    values: dict[str, dict[str, np.ndarray]] = {}
    for place, update in adapter.updates.items():
        for name in places[place]:
            if len(places[place]) > 1 and adapter.rows and name not in adapter.rows:
                # Another part of that matrix has an update.
                continue
            linear = modules[name]
            assert isinstance(linear, nnx.Linear)
            _check_shapes(update, name, linear, layout, folder)
            values[name] = _ours(update, layout[f"{name}.kernel"], adapter.rows.get(name))
            rank = values[name]["a"].shape[-1]
            kinds[name] = LowRankKind(rank, update.scale * rank, "magnitude" in values[name])
    paths = add_updates(
        model, {name.removeprefix(BLOCKS): kind for name, kind in kinds.items()}, nnx.Rngs(0)
    )
    for path, layer in nnx.iter_modules(model):
        for which, value in values.get(".".join(map(str, path)), {}).items():
            parameter = getattr(layer, which)
            parameter[...] = jnp.asarray(value, parameter[...].dtype)
    if of_head and isinstance(model, VisionTower):
        unfreeze(model.head)
        for name, parameter in _of_head(model).items():
            value = adapter.whole[f"{_HEAD}.{name}"].T
            parameter[...] = jnp.asarray(value, parameter[...].dtype)
    return paths


def lora_targets(
    model: Decoder | VisionTower, names: tuple[str, ...], *, like: str | os.PathLike
) -> tuple[str, ...]:
    """Names of layers for :func:`bdia_jax.nn.add_lora`, from the names that ``peft`` has for them.

    Args:
      model: of :func:`bdia_jax.interop.load`.
      names: of layers in the folder, or ends of these (``"q_proj"``, ``"mlp.down_proj"``); or
        ``"all-linear"``. Others are returned as they are.
      like: what the model was loaded from.
    """
    layout, modules = _known(model, like)
    places = _places(_tensors(layout)) | _places(modules)
    targets: list[str] = []
    for given in names:
        meant = [
            name.removeprefix(BLOCKS)
            for place, ours in places.items()
            for name in ours
            if given == "all-linear" or f".{place.behind}".endswith(f".{given}")
        ]
        targets += meant or [given]
    return tuple(dict.fromkeys(targets))


def _known(
    model: Decoder | VisionTower, like: str | os.PathLike | None
) -> tuple[Layout, dict[str, str]]:
    """Where the parameters are found in what the model was loaded from; and names of modules.

    Of linear layers in blocks, by our names, with ``{}`` for the number of the block.
    """
    if isinstance(model, VisionTower):
        assert like is not None
        with VisionFolder(resolve(like)) as folder:
            family = vision.family_of(folder.config)
        layout = family.layout(model.config, None)
        return layout, {n: family.module(n.removeprefix(BLOCKS)) for n in _tensors(layout)}
    if like is None:
        layout = families.family_of(model.config).layout(model.config, None)
    else:
        with open_checkpoint(like) as checkpoint:
            family, theirs = families.named(checkpoint.config), families.read(checkpoint.config)
            layout = families.layout(family, model.config, None, checkpoint.config)
        different = [n for n in _SIZES if getattr(theirs, n) != getattr(model.config, n)]
        if different:
            told = ", ".join(
                f"{n} = {getattr(theirs, n)}, where the model has {getattr(model.config, n)}"
                for n in different
            )
            raise ValueError(f"like must be what the model was loaded from; {like} has {told}")
    return layout, _tensors(layout)


def _tensors(layout: Layout) -> dict[str, str]:
    """Names of the kernels of linear layers in blocks, by our names of layers."""
    return {
        ours.removesuffix(".kernel"): source.name.removesuffix(".weight")
        for ours, source in layout.items()
        if ours.startswith(BLOCKS) and ours.endswith(".kernel")
    }


def _places(modules: Mapping[str, str]) -> dict[Place, list[str]]:
    """Our layers, by theirs; several where one matrix there is several of ours."""
    places: dict[Place, list[str]] = {}
    for ours, theirs in modules.items():
        before, _, behind = theirs.partition(".{}.")
        places.setdefault(Place(before, behind), []).append(ours)
    return places


def _of_head(model: VisionTower) -> dict[str, nnx.Variable]:
    """By their names there, where a matrix is the other way round."""
    head = model.head
    assert head.bias is not None
    return {"weight": head.kernel, "bias": head.bias}


def _outputs(name: str, own: int, layout: Layout) -> int:
    """Those of the matrix there; ``own`` are those of our layer."""
    source = layout[f"{name}.kernel"]
    ends = [s.span[1] for s in layout.values() if s.name == source.name and s.span is not None]
    return source.groups * max(ends) if ends else own


def _together(
    parts: Mapping[str, LowRankLinear], others: Mapping[str, Any], layout: Layout
) -> LowRankUpdate:
    """The update of a matrix there, of which ``others`` are the parts without one."""

    def theirs(name: str, array: Array) -> np.ndarray:
        source = layout[f"{name}.kernel"]
        whole = _outputs(name, array.shape[-1], layout)
        return arrays.among_zeros(
            arrays.original(np.asarray(array, np.float32), source), source, whole
        )

    if len(scales := {part.scale for part in parts.values()}) > 1:
        raise ValueError(
            f"updates of {', '.join(parts)} must have one scale, because these are one matrix in "
            f"the folder; got {', '.join(map(str, sorted(scales)))}"
        )
    a = np.concatenate([np.asarray(part.a[...], np.float32) for part in parts.values()], -1)
    b = np.concatenate([theirs(name, part.b[...]) for name, part in parts.items()], -2)
    matrices = {"A": a.swapaxes(1, 2), "B": b.swapaxes(1, 2)}
    magnitudes = {
        name: part.magnitude[...]
        for name, part in parts.items()
        if isinstance(part, DecomposedLinear)
    }
    if magnitudes:
        # With the norms that they have, the others are what they were.
        magnitudes |= {name: norms(weights(layer)) for name, layer in others.items()}
        found = [theirs(name, magnitude) for name, magnitude in magnitudes.items()]
        matrices["magnitude"] = np.sum(found, axis=0)
    return LowRankUpdate(scales.pop(), matrices)


def _ours(
    update: LowRankUpdate, source: Source, rows: tuple[int, int] | None
) -> dict[str, np.ndarray]:
    """The matrices of one of our layers; of some rows of A only."""

    def own(array: np.ndarray) -> np.ndarray:
        return arrays.rewritten(arrays.cut(array, source), source)

    kept = slice(*rows) if rows is not None else slice(None)
    found = {
        "a": update.matrices["A"][:, kept].swapaxes(1, 2),
        "b": own(update.matrices["B"][..., kept].swapaxes(1, 2)),
    }
    if (magnitude := update.matrices.get("magnitude")) is not None:
        found["magnitude"] = own(magnitude)
    return found


def _check_shapes(
    update: LowRankUpdate, name: str, linear: nnx.Linear, layout: Layout, folder: pathlib.Path
) -> None:
    blocks, inputs, own = linear.kernel.shape
    outputs = _outputs(name, own, layout)
    shapes = {"A": (update.rank, inputs), "B": (outputs, update.rank), "magnitude": (outputs,)}
    for which, value in update.matrices.items():
        if value.shape != (blocks, *shapes[which]):
            raise FolderError(
                f"{folder}: with r = {update.rank}, lora_{which} of {name} must have the shape "
                f"{shapes[which]} in each of {blocks} blocks; got {value.shape[1:]} in {len(value)}"
            )
