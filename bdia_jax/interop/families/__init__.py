"""Families of networks: a file, or a class of one, for each; and the table of them."""

from __future__ import annotations

from typing import Any

from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.families.ernie import Ernie
from bdia_jax.interop.families.experts import Mixtral, OlmoExperts, Qwen3Experts
from bdia_jax.interop.families.family import (
    Config,
    Family,
    Names,
    Source,
    agree,
    check_types,
    expect,
    reading,
)
from bdia_jax.interop.families.gemma import Gemma, Gemma2, Gemma3, Gemma3WithImages
from bdia_jax.interop.families.gpt2 import GPT2
from bdia_jax.interop.families.granite import Granite
from bdia_jax.interop.families.llama import Llama, Mistral, Qwen2, Qwen3, SeedOss
from bdia_jax.interop.families.neox import NeoX
from bdia_jax.interop.families.olmo import Olmo2, Olmo3
from bdia_jax.interop.families.phi import Phi3
from bdia_jax.interop.families.smollm import SmolLM3
from bdia_jax.nn import DecoderConfig

FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        *(GPT2(), Llama(), Qwen2(), Qwen3(), Mistral(), SeedOss(), Phi3()),
        *(NeoX(), Granite(), Ernie(), SmolLM3(), Olmo2(), Olmo3()),
        *(Mixtral(), Qwen3Experts(), OlmoExperts()),
        *(Gemma(), Gemma2(), Gemma3(), Gemma3WithImages()),
    )
}
NORM_AFTER_SUM = (
    *("albert", "bart", "bert", "bert-generation", "big_bird", "blenderbot-small", "camembert"),
    *("convbert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "fsmt", "layoutlm"),
    *("led", "longformer", "marian", "mpnet", "openai-gpt", "roberta", "roformer", "xlm"),
    *("xlm-roberta", "xlnet"),
)
"""Values of model_type of networks that normalize the sum of a state and its update."""
NORM_OF_UPDATE = ("exaone4", "glm4")
"""Those of networks that normalize an update before they add it, and are not known here yet."""

__all__ = [
    "FAMILIES",
    "Family",
    "Names",
    "Source",
    "family_of",
    "layout",
    "named",
    "read",
    "write",
]


def named(c: Config) -> Family:
    """The family that a config.json names.

    Raises:
      FolderError: if there is none.
    """
    name = c.get("model_type")
    if not isinstance(name, str):
        raise FolderError(f"model_type must be one of {', '.join(FAMILIES)}; got {name!r}")
    # Of OPT, one size has its norms there.
    of_opt = name == "opt" and not c.get("do_layer_norm_before", True)
    if name in NORM_AFTER_SUM or of_opt:
        raise FolderError(
            f"a block of {name} is norm(x + h(x)), not x + h(x): the norm after the sum loses what "
            "an inverse would need, so such networks cannot be trained reversibly; model_type must "
            f"be one of {', '.join(FAMILIES)}"
        )
    if name in NORM_OF_UPDATE:
        raise FolderError(
            f"a block of {name} is x + norm(h(x)), which has an inverse, but its names and "
            f"settings are not known here yet; model_type must be one of {', '.join(FAMILIES)}"
        )
    if name not in FAMILIES:
        raise FolderError(f"model_type must be one of {', '.join(FAMILIES)}; got {name!r}")
    return FAMILIES[name]


def family_of(config: DecoderConfig) -> Family:
    """The first family that has such networks.

    Raises:
      ValueError: if there is none.
    """
    for family in FAMILIES.values():
        if family.has(config):
            return family
    raise ValueError(f"no family of {', '.join(FAMILIES)} has such networks; got {config}")


def read(c: Config) -> DecoderConfig:
    """The configuration that a config.json holds.

    Raises:
      FolderError: for another architecture, settings that there is no equivalent of, or that
        contradict each other.
    """
    if quantized := c.get("quantization_config") or c.get("quantization"):
        kind = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise FolderError(
            f"the weights are quantized ({kind or quantized}); only those that are not can be "
            "read: give the folder that they were made from"
        )
    family = named(c)
    agree({name: c.get(name) for name in ("dtype", "torch_dtype")})
    with reading(family.name):
        _check_architectures(family, c)
        for part in (c, family.alone(c)):
            # With another value, transformers has every position attend to all, in all families.
            expect(part, "is_causal", (True, None), True)
            expect(part, "use_bidirectional_attention", (False, None), None)
        config = family.read(c)
        check_types(config)
        return config


def _check_architectures(family: Family, c: Config) -> None:
    classes = c.get("architectures") or [family.architecture]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise FolderError(f"config.json: architectures must be a list of names; got {classes!r}")
    prefix = family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel").lower()
    if not any(name.lower().startswith(prefix) for name in classes):
        raise FolderError(
            f"config.json contradicts itself: model_type is {family.name!r}, architectures is "
            f"{', '.join(classes)}"
        )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The contents of a config.json, from a configuration: the inverse of :func:`read`.

    Raises:
      ValueError: if no family has such networks.
    """
    return family_of(config).whole(config)


def layout(
    family: Family, config: DecoderConfig, names: Names | None, c: Config
) -> dict[str, Source]:
    """Where every parameter is found: :meth:`Family.layout`, the head, and what is rewritten.

    Args:
      family, config, names: as of :meth:`Family.layout`.
      c: the contents of config.json.
    """
    found = family.layout(config, names)
    if not config.tied_head:
        found["head"] = Source(family.head)
    scales = family.scales(c, config.tied_head)
    return {name: source._replace(scale=scales.get(name, 1.0)) for name, source in found.items()}
