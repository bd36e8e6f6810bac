"""Rotary positions, as configurations of ``transformers`` and GGUF files describe them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.families.family import Config, agree
from bdia_jax.nn import RotaryScaling

DEFAULT_THETA = 10_000.0
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_length",
}
_PLACES = ("rope_parameters", "rope_scaling")
"""Since version 5 of transformers, and before."""


def read_rope(c: Config, usual_theta: float) -> tuple[float, RotaryScaling | None]:
    """The base of the wavelengths, and how they are stretched.

    Args:
      c: contents of a config.json.
      usual_theta: the base, where they do not say.

    Raises:
      FolderError: for another kind of scaling; for two places that contradict each other.
    """
    given = {place: c[place] for place in _PLACES if c.get(place)}
    kinds = {
        f"{place}.{name}": values[name]
        for place, values in given.items()
        for name in ("rope_type", "type")
        if values.get(name) is not None
    }
    for place, values in given.items():
        if not {"rope_type", "type"} & set(values):
            kinds[f"{place}.rope_type (not given)"] = "default"
    kind = agree(kinds) or "default"
    if kind not in ("default", "llama3"):
        raise FolderError(f"config.json: rope_type must be default or llama3; got {kind!r}")

    def value(name: str) -> Any:
        outside = {name: c.get(name)} if name not in ("factor",) else {}
        return agree(outside | {f"{place}.{name}": v.get(name) for place, v in given.items()})

    if (share := value("partial_rotary_factor")) not in (None, 1):
        raise FolderError(f"config.json: partial_rotary_factor must be 1; got {share!r}")
    known = {*_LLAMA3, "rope_theta", "rope_type", "type", "partial_rotary_factor"}
    for place, values in given.items():
        for name, got in values.items():
            if name not in known and got is not None:
                raise FolderError(
                    f"config.json: {place} may have {', '.join(sorted(known))}; got {name}: {got}"
                )
    theta = value("rope_theta")
    theta = usual_theta if theta is None else float(theta)
    if kind == "default":
        return theta, None
    settings = {ours: value(theirs) for theirs, ours in _LLAMA3.items()}
    for theirs, ours in _LLAMA3.items():
        if settings[ours] is None:
            raise KeyError(theirs)
        settings[ours] = (int if ours == "original_length" else float)(settings[ours])
    return theta, RotaryScaling(**settings)


def write_rope(theta: float, scaling: RotaryScaling | None) -> dict[str, Any]:
    """The same settings in both places."""
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if scaling is not None:
        rope["rope_type"] = "llama3"
        rope |= {theirs: getattr(scaling, ours) for theirs, ours in _LLAMA3.items()}
    return {
        "rope_parameters": rope,
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else rope,
    }


def read_gguf_rope(
    metadata: Mapping[str, Any], head_dim: int, divisors: np.ndarray | None
) -> dict[str, Any]:
    """Of a config.json, from the metadata of a GGUF file.

    Args:
      metadata: without the name of the architecture.
      head_dim: features of a head.
      divisors: the tensor ``rope_freqs.weight``, by which llama.cpp divides the frequencies; it
        holds what became of Llama 3.1's settings, of which the factor is the largest divisor. The
        other settings have been the same in all models, which is checked.

    Raises:
      FolderError: for another kind of scaling.
    """
    kind = metadata.get("rope.scaling.type", "none")
    if kind != "none":
        raise FolderError(f"rope.scaling.type must be none; got {kind!r}")
    turned = metadata.get("rope.dimension_count", head_dim)
    if turned != head_dim:
        raise FolderError(f"rope.dimension_count must be head_dim = {head_dim}; got {turned}")
    theta = metadata.get("rope.freq_base", DEFAULT_THETA)
    scaling = None
    if divisors is not None and np.any(divisors != 1):
        scaling = RotaryScaling(factor=float(divisors.max()))
        expected = _divisors(theta, head_dim, scaling)
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
            raise FolderError(
                f"rope_freqs.weight must hold what {scaling} makes of {head_dim // 2} frequencies "
                f"of base {theta}; got {divisors}"
            )
    return write_rope(theta, scaling)


def _divisors(theta: float, head_dim: int, s: RotaryScaling) -> np.ndarray:
    """What :class:`RotaryScaling` divides the frequencies by."""
    turns = s.original_length * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    share = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    share = np.clip(share, 0, 1)
    return 1 / (share + (1 - share) / s.factor)
