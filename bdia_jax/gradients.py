"""What backward passes share that finish the gradient of one block at a time, last block first.

What becomes of a block's gradient is one of two objects with the same four methods,
:class:`Accumulate` and :class:`UpdateInPlace`; a pass carries what ``start`` returns from block to
block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, PyTree

from bdia_jax.adjoints import BackwardReport
from bdia_jax.arguments import Inputs, Leaves, Scan
from bdia_jax.pinning import reduce_to


class Accumulate(NamedTuple):
    """The gradients of all blocks, stacked."""

    params: Leaves
    """Stacked: those that a gradient is asked for."""

    def start(self) -> Leaves:
        return jax.tree.map(jnp.zeros_like, self.params)

    def read(self, stacked: PyTree[Array], k) -> tuple[PyTree[Array], PyTree[Array]]:
        """What is carried, and the parameters of block k."""
        return stacked, read(self.params, k)

    def write(self, stacked: PyTree[Array], k, d_params: Leaves) -> PyTree[Array]:
        return write(stacked, d_params, k)

    def finish(self, stacked: PyTree[Array]) -> tuple[PyTree, PyTree, PyTree]:
        """The cotangents of ``params``, ``update_params`` and ``update_state``."""
        return stacked, None, None


class UpdateInPlace(NamedTuple):
    """New parameters, by an :class:`bdia_jax.Update`, in the place of the old ones.

    Leaves that are not updated get their gradient as without an update.

    What is written is what the block above left behind, and only then the next block is read.
    Written at once, it would be fused with what reads the old values of all blocks, and XLA would
    copy those.
    """

    function: Callable[[Leaves, Leaves, PyTree], tuple[Leaves, PyTree]]
    params: Leaves
    state: PyTree[Array]
    blocks: int
    others: Accumulate

    def start(self) -> tuple[PyTree, PyTree, PyTree]:
        """All parameters and states; what of them is still to be written; other gradients."""
        stacked = self.params, self.state
        return stacked, read(stacked, self.blocks - 1), self.others.start()

    def read(self, carried: tuple[PyTree, PyTree, PyTree], k) -> tuple[PyTree, PyTree]:
        stacked, pending, others = carried
        stacked = write(stacked, pending, jnp.minimum(k + 1, self.blocks - 1))
        old = read(stacked, k)
        others, fixed = self.others.read(others, k)
        return (stacked, old, others), old[0] | fixed

    def write(self, carried: tuple[PyTree, PyTree, PyTree], k, d_params: Leaves):
        stacked, (params, state), others = carried
        d_updated, d_others = split(d_params, params)
        new = self.function(params, d_updated, state)
        return stacked, new, self.others.write(others, k, d_others)

    def finish(self, carried: tuple[PyTree, PyTree, PyTree]) -> tuple[PyTree, PyTree, PyTree]:
        stacked, pending, others = carried
        d_others, *_ = self.others.finish(others)
        return d_others, *write(stacked, pending, 0)


def read(stacked: PyTree[Array], k) -> PyTree[Array]:
    """The part of block k."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, k, keepdims=False), stacked)


def write(stacked: PyTree[Array], part: PyTree[Array], k) -> PyTree[Array]:
    """``stacked``, with another part of block k."""
    return jax.tree.map(lambda a, new: lax.dynamic_update_index_in_dim(a, new, k, 0), stacked, part)


def plus(a: Leaves, b: Leaves) -> Leaves:
    """The sum, in the dtypes of ``a``; leaves that are missing are zeros."""
    return a | {i: a[i] + d.astype(a[i].dtype) if i in a else d for i, d in b.items()}


def once(tree: PyTree[Array]) -> PyTree[Array]:
    """``tree``; an error if it is differentiated.

    For the inputs of a derivative rule, which are differentiated only if the whole is
    differentiated twice. Integers in between would make that 0, without a word.
    """

    def of(leaf):
        return _once_p.bind(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(of, tree)


# A primitive, because a rule of jax.custom_jvp is lost when a scan is differentiated twice.
_once_p = Primitive("differentiated_once")
_once_p.def_impl(lambda x: x)
_once_p.def_abstract_eval(lambda x: x)
batching.defvectorized(_once_p)
mlir.register_lowering(_once_p, lambda context, x: [x])


def _twice(primals, tangents):
    raise TypeError(
        "a scan with Online() or Checkpoint() can be differentiated once, in reverse mode: use "
        "adjoint=Direct() for second derivatives (jax.hessian, gradient penalties, grad of grad)"
    )


ad.primitive_jvps[_once_p] = _twice


def with_derivative(
    scan: Scan, up: Callable, down: Callable
) -> Callable[[Inputs], tuple[Array, Array]]:
    """A scan as a function that is differentiated by its two passes, once, in reverse mode.

    Args:
      scan: what is static.
      up: ``up(scan, inputs, wanted)``: the output, and what is saved for the way back. ``wanted``
        says of which inputs a gradient is asked for; None where there is no way back.
      down: ``down(scan, saved, cotangents)``: the cotangents of the inputs.
    """
    run = jax.custom_vjp(lambda inputs: up(scan, inputs, None)[0])

    def forward(primals):
        inputs, wanted = perturbed(primals)
        return up(scan, once(inputs), wanted)

    def backward(saved, cotangents):
        return (down(scan, saved, cotangents),)

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


class Wanted(NamedTuple):
    """Parameters and constants, split into those that a gradient is asked for and the others."""

    params: Leaves
    updated: Leaves
    """Parameters that an update trains."""
    fixed_params: Leaves
    consts: Leaves
    fixed_consts: Leaves

    @classmethod
    def of(cls, inputs: Inputs, wanted: Inputs | None) -> Wanted:
        """``wanted`` as :func:`with_derivative` gives it; None for no gradient at all."""
        params, consts = ({}, {}) if wanted is None else (wanted.params, wanted.consts)
        params, consts = ({i for i, yes in some.items() if yes} for some in (params, consts))
        params, fixed = split(inputs.params, params)
        return cls(params, inputs.update_params or {}, fixed, *split(inputs.consts, consts))

    def read_by(self, part, params, k):
        """What a part of block k reads, of ``params`` (those of the block) and of all others."""
        some, fixed = (split(leaves, part.params)[0] for leaves in (params, self.fixed_params))
        consts = (split(leaves, part.consts)[0] for leaves in (self.consts, self.fixed_consts))
        return (some, read(fixed, k)), tuple(consts)


class Cotangents(NamedTuple):
    """What the scan down takes from block to block, besides the states."""

    a_next: Float[Array, "batch *shape"]
    """Of a step's output."""
    a: Float[Array, "batch *shape"] | None
    """Of its input, as far as it came by the steps above; None for zeros."""
    consts: Leaves
    params: Any
    """What becomes of the blocks' gradients: carried by an object of :mod:`bdia_jax.gradients`."""


def gradient_of(scan: Scan, wanted: Wanted, update_state) -> Accumulate | UpdateInPlace:
    """What becomes of the blocks' gradients."""
    stacked = Accumulate(wanted.params)
    if scan.update is None:
        return stacked
    return UpdateInPlace(scan.update, wanted.updated, update_state, scan.blocks, stacked)


def split(leaves: Leaves, some: Collection[int]) -> tuple[Leaves, Leaves]:
    """Some of the leaves, and the others."""
    return (
        {i: leaf for i, leaf in leaves.items() if i in some},
        {i: leaf for i, leaf in leaves.items() if i not in some},
    )


def filled(d_params: Leaves, params: Leaves) -> Leaves:
    """The gradient, with zeros for parameters that no part reads."""
    return {i: d_params[i] if i in d_params else jnp.zeros_like(p) for i, p in params.items()}


def zeros_of_consts(wanted: Wanted) -> Leaves:
    """Where cotangents of constants are summed up: in float32 at least."""
    return jax.tree.map(
        lambda c: jnp.zeros_like(c, jnp.float32 if c.dtype.itemsize < 4 else c.dtype),
        wanted.consts,
    )


def cotangents_of_inputs(gradient, wanted: Wanted, c: Cotangents, report: BackwardReport) -> Inputs:
    """What a backward pass returns."""
    d_params, d_update_params, d_update_state = gradient.finish(c.params)
    d_consts = {i: d.astype(wanted.consts[i].dtype) for i, d in c.consts.items()}
    # Under shard_map every device saw its samples alone; the report is on all of them.
    reductions = (lax.psum, lax.psum, lax.pmax)
    report = BackwardReport(
        *(reduce_to(frozenset(), counts, r) for counts, r in zip(report, reductions))
    )
    return Inputs(
        _with_none(d_params, wanted.fixed_params),
        _with_none(d_consts, wanted.fixed_consts),
        None,
        None,
        jnp.zeros_like(c.a_next) if c.a is None else c.a,
        c.a_next,
        report,
        d_update_params,
        d_update_state,
    )


def _with_none(cotangents: Leaves, fixed: Leaves) -> Any:
    """With None for the leaves that no gradient is asked for."""
    return dict.fromkeys(fixed) | cotangents


def perturbed(primals: PyTree[CustomVJPPrimal]) -> tuple[PyTree[Array], PyTree[bool]]:
    """The values of what a forward rule is given; and of which a gradient is asked for."""
    is_primal = lambda leaf: isinstance(leaf, CustomVJPPrimal)  # noqa: E731
    values = jax.tree.map(lambda leaf: leaf.value, primals, is_leaf=is_primal)
    return values, jax.tree.map(lambda leaf: leaf.perturbed, primals, is_leaf=is_primal)


def is_zero(cotangent) -> bool:
    """Whether a cotangent is zero at trace time."""
    return isinstance(cotangent, SymbolicZero)
