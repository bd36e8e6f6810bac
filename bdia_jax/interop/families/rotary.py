"""Rotary positions, as configurations of ``transformers`` and GGUF files describe them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.families.family import Config, agree
from bdia_jax.interop.families.windows import FULL, SLIDING
from bdia_jax.nn import DecoderConfig, LinearScaling, LongScaling, RotaryScaling, YarnScaling
from bdia_jax.nn.rotary_scaling import Scaling

DEFAULT_THETA = 10_000.0
_NAMES: dict[str, dict[str, str]] = {
    "default": {},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
    "linear": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "fast",
        "beta_slow": "slow",
        "attention_factor": "amplitude",
        "truncate": "truncate",
    },
    "longrope": {
        "short_factor": "short",
        "long_factor": "long",
        "original_max_position_embeddings": "original_length",
        "attention_factor": "amplitude",
    },
}
"""What settings of every kind are called, there and here."""
_OPTIONAL = {"beta_fast", "beta_slow", "attention_factor", "truncate"}
_ALSO = {"yarn": {"mscale", "mscale_all_dim"}, "longrope": {"factor"}}
"""Settings from which others follow."""
_KINDS: dict[str, type[Scaling]] = {
    "llama3": RotaryScaling,
    "linear": LinearScaling,
    "yarn": YarnScaling,
    "longrope": LongScaling,
}
USUAL_KINDS = ("default", "llama3", "linear", "yarn")
_OLD_NAMES = {"su": "longrope"}
_OUTSIDE = ("rope_theta", "original_max_position_embeddings")
"""Settings that may also stand beside the others of a config.json."""
_PLACES = ("rope_parameters", "rope_scaling")
"""Since version 5 of transformers, and before."""


def read_rope(
    c: Config, usual_theta: float, allowed: tuple[str, ...] = USUAL_KINDS, *, partial: bool = False
) -> tuple[float, Scaling | None]:
    """The base of the wavelengths, and how they are stretched.

    Args:
      c: contents of a config.json.
      usual_theta: the base, where they do not say.
      allowed: kinds of scaling.
      partial: whether there may be features that are not rotated (:func:`read_share`).

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
    kind = _OLD_NAMES.get(kind, kind)
    if kind not in allowed:
        raise FolderError(
            f"config.json: rope_type must be one of {', '.join(allowed)}; got {kind!r}"
        )

    def value(name: str) -> Any:
        # transformers looks for no others there.
        outside = {name: c.get(name)} if name in _OUTSIDE else {}
        return agree(outside | {f"{place}.{name}": v.get(name) for place, v in given.items()})

    if (share := read_share(c)) != 1 and not partial:
        raise FolderError(f"config.json: partial_rotary_factor must be 1; got {share!r}")
    known = {*_NAMES[kind], *_ALSO.get(kind, ())}
    known |= {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    if kind == "default":
        # They say nothing then.
        known |= {*_NAMES["llama3"]}
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
    settings: dict[str, Any] = {}
    for theirs, ours in _NAMES[kind].items():
        found = value(theirs)
        if found is None and theirs not in _OPTIONAL:
            raise KeyError(theirs)
        if found is not None:
            settings[ours] = _TYPES.get(ours, float)(found)
    if kind == "yarn" and "amplitude" not in settings:
        settings["amplitude"] = _amplitude(
            settings["factor"], value("mscale"), value("mscale_all_dim")
        )
    if kind == "longrope" and "amplitude" not in settings:
        longest, original = c["max_position_embeddings"], settings["original_length"]
        factor = value("factor") or longest / original
        stretched = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
        settings["amplitude"] = stretched
    return theta, _KINDS[kind](**settings)


def _floats(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(map(float, values))


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError(f"original_max_position_embeddings must be a whole number; got {value}")
    return int(value)


_TYPES: dict[str, Callable[[Any], Any]] = {
    "original_length": _whole,
    "truncate": bool,
    "short": _floats,
    "long": _floats,
}
"""Of settings that are no floats."""


def read_share(c: Config, usual: float = 1.0) -> float:
    """Which share of the features of a head is rotated; ``usual``, where nothing says.

    Raises:
      FolderError: for two places that contradict each other.
    """
    name = "partial_rotary_factor"
    places = {name: c.get(name)}
    for place in _PLACES:
        places[f"{place}.{name}"] = (c.get(place) or {}).get(name)
    share = agree(places)
    return usual if share is None else float(share)


def write_share(turned: int, head_dim: int) -> float:
    """The share of which transformers makes ``turned``: the whole number below its product."""
    share = turned / head_dim
    return share if int(head_dim * share) == turned else math.nextafter(share, 1)


def _amplitude(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """That of YaRN, where it is not given; as transformers computes it."""

    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)


def write_rope(theta: float, scaling: Scaling | None) -> dict[str, Any]:
    """Settings of a config.json for rotary positions, in both places of :func:`read_rope`."""
    rope = _rope(theta, scaling)
    return {
        "rope_parameters": rope,
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else rope,
    }


def _rope(theta: float, scaling: Scaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_theta": theta, "rope_type": "default"}
    (kind,) = (name for name, of in _KINDS.items() if isinstance(scaling, of))
    settings = {theirs: getattr(scaling, ours) for theirs, ours in _NAMES[kind].items()}
    return {"rope_theta": theta, "rope_type": kind} | settings


def read_ropes_by_type(
    c: Config, usual_theta: float, local_theta: float | None, usual_local: float
) -> dict[str, Any]:
    """Settings of ours, of networks whose blocks with a window have wavelengths of their own.

    Args:
      c: contents of a config.json.
      usual_theta: the base of the others, where they do not say.
      local_theta: the base within a window, as a setting says that is older than version 5.
      usual_local: that base, where nothing says.

    Raises:
      FolderError: as :func:`read_rope`; and for scaling within a window.
    """
    nested = c.get("rope_parameters") or {}
    if other := set(nested) - {FULL, SLIDING}:
        raise FolderError(
            f"config.json: rope_parameters may have {FULL} and {SLIDING}; got "
            f"{', '.join(sorted(other))}"
        )
    theta, scaling = read_rope(dict(c) | {"rope_parameters": nested.get(FULL)}, usual_theta)
    local, scaled = read_rope(
        {"rope_theta": local_theta, "rope_parameters": nested.get(SLIDING)}, usual_local
    )
    if scaled is not None:
        raise FolderError(
            f"config.json: rope_type of {SLIDING} must be default, because positions within a "
            f"window need no scaling; got {nested[SLIDING]}"
        )
    return {"rope_theta": theta, "rope_scaling": scaling, "window_rope_theta": local}


def write_ropes_by_type(
    theta: float, scaling: Scaling | None, local: float | None
) -> dict[str, Any]:
    """Settings of a config.json for rotary positions, with other wavelengths in a window.

    The inverse of :func:`read_ropes_by_type`.
    """
    nested = {FULL: _rope(theta, scaling)}
    if local is not None:
        nested[SLIDING] = _rope(local, None)
    return write_rope(theta, scaling) | {"rope_parameters": nested}


def base_within(config: DecoderConfig) -> float | None:
    """The base of the wavelengths in blocks with a window; None if there are none."""
    return None if config.window is None else config.window_rope_theta or config.rope_theta


def read_gguf_rope(
    metadata: Mapping[str, Any], head_dim: int, divisors: np.ndarray | None
) -> dict[str, Any]:
    """Settings of a config.json for rotary positions, from the metadata of a GGUF file.

    Args:
      metadata: without the name of the architecture.
      head_dim: features of a head.
      divisors: the tensor ``rope_freqs.weight``, by which llama.cpp divides the frequencies; it
        holds what became of Llama 3.1's settings, of which the factor is the largest divisor. The
        other settings have been the same in all models, which is checked.

    Raises:
      FolderError: for another kind of scaling.
    """
    # As llama.cpp reads it: a factor without a kind is a linear one, and 0 is none.
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 0)) or 1
    kind = metadata.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise FolderError(f"rope.scaling.type must be none or linear; got {kind!r}")
    turned = metadata.get("rope.dimension_count", head_dim)
    if turned != head_dim:
        raise FolderError(f"rope.dimension_count must be head_dim = {head_dim}; got {turned}")
    theta = metadata.get("rope.freq_base", DEFAULT_THETA)
    scaling = LinearScaling(factor=factor) if kind == "linear" and factor != 1 else None
    if divisors is not None and np.any(divisors != 1):
        if scaling is not None:
            raise FolderError(f"rope.scaling.factor must be 1 with rope_freqs.weight; got {factor}")
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
