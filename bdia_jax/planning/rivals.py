"""Other ways to keep the inputs of blocks, to compare with: what runs the blocks of a stack.

Both run the standard network, and are differentiated by ``jax.checkpoint``.
"""

from __future__ import annotations

import functools
import math

import jax
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from bdia_jax.nn.stack import ReversibleStack

INPUT = "input of a block"


class Rival(nnx.Module):
    """Stands where a stack was."""

    def __init__(self, stack: ReversibleStack):
        self.stack = stack

    def blocks(self, consts, key):
        """One block as ``step(x, (params, key)) -> (x + h(x), None)``; and what to scan over."""
        block, params = self.stack.functional()
        assert callable(block), "parts are steps, which only a stack takes"
        keys = None if key is None else jax.random.split(key, self.stack.depth)

        def step(x, inputs):
            params, key = inputs
            return x + block(params, x, key, *consts), None

        return step, (params, keys)


class Nested(Rival):
    """√K groups of blocks: states between groups are kept; a group is run again, then its blocks.

    Source: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016.
    """

    def __call__(self, x, *consts, key=None):
        """The standard network."""
        depth = self.stack.depth
        size = next(s for s in range(math.isqrt(depth), 0, -1) if depth % s == 0)
        step, inputs = self.blocks(consts, key)
        groups = jax.tree.map(lambda p: p.reshape(depth // size, size, *p.shape[1:]), inputs)

        @jax.checkpoint
        def group(x, inputs):
            return lax.scan(jax.checkpoint(step), x, inputs)

        return lax.scan(group, x, groups)[0]


class InHostMemory(Rival):
    """The inputs of blocks wait in the memory of the host, and are copied there and back.

    For a GPU or a TPU.
    """

    def __call__(self, x, *consts, key=None):
        """The standard network."""
        step, inputs = self.blocks(consts, key)
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )

        @functools.partial(jax.checkpoint, policy=policy)
        def kept(x, inputs):
            return step(checkpoint_name(x, INPUT), inputs)

        return lax.scan(kept, x, inputs)[0]
