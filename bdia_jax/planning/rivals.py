"""Nested checkpoints, to compare with: they run the blocks instead of a stack."""

from __future__ import annotations

import math

import jax
from flax import nnx
from jax import lax

from bdia_jax.nn.stack import ReversibleStack


class Nested(nnx.Module):
    """√K groups of blocks: states between groups are kept; a group is run again, then its blocks.

    The standard network, differentiated by ``jax.checkpoint``. Source: Chen, Xu, Zhang, Guestrin,
    "Training Deep Nets with Sublinear Memory Cost", 2016.
    """

    def __init__(self, stack: ReversibleStack):
        self.stack = stack

    def __call__(self, x, *consts, key=None):
        """The output of the last block."""
        block, params = self.stack.functional()
        assert callable(block), "parts are steps, which only a stack takes"
        depth = self.stack.depth
        size = next(s for s in range(math.isqrt(depth), 0, -1) if depth % s == 0)
        keys = None if key is None else jax.random.split(key, depth)
        groups = jax.tree.map(
            lambda p: p.reshape(depth // size, size, *p.shape[1:]), (params, keys)
        )

        @jax.checkpoint
        def step(x, inputs):
            params, key = inputs
            return x + block(params, x, key, *consts), None

        @jax.checkpoint
        def group(x, inputs):
            return lax.scan(step, x, inputs)

        return lax.scan(group, x, groups)[0]
