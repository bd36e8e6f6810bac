"""The product of linear layers, whose derivative by the kernel has the layout of the kernel."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.extend.core.primitives import dot_general_p
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from bdia_jax.pinning import alike


def product(
    x: Float[Array, "*batch inputs"],
    kernel: Float[Array, "inputs outputs"],
    precision: Any = None,
) -> Float[Array, "*batch outputs"]:
    """``x kernel``, whose derivative by the kernel is ``xᵀ d``.

    JAX by itself computes ``(dᵀ x)ᵀ``. A compiler for CPUs copies the left factor, together with
    all that leads to it, and the result; of a hidden layer those are the larger arrays. For GPUs
    both forms are one call.

    ``precision`` is that of ``jax.lax.dot_general``, of all three products; None for
    ``jax.default_matmul_precision``.
    """
    if precision is None:
        # Here, not where the program is lowered: by then, a context has been left.
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore
    return _product_p.bind(*alike(x, kernel), precision=precision)


def dot_general(
    x, kernel, dimension_numbers, precision=None, preferred_element_type=None, out_sharding=None
):
    """:func:`product` as the ``dot_general`` of ``flax.nnx.Linear``."""
    if preferred_element_type is not None or out_sharding is not None:
        raise ValueError(
            "preferred_element_type and out_sharding must be None; got "
            f"{preferred_element_type} and {out_sharding}"
        )
    if dimension_numbers != _sums(x.ndim):
        raise ValueError(
            f"dimension_numbers must be {_sums(x.ndim)}, those of a linear layer; got "
            f"{dimension_numbers}"
        )
    return product(x, kernel, precision)


def _product(x, kernel, *, precision):
    return lax.dot_general(x, kernel, _sums(x.ndim), precision=precision)


def _sums(ndim: int):
    """Over the last axis of x, and the first of the kernel."""
    return ((ndim - 1,), (0,)), ((), ())


def _shape(x, kernel, *, precision):
    del precision
    options = {"precision": None, "preferred_element_type": None, "out_sharding": None}
    return dot_general_p.abstract_eval(x, kernel, dimension_numbers=_sums(x.ndim), **options)[0]


def _d_x(d, x, kernel, *, precision):
    del x
    return lax.dot_general(d, kernel, (((d.ndim - 1,), (1,)), ((), ())), precision=precision)


def _d_kernel(d, x, kernel, *, precision):
    positions = tuple(range(d.ndim - 1))
    # As JAX's own rule: over explicit mesh axes it has to be said, for the positions may be split.
    where = kernel.aval.sharding
    return lax.dot_general(
        x,
        d,
        ((positions, positions), ((), ())),
        precision=precision,
        out_sharding=None if where.mesh.empty else where,
    )


def _batched(arguments, axes, *, precision):
    return jax.vmap(functools.partial(_product, precision=precision), axes)(*arguments), 0


_product_p = Primitive("product")
_product_p.def_impl(_product)
_product_p.def_abstract_eval(_shape)
mlir.register_lowering(_product_p, mlir.lower_fun(_product, multiple_results=False))
batching.primitive_batchers[_product_p] = _batched
# Bilinear: all derivatives, in both modes, follow from its transposes.
ad.defbilinear(_product_p, _d_x, _d_kernel)
