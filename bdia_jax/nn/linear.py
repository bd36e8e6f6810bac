"""The product of linear layers, whose derivative by the kernel has the layout of the kernel."""

from __future__ import annotations

import jax
from jax import lax
from jaxtyping import Array, Float

from bdia_jax.gradients import is_zero
from bdia_jax.pinning import alike


def product(
    x: Float[Array, "*batch inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*batch outputs"]:
    """``x kernel``, whose derivative by the kernel is ``xᵀ d``; differentiable in reverse mode.

    JAX by itself computes ``(dᵀ x)ᵀ``. A compiler for CPUs copies the left factor, together with
    all that leads to it, and the result; of a hidden layer those are the larger arrays. For GPUs
    both forms are one call.
    """
    return _product(*alike(x, kernel))


@jax.custom_vjp
def _product(x, kernel):
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _forward(x, kernel):
    # Of a frozen kernel, x is not kept.
    kept = x.value if kernel.perturbed else None
    return _product(x.value, kernel.value), (kept, kernel.value)


def _backward(kept, d):
    x, kernel = kept
    if is_zero(d):
        return None, None
    d_x = lax.dot_general(d, kernel, (((d.ndim - 1,), (1,)), ((), ())))
    if x is None:
        return d_x, None
    positions = tuple(range(d.ndim - 1))
    # As JAX's own rule: over explicit mesh axes it has to be said, for the positions may be split.
    where = jax.typeof(kernel).sharding
    return d_x, lax.dot_general(
        x,
        d,
        ((positions, positions), ((), ())),
        out_sharding=None if where.mesh.empty else where,
    )


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def dot_general(x, kernel, *_, **__):
    """:func:`product` as the ``dot_general`` of ``flax.nnx.Linear``."""
    return product(x, kernel)
