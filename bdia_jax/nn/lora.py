"""Training a part of the parameters: frozen weights, and low-rank updates of them (LoRA)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bdia_jax.nn.stack import StackedBlocks


class Frozen(nnx.Variable):
    """A weight that is not trained: it gets no gradient, and no optimizer state."""


class LowRankLinear(nnx.Module):
    """A frozen linear layer, and a trained update of low rank: ``base(x) + (alpha/rank) x a b``.

    ``b`` starts as zeros, and with it the update. (Hu et al., "LoRA", 2021.) In a stack, all
    arrays have a leading block axis.
    """

    def __init__(self, base: nnx.Linear, rank: int, alpha: float, *, rngs: nnx.Rngs):
        *blocks, inputs, outputs = base.kernel.shape
        if not 1 <= rank <= min(inputs, outputs):
            raise ValueError(
                f"rank must lie in [1, {min(inputs, outputs)}] for a matrix of {inputs} × "
                f"{outputs}; got {rank}"
            )
        self.base, self.scale = base, alpha / rank
        spread = nnx.initializers.normal(inputs**-0.5)
        self.a = nnx.Param(spread(rngs.params(), (*blocks, inputs, rank)))
        self.b = nnx.Param(jnp.zeros((*blocks, rank, outputs)))

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """In the dtype that the base computes in."""
        y = self.base(x)
        a, b = (matrix[...].astype(y.dtype) for matrix in (self.a, self.b))
        return y + (x.astype(y.dtype) @ a) @ b * self.scale

    def merged(self) -> nnx.Linear:
        """The base, with the update added to its kernel; in float32, then rounded to its dtype."""
        a, b = (matrix[...].astype(jnp.float32) for matrix in (self.a, self.b))
        kernel = self.base.kernel[...]
        updated = kernel.astype(jnp.float32) + a @ b * self.scale
        self.base.kernel[...] = updated.astype(kernel.dtype)
        return self.base


def add_lora(
    model: nnx.Module,
    rank: int,
    alpha: float | None = None,
    targets: tuple[str, ...] = ("q", "v"),
    *,
    rngs: nnx.Rngs,
) -> list[str]:
    """Freezes ``model``, in place, but for new low-rank updates of linear layers of its stacks.

    Args:
      model: with :class:`bdia_jax.nn.ReversibleStack` somewhere in it.
      rank: of the updates.
      alpha: the updates are scaled by alpha / rank; None for rank.
      targets: names of linear layers in a block (``"q"``), or ends of their paths
        (``"attention.out"``).
      rngs: for the initialization.

    Returns:
      The paths of the layers in their blocks.

    Raises:
      ValueError: if a target is no linear layer of a stack, with those that there are.
    """
    found, matched = [], set()
    linear = {}
    for stack in _stacks(model):
        for parent, name, path in _linears(stack.stacked):
            linear[path] = None
            hits = [t for t in targets if f".{path}".endswith(f".{t}")]
            if hits:
                matched.update(hits)
                found.append((parent, name, path))
    if missing := [t for t in targets if t not in matched]:
        raise ValueError(
            f"targets must name linear layers of the blocks, of which there are "
            f"{', '.join(linear) or 'none'}; got {', '.join(missing)}"
        )
    if not found:
        raise ValueError("targets must name at least one linear layer; got none")
    updates = [
        LowRankLinear(getattr(parent, name), rank, rank if alpha is None else alpha, rngs=rngs)
        for parent, name, _ in found
    ]
    freeze(model)
    for (parent, name, _), update in zip(found, updates, strict=True):
        setattr(parent, name, update)
    return [path for _, _, path in found]


def merge_lora(model: nnx.Module) -> None:
    """The inverse of :func:`add_lora`, in place: updates become a part of the weights."""
    for _, module in list(nnx.iter_modules(model)):
        for name, child in list(vars(module).items()):
            if isinstance(child, LowRankLinear):
                setattr(module, name, child.merged())
    unfreeze(model)


def freeze(model: nnx.Module, select: str = "") -> None:
    """Makes parameters :class:`Frozen`, in place.

    Args:
      model: any.
      select: a regular expression that is searched for in a parameter's path, such as
        ``"^embedding$"``; "" for all.
    """
    _retype(model, nnx.Param, Frozen, lambda path: re.search(select, path) is not None)


def unfreeze(model: nnx.Module) -> None:
    """Makes every frozen weight a parameter again, in place."""
    _retype(model, Frozen, nnx.Param, lambda path: True)


def _retype(model, old: type, new: type, chosen: Callable[[str], bool]) -> None:
    for where, module in list(nnx.iter_modules(model)):
        for name, value in list(vars(module).items()):
            if isinstance(value, old) and chosen(".".join(map(str, (*where, name)))):
                setattr(module, name, new(value.get_value()))


def _stacks(model: nnx.Module) -> Iterator[StackedBlocks]:
    return (m for _, m in nnx.iter_modules(model) if isinstance(m, StackedBlocks))


def _linears(block: nnx.Module) -> Iterator[tuple[nnx.Module, str, str]]:
    """Modules, names in them, and paths, of the linear layers."""
    for where, module in nnx.iter_modules(block):
        for name, child in vars(module).items():
            if isinstance(child, nnx.Linear):
                yield module, name, ".".join(map(str, (*where, name)))
