"""What backward passes share that finish the gradient of one block at a time, last block first.

What becomes of a block's gradient is one of two objects with the same four methods,
:class:`Accumulate` and :class:`UpdateInPlace`; a pass carries what ``start`` returns from block to
block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, PyTree

from bdia_jax.adjoints import BackwardReport
from bdia_jax.arguments import Inputs, Scan
from bdia_jax.pinning import reduce_to
from bdia_jax.trees import is_none, partition


class Accumulate(NamedTuple):
    """The gradients of all blocks, stacked."""

    params: PyTree[Array]
    """Stacked: the leaves that a gradient is asked for, None elsewhere."""

    def start(self) -> PyTree[Array]:
        return jax.tree.map(jnp.zeros_like, self.params)

    def read(self, stacked: PyTree[Array], k) -> tuple[PyTree[Array], PyTree[Array]]:
        """What is carried, and the parameters of block k."""
        return stacked, read(self.params, k)

    def write(self, stacked: PyTree[Array], k, d_params: PyTree[Array]) -> PyTree[Array]:
        return write(stacked, d_params, k)

    def finish(self, stacked: PyTree[Array]) -> tuple[PyTree, PyTree, PyTree]:
        """The cotangents of ``params``, ``update_params`` and ``update_state``."""
        return stacked, None, None


class UpdateInPlace(NamedTuple):
    """New parameters, by an :class:`bdia_jax.Update`, in the place of the old ones.

    What is written is what the block above left behind, and only then the next block is read.
    Written at once, it would be fused with what reads the old values of all blocks, and XLA would
    copy those.
    """

    function: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    params: PyTree[Array]
    state: PyTree[Array]
    blocks: int

    def start(self) -> tuple[PyTree, PyTree]:
        """All parameters and states; and what of them is still to be written."""
        stacked = self.params, self.state
        return stacked, read(stacked, self.blocks - 1)

    def read(self, carried: tuple[PyTree, PyTree], k) -> tuple[tuple[PyTree, PyTree], PyTree]:
        stacked, pending = carried
        stacked = write(stacked, pending, jnp.minimum(k + 1, self.blocks - 1))
        old = read(stacked, k)
        return (stacked, old), old[0]

    def write(self, carried: tuple[PyTree, PyTree], k, d_params: PyTree[Array]):
        stacked, (params, state) = carried
        return stacked, self.function(params, d_params, state)

    def finish(self, carried: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree, PyTree]:
        stacked, pending = carried
        return None, *write(stacked, pending, 0)


def read(stacked: PyTree[Array], k) -> PyTree[Array]:
    """The part of block k."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, k, keepdims=False), stacked)


def write(stacked: PyTree[Array], part: PyTree[Array], k) -> PyTree[Array]:
    """``stacked``, with another part of block k."""
    return jax.tree.map(lambda a, new: lax.dynamic_update_index_in_dim(a, new, k, 0), stacked, part)


def plus(a: PyTree[Array], b: PyTree[Array]) -> PyTree[Array]:
    """The sum of two trees in which None stands for zeros, in the dtypes of ``a``."""

    def of(a, b):
        if a is None or b is None:
            return b if a is None else a
        return a + b.astype(a.dtype)

    return jax.tree.map(of, a, b, is_leaf=is_none)


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


def with_derivative(primal, forward, backward) -> Callable[[Inputs], tuple[Array, Array]]:
    """``primal`` as a function that is differentiated by the other two, once, in reverse mode.

    ``forward`` is given, beside the inputs, those of their leaves that a gradient is asked for.
    """
    run = jax.custom_vjp(primal)

    def forward_rule(primals):
        inputs, wanted = perturbed(primals)
        return forward(once(inputs), wanted)

    run.defvjp(
        forward_rule,
        lambda saved, cotangents: (backward(saved, cotangents),),
        symbolic_zeros=True,
    )
    return run


class Wanted(NamedTuple):
    """Parameters and constants, split into those that a gradient is asked for and the others.

    Trees in which None stands for what the other one has.
    """

    params: PyTree[Array]
    fixed_params: PyTree[Array]
    consts: PyTree[Array]
    fixed_consts: PyTree[Array]

    @classmethod
    def of(cls, inputs: Inputs, wanted: Inputs | None) -> Wanted:
        """``wanted`` as :func:`with_derivative` gives it; None for no gradient at all."""
        if wanted is None:
            no = lambda tree: jax.tree.map(lambda _: False, tree)  # noqa: E731
            wanted = inputs._replace(params=no(inputs.params), consts=no(inputs.consts))
        consts = partition(inputs.consts, wanted.consts)
        if inputs.update_params is not None:
            return cls(inputs.update_params, inputs.params, *consts)
        return cls(*partition(inputs.params, wanted.params), *consts)

    def read_by(self, part, params, k):
        """What a part of block k reads, of ``params`` (those of the block) and of all others."""
        some = partition(params, part.params)[0], partition(self.fixed_params, part.params)[0]
        consts = (partition(c, part.consts)[0] for c in (self.consts, self.fixed_consts))
        return (some[0], read(some[1], k)), tuple(consts)


class Cotangents(NamedTuple):
    """What the scan down takes from block to block, besides the states."""

    a_next: Float[Array, "batch *shape"]
    """Of a step's output."""
    a: Float[Array, "batch *shape"] | None
    """Of its input, as far as it came by the steps above; None for zeros."""
    consts: PyTree[Array]
    params: Any
    """What becomes of the blocks' gradients: carried by an object of :mod:`bdia_jax.gradients`."""


def gradient_of(scan: Scan, wanted: Wanted, update_state) -> Accumulate | UpdateInPlace:
    """What becomes of the blocks' gradients."""
    if scan.update is None:
        return Accumulate(wanted.params)
    return UpdateInPlace(scan.update, wanted.params, update_state, scan.blocks)


def no_gradient(params: PyTree[Array]) -> PyTree[None]:
    """Zeros, to which the gradients of a block's parts are added: None for every leaf."""
    return jax.tree.map(lambda _: None, params)


def zeros_for(d_params: PyTree[Array], params: PyTree[Array]) -> PyTree[Array]:
    """The gradient, with zeros for parameters that no part reads."""
    return jax.tree.map(
        lambda d, p: jnp.zeros_like(p) if d is None and p is not None else d,
        d_params,
        params,
        is_leaf=is_none,
    )


def zeros_of_consts(wanted: Wanted) -> PyTree[Array]:
    """Where cotangents of constants are summed up: in float32 at least."""
    return jax.tree.map(
        lambda c: jnp.zeros_like(c, jnp.float32 if c.dtype.itemsize < 4 else c.dtype),
        wanted.consts,
    )


def cotangents_of_inputs(gradient, wanted: Wanted, c: Cotangents, report: BackwardReport) -> Inputs:
    """What a backward pass returns."""
    d_params, d_update_params, d_update_state = gradient.finish(c.params)
    # Under shard_map every device saw its samples alone; the report is on all of them.
    reductions = (lax.psum, lax.psum, lax.pmax)
    report = BackwardReport(
        *(reduce_to(frozenset(), counts, r) for counts, r in zip(report, reductions))
    )
    return Inputs(
        d_params,
        jax.tree.map(lambda d, const: d.astype(const.dtype), c.consts, wanted.consts),
        None,
        None,
        jnp.zeros_like(c.a_next) if c.a is None else c.a,
        c.a_next,
        report,
        d_update_params,
        d_update_state,
    )


def perturbed(primals: PyTree[CustomVJPPrimal]) -> tuple[PyTree[Array], PyTree[bool]]:
    """The values of what a forward rule is given; and of which a gradient is asked for."""
    is_primal = lambda leaf: isinstance(leaf, CustomVJPPrimal)  # noqa: E731
    values = jax.tree.map(lambda leaf: leaf.value, primals, is_leaf=is_primal)
    return values, jax.tree.map(lambda leaf: leaf.perturbed, primals, is_leaf=is_primal)


def is_zero(cotangent) -> bool:
    """Whether a cotangent is zero at trace time."""
    return isinstance(cotangent, SymbolicZero)
