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
from bdia_jax.nn.settings import ReversibleSettings, fields_of
from bdia_jax.nn.stack import ReversibleStack
from bdia_jax.steps import BDIA, Step


def reversible_stacks(model: nnx.Module) -> Iterator[ReversibleStack]:
    """The stacks of a model whose steps may be set."""
    stacks = (m for _, m in nnx.iter_modules(model) if isinstance(m, ReversibleStack))
    return (stack for stack in stacks if not stack.fixed)


def set_step(model: nnx.Module, step: Step, adjoint: Adjoint | None = None) -> None:
    """Gives all stacks of a model this step, in place; and this adjoint, if one is given.

    The configuration of the model, if it has one, says the same afterwards, as far as its fields
    can: not the bits of rounded checkpoints, nor a step of another kind than it knows.

    Args:
      model: any with stacks.
      step: what they do from block to block.
      adjoint: how that is differentiated; None for what each stack has.

    Raises:
      TypeError, ValueError: for a step and an adjoint that do not fit each other. The model is then
        as it was.
    """
    stacks = [*reversible_stacks(model)]
    for stack in stacks:
        check_combination(step, adjoint or stack.adjoint)
    config = getattr(model, "config", None)
    if stacks and isinstance(config, ReversibleSettings):
        fields = fields_of(step, adjoint or stacks[0].adjoint)
        config = dataclasses.replace(config, **fields)
        setattr(model, "config", config)  # noqa: B010
    for stack in stacks:
        stack.step, stack.adjoint = step, adjoint or stack.adjoint


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
      ValueError: for a model without such stacks, or with stacks on several grids.
    """
    steps = [s.step for s in reversible_stacks(model) if isinstance(s.step, BDIA)]
    if not steps:
        raise ValueError("the model has no stack that trains by BDIA, of which γ could be chosen")
    grids = dict.fromkeys((step.frac_bits, step.tolerance_bits) for step in steps)
    if len(grids) > 1:
        raise ValueError(
            "the stacks that train by BDIA must have one grid; their (frac_bits, tolerance_bits) "
            f"are {', '.join(map(str, grids))}"
        )
    frac_bits, tolerance_bits = next(iter(grids))
    graph, state = nnx.split(model)

    def loss_of_step(step, state, *args):
        model = nnx.merge(graph, state)
        for stack in reversible_stacks(model):
            stack.step, stack.adjoint = step, Direct()
        return loss(model, *args)

    grid = {"frac_bits": frac_bits, "tolerance_bits": tolerance_bits}
    return gamma.choose_gamma(
        loss_of_step, ((state, *args) for args in arguments), **(grid | options)
    )
