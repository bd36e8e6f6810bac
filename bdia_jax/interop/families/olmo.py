"""Ai2's OLMo 2 and 3: norms of what the sublayers return, and of all heads of queries together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.families.family import Config
from bdia_jax.interop.families.llama import Llama
from bdia_jax.interop.families.rotary import base_within, read_ropes_by_type, write_ropes_by_type
from bdia_jax.interop.families.windows import layer_types, read_windows
from bdia_jax.nn import DecoderConfig


class Olmo2(Llama):
    """OLMo Team, "2 OLMo 2 Furious", 2024: ``x + norm(attn(x))``, without a norm before."""

    name = "olmo2"
    architecture = "Olmo2ForCausalLM"
    reads_gguf = False
    norms: ClassVar[Mapping[str, str]] = {
        "attention_update_norm": "post_attention_layernorm",
        "ffn_update_norm": "post_feedforward_layernorm",
    }

    def read(self, c: Config) -> DecoderConfig:
        return super().read({"rms_norm_eps": 1e-5, **c})

    def details(self, c: Config) -> dict[str, Any]:
        bias = c.get("attention_bias", False)
        return {
            "qkv_bias": bias,
            "out_bias": bias,
            "ffn_bias": False,
            "norm_place": "after",
            "qk_norm_whole": True,
        }

    def write_details(self, config: DecoderConfig) -> dict[str, Any]:
        return {"attention_bias": config.qkv_bias}


class Olmo3(Olmo2):
    """OLMo Team, "Olmo 3", 2025: three blocks of four have a window, in which nothing is scaled."""

    name = "olmo3"
    architecture = "Olmo3ForCausalLM"
    usual_theta = 500_000.0

    def windows(self, c: Config) -> dict[str, Any]:
        usual = tuple((i + 1) % 4 != 0 for i in range(c["num_hidden_layers"]))
        return read_windows(c, c.get("sliding_window", 4096), usual)

    def write_windows(self, config: DecoderConfig) -> dict[str, Any]:
        return {"sliding_window": config.window, "layer_types": layer_types(config)}

    def rope(self, c: Config) -> dict[str, Any]:
        theta, window = c.get("rope_theta"), self.windows(c)["window"]
        if window and not c.get("rope_parameters") and theta not in (None, self.usual_theta):
            raise FolderError(
                f"config.json: rope_parameters must say which base blocks with a window have, "
                f"because versions of transformers differ in what rope_theta alone means; got "
                f"rope_theta = {theta!r}"
            )
        found = read_ropes_by_type(c, self.usual_theta, None, self.usual_theta)
        return found | ({} if window else {"window_rope_theta": None})

    def write_rope(self, config: DecoderConfig) -> dict[str, Any]:
        return write_ropes_by_type(config.rope_theta, config.rope_scaling, base_within(config))
