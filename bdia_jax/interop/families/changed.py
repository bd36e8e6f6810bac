"""Families that are a Llama once their weights are changed: scaled, or in another order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bdia_jax.interop.checkpoint import Checkpoint, FolderError
from bdia_jax.interop.families.family import BLOCKS, Config, Names, Source
from bdia_jax.interop.families.llama import Llama
from bdia_jax.nn import DecoderConfig

_MULTIPLIERS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)


class Granite(Llama):
    """IBM's Granite 3, 2024: a Llama with four multipliers, which its weights take up.

    Where the head is the embedding, that matrix takes up the multiplier of embeddings, and the last
    norm what the logits have too much of: so it stays one matrix.

    As float32, a weight is back after loading and saving but for its last bit; to the bit if the
    multiplier is a power of two, or if it was bfloat16 or float16 in the folder and is so again.
    """

    name = "granite"
    architecture = "GraniteForCausalLM"

    def write_details(self, config: DecoderConfig) -> dict[str, Any]:
        plain = dict.fromkeys(_MULTIPLIERS, 1.0)
        plain["attention_multiplier"] = config.size_of_head**-0.5
        return super().write_details(config) | plain

    def read(self, c: Config) -> DecoderConfig:
        for name in _MULTIPLIERS:
            value = c.get(name, 1.0)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise FolderError(f"config.json: {name} must be a positive number; got {value!r}")
        return super().read(c)

    def layout(self, config: DecoderConfig, names: Names | None, c: Config) -> dict[str, Source]:
        layout = super().layout(config, names, c)
        embedding, attention, residual, logits = (c.get(name, 1.0) for name in _MULTIPLIERS)
        scales = {
            "embedding": embedding,
            "norm.scale": 1 / (logits * embedding if config.tied_head else logits),
        }
        for name, scale in {
            # Our attention divides the products of queries and keys by √head_dim.
            "attention.q": attention * math.sqrt(config.size_of_head),
            "attention.out": residual,
            "ffn.down": residual,
        }.items():
            scales |= {f"{BLOCKS}{name}.{kind}": scale for kind in ("kernel", "bias")}
        return {
            name: source._replace(scale=scales.get(name, 1.0)) for name, source in layout.items()
        }

    def read_gguf(self, metadata: Mapping[str, Any], tensors: Checkpoint) -> dict[str, Any]:
        raise FolderError("GGUF files of Granite are not read; give a folder of transformers")


class Ernie45(Llama):
    """Baidu's "ERNIE 4.5 Technical Report", 2025, the dense ones: neighbors are rotated.

    Features 2i and 2i + 1 of a head's queries and keys are turned by one angle; here, these are i
    and i + head_dim/2.
    """

    name = "ernie4_5"
    architecture = "Ernie4_5ForCausalLM"
    usual_theta = 500_000.0

    def details(self, c: Config) -> dict[str, bool]:
        bias = bool(c.get("use_bias"))
        return {"qkv_bias": bias, "out_bias": bias, "ffn_bias": bias, "qk_norm": False}

    def write_details(self, config: DecoderConfig) -> dict[str, bool]:
        return {"use_bias": config.qkv_bias}

    def read(self, c: Config) -> DecoderConfig:
        usual = {
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        }
        return super().read(usual | dict(c))

    def layout(self, config: DecoderConfig, names: Names | None, c: Config) -> dict[str, Source]:
        turned = {f"{BLOCKS}attention.{x}.{kind}" for x in "qk" for kind in ("kernel", "bias")}
        return {
            name: source._replace(pairs=config.size_of_head) if name in turned else source
            for name, source in super().layout(config, names, c).items()
        }

    def read_gguf(self, metadata: Mapping[str, Any], tensors: Checkpoint) -> dict[str, Any]:
        raise FolderError("GGUF files of Ernie 4.5 are not read; give a folder of transformers")
