"""Ways to train a network: one list, which plans, measurements and tests go through.

A way is settings of a model's configuration, and three things that a configuration does not have:
to how many bits checkpoints are rounded, what runs the blocks instead of their stack, and whether
blocks are updated in the backward pass. To have another way in all tables, add a line to
:data:`WAYS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from flax import nnx

from bdia_jax.adjoints import Adjoint, Checkpoint
from bdia_jax.nn import ReversibleSettings, ReversibleStack
from bdia_jax.nn.settings import Method
from bdia_jax.planning.rivals import Nested
from bdia_jax.steps import Step
from bdia_jax.train.settings import TrainSettings

Config = TypeVar("Config", bound=ReversibleSettings)

FFN_CHUNK = 128
"""Positions of a chunk, where blocks go over them in chunks."""


@dataclasses.dataclass(frozen=True)
class Way:
    """How to train a network."""

    method: Method
    """A name that configurations have."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """More fields of a configuration; what is not given here stays as it is there."""
    checkpoint_bits: int | None = None
    """Bits that the inputs of checkpointed blocks are rounded to."""
    by: Callable[[ReversibleStack], nnx.Module] | None = None
    """What runs the blocks instead of their stack, which it is given; as the model's ``blocks``."""
    chunks: bool = False
    """All of a block but attention itself goes over the positions in chunks; of decoders."""
    update_in_backward: bool = False

    def config(self, config: Config, length: int = 1) -> Config:
        """A model's configuration, for sequences of ``length`` tokens: at least four chunks."""
        chunk = {"ffn_chunk": min(FFN_CHUNK, -(-length // 4))} if self.chunks else {}
        return dataclasses.replace(config, method=self.method, **self.settings, **chunk)

    def install(self, model: nnx.Module) -> None:
        """What a configuration does not have; for a model of :meth:`config`."""
        if self.checkpoint_bits is not None:
            for _, stack in nnx.iter_modules(model):
                if isinstance(stack, ReversibleStack):
                    stack.adjoint = self.adjoint
        if self.by is not None:
            setattr(model, "blocks", self.by(getattr(model, "blocks")))  # noqa: B009, B010

    def train(self, settings: TrainSettings) -> TrainSettings:
        """Settings of training."""
        return dataclasses.replace(settings, update_in_backward=self.update_in_backward)

    @property
    def step(self) -> Step:
        """Of a stack without a configuration."""
        return self._settings.step()

    @property
    def adjoint(self) -> Adjoint:
        """Of a stack without a configuration."""
        adjoint = self._settings.adjoint()
        return adjoint if self.checkpoint_bits is None else Checkpoint(self.checkpoint_bits)

    @property
    def _settings(self) -> ReversibleSettings:
        return ReversibleSettings(method=self.method, **self.settings)


WHOLE = {"parts_as_steps": False}
PARTS = {"parts_as_steps": True}
HOST = {"keep_in": "host"}

WAYS: dict[str, Way] = {
    "standard": Way("standard"),
    "checkpointed": Way("standard-checkpoint", WHOLE),
    "checkpointed parts": Way("standard-checkpoint", PARTS),
    "checkpointed, 8 bits": Way("standard-checkpoint", WHOLE, checkpoint_bits=8),
    "checkpointed, 4 bits": Way("standard-checkpoint", WHOLE, checkpoint_bits=4),
    "checkpointed, chunks": Way("standard-checkpoint", WHOLE, chunks=True),
    "checkpointed, nested": Way("standard", WHOLE, by=Nested),
    "checkpointed, nested, chunks": Way("standard", WHOLE, by=Nested, chunks=True),
    "checkpointed, in host memory": Way("standard-checkpoint", WHOLE | HOST),
    "checkpointed, in host memory, chunks": Way("standard-checkpoint", WHOLE | HOST, chunks=True),
    "checkpointed, updated in backward": Way("standard-checkpoint", WHOLE, update_in_backward=True),
    "checkpointed, chunks, updated in backward": Way(
        "standard-checkpoint", WHOLE, chunks=True, update_in_backward=True
    ),
    "BDIA": Way("bdia", WHOLE),
    "BDIA, parts": Way("bdia", PARTS),
    "BDIA, parts, m = 4": Way("bdia", PARTS | {"gamma": 1 / 16}),
    "BDIA, chunks": Way("bdia", WHOLE, chunks=True),
    "BDIA, r = 1": Way("bdia", WHOLE | {"tolerance_bits": 1}),
    "BDIA, parts, chunks": Way("bdia", PARTS, chunks=True),
    "BDIA, chunks, bits in host memory": Way("bdia", WHOLE | HOST, chunks=True),
    "BDIA, chunks, narrow cotangents": Way(
        "bdia", WHOLE | {"narrow_cotangents": True}, chunks=True
    ),
    "BDIA, updated in backward": Way("bdia", WHOLE, update_in_backward=True),
    "BDIA, parts, updated in backward": Way("bdia", PARTS, update_in_backward=True),
    "BDIA, parts, chunks, updated in backward": Way(
        "bdia", PARTS, chunks=True, update_in_backward=True
    ),
}
"""By the name that a row of a table has. Blocks are updated in the backward pass by the optimizer;
"chunks" are of all of a block but attention; "parts" are attention and feed-forward network, each a
step, or a checkpoint, of its own. Nested checkpoints are kept of √K groups of blocks."""


def check_ways(names: Iterable[str]) -> None:
    """Raises ``ValueError`` for a name that :data:`WAYS` does not have."""
    if unknown := [name for name in names if name not in WAYS]:
        raise ValueError(f"ways must be of {'; '.join(WAYS)}; got {'; '.join(unknown)}")
