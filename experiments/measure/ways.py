"""Ways to train, for measurements: those of plans, and two that only measurements know.

``bdia_jax.planning.ways`` has the list; here are baselines that replace what runs
a network's blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
from flax import nnx
from jax import lax

from bdia_jax import coupling
from bdia_jax.nn import DecoderConfig, ReversibleStack, ViTConfig
from bdia_jax.planning import ways
from bdia_jax.planning.ways import PARTS, WHOLE, Way
from measure.networks import Network, Stack

BASES = ("standard", "checkpointed", "BDIA, parts")
"""The ways that the times of the others are compared with."""


class Grouped(nnx.Module):
    """√K groups of blocks: states between groups are kept; a group is run again, then its blocks.

    Source: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016.
    """

    def __init__(self, stack: ReversibleStack):
        self.stack = stack

    def __call__(self, x, *consts, key):
        """The standard network."""
        block, params = self.stack.functional()
        depth = self.stack.depth
        size = next(s for s in range(math.isqrt(depth), 0, -1) if depth % s == 0)
        groups = jax.tree.map(
            lambda p: p.reshape(depth // size, size, *p.shape[1:]),
            (params, jax.random.split(key, depth)),
        )

        @jax.checkpoint
        def step(x, inputs):
            params, key = inputs
            return x + block(params, x, key, *consts), None

        return lax.scan(jax.checkpoint(lambda x, inputs: lax.scan(step, x, inputs)), x, groups)[0]


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


@dataclasses.dataclass(frozen=True)
class Replaced(Way):
    """A way in which something else runs the blocks of a ViT or a decoder."""

    by: Callable[[ReversibleStack], nnx.Module] = Grouped

    def install(self, model: nnx.Module) -> None:
        """Replaces the stack."""
        model.blocks = self.by(model.blocks)


WAYS: dict[str, Way] = ways.WAYS | {
    "checkpointed √K groups": Replaced("standard", WHOLE, by=Grouped),
    "RevNet": Replaced("standard", PARTS, by=RevNet),
}


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
        if isinstance(way, Replaced):
            # Of one stack; rotary angles are an argument that RevNet does not take.
            takes_x = isinstance(config, ViTConfig) or (decoder and config.positions == "learned")
            return takes_x if way.by is RevNet else takes_x or decoder
        return not (gradient and way.update_in_backward)

    return {name: way for name, way in WAYS.items() if possible(way)}
