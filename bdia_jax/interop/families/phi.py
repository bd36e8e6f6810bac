"""Microsoft's Phi-3 and Phi-4: Llama's networks, of which some rotate a part of every head."""

from __future__ import annotations

import dataclasses
from typing import Any

from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.families.family import BLOCKS, Config, Names, Source, spans
from bdia_jax.interop.families.llama import PLAIN, Llama
from bdia_jax.interop.families.rotary import read_rope, read_share, write_rope, write_share
from bdia_jax.interop.families.windows import read_one_window
from bdia_jax.nn import DecoderConfig, LongScaling

_ORIGINAL, _USUAL_ORIGINAL = "original_max_position_embeddings", 4096
_QKV = ("attention.q", "attention.k", "attention.v")


class Phi3(Llama):
    """Abdin et al., "Phi-3 Technical Report", 2024: matrices that are used together are one.

    Phi-4-mini rotates three quarters of a head. Those of 128K tokens have two sets of factors for
    their wavelengths, and sequences as long as those of the first training, with the short factors,
    which are right for these. With a larger ``max_length`` (``load(..., max_length=131072)``), they
    have the long factors, whatever the length of a text.
    """

    name = "phi3"
    architecture = "Phi3ForCausalLM"
    reads_gguf = False

    def details(self, c: Config) -> dict[str, bool]:
        return PLAIN

    def write_details(self, config: DecoderConfig) -> dict[str, Any]:
        return {}

    def windows(self, c: Config) -> dict[str, Any]:
        return read_one_window(c, c.get("sliding_window"))

    def write_windows(self, config: DecoderConfig) -> dict[str, Any]:
        return {"sliding_window": config.window}

    def rope(self, c: Config) -> dict[str, Any]:
        # transformers has other kinds for other architectures only.
        theta, scaling = read_rope(c, self.usual_theta, ("default", "longrope"), partial=True)
        within = None if not isinstance(scaling, LongScaling) else scaling.original_length
        if c.get(_ORIGINAL) is None and within not in (None, _USUAL_ORIGINAL):
            raise FolderError(
                f"config.json: {_ORIGINAL} must not stand in rope_scaling alone, where "
                f"transformers overwrites it with {_USUAL_ORIGINAL}: give it beside it, too; got "
                f"{within}"
            )
        turned = int(self.head_dim(c) * read_share(c))
        whole = turned == self.head_dim(c)
        return {
            "rope_theta": theta,
            "rope_scaling": scaling,
            "rotary_dim": None if whole else turned,
        }

    def write_rope(self, config: DecoderConfig) -> dict[str, Any]:
        share = write_share(config.turned, config.size_of_head)
        found = write_rope(config.rope_theta, config.rope_scaling)
        found["rope_parameters"]["partial_rotary_factor"] = share
        found["partial_rotary_factor"] = share
        if isinstance(config.rope_scaling, LongScaling):
            length = config.rope_scaling.original_length
            found[_ORIGINAL] = length
        return found

    def read(self, c: Config) -> DecoderConfig:
        config = super().read({"rms_norm_eps": 1e-5, **c})
        if isinstance(config.rope_scaling, LongScaling):
            length = min(config.max_length, config.rope_scaling.original_length)
            config = dataclasses.replace(config, max_length=length)
        return config

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
