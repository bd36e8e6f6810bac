"""GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bdia_jax.interop.checkpoint import Checkpoint
from bdia_jax.interop.families.family import (
    BLOCKS,
    Config,
    Family,
    Names,
    Source,
    agree,
    expect,
    spans,
)
from bdia_jax.nn import DecoderConfig

_LINEAR = {
    "attention.out": "attn.c_proj",
    "ffn.up": "mlp.c_fc",
    "ffn.down": "mlp.c_proj",
}
_NORMS = {"attention_norm": "ln_1", "ffn_norm": "ln_2"}


class GPT2(Family):
    """Layer norm, learned positions, biases everywhere, one matrix for queries, keys and values."""

    name = "gpt2"
    architecture = "GPT2LMHeadModel"
    as_many_heads = True

    def read(self, c: Config) -> DecoderConfig:
        expect(c, "activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
        expect(c, "scale_attn_weights", (True,), True)
        expect(c, "scale_attn_by_inverse_layer_idx", (False,), False)
        expect(c, "add_cross_attention", (False,), False)

        def size(*names: str) -> int:
            """Transformers reads either name."""
            value = agree({name: c.get(name) for name in names})
            if value is None:
                raise KeyError(names[0])
            return value

        width = size("n_embd", "hidden_size")
        return DecoderConfig(
            vocab_size=c["vocab_size"],
            max_length=size("n_positions", "max_position_embeddings", "n_ctx"),
            width=width,
            depth=size("n_layer", "num_hidden_layers"),
            heads=size("n_head", "num_attention_heads"),
            hidden=c.get("n_inner") or 4 * width,
            norm_epsilon=c.get("layer_norm_epsilon", 1e-5),
            tied_head=c.get("tie_word_embeddings", True),
        )

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        return {
            "n_positions": config.max_length,
            "n_embd": config.width,
            "n_layer": config.depth,
            "n_head": config.heads,
            "n_inner": config.hidden or 4 * config.width,
            "layer_norm_epsilon": config.norm_epsilon,
            "activation_function": "gelu_new",
        }

    def layout(self, config: DecoderConfig, names: Names | None) -> dict[str, Source]:
        # The files of the original models were written by the network without its head.
        prefix = "transformer."
        if names is not None and "wte.weight" in names and f"{prefix}wte.weight" not in names:
            prefix = ""
        block = f"{prefix}h.{{}}."
        layout = {
            "embedding": Source(f"{prefix}wte.weight"),
            "positions": Source(f"{prefix}wpe.weight"),
            "norm.scale": Source(f"{prefix}ln_f.weight"),
            "norm.bias": Source(f"{prefix}ln_f.bias"),
        }
        for ours, theirs in _NORMS.items():
            layout[f"{BLOCKS}{ours}.scale"] = Source(f"{block}{theirs}.weight")
            layout[f"{BLOCKS}{ours}.bias"] = Source(f"{block}{theirs}.bias")
        for kind, theirs in (("kernel", "weight"), ("bias", "bias")):
            for ours, linear in _LINEAR.items():
                layout[f"{BLOCKS}{ours}.{kind}"] = Source(f"{block}{linear}.{theirs}")
            for ours, span in zip("qkv", spans(*[config.width] * 3)):
                layout[f"{BLOCKS}attention.{ours}.{kind}"] = Source(
                    f"{block}attn.c_attn.{theirs}", span=span
                )
        return layout

    def read_gguf(self, metadata: Mapping[str, Any], tensors: Checkpoint) -> dict[str, Any]:
        return {
            "n_positions": metadata["context_length"],
            "n_embd": metadata["embedding_length"],
            "n_layer": metadata["block_count"],
            "n_head": metadata["attention.head_count"],
            "n_inner": metadata["feed_forward_length"],
            "layer_norm_epsilon": metadata["attention.layer_norm_epsilon"],
            "activation_function": "gelu_new",
        }

    def from_gguf(self, name: str, tensor: np.ndarray, c: Config) -> np.ndarray:
        # llama.cpp stores [outputs, inputs] for all models; here, transformers does not.
        linear = tensor.ndim == 2 and ".h." in name
        return tensor.T if linear else tensor
