"""Optimizers, by optax.

A new optimizer is a name in :data:`Optimizer` and an entry in :data:`OPTIMIZERS`: settings, command
lines and tests take it from there. What no library of the kind has yet is left out: Adam's moments
in 8 bits (bitsandbytes, for CUDA alone).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import optax
from jaxtyping import PyTree

from bdia_jax.nn.stacked import is_stacked
from bdia_jax.optim import set_adam
from bdia_jax.train.blockwise import Blockwise
from bdia_jax.train.norms import clip_by_global_norm
from bdia_jax.train.rounding import with_stochastic_rounding

Optimizer = Literal["adam", "adamw", "set-adam", "sgd", "lion", "muon", "adafactor"]
Decayed = Literal["matrices", "all"]
Mask = Callable[[PyTree], PyTree[bool]]
Make = Callable[[optax.Schedule, float, Mask | None], optax.GradientTransformation]
"""Makes an optimizer of a learning rate, a weight decay, and a mask of what decays."""


class Recipe(NamedTuple):
    """How an optimizer is made."""

    make: Make
    decays: bool = False
    """Whether it has weight decay; otherwise only 0 is allowed."""
    blockwise: bool = False
    """Whether it looks at a whole array, so that every block must have its own."""
    others: Make | None = None
    """For what is in no stack, where that is another one."""


def _adamw(rate, decay, mask):
    return optax.adamw(rate, weight_decay=decay, mask=mask)


def _muon(rate, decay, mask):
    """With updates as large as Adam's (Liu et al., 2025), so that learning rates are alike."""
    return optax.contrib.muon(
        rate,
        weight_decay=decay,
        weight_decay_mask=mask,
        # Of what has one axis, which optax leaves to AdamW.
        adam_weight_decay=decay if mask is None else 0.0,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(_matrix, params),
    )


def _matrix(p: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    """A kernel, of a convolution over two axes too, as inputs × outputs; None for one axis.

    What has three axes is as many matrices as the first one says: a mixture of experts.
    """
    if p.ndim < 2:
        return None
    if p.ndim == 3:
        return optax.contrib.MuonDimensionNumbers(1, 2)
    return optax.contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1)


def _adafactor(rate, decay, mask):
    """Without the learning rate of its own that optax.adafactor makes of the parameters' scale."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(decay, mask),
        optax.scale_by_learning_rate(rate),
    )


OPTIMIZERS: dict[str, Recipe] = {
    "adam": Recipe(lambda rate, *_: optax.adam(rate)),
    "adamw": Recipe(_adamw, decays=True),
    "set-adam": Recipe(lambda rate, *_: set_adam(rate, is_stacked=is_stacked)),
    "sgd": Recipe(lambda rate, *_: optax.sgd(rate, momentum=0.9)),
    "lion": Recipe(
        lambda rate, decay, mask: optax.lion(rate, weight_decay=decay, mask=mask), decays=True
    ),
    "muon": Recipe(_muon, decays=True, blockwise=True, others=_adamw),
    "adafactor": Recipe(_adafactor, decays=True, blockwise=True),
}


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.0,
    decayed: Decayed = "matrices",
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """The optimizer called ``name``, after clipping by the global norm of the gradient.

    muon and adafactor take the parameters of a Flax model (``nnx.state(model, nnx.Param)``), in
    which they find the stacks; the others any pytree.
    """
    blockwise = make_blockwise(name, schedule, weight_decay=weight_decay, decayed=decayed)
    optimizer = blockwise.as_optax() if OPTIMIZERS[name].blockwise else blockwise.others
    if clip_norm is None:
        return optimizer
    return optax.chain(clip_by_global_norm(clip_norm), optimizer)


def make_blockwise(
    name: str,
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.0,
    decayed: Decayed = "matrices",
) -> Blockwise:
    """The same, of one block at a time, without clipping."""
    recipe = OPTIMIZERS[name]
    options = (schedule, weight_decay, decay_mask if decayed == "matrices" else None)
    makers = (recipe.make, recipe.others or recipe.make)
    return Blockwise(*(with_stochastic_rounding(make(*options)) for make in makers))


def decay_mask(params: PyTree) -> PyTree[bool]:
    """What decays: arrays of two or more axes, not counting that of blocks; no norms or biases."""
    return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim - is_stacked(path) > 1, params)
