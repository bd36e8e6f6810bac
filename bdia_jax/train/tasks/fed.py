"""Tasks whose batches come from the host."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import PyTree

FED = "fed"
"""Under this name, a task finds what the host feeds to a step, beside its arrays."""


@runtime_checkable
class Fed(Protocol):
    """A task whose training batches the host makes as the run goes, of data that may not fit.

    It is a :class:`bdia_jax.train.Task` as well. Its ``arrays`` are a dict, with a digest of what
    is fed among them, so that a run is not resumed on other data; ``batch`` finds there, as
    ``"fed"``, what the step was fed.

    Positions are of JSON's types. What is fed must depend on the position and the size alone: the
    position is saved with a state, and a resumed run goes on from it.
    """

    def start(self) -> Any:
        """Where the first batch begins."""
        ...

    def feed(self, position: Any, size: int) -> tuple[PyTree[np.ndarray], Any]:
        """``size`` samples from a position, and the position behind them."""
        ...

    def fed_shapes(self, size: int) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of what :meth:`feed` gives."""
        ...

    def epoch(self) -> int:
        """Samples of a pass over the data. This may have to read all of them."""
        ...
