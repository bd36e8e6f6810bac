"""Hugging Face's SmolLM3: Llama's networks, of which some blocks do not rotate queries and keys."""

from __future__ import annotations

from typing import Any

from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.families.family import Config
from bdia_jax.interop.families.llama import Llama
from bdia_jax.interop.families.windows import layer_types, read_windows
from bdia_jax.nn import DecoderConfig


class SmolLM3(Llama):
    """Bakouch et al., "SmolLM3: smol, multilingual, long-context reasoner", 2025.

    Without ``no_rope_layers``, every fourth block does not rotate.
    """

    name = "smollm3"
    architecture = "SmolLM3ForCausalLM"
    reads_gguf = False
    usual_theta = 2_000_000.0

    def read(self, c: Config) -> DecoderConfig:
        return super().read({"num_key_value_heads": 4, "tie_word_embeddings": True, **c})

    def rope(self, c: Config) -> dict[str, Any]:
        rotated = self._rotated(c)
        return super().rope(c) | {"rotated": None if all(rotated) else rotated}

    def write_rope(self, config: DecoderConfig) -> dict[str, Any]:
        rotated = (True,) * config.depth if config.rotated is None else config.rotated
        return super().write_rope(config) | {"no_rope_layers": [int(turned) for turned in rotated]}

    def windows(self, c: Config) -> dict[str, Any]:
        window = c.get("sliding_window") if c.get("use_sliding_window") else None
        usual = tuple(window is not None and not turned for turned in self._rotated(c))
        return read_windows(c, window, usual)

    def write_windows(self, config: DecoderConfig) -> dict[str, Any]:
        return {
            "use_sliding_window": config.window is not None,
            "sliding_window": config.window,
            "layer_types": layer_types(config),
        }

    def _rotated(self, c: Config) -> tuple[bool, ...]:
        """Which blocks rotate; 0 in ``no_rope_layers`` is one that does not."""
        depth, every = c["num_hidden_layers"], c.get("no_rope_layer_interval", 4)
        given = c.get("no_rope_layers")
        if given is None:
            return tuple((i + 1) % every != 0 for i in range(depth))
        if len(given) < depth:
            raise FolderError(
                f"config.json: no_rope_layers must have an entry for each of num_hidden_layers = "
                f"{depth}; got {len(given)}"
            )
        return tuple(bool(turned) for turned in given[:depth])
