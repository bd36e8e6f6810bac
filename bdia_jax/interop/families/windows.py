"""Which blocks attend within a window, as configurations of ``transformers`` say it."""

from __future__ import annotations

from typing import Any

from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.families.family import Config
from bdia_jax.nn import DecoderConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(c: Config, window: int | None, usual: tuple[bool, ...]) -> dict[str, Any]:
    """Settings of ours: ``window`` and ``windowed``.

    Args:
      c: contents of a config.json.
      window: how many tokens are in it; None for a network without.
      usual: which blocks have it, where ``layer_types`` are not given.

    Raises:
      FolderError: for other layer types, or another number of them.
    """
    given, allowed = c.get("layer_types"), (FULL,) if window is None else (FULL, SLIDING)
    if given is not None:
        if other := set(given) - set(allowed):
            raise FolderError(
                f"config.json: layer_types must be {' or '.join(allowed)}; got "
                f"{', '.join(sorted(other))}"
            )
        if len(given) != c["num_hidden_layers"]:
            raise FolderError(
                f"config.json: layer_types must have an entry for each of num_hidden_layers = "
                f"{c['num_hidden_layers']}; got {len(given)}"
            )
        usual = tuple(kind == SLIDING for kind in given)
    if not any(usual):
        return {"window": None, "windowed": None}
    return {"window": window, "windowed": None if all(usual) else usual}


def read_one_window(c: Config, window: int | None) -> dict[str, Any]:
    """Settings of ours, ``window`` and ``windowed``, of architectures with a window in all blocks.

    Raises:
      FolderError: for layer types that differ, which transformers ignores in them.
    """
    found = read_windows(c, window, usual=(window is not None,) * c["num_hidden_layers"])
    if found["windowed"] is not None or (window is not None and found["window"] is None):
        raise FolderError(
            f"config.json: with sliding_window = {window}, layer_types must be {SLIDING}, because "
            f"transformers ignores them in this architecture; got {', '.join(c['layer_types'])}"
        )
    return found


def layer_types(config: DecoderConfig) -> list[str]:
    """The ``layer_types`` of a config.json, a name for every block."""
    every = (config.window is not None,) * config.depth
    return [SLIDING if within else FULL for within in config.windowed or every]
