"""Microsoft's Phi-3 and Phi-4: Llama's networks, of which some rotate a part of every head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bdia_jax.interop.checkpoint import Checkpoint, FolderError
from bdia_jax.interop.families.family import BLOCKS, Config, Names, Source, spans
from bdia_jax.interop.families.llama import PLAIN, Llama
from bdia_jax.interop.families.windows import read_windows
from bdia_jax.nn import DecoderConfig

_QKV = ("attention.q", "attention.k", "attention.v")


class Phi3(Llama):
    """Abdin et al., "Phi-3 Technical Report", 2024: matrices that are used together are one."""

    name = "phi3"
    architecture = "Phi3ForCausalLM"

    def details(self, c: Config) -> dict[str, bool]:
        return PLAIN

    def write_details(self, config: DecoderConfig) -> dict[str, Any]:
        return {}

    def windows(self, c: Config) -> dict[str, Any]:
        # Its models with layer types are of other architectures.
        window = c.get("sliding_window")
        return read_windows(c, window, usual=(window is not None,) * c["num_hidden_layers"])

    def write_windows(self, config: DecoderConfig) -> dict[str, Any]:
        return {"sliding_window": config.window}

    def head_dim(self, c: Config) -> int:
        return c["hidden_size"] // c["num_attention_heads"]

    def has(self, config: DecoderConfig) -> bool:
        return super().has(config) and config.heads * config.size_of_head == config.width

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        written = super().write(config)
        del written["head_dim"]
        return written

    def layout(self, config: DecoderConfig, names: Names | None) -> dict[str, Source]:
        layout, block = super().layout(config, names), "model.layers.{}."
        queries, keys = (
            heads * config.size_of_head for heads in (config.heads, config.num_kv_heads)
        )
        hidden = config.hidden or 4 * config.width
        for theirs, sizes in (
            ("self_attn.qkv_proj", dict(zip(_QKV, (queries, keys, keys)))),
            ("mlp.gate_up_proj", {"ffn.gate": hidden, "ffn.up": hidden}),
        ):
            for name, span in zip(sizes, spans(*sizes.values())):
                layout[f"{BLOCKS}{name}.kernel"] = Source(
                    f"{block}{theirs}.weight", transposed=True, span=span
                )
        return layout

    def read_gguf(self, metadata: Mapping[str, Any], tensors: Checkpoint) -> dict[str, Any]:
        raise FolderError("GGUF files of Phi-3 are not read; give a folder of transformers")
