"""IBM's Granite: Llama's networks with four multipliers, which become a part of the weights."""

from __future__ import annotations

import math

from bdia_jax.interop.checkpoint import FolderError
from bdia_jax.interop.families.family import BLOCKS, Config
from bdia_jax.interop.families.llama import Llama
from bdia_jax.nn import DecoderConfig

_FACTORS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)


class Granite(Llama):
    """Granite Team, "Granite 3.0 Language Models", 2024.

    The embedding is multiplied, the updates of a block, and the products of queries and keys; the
    logits are divided. With these factors in the weights, the network is one of Llama's, and is
    written as one, unless it is to be like a folder of Granite. Where the head is the embedding,
    that stays one matrix: it takes up the embedding's factor, and the last norm what the logits
    then have too much of. A factor that is no power of 2 rounds a weight once more, so that what
    is saved may differ in the last bit; but not where a folder of bfloat16 was loaded as float32.
    """

    name = "granite"
    architecture = "GraniteForCausalLM"
    reads_gguf = False

    def has(self, config: DecoderConfig) -> bool:
        # They are Llama's.
        return False

    def read(self, c: Config) -> DecoderConfig:
        for name in _FACTORS:
            factor = c.get(name, 1.0)
            if not isinstance(factor, int | float) or not 0 < factor < math.inf:
                raise FolderError(f"config.json: {name} must be a positive number; got {factor!r}")
        return super().read(c)

    def scales(self, c: Config, tied_head: bool) -> dict[str, float]:
        embedding, update = c.get("embedding_multiplier", 1.0), c.get("residual_multiplier", 1.0)
        logits = 1 / c.get("logits_scaling", 1.0)
        # Attention divides by the root of the head's size.
        queries = c.get("attention_multiplier", 1.0) * self.head_dim(c) ** 0.5
        factors = {"attention.q": queries, "attention.out": update, "ffn.down": update}
        output = {"norm.scale": logits / embedding} if tied_head else {"head": logits}
        return {"embedding": embedding, **output} | {
            f"{BLOCKS}{layer}.{part}": factor
            for layer, factor in factors.items()
            for part in ("kernel", "bias")
        }
