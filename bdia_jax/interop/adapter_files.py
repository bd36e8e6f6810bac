"""The files of an adapter of ``peft``: settings, and matrices by the layers they belong to."""

from __future__ import annotations

import json
import pathlib
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from bdia_jax.files import write_json
from bdia_jax.interop import replacing
from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.folder import file_in, read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_ROWS = "bdia_jax.rows"
"""Of the metadata: which rows of an A are whose, where one matrix is several of ours."""
_PREFIX = "base_model.model."
_NAME = re.compile(
    r"(?P<before>.+)\.(?P<block>\d+)\.(?P<behind>.+)\.lora_"
    r"(?:(?P<matrix>[AB])(?:\.default)?\.weight|magnitude_vector(?:\.default)?(?:\.weight)?)"
)
_ENDS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_AS_USUAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "alora_invocation_tokens": (None,),
    "megatron_config": (None,),
    # Others change the weights that are not in the adapter.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "target_parameters": (None, []),
}
"""Settings with another meaning than that of :class:`bdia_jax.nn.LowRankLinear`."""


class Place(NamedTuple):
    """Where in a model a layer is, in all blocks."""

    before: str
    """What is before the number of a block."""
    behind: str
    """What is behind it."""


class LowRankUpdate(NamedTuple):
    """The low-rank update of a layer, in all blocks."""

    scale: float
    """What B A is multiplied with."""
    matrices: dict[str, np.ndarray]
    """A ``[blocks, rank, inputs]``, B ``[blocks, outputs, rank]``; with DoRA, magnitude
    ``[blocks, outputs]``."""

    @property
    def rank(self) -> int:
        """The rank of A, which B should have, too."""
        return self.matrices["A"].shape[1]


class Adapter(NamedTuple):
    """What the folder of an adapter holds."""

    updates: dict[Place, LowRankUpdate]
    rows: dict[str, tuple[int, int]]
    """By our names of layers: the first row of A, and the one behind the last; of those that are
    one matrix there, and that we wrote."""
    whole: dict[str, np.ndarray]
    """Parameters of a module that was trained whole, by their names there."""


def write(folder: pathlib.Path, adapter: Adapter, settings: Mapping[str, Any]) -> None:
    """Writes the folder of an adapter; one that is in it is replaced.

    Args:
      folder: is made.
      adapter: the updates.
      settings: others for its ``adapter_config.json``.
    """
    from safetensors.numpy import save_file

    tensors = {
        f"{_PREFIX}{before}.{block}.{behind}.{_ENDS[which]}": np.ascontiguousarray(each)
        for (before, behind), update in adapter.updates.items()
        for which, value in update.matrices.items()
        for block, each in enumerate(value)
    }
    tensors |= {f"{_PREFIX}{name}": np.ascontiguousarray(t) for name, t in adapter.whole.items()}
    ranks = {place.behind: update.rank for place, update in adapter.updates.items()}
    alphas = {p.behind: update.scale * update.rank for p, update in adapter.updates.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {name: other for name, other in alphas.items() if other != alpha},
        "target_modules": sorted(ranks),
        "use_dora": any("magnitude" in update.matrices for update in adapter.updates.values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        **settings,
    }
    metadata = {"format": "pt"} | ({_ROWS: json.dumps(adapter.rows)} if adapter.rows else {})
    with replacing.new_files(folder) as new:
        save_file(tensors, new / WEIGHTS, metadata=metadata)
        write_json(new / CONFIG, config)
        steps = [replacing.Step("put", name) for name in (WEIGHTS, CONFIG)]
        replacing.put_in_place(folder, steps)


def read(
    folder: pathlib.Path,
    places: Collection[Place],
    *,
    module: str | None = None,
    ignored: re.Pattern[str] | None = None,
    hint: str = "",
) -> Adapter:
    """The adapter in a folder.

    Args:
      folder: with both files.
      places: of the layers that may have updates.
      module: one that may have been trained whole; None for none.
      ignored: starts of names of modules whose updates do not matter.
      hint: what may help if there are updates of other layers.

    Raises:
      FileNotFoundError: without these files.
      FolderError: for an adapter of another kind, or of other layers; for one that is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    config = read_json(file_in(folder, CONFIG))
    for name, allowed in _AS_USUAL.items():
        if name in config and config[name] not in allowed:
            raise FolderError(
                f"{folder / CONFIG}: {name} must be {allowed[0]}; got {config[name]!r}"
            )
    if (config.get("modules_to_save") or []) not in ([], [module]):
        raise FolderError(
            f"{folder / CONFIG}: modules_to_save must be {module and [module]}; got "
            f"{config['modules_to_save']!r}"
        )
    if (some := config.get("layers_to_transform")) is not None:
        some = [some] if isinstance(some, int) else some
        if sorted(some) != [*range(len(some))]:
            raise FolderError(
                f"{folder / CONFIG}: layers_to_transform must be null, because all blocks have the "
                f"same layers; got {some}"
            )
    path = file_in(folder, WEIGHTS)
    tensors, rows = _file(path)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    if ignored is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if not ignored.match(name)}
    whole = {name: tensors.pop(name) for name in [*tensors] if _is_of(name, module)}
    found = _by_place(
        path, tensors, places, ("A", "B", *["magnitude"] * bool(config.get("use_dora"))), hint
    )
    updates = {}
    for place, matrices in found.items():
        rank, alpha = _rank_and_alpha(config, place, len(matrices["A"]), folder / CONFIG)
        if rank != matrices["A"].shape[1]:
            raise FolderError(
                f"{folder}: with r = {rank}, lora_A of {place.behind} must have {rank} rows; got "
                f"the shape {matrices['A'].shape[1:]}"
            )
        updates[place] = LowRankUpdate(alpha / rank, matrices)
    return Adapter(updates, rows, whole)


def _is_of(name: str, module: str | None) -> bool:
    return name.startswith(f"{module}.") and ".lora_" not in name


def _file(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, int]]]:
    """Tensors by name, and :attr:`Adapter.rows`."""
    from safetensors import safe_open

    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; adapters in other formats are not read")
    try:
        with safe_open(path, "np") as file:
            rows = json.loads((file.metadata() or {}).get(_ROWS, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, {name: (first, end) for name, (first, end) in rows.items()}
    except Exception as error:
        raise FolderError(f"{path} is damaged, or no safetensors file: {error}") from error


def _by_place(
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    places: Collection[Place],
    expected: tuple[str, ...],
    hint: str,
) -> dict[Place, dict[str, np.ndarray]]:
    """The matrices that are expected of each layer, with a leading block axis."""
    blocks: dict[Place, dict[str, dict[int, np.ndarray]]] = {}
    for key, tensor in tensors.items():
        match = _NAME.fullmatch(key)
        groups = {} if match is None else match.groupdict()
        place = Place(groups.get("before", ""), groups.get("behind", ""))
        which = groups.get("matrix") or "magnitude"
        if match is None or place not in places or which not in expected:
            raise FolderError(
                f"{path}: {key} is no update of a linear layer of the model's blocks, which are "
                f"{', '.join(place.behind for place in places)}{hint}"
            )
        of_place = blocks.setdefault(place, {name: {} for name in expected})
        of_place[which][int(groups["block"])] = tensor
    if not blocks:
        raise FolderError(f"{path} has no updates")
    for place, of_place in blocks.items():
        count = max(map(len, of_place.values()))
        for which, each in of_place.items():
            if sorted(each) != [*range(count)]:
                raise FolderError(
                    f"{path}: {place.behind} must have {', '.join(expected)} in every block, "
                    f"from 0 to {count - 1}; {which} is there for {sorted(each)}"
                )
            if len(shapes := {tensor.shape for tensor in each.values()}) > 1:
                raise FolderError(
                    f"{path}: lora_{which} of {place.behind} must have one shape in all blocks; "
                    f"got {', '.join(map(str, sorted(shapes)))}"
                )
    return {
        place: {
            which: np.stack([*dict(sorted(each.items())).values()]) for which, each in m.items()
        }
        for place, m in blocks.items()
    }


def _rank_and_alpha(
    config: Mapping[str, Any], place: Place, blocks: int, where: pathlib.Path
) -> tuple[int, float]:
    """Of a layer, which a pattern may name; with rsLoRA, the alpha that means the same without."""

    def of(pattern: str, usual: str) -> Any:
        patterns = config.get(pattern) or {}
        found = []
        for block in range(blocks):
            path = f"{place.before}.{block}.{place.behind}"
            try:
                hits = [patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", path)]
            except re.error as error:
                raise FolderError(f"{where}: {pattern} must be of expressions: {error}") from error
            found.append(next(iter(hits), config.get(usual)))
        if found != found[:1] * blocks:
            raise FolderError(
                f"{where}: {pattern} must give {place.behind} one value in all blocks; got "
                f"{', '.join(map(str, found))}"
            )
        return found[0]

    rank, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise FolderError(f"{where} must have r and lora_alpha; got {rank}, {alpha}")
    # There, the scale is alpha / √rank.
    return rank, alpha * rank**0.5 if config.get("use_rslora") else alpha
