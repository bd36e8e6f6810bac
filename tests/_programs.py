"""What a traced program computes."""

import jax
import jax.extend
from jax.interpreters.partial_eval import dce_jaxpr


def products_of(function, *given):
    """The matrix products of a function's program, but for those whose result nobody needs."""
    program = jax.make_jaxpr(function)(*given).jaxpr
    needed, _ = dce_jaxpr(program, [True] * len(program.outvars))
    return [e for e in equations(needed) if e.primitive.name == "dot_general"]


def equations(jaxpr):
    """Those of a program, and of all programs in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)
