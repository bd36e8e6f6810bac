"""EleutherAI's GPT-NeoX and Pythia: attention and feed-forward network side by side."""

from __future__ import annotations

from typing import Any, Literal

from bdia_jax.interop.checkpoint import FolderError
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
from bdia_jax.interop.families.rotary import (
    DEFAULT_THETA,
    read_rope,
    read_share,
    write_rope,
    write_share,
)
from bdia_jax.nn import DecoderConfig

_LINEAR = {
    "attention.out": ("attention.dense", "out_bias"),
    "ffn.up": ("mlp.dense_h_to_4h", "ffn_bias"),
    "ffn.down": ("mlp.dense_4h_to_h", "ffn_bias"),
}
_NORMS = {
    "norm": "final_layer_norm",
    f"{BLOCKS}attention_norm": "layers.{}.input_layernorm",
    f"{BLOCKS}ffn_norm": "layers.{}.post_attention_layernorm",
}
_ACTIVATIONS: dict[str, Literal["gelu", "exact_gelu"]] = {
    "gelu": "exact_gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
}
_OLD_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


class NeoX(Family):
    """Biderman et al., "Pythia", 2023: layer norm, biases, a part of every head is rotated."""

    name = "gpt_neox"
    architecture = "GPTNeoXForCausalLM"
    head = "embed_out.weight"
    as_many_heads = True
    reads_gguf = False

    def read(self, c: Config) -> DecoderConfig:
        expect(c, "hidden_act", tuple(_ACTIVATIONS), "gelu")
        for name, old in _OLD_NAMES.items():
            if c.get(name) is not None and c.get(old) is None and not c.get("rope_parameters"):
                raise FolderError(
                    f"config.json: {old} must be given, because transformers does not read {name} "
                    f"in this architecture; got {name} = {c[name]!r}"
                )
            value = agree({old: c.get(old), name: c.get(name)})
            c = c if value is None else {**c, name: value}
        width, heads = c["hidden_size"], c["num_attention_heads"]
        theta, scaling = read_rope(c, DEFAULT_THETA, partial=True)
        turned = int(width // heads * read_share(c, usual=0.25))
        bias = c.get("attention_bias", True)
        return DecoderConfig(
            vocab_size=c["vocab_size"],
            max_length=c["max_position_embeddings"],
            width=width,
            depth=c["num_hidden_layers"],
            heads=heads,
            hidden=c["intermediate_size"],
            norm_epsilon=c.get("layer_norm_eps", 1e-5),
            positions="rotary",
            rope_theta=theta,
            rope_scaling=scaling,
            rotary_dim=None if turned == width // heads else turned,
            parallel=c.get("use_parallel_residual", True),
            feed_forward=_ACTIVATIONS[c.get("hidden_act", "gelu")],
            qkv_bias=bias,
            out_bias=bias,
            tied_head=c.get("tie_word_embeddings", False),
        )

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        share = write_share(config.turned, config.size_of_head)
        rope = write_rope(config.rope_theta, config.rope_scaling)
        rope["rope_parameters"]["partial_rotary_factor"] = share
        return {
            "max_position_embeddings": config.max_length,
            "hidden_size": config.width,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads,
            "intermediate_size": config.hidden or 4 * config.width,
            "layer_norm_eps": config.norm_epsilon,
            "hidden_act": "gelu" if config.feed_forward == "exact_gelu" else "gelu_new",
            "use_parallel_residual": config.parallel,
            "attention_bias": config.qkv_bias,
            "rotary_emb_base": config.rope_theta,
            "rotary_pct": share,
            **rope,
        }

    def layout(self, config: DecoderConfig, names: Names | None) -> dict[str, Source]:
        layout = {"embedding": Source("gpt_neox.embed_in.weight")}
        for ours, theirs in _NORMS.items():
            layout[f"{ours}.scale"] = Source(f"gpt_neox.{theirs}.weight")
            layout[f"{ours}.bias"] = Source(f"gpt_neox.{theirs}.bias")

        def add(ours: str, theirs: str, bias: str, **place: Any) -> None:
            theirs = f"gpt_neox.layers.{{}}.{theirs}"
            layout[f"{BLOCKS}{ours}.kernel"] = Source(f"{theirs}.weight", transposed=True, **place)
            if getattr(config, bias):
                layout[f"{BLOCKS}{ours}.bias"] = Source(f"{theirs}.bias", **place)

        for ours, (theirs, bias) in _LINEAR.items():
            add(ours, theirs, bias)
        # Of every head in turn, its queries, keys and values.
        for ours, span in zip("qkv", spans(*[config.size_of_head] * 3)):
            place = {"span": span, "groups": config.heads}
            add(f"attention.{ours}", "attention.query_key_value", "qkv_bias", **place)
        return layout
