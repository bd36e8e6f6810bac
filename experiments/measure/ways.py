"""Ways to train, for measurements: those of plans, and one that only measurements know."""

from __future__ import annotations

from flax import nnx

from bdia_jax import coupling
from bdia_jax.nn import DecoderConfig, ReversibleStack, ViTConfig
from bdia_jax.planning import ways
from bdia_jax.planning.ways import PARTS, Way
from measure.networks import Network, Stack

BASES = ("standard", "checkpointed", "BDIA, parts")
"""The ways that the times of the others are compared with."""


class RevNet(nnx.Module):
    """The parts of the blocks update two streams in turns; their mean goes on.

    Another network than the standard one (:mod:`bdia_jax.coupling`). Of blocks that are given
    ``x`` alone.
    """

    def __init__(self, stack: ReversibleStack):
        self.stack = stack

    def __call__(self, x, *consts, key):
        """Streams in float32, as the inverse needs."""
        parts, params = self.stack.functional()
        first, second = (
            lambda params, stream, key, part=part: part(
                params, stream.astype(x.dtype), key, *(None for _ in consts)
            )
            for part in parts
        )
        a, b = coupling.coupled_scan(first, second, params, (x.astype("float32"),) * 2, key=key)
        return ((a + b) / 2).astype(x.dtype)


WAYS: dict[str, Way] = ways.WAYS | {"RevNet": Way("standard", PARTS, by=RevNet)}


def ways_for(network: Network | Stack, *, gradient: bool = False) -> dict[str, Way]:
    """The ways in which a network can be trained.

    Args:
      network: what is trained.
      gradient: only those that differ in loss and gradient, without an optimizer.
    """
    config = getattr(network, "config", None)
    decoder = isinstance(config, DecoderConfig)

    def possible(way: Way) -> bool:
        if way.chunks and not decoder:
            return False
        if way.by is not None:
            # Of one stack; rotary angles are an argument that RevNet does not take.
            takes_x = isinstance(config, ViTConfig) or (decoder and config.positions == "learned")
            return takes_x if way.by is RevNet else takes_x or decoder
        return not (gradient and way.update_in_backward)

    return {name: way for name, way in WAYS.items() if possible(way)}
