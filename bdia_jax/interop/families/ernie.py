"""Baidu's ERNIE 4.5, without experts: Llama's networks, whose rotation pairs other features."""

from __future__ import annotations

from bdia_jax.interop.families.family import BLOCKS, Config, Names, Source
from bdia_jax.interop.families.llama import Llama
from bdia_jax.nn import DecoderConfig


class Ernie(Llama):
    """Baidu, "ERNIE 4.5 Technical Report", 2025.

    Features 2i and 2i + 1 of queries and keys are rotated together. With the features in another
    order the network is one of Llama's, and is written as one, unless it is to be like a folder of
    ERNIE.
    """

    name = "ernie4_5"
    architecture = "Ernie4_5ForCausalLM"
    reads_gguf = False
    usual_theta = 500_000.0

    def details(self, c: Config) -> dict[str, bool]:
        bias = bool(c.get("use_bias"))
        return {"qkv_bias": bias, "out_bias": bias, "ffn_bias": bias, "qk_norm": False}

    def write_details(self, config: DecoderConfig) -> dict[str, bool]:
        return {"use_bias": config.qkv_bias}

    def read(self, c: Config) -> DecoderConfig:
        usual = {
            "head_dim": 128,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        }
        return super().read({**usual, **c})

    def has(self, config: DecoderConfig) -> bool:
        # They are Llama's.
        return False

    def layout(self, config: DecoderConfig, names: Names | None) -> dict[str, Source]:
        layout = super().layout(config, names)
        for layer, heads in (("attention.q", config.heads), ("attention.k", config.num_kv_heads)):
            for part in ("kernel", "bias"):
                if (name := f"{BLOCKS}{layer}.{part}") in layout:
                    layout[name] = layout[name]._replace(heads=heads)
        return layout
