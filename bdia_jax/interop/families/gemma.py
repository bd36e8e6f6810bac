"""Google's Gemma: a scaled embedding, norms by 1 + their weights, gates of GELU; windows, caps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.families.family import Config, Names, Source, expect
from bdia_jax.interop.families.llama import Llama
from bdia_jax.interop.families.rotary import (
    DEFAULT_THETA,
    base_within,
    read_ropes_by_type,
    write_ropes_by_type,
)
from bdia_jax.interop.families.windows import layer_types, read_windows
from bdia_jax.nn import DecoderConfig

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Gemma(Llama):
    """Gemma Team, "Gemma: Open Models Based on Gemini Research and Technology", 2024.

    The embedding is multiplied by the root of the width, norms by 1 + their weights.
    """

    name = "gemma"
    architecture = "GemmaForCausalLM"
    reads_gguf = False
    usual_head_dim = 256
    # An old name, which means the tanh form here, too.
    activation = ("gelu_pytorch_tanh", "gelu_new", "gelu")
    usual: ClassVar[dict[str, Any]] = {"tie_word_embeddings": True}
    """What configurations leave out, where it is not what Llama's leave out."""

    def read(self, c: Config) -> DecoderConfig:
        # The newest version of transformers does not read it.
        expect(c, "hidden_activation", (None, *self.activation[:2]), None)
        return super().read({**self.usual, **c})

    def details(self, c: Config) -> dict[str, Any]:
        bias = c.get("attention_bias", False)
        return {
            "qkv_bias": bias,
            "out_bias": bias,
            "ffn_bias": False,
            "feed_forward": "geglu",
            "zero_centered_norm": True,
            "embedding_scale": c["hidden_size"] ** 0.5,
        }

    def write_details(self, config: DecoderConfig) -> dict[str, Any]:
        return {"attention_bias": config.qkv_bias}


class Gemma2(Gemma):
    """Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size", 2024.

    Norms before and after each sublayer, a window in every other block, soft caps of the scores of
    attention and of the logits.
    """

    name = "gemma2"
    architecture = "Gemma2ForCausalLM"
    activation = ("gelu_pytorch_tanh", "gelu_new")
    activation_name = "hidden_activation"
    norms: ClassVar[Mapping[str, str]] = {
        "attention_norm": "input_layernorm",
        "attention_update_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_update_norm": "post_feedforward_layernorm",
    }
    usual: ClassVar[dict[str, Any]] = {
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }

    def details(self, c: Config) -> dict[str, Any]:
        scalar, dim = c["query_pre_attn_scalar"], self.head_dim(c)
        if scalar != int(scalar) or scalar < 1:
            raise FolderError(
                f"config.json: query_pre_attn_scalar must be a whole number >= 1; got {scalar!r}"
            )
        return super().details(c) | {
            "norm_place": "both",
            "attention_scale": None if scalar == dim else scalar**-0.5,
            "attention_cap": c["attn_logit_softcapping"],
            "logit_cap": c["final_logit_softcapping"],
        }

    def write_details(self, config: DecoderConfig) -> dict[str, Any]:
        scale = config.attention_scale
        return super().write_details(config) | {
            # A whole number in transformers.
            "query_pre_attn_scalar": config.size_of_head if scale is None else round(scale**-2),
            "attn_logit_softcapping": config.attention_cap,
            "final_logit_softcapping": config.logit_cap,
        }

    def every(self, c: Config) -> int:
        """One block of so many has no window, the last one."""
        return 2

    def windows(self, c: Config) -> dict[str, Any]:
        every = self.every(c)
        usual = tuple(bool((i + 1) % every) for i in range(c["num_hidden_layers"]))
        return read_windows(c, c["sliding_window"], usual)

    def write_windows(self, config: DecoderConfig) -> dict[str, Any]:
        # transformers needs a size also where no block has a window.
        window = config.window or config.max_length
        return {"sliding_window": window, "layer_types": layer_types(config)}


class Gemma3(Gemma2):
    """Gemma Team, "Gemma 3 Technical Report", 2025: its text models, and the decoder of the others.

    Five blocks of six have a window and short wavelengths; queries and keys are normalized.
    """

    name = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    usual_theta = 1_000_000.0
    usual: ClassVar[dict[str, Any]] = Gemma2.usual | {
        "num_attention_heads": 8,
        "max_position_embeddings": 131_072,
        "vocab_size": 262_208,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window_pattern": 6,
    }

    def read(self, c: Config) -> DecoderConfig:
        # The network of transformers does not use it.
        expect(c, "attn_logit_softcapping", (None,), None)
        return super().read(c)

    def details(self, c: Config) -> dict[str, Any]:
        return super().details(c) | {"qk_norm": True}

    def every(self, c: Config) -> int:
        return c["sliding_window_pattern"]

    def rope(self, c: Config) -> dict[str, Any]:
        local = c.get("rope_local_base_freq")
        found = read_ropes_by_type(c, self.usual_theta, local, usual_local=DEFAULT_THETA)
        return found | ({} if self.windows(c)["window"] else {"window_rope_theta": None})

    def write_rope(self, config: DecoderConfig) -> dict[str, Any]:
        local = base_within(config)
        found = write_ropes_by_type(config.rope_theta, config.rope_scaling, local)
        return found | {"rope_local_base_freq": local}


class Gemma3WithImages(Gemma3):
    """The decoder of those that see images, too: the rest of the folder is left alone.

    It is written as a text model, unless what is written are low-rank updates: they have the names
    that their layers have in the whole network.
    """

    name = "gemma3"
    architecture = "Gemma3ForConditionalGeneration"
    others = ("vision_tower.", "multi_modal_projector.")

    def has(self, config: DecoderConfig) -> bool:
        # They are those of the text models.
        return False

    def alone(self, c: Config) -> Config:
        tokens = {name: c[name] for name in _TOKENS if name in c}
        of_text = {"model_type": Gemma3.name, "architectures": [Gemma3.architecture]}
        return tokens | c["text_config"] | of_text | {"tie_word_embeddings": True}

    def read(self, c: Config) -> DecoderConfig:
        expect(c, "tie_word_embeddings", (True,), True)
        return super().read(self.alone(c))

    def layout(self, config: DecoderConfig, names: Names | None) -> dict[str, Source]:
        # What files call the layers, and what the network itself does, and with it peft.
        prefix = "model.language_model." if names is None else "language_model.model."
        return {
            ours: source._replace(name=prefix + source.name.removeprefix("model."))
            for ours, source in super().layout(config, names).items()
        }
