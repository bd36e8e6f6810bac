"""How much the noise of γ costs: the loss of training beside that of the network handed back.

A step with γ trains the network ``step.network``, that is γ = 0. A network that was trained without
γ may not tolerate a large one: its training loss then says little about the network that comes out.
What is compared is one batch, with the same weights, dropout and label smoothing, so that γ alone
makes the difference.
"""

from __future__ import annotations

import logging
import math

import jax
from flax import nnx
from jaxtyping import Array, Float

from bdia_jax import Direct
from bdia_jax.nn.gamma import reversible_stacks
from bdia_jax.train import mesh as meshes
from bdia_jax.train.step import Recipe, State, draw, micro_batches, shard

log = logging.getLogger("bdia_jax")

FAR = 0.15
"""The rise of the first batch's loss by γ, as a share of the loss without it, that is warned of.

On average, γ costs fresh weights nothing, because they know nothing that it could destroy. The loss
of a pretrained decoder (SmolLM2-135M, 30 blocks) rises by 140 % with γ = 1/2 and by 23 % with 1/4,
both of which made its fine-tuning worse, and by 4 % with 1/8, which did not.
"""
NOISE = 1.2
"""What chance may add to that share, divided by the root of the batch's weight: four times the
standard deviation of a sample. With γ = 1/2, fresh weights, dropout and label smoothing, 24 seeds
each, the rise lay within ±0.33 for a vision transformer of 24 blocks and batches of 4 images,
within ±0.19 for 6 blocks and 16 images, and within ±0.01 for decoders and translators, whose
batches have many tokens.
"""
FLOOR = 0.1
"""A smaller rise, in nats, is never warned of: weights trained with γ have small losses without."""


def has_gap(model: nnx.Module) -> bool:
    """Whether training runs another network than the one that is handed back."""
    return any(stack.step.network != stack.step for stack in reversible_stacks(model))


def network_loss(recipe: Recipe, state: State, rest, arrays) -> Float[Array, ""]:
    """The mean loss of the next training batch without γ: one forward pass, otherwise as a step."""
    batch, keys = draw(recipe, state, arrays)

    def of_part(part_and_key):
        part, key = part_and_key
        model = meshes.merged(recipe.mesh, recipe.graph, state.params, recipe.probes, rest)
        for stack in reversible_stacks(model):
            stack.step, stack.adjoint = stack.step.network, Direct()
        return recipe.task.loss(model, shard(recipe, part), key)

    if recipe.settings.accumulate == 1:
        sums = of_part((batch, keys[0]))
    else:
        # One micro-batch after the other, as in a step.
        of_parts = jax.lax.map(of_part, (micro_batches(recipe, batch), keys))
        sums = jax.tree.map(lambda a: a.sum(axis=0), of_parts)
    return sums.means()["loss"]


def is_far(loss: float, without: float, weight: float) -> bool:
    """Whether the loss of a batch, with γ, lies far above that without it."""
    if not math.isfinite(loss) or not weight:
        return False
    return loss - without > max(FLOOR, (FAR + NOISE / math.sqrt(weight)) * abs(without))


def warn(model: nnx.Module, loss: float, without: float) -> None:
    """Warns that γ costs the first batch much, and says what to do."""
    step = next(s.step for s in reversible_stacks(model) if s.step.network != s.step)
    log.warning(
        "\n".join(
            (
                "",
                "*** The noise of γ destroys what these weights know ***",
                f"    loss of the first batch: {loss:.4g} with γ = {step.gamma:g}, signs by "
                f"{step.signs}; {without:.4g} without γ, as the network is handed back.",
                "    Choose a smaller γ (gamma=0.0625: 4 bits per activation and step), one sign",
                '    per sample (signs="sample"), or have γ measured (bdia_jax.choose_gamma; for',
                "    commands, --gamma auto). If weights start from scratch, a rise may be what",
                "    you want: γ then regularizes.",
                "",
            )
        )
    )
