"""Llama, and those that differ from it by biases, norms of queries and keys, or a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from bdia_jax.interop.checkpoint import Checkpoint, FolderError
from bdia_jax.interop.families.family import BLOCKS, Config, Family, Names, Source, expect
from bdia_jax.interop.families.rotary import (
    DEFAULT_THETA,
    read_gguf_rope,
    read_rope,
    write_rope,
)
from bdia_jax.interop.families.windows import layer_types, read_one_window, read_windows
from bdia_jax.nn import DecoderConfig, llama

_LINEAR = {
    "attention.q": ("self_attn.q_proj", "qkv_bias"),
    "attention.k": ("self_attn.k_proj", "qkv_bias"),
    "attention.v": ("self_attn.v_proj", "qkv_bias"),
    "attention.out": ("self_attn.o_proj", "out_bias"),
    "ffn.gate": ("mlp.gate_proj", "ffn_bias"),
    "ffn.up": ("mlp.up_proj", "ffn_bias"),
    "ffn.down": ("mlp.down_proj", "ffn_bias"),
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_scale": (0,),
    **dict.fromkeys(("attention.scale", "residual_scale", "embedding_scale"), (0, 1)),
    **dict.fromkeys(("logit_scale", "use_parallel_residual"), (0, 1)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (0,)),
}
"""Metadata of GGUF files that would make other networks, and what they may be."""
PLAIN = {"qkv_bias": False, "out_bias": False, "ffn_bias": False, "qk_norm": False}


class Llama(Family):
    """Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023."""

    name = "llama"
    architecture = "LlamaForCausalLM"
    turns_neighbors: ClassVar[bool] = True
    """Whether llama.cpp rotates features 2i and 2i + 1, and reorders queries and keys for that."""
    usual_head_dim: ClassVar[int | None] = None
    """Where a configuration does not say; None for a share of the width."""
    usual_theta: ClassVar[float] = DEFAULT_THETA
    """The base of the wavelengths, where a configuration does not say."""
    norms: ClassVar[Mapping[str, str]] = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    """Names of ours, and theirs, of a block's norms."""
    activation: ClassVar[tuple[str, ...]] = ("silu", "swish")
    """What the gate's may be called; the first name is written."""
    activation_name: ClassVar[str] = "hidden_act"
    """The setting that calls it so."""
    hidden: ClassVar[str] = "intermediate_size"
    """The setting with the features of the hidden layer."""

    def details(self, c: Config) -> dict[str, Any]:
        """Settings of ours in which families differ, such as biases."""
        bias = c.get("attention_bias", False)
        ffn_bias = c.get("mlp_bias", False)
        return {"qkv_bias": bias, "out_bias": bias, "ffn_bias": ffn_bias, "qk_norm": False}

    def write_details(self, config: DecoderConfig) -> dict[str, Any]:
        """Settings of ``transformers``: the inverse of :meth:`details`."""
        return {"attention_bias": config.qkv_bias, "mlp_bias": config.ffn_bias}

    def head_dim(self, c: Config) -> int:
        """Features of a head."""
        width = c["hidden_size"] // c["num_attention_heads"]
        return c.get("head_dim") or self.usual_head_dim or width

    def windows(self, c: Config) -> dict[str, Any]:
        """Settings of ours: the window of attention, and which blocks have it."""
        return read_windows(c, None, usual=(False,) * c["num_hidden_layers"])

    def write_windows(self, config: DecoderConfig) -> dict[str, Any]:
        """Settings of ``transformers``: the inverse of :meth:`windows`."""
        return {}

    def rope(self, c: Config) -> dict[str, Any]:
        """Settings of ours: of rotary positions."""
        theta, scaling = read_rope(c, self.usual_theta)
        return {"rope_theta": theta, "rope_scaling": scaling}

    def write_rope(self, config: DecoderConfig) -> dict[str, Any]:
        """Settings of ``transformers``: the inverse of :meth:`rope`."""
        return write_rope(config.rope_theta, config.rope_scaling)

    def read(self, c: Config) -> DecoderConfig:
        expect(c, self.activation_name, self.activation, self.activation[0])
        expect(c, "pretraining_tp", (1, None), 1)
        return llama(
            vocab_size=c["vocab_size"],
            max_length=c["max_position_embeddings"],
            width=c["hidden_size"],
            depth=c["num_hidden_layers"],
            heads=c["num_attention_heads"],
            kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            head_dim=self.head_dim(c),
            hidden=c[self.hidden],
            norm_epsilon=c.get("rms_norm_eps", 1e-6),
            tied_head=c.get("tie_word_embeddings", False),
            **self.rope(c),
            **self.windows(c),
            **self.details(c),
        )

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        return {
            "max_position_embeddings": config.max_length,
            "hidden_size": config.width,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.size_of_head,
            self.hidden: config.hidden or 4 * config.width,
            "rms_norm_eps": config.norm_epsilon,
            self.activation_name: self.activation[0],
            **self.write_details(config),
            **self.write_windows(config),
            **self.write_rope(config),
        }

    def layout(self, config: DecoderConfig, names: Names | None) -> dict[str, Source]:
        block = "model.layers.{}."
        layout = {
            "embedding": Source("model.embed_tokens.weight"),
            "norm.scale": Source("model.norm.weight"),
        }
        for ours, theirs in self.norms.items():
            layout[f"{BLOCKS}{ours}.scale"] = Source(f"{block}{theirs}.weight")
        for ours, (theirs, bias) in _LINEAR.items():
            layout[f"{BLOCKS}{ours}.kernel"] = Source(f"{block}{theirs}.weight", transposed=True)
            if getattr(config, bias):
                layout[f"{BLOCKS}{ours}.bias"] = Source(f"{block}{theirs}.bias")
        if config.qk_norm or config.qk_norm_whole:
            for name in ("q_norm", "k_norm"):
                layout[f"{BLOCKS}attention.{name}.scale"] = Source(
                    f"{block}self_attn.{name}.weight"
                )
        return layout

    def read_gguf(self, metadata: Mapping[str, Any], tensors: Checkpoint) -> dict[str, Any]:
        for name, allowed in _NEUTRAL.items():
            if (value := metadata.get(name, allowed[0])) not in allowed:
                told = " or ".join(map(str, allowed))
                raise FolderError(f"{name} must be {told}; got {value}")
        width, heads = metadata["embedding_length"], metadata["attention.head_count"]
        head_dim = metadata.get("attention.key_length", width // heads)
        if (of_values := metadata.get("attention.value_length", head_dim)) != head_dim:
            raise FolderError(
                f"attention.value_length must be {head_dim}, the size of a key; got {of_values}"
            )
        divisors = "rope_freqs.weight"
        return {
            "max_position_embeddings": metadata["context_length"],
            "hidden_size": width,
            "num_hidden_layers": metadata["block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": metadata.get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": metadata["feed_forward_length"],
            "rms_norm_eps": metadata["attention.layer_norm_rms_epsilon"],
            "hidden_act": "silu",
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in tensors,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in tensors,
            **read_gguf_rope(
                metadata, head_dim, tensors.get(divisors) if divisors in tensors else None
            ),
        }

    def from_gguf(self, name: str, tensor: np.ndarray, c: Config) -> np.ndarray:
        if not self.turns_neighbors:
            return tensor
        if ".q_proj." in name:
            heads = c["num_attention_heads"]
        elif ".k_proj." in name:
            heads = c["num_key_value_heads"]
        else:
            return tensor
        # Rows [head, pair, member] become [head, member, pair]: ours are i and i + dim/2.
        pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
        return pairs.swapaxes(1, 2).reshape(tensor.shape)


class Mistral(Llama):
    """Jiang et al., "Mistral 7B", 2023: some attend within a window, in all blocks."""

    name = "mistral"
    architecture = "MistralForCausalLM"

    def details(self, c: Config) -> dict[str, Any]:
        return PLAIN

    def write_details(self, config: DecoderConfig) -> dict[str, Any]:
        return {}

    def windows(self, c: Config) -> dict[str, Any]:
        return read_one_window(c, c.get("sliding_window", 4096))

    def write_windows(self, config: DecoderConfig) -> dict[str, Any]:
        return {"sliding_window": config.window}


class _Qwen(Llama):
    """Where some blocks have a window, transformers' default are all from one on."""

    turns_neighbors = False

    def windows(self, c: Config) -> dict[str, Any]:
        # What transformers takes where the size is missing.
        window = c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
        first = c.get("max_window_layers", 28)
        usual = tuple(window is not None and i >= first for i in range(c["num_hidden_layers"]))
        return read_windows(c, window, usual)

    def write_windows(self, config: DecoderConfig) -> dict[str, Any]:
        if config.window is None:
            return {}
        return {
            "use_sliding_window": True,
            "sliding_window": config.window,
            "layer_types": layer_types(config),
        }


class Qwen2(_Qwen):
    """Yang et al., "Qwen2 Technical Report", 2024: queries, keys and values have biases."""

    name = "qwen2"
    architecture = "Qwen2ForCausalLM"

    def details(self, c: Config) -> dict[str, bool]:
        return {"qkv_bias": True, "out_bias": False, "ffn_bias": False, "qk_norm": False}

    def write_details(self, config: DecoderConfig) -> dict[str, bool]:
        return {}


class Qwen3(_Qwen):
    """Yang et al., "Qwen3 Technical Report", 2025: queries and keys are normalized."""

    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    usual_head_dim = 128

    def details(self, c: Config) -> dict[str, bool]:
        bias = c.get("attention_bias", False)
        return {"qkv_bias": bias, "out_bias": bias, "ffn_bias": False, "qk_norm": True}

    def write_details(self, config: DecoderConfig) -> dict[str, bool]:
        return {"attention_bias": config.qkv_bias}


class SeedOss(Llama):
    """ByteDance's Seed-OSS, 2025: queries, keys and values have biases, the way back has none."""

    name = "seed_oss"
    architecture = "SeedOssForCausalLM"
    reads_gguf = False
    usual_head_dim = 128

    def details(self, c: Config) -> dict[str, bool]:
        return {
            "qkv_bias": c.get("attention_bias", True),
            "out_bias": c.get("attention_out_bias", False),
            "ffn_bias": c.get("mlp_bias", False),
            "qk_norm": False,
        }

    def write_details(self, config: DecoderConfig) -> dict[str, bool]:
        return {
            "attention_bias": config.qkv_bias,
            "attention_out_bias": config.out_bias,
            "mlp_bias": config.ffn_bias,
        }
