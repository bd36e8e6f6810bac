"""The weights of a model before and after a run."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax.train.settings import TrainSettings

log = logging.getLogger("bdia_jax")


def check_trained_dtypes(model: nnx.Module, settings: TrainSettings) -> None:
    """A ``ValueError`` for trained weights in which an optimizer's steps would be lost.

    A bfloat16 has 8 significant bits: a step of less than 2^-9 of a weight is rounded away (that is
    most steps at ordinary learning rates), and Adam's second moment, multiplied by 0.999, rounds
    back to itself, so that it never decays. In float16, squares of small gradients are 0.
    """
    narrow = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        dtype = leaf.get_value().dtype
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).nmant < 23:
            narrow.setdefault(str(dtype), []).append(".".join(map(str, path)))
    for dtype, names in narrow.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"trained weights must be float32 (or float64); got {dtype} for "
            f"{', '.join(names[:3])}{more}: steps of {settings.optimizer} with learning_rate = "
            f"{settings.learning_rate:g} would be rounded away. Set param_dtype to float32 "
            "(frozen weights may stay as they are), or give train() an optimizer of your own"
        )


def give_back(model: nnx.Module, params: nnx.State) -> None:
    """Gives the model the weights of the last state."""
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(params)):
        # A step was interrupted after it had taken its arguments.
        log.warning("the weights were lost with the step that was interrupted: resume the run")
        return
    nnx.update(model, params)
