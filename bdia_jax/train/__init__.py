"""One training loop for every experiment."""

from bdia_jax.train.checkpoints import CheckpointError
from bdia_jax.train.figures import plot_curves
from bdia_jax.train.loop import (
    EXIT_TERMINATED,
    InexactInverseError,
    NonFiniteError,
    Result,
    StepMemory,
    TrainSettings,
    evaluate,
    step_memory,
    train,
    training_step,
)
from bdia_jax.train.metrics import read_metrics
from bdia_jax.train.optimizers import make_optimizer
from bdia_jax.train.tasks import (
    ImageClassification,
    LanguageModelling,
    PackedTexts,
    Task,
    Translation,
)

__all__ = [
    "EXIT_TERMINATED",
    "CheckpointError",
    "ImageClassification",
    "InexactInverseError",
    "LanguageModelling",
    "NonFiniteError",
    "PackedTexts",
    "Result",
    "StepMemory",
    "Task",
    "TrainSettings",
    "Translation",
    "evaluate",
    "make_optimizer",
    "plot_curves",
    "read_metrics",
    "step_memory",
    "train",
    "training_step",
]
