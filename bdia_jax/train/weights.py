"""The weights of a model before and after a run."""

from __future__ import annotations

import logging

import jax
from flax import nnx

log = logging.getLogger("bdia_jax")


def check_trained_dtypes(model: nnx.Module) -> None:
    """A ``ValueError`` for trained weights of float16, in which steps and squares are lost.

    Those of bfloat16 are rounded stochastically (:mod:`bdia_jax.train.rounding`), which is said.
    """
    kinds: dict[str, list[str]] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        kinds.setdefault(str(leaf.get_value().dtype), []).append(".".join(map(str, path)))
    if names := kinds.get("bfloat16"):
        log.info("%d trained arrays are of bfloat16: steps are rounded stochastically", len(names))
    allowed = ("bfloat16", "float32", "float64")
    for dtype, names in kinds.items():
        if dtype in allowed:
            continue
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"trained weights must be float32, float64 or bfloat16; got {dtype} for "
            f"{', '.join(names[:3])}{more}. Set param_dtype to one of these (frozen weights may "
            "stay as they are), or give train() an optimizer of your own"
        )


def give_back(model: nnx.Module, params: nnx.State) -> None:
    """Gives the model the weights of the last state."""
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(params)):
        # A step was interrupted after it had taken its arguments.
        log.warning("the weights were lost with the step that was interrupted: resume the run")
        return
    nnx.update(model, params)
