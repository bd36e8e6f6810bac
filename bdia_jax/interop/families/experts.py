"""Families with mixtures of experts: Mixtral, Qwen 3's and OLMoE."""

from __future__ import annotations

from typing import Any, ClassVar

from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.families.family import BLOCKS, Config, Names, Source, agree, expect
from bdia_jax.interop.families.llama import PLAIN, Llama, Mistral, Qwen3
from bdia_jax.interop.families.windows import read_one_window
from bdia_jax.nn import DecoderConfig


class _Experts(Llama):
    """Llama's networks, where a router picks some feed-forward networks for each position.

    The loss that balances the experts is not added: ``transformers`` adds it on request only.
    """

    reads_gguf = False
    usual_experts: ClassVar[int]
    """How many there are, where a configuration does not say."""
    sublayer: ClassVar[str] = "mlp"
    """What they are called in a block."""
    matrices: ClassVar[dict[str, str]] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    """Ours and theirs, of an expert."""

    def normalized(self, c: Config) -> bool:
        """Whether the shares of the experts that are picked sum up to 1."""
        return c.get("norm_topk_prob", False)

    def details(self, c: Config) -> dict[str, Any]:
        experts = agree({name: c.get(name) for name in ("num_experts", "num_local_experts")})
        experts = self.usual_experts if experts is None else experts
        return super().details(c) | {
            "experts": experts,
            "experts_per_token": c["num_experts_per_tok"],
            "normalized_shares": self.normalized(c),
        }

    def write_details(self, config: DecoderConfig) -> dict[str, Any]:
        return super().write_details(config) | {
            "num_experts": config.experts,
            "num_local_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "norm_topk_prob": config.normalized_shares,
        }

    def has(self, config: DecoderConfig) -> bool:
        return config.experts is not None and super().has(config)

    def layout(self, config: DecoderConfig, names: Names | None) -> dict[str, Source]:
        layout, block = super().layout(config, names), f"model.layers.{{}}.{self.sublayer}"
        for ours, theirs in self.matrices.items():
            del layout[f"{BLOCKS}ffn.{ours}.kernel"]
            layout[f"{BLOCKS}ffn.{ours}"] = Source(
                f"{block}.experts.{{}}.{theirs}.weight", transposed=True, experts=config.experts
            )
        layout[f"{BLOCKS}ffn.router"] = Source(f"{block}.gate.weight", transposed=True)
        return layout


class Mixtral(_Experts, Mistral):
    """Jiang et al., "Mixtral of Experts", 2024."""

    name = "mixtral"
    architecture = "MixtralForCausalLM"
    usual_theta = 1e6
    usual_experts = 8
    sublayer = "block_sparse_moe"
    matrices: ClassVar = {"gate": "w1", "up": "w3", "down": "w2"}

    def normalized(self, c: Config) -> bool:
        return True

    def windows(self, c: Config) -> dict[str, Any]:
        return super().windows({"sliding_window": None, **c})

    def read(self, c: Config) -> DecoderConfig:
        usual = {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "num_experts_per_tok": 2}
        return super().read({**usual, **c})


_QWEN = {"num_experts_per_tok": 8, "num_key_value_heads": 4, "moe_intermediate_size": 768}


class Qwen3Experts(_Experts, Qwen3):
    """Yang et al., "Qwen3 Technical Report", 2025: experts in every block."""

    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    hidden = "moe_intermediate_size"
    usual_head_dim = None
    usual_experts = 128

    def windows(self, c: Config) -> dict[str, Any]:
        # One for all blocks, whatever else is said.
        window = c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
        return read_one_window(c, window)

    def write_windows(self, config: DecoderConfig) -> dict[str, Any]:
        if config.window is None:
            return {}
        return {"use_sliding_window": True, "sliding_window": config.window}

    def read(self, c: Config) -> DecoderConfig:
        if c.get("mlp_only_layers"):
            raise FolderError(
                f"config.json: mlp_only_layers must be empty; got {c['mlp_only_layers']}"
            )
        expect(c, "decoder_sparse_step", (1,), 1)
        return super().read({**_QWEN, **c})


class OlmoExperts(_Experts):
    """Muennighoff et al., "OLMoE", 2024: norms of all heads of queries together."""

    name = "olmoe"
    architecture = "OlmoeForCausalLM"
    usual_experts = 64

    def details(self, c: Config) -> dict[str, Any]:
        expect(c, "clip_qkv", (None,), None)
        bias = c.get("attention_bias", False)
        found = super().details(c) | PLAIN
        return found | {"qkv_bias": bias, "out_bias": bias, "qk_norm_whole": True}

    def write_details(self, config: DecoderConfig) -> dict[str, Any]:
        return super().write_details(config) | {"attention_bias": config.qkv_bias}

    def read(self, c: Config) -> DecoderConfig:
        return super().read({"rms_norm_eps": 1e-5, "num_experts_per_tok": 8, **c})
