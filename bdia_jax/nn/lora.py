"""Training a part of the parameters: frozen weights, and low-rank updates of them (LoRA)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bdia_jax.grid import accumulator
from bdia_jax.nn.stacked import StackedBlocks


class Frozen(nnx.Variable):
    """A weight that is not trained: it gets no gradient, and no optimizer state."""


class LowRankLinear(nnx.Module):
    """A frozen linear layer, and a trained update of low rank: ``base(x) + (alpha/rank) x a b``.

    ``b`` starts as zeros, and with it the update. (Hu et al., "LoRA", 2021.) In a stack, all
    arrays have a leading block axis.
    """

    def __init__(self, base: nnx.Linear, rank: int, alpha: float, *, rngs: nnx.Rngs):
        *blocks, inputs, outputs = base.kernel.shape
        self.base, self.scale = base, alpha / rank
        spread = nnx.initializers.normal(inputs**-0.5)
        self.a = nnx.Param(spread(rngs.params(), (*blocks, inputs, rank)))
        self.b = nnx.Param(jnp.zeros((*blocks, rank, outputs)))

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """In the dtype that the base computes in."""
        y = self.base(x)
        a, b = (matrix[...].astype(y.dtype) for matrix in (self.a, self.b))
        return y + (x.astype(y.dtype) @ a) @ b * self.scale

    def updated(self) -> Float[Array, "*blocks inputs outputs"]:
        """The kernel of the base, and the update, in float32 (float64)."""
        kernel = weights(self.base)
        a, b = (matrix[...].astype(kernel.dtype) for matrix in (self.a, self.b))
        return kernel + a @ b * self.scale

    def merged(self) -> nnx.Linear:
        """The base, with the kernel :meth:`updated`, rounded to its dtype.

        Raises:
          ValueError: if the base is quantized.
        """
        kernel = self.base.kernel[...]
        self.base.kernel[...] = self.updated().astype(kernel.dtype)
        return self.base


class DecomposedLinear(LowRankLinear):
    """The same, with magnitudes of the columns of ``base + update`` that are trained separately.

    ``x (W + u) * magnitude / |W + u|`` with ``u = (alpha/rank) a b``. The norms of the columns are
    constants to the derivative. The magnitudes start as those of ``W``. (Liu et al., "DoRA", 2024;
    in its section 4.3 they say why constants.)
    """

    def __init__(self, base: nnx.Linear, rank: int, alpha: float, *, rngs: nnx.Rngs):
        super().__init__(base, rank, alpha, rngs=rngs)
        self.magnitude = nnx.Param(norms(weights(base)))
        # It is not scaled.
        self.bias = None if base.bias is None else Frozen(base.bias[...])
        base.bias, base.use_bias = None, False

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """In the dtype that the base computes in."""
        y = super().__call__(x)
        lengths = jax.lax.stop_gradient(_divisors(super().updated()))
        y = y * (self.magnitude[...] / lengths).astype(y.dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def updated(self) -> Float[Array, "*blocks inputs outputs"]:
        """``(W + u) * magnitude / |W + u|``, in float32."""
        whole = super().updated()
        return whole * (self.magnitude[...] / _divisors(whole))[..., None, :]

    def merged(self) -> nnx.Linear:
        """As that of low-rank updates; the bias is the base's again."""
        base = super().merged()
        if self.bias is not None:
            base.bias, base.use_bias = nnx.Param(self.bias[...]), True
        return base


def weights(layer: nnx.Linear) -> Float[Array, "*blocks inputs outputs"]:
    """The kernel that a layer computes with, in float32 (float64); also of a quantized one."""
    decoded = getattr(layer, "decoded", None)
    if decoded is not None:
        return decoded()
    return layer.kernel[...].astype(accumulator(layer.kernel.dtype))


def norms(kernel: Float[Array, "*blocks inputs outputs"]) -> Float[Array, "*blocks outputs"]:
    """Of the columns."""
    return jnp.linalg.norm(kernel, axis=-2)


def _divisors(kernel):
    """The norms of the columns, to divide by them: 1 for a column of zeros, which stays so."""
    found = norms(kernel)
    return jnp.where(found == 0, 1, found)


class LowRankKind(NamedTuple):
    """Of a low-rank update."""

    rank: int
    alpha: float
    """The update is scaled by alpha / rank."""
    dora: bool = False
    """Whether magnitudes are trained apart (:class:`DecomposedLinear`)."""


def add_lora(
    model: nnx.Module,
    rank: int,
    alpha: float | None = None,
    targets: tuple[str, ...] = ("q", "v"),
    *,
    dora: bool = False,
    rngs: nnx.Rngs,
) -> list[str]:
    """Freezes ``model`` in place, and adds trained low-rank updates to linear layers of its stacks.

    Args:
      model: with :class:`bdia_jax.nn.ReversibleStack` somewhere in it.
      rank: of the updates.
      alpha: the updates are scaled by alpha / rank; None for rank.
      targets: names of linear layers in a block (``"q"``), or ends of their paths
        (``"attention.out"``).
      dora: whether the magnitudes of the columns are trained, too (:class:`DecomposedLinear`).
      rngs: for the initialization.

    Returns:
      The paths of the layers in their blocks.

    Raises:
      ValueError: if a target is no linear layer of a stack, with those that there are.
    """
    paths = dict.fromkeys(path for _, _, path in _linears(model))
    hits = {t: [path for path in paths if f".{path}".endswith(f".{t}")] for t in targets}
    if missing := [t for t, found in hits.items() if not found]:
        raise ValueError(
            f"targets must name linear layers of the blocks, of which there are "
            f"{', '.join(paths) or 'none'}; got {', '.join(missing)}"
        )
    if not hits:
        raise ValueError("targets must name at least one linear layer; got none")
    kind = LowRankKind(rank, rank if alpha is None else alpha, dora)
    kinds = {path: kind for found in hits.values() for path in found}
    for parent, name, path in _linears(model):
        *_, inputs, outputs = getattr(parent, name).kernel.shape
        if path in kinds and not 1 <= rank <= min(inputs, outputs):
            raise ValueError(
                f"rank must lie in [1, {min(inputs, outputs)}] for a matrix of {inputs} × "
                f"{outputs}; got {rank}"
            )
    return add_updates(model, kinds, rngs)


def add_updates(model: nnx.Module, kinds: Mapping[str, LowRankKind], rngs: nnx.Rngs) -> list[str]:
    """As :func:`add_lora`, with a kind of update for the path of each layer in its block.

    A rank may be larger than the matrix has: there are such adapters.
    """
    found = [(parent, name, path) for parent, name, path in _linears(model) if path in kinds]
    updates = []
    for parent, name, path in found:
        rank, alpha, dora = kinds[path]
        layer = DecomposedLinear if dora else LowRankLinear
        updates.append(layer(getattr(parent, name), rank, alpha, rngs=rngs))
    freeze(model)
    for (parent, name, _), update in zip(found, updates, strict=True):
        setattr(parent, name, update)
    return [path for _, _, path in found]


def merge_lora(model: nnx.Module) -> None:
    """Updates become a part of the weights, in place; all weights are trained again."""
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

    Raises:
      ValueError: if no parameter has such a path.
    """
    paths = _retype(model, nnx.Param, Frozen, lambda path: re.search(select, path) is not None)
    if select and not any(re.search(select, path) for path in paths):
        raise ValueError(
            f"select must be found in the path of a parameter; got {select!r}, and there are "
            f"{', '.join(paths) or 'none'}"
        )


def unfreeze(model: nnx.Module) -> None:
    """Makes every frozen weight a parameter again, in place."""
    _retype(model, Frozen, nnx.Param, lambda path: True)


def _retype(model, old: type, new: type, chosen: Callable[[str], bool]) -> list[str]:
    """Makes variables of another type of those chosen; the paths of all that there were."""
    found = [
        (module, name, value, ".".join(map(str, (*where, name))))
        for where, module in nnx.iter_modules(model)
        for name, value in vars(module).items()
        if isinstance(value, old)
    ]
    # A weight that is in two places is one, and stays one, whichever of them was meant.
    made = {
        id(value): new.from_metadata(value.get_value(), value.get_metadata())
        for _, _, value, path in found
        if chosen(path)
    }
    for module, name, value, _ in found:
        if id(value) in made:
            setattr(module, name, made[id(value)])
    return [path for *_, path in found]


def _linears(model: nnx.Module) -> Iterator[tuple[nnx.Module, str, str]]:
    """Modules, names in them, and paths in a block, of the linear layers of all stacks."""
    for _, stack in nnx.iter_modules(model):
        if not isinstance(stack, StackedBlocks):
            continue
        for where, module in nnx.iter_modules(stack.stacked):
            for name, child in vars(module).items():
                if isinstance(child, nnx.Linear):
                    yield module, name, ".".join(map(str, (*where, name)))
