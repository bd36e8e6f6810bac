"""An update of a stack's blocks in the backward pass, for one call."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.extend.core import get_opaque_trace_state

from bdia_jax.adjoints import Update


class Updates:
    """An update, for one call in the trace in which it was installed."""

    def __init__(self, update: Update, trace: Any):
        self.update, self.trace, self.called = update, trace, False

    def of_blocks(self, stacked_params: tuple[nnx.State, nnx.State]) -> Update:
        """For blocks that are functions of a pair, of parameters and other variables.

        Raises:
          ValueError: at the second call, or in another trace.
        """
        reason = "; new values of its blocks would be summed as if they were gradients"
        if self.called:
            raise ValueError(
                "a stack whose blocks are updated in the backward pass can be called once; it is "
                "called a second time" + reason
            )
        if get_opaque_trace_state() != self.trace:
            raise ValueError(
                "a stack whose blocks are updated in the backward pass must be called where "
                "updates() was; it is called in another trace (of jax.lax.scan, jax.vmap, "
                "jax.checkpoint or jax.jit)" + reason
            )
        self.called = True

        def function(params, d_params, state):
            new, state = self.update.function(params[0], d_params[0], state)
            return (new, params[1]), state

        untrained = jax.tree.map(lambda _: None, stacked_params[1])
        return Update(function, (self.update.params, untrained), self.update.state)
