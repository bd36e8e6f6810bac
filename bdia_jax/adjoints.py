"""How a scan over blocks is differentiated: an adjoint, as an object.

====================  ===========================================  =============================
adjoint               keeps, per element and step                  when
====================  ===========================================  =============================
:class:`Online`       m + r bits                                   the default: steps are undone
:class:`Checkpoint`   the block's input: 16 or 32 bits             steps that cannot be undone
:class:`Direct`       all that the block's derivative reads        small networks, jvp, Hessians
====================  ===========================================  =============================

All three differentiate the same forward pass. Online and Checkpoint compute a block again in the
backward pass, one block at a time, so that both can take an optimizer's step of a block as soon as
its gradient is known (:class:`Update`), and report what the backward pass saw
(:class:`BackwardReport`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bdia_jax.memories import Memory


class BackwardReport(NamedTuple):
    """What the backward pass saw, per block: float32 of shape ``[blocks]`` each.

    Give :meth:`zeros` to an adjoint as ``probe`` and differentiate with respect to it: its
    "gradient" is the report. With :class:`Checkpoint`, which takes nothing back, it is all zeros.
    """

    mismatched: Float[Array, "blocks"]
    """Samples whose reconstructed state is not that of the forward pass."""
    corrected: Float[Array, "blocks"]
    """Roundings that came out differently, and that the tolerance bits corrected."""
    deviation: Float[Array, "blocks"]
    """The largest correction, in grid steps. Of several calls with one probe, JAX adds them up."""

    @classmethod
    def zeros(cls, blocks: int) -> BackwardReport:
        return cls(*(jnp.zeros(blocks, jnp.float32) for _ in cls._fields))


class Update(NamedTuple):
    """Uses a block's gradient as soon as it is known, in the backward pass.

    The stacked gradient then never exists. Instead, the "gradients" with respect to ``params`` and
    ``state`` are their new values. For one scan of a loss, once: new values of two calls, of the
    rounds of a loop, of ``jax.vmap`` over samples, or of the devices of a ``jax.shard_map`` without
    ``check_vma``, would be summed as if they were gradients. What has no gradient has zeros for new
    values: do not take those of a scan that the loss does not depend on, or that is in a branch of
    ``jax.lax.cond`` which is not taken.
    """

    function: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    """``function(params_k, d_params_k, state_k)`` returns new parameters and state of one block:
    an optimizer's step, for instance."""
    params: PyTree[Float[Array, "blocks ..."]]
    """The parameters that are trained: ``stacked_params``, with None for leaves that are not. The
    blocks take these leaves from here, and there is no gradient by them in ``stacked_params``. The
    other leaves have theirs as usual, stacked."""
    state: PyTree[Float[Array, "blocks ..."]]
    """Floating-point arrays with a leading block axis, such as an optimizer's moments."""


@dataclasses.dataclass(frozen=True)
class Online:
    """Online back-propagation: every step is taken back, to the last bit.

    It keeps the last two states and, per step, m + r bits per element and a checksum per sample.
    A state that is not reconstructed exactly turns the gradients from that block down into NaN.
    Reverse mode only, and once: differentiating twice is an error.

    Needs a step with an inverse: :class:`bdia_jax.BDIA` with γ = 2^-m, or
    :class:`bdia_jax.Midpoint`, on the grid.

    Args:
      probe: :meth:`BackwardReport.zeros`, for a report.
      update: how a block's gradient is used at once; None to return the gradient.
      keep_in: where the bits are kept. With "host", nothing on the device grows with the depth, and
        m + r bits per element and step are copied to the host and back.
      narrow_cotangents: whether the two cotangents are kept, between blocks, in the dtype that the
        blocks see, rather than in float32. The states are as exact as before. With bfloat16,
        gradients are rounded once more per block, and the loop holds 4 bytes per element less.

    Source: Zhang, Lewis, Kleijn, ICML 2025 (arXiv 2407.09093).
    """

    probe: BackwardReport | None = None
    update: Update | None = None
    keep_in: Memory = "device"
    narrow_cotangents: bool = False

    def __post_init__(self):
        _check_memory(self.keep_in)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The input of every block is kept, and the block computed again (``jax.checkpoint``).

    For any step. Reverse mode only, and once: differentiating twice is an error.

    Args:
      bits: None to keep inputs as they are. Otherwise each is rounded to so many bits, 2 … 8, with
        a scale per 64 features: the forward pass is exact, the gradient is that at the rounded
        inputs. For ``Euler()`` without a grid.
      probe, update: as in :class:`Online`.
      keep_in: where the inputs are kept, "device" or "host".

    Sources: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016. For
    ``bits``: Chen et al., "ActNN", ICML 2021.
    """

    bits: int | None = None
    probe: BackwardReport | None = None
    update: Update | None = None
    keep_in: Memory = "device"

    def __post_init__(self):
        _check_memory(self.keep_in)
        whole = hasattr(self.bits, "__index__") and not isinstance(self.bits, bool)
        if self.bits is not None:
            if not (whole and 2 <= self.bits <= 8):
                raise ValueError(f"bits must be an int in 2 … 8, or None; got {self.bits!r}")
            object.__setattr__(self, "bits", self.bits.__index__())


@dataclasses.dataclass(frozen=True)
class Direct:
    """Plain automatic differentiation of the same forward pass, straight through the rounding.

    For any step. Has the forward mode and second derivatives, as far as the block has them; the
    reference for tests.
    """


Adjoint = Online | Checkpoint | Direct


def _check_memory(keep_in: Memory) -> None:
    if keep_in not in get_args(Memory):
        raise ValueError(f"keep_in must be one of {', '.join(get_args(Memory))}; got {keep_in!r}")
