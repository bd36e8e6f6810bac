"""The γ of a model's stacks: set, or chosen by what the model tolerates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from bdia_jax import gamma
from bdia_jax.adjoints import Adjoint, Direct
from bdia_jax.checks import check_combination
from bdia_jax.nn.settings import ReversibleSettings
from bdia_jax.nn.stack import ReversibleStack
from bdia_jax.steps import BDIA, Step


def reversible_stacks(model: nnx.Module) -> Iterator[ReversibleStack]:
    """The stacks of a model."""
    return (m for _, m in nnx.iter_modules(model) if isinstance(m, ReversibleStack))


def set_step(model: nnx.Module, step: Step, adjoint: Adjoint | None = None) -> None:
    """Gives all stacks of a model this step, in place; and this adjoint, if one is given.

    A model's configuration, if it has one, gets γ, signs and bits of the grid, too.
    """
    for stack in reversible_stacks(model):
        check_combination(step, adjoint or stack.adjoint)
        stack.step, stack.adjoint = step, adjoint or stack.adjoint
    config = getattr(model, "config", None)
    if isinstance(step, BDIA) and isinstance(config, ReversibleSettings):
        values = {name: getattr(step, name) for name in ("gamma", "signs", "frac_bits")}
        setattr(model, "config", dataclasses.replace(config, **values))  # noqa: B010


def choose_gamma(
    model: nnx.Module,
    loss: Callable[..., Float[Array, ""]],
    arguments: Iterable[tuple],
    **options: Any,
) -> gamma.GammaChoice:
    """:func:`bdia_jax.choose_gamma` for a model whose stacks train by :class:`bdia_jax.BDIA`.

    The model is left as it is; :func:`set_step` gives it the step that was chosen.

    Args:
      model: in training mode.
      loss: ``loss(model, *args)``, a scalar; traced.
      arguments: the ``args`` of some calls, such as ``[(batch, key), ...]``, of one shape.
      **options: of :func:`bdia_jax.choose_gamma`; by default, the grid is that of the stacks.

    Raises:
      ValueError: for a model without such stacks.
    """
    steps = {stack.step for stack in reversible_stacks(model)}
    steps = [step for step in steps if isinstance(step, BDIA)]
    if not steps:
        raise ValueError("the model has no stack that trains by BDIA, of which γ could be chosen")
    graph, state = nnx.split(model)

    def loss_of_step(step, state, *args):
        model = nnx.merge(graph, state)
        for stack in reversible_stacks(model):
            stack.step, stack.adjoint = step, Direct()
        return loss(model, *args)

    grid = {"frac_bits": steps[0].frac_bits, "tolerance_bits": steps[0].tolerance_bits}
    return gamma.choose_gamma(
        loss_of_step, ((state, *args) for args in arguments), **(grid | options)
    )
