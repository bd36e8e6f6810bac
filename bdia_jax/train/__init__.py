"""One training loop for every experiment.

| module | |
|---|---|
| `settings` | how to train |
| `tasks` | what: batches, a loss, an evaluation, by kind of data |
| `optimizers` | optimizers, by name |
| `schedules` | learning rates, by name |
| `blockwise` | an optimizer of one block at a time |
| `step` | one training step, as a pure function |
| `in_backward` | the same, with blocks updated in the backward pass |
| `rounding` | stochastic rounding of what is kept in bfloat16 |
| `mesh` | where arrays are, on several devices |
| `placing` | models on a mesh outside of a run |
| `programs` | both compiled, and where their arrays live |
| `loop` | a run from its first check to its report |
| `run` | its steps, evaluations and checkpoints |
| `result` | what came of it, and which evaluation is the best |
| `pieces` | an evaluation and a step, outside of a run |
| `gamma` | γ chosen for a model and its data |
| `linear_probe` | a head for new classes, fitted before training |
| `gap` | what γ costs: the loss without it, beside that of training |
| `epochs` | epochs as steps |
| `feed` | batches that the host feeds |
| `errors` | steps that went wrong |
| `weights` | what the model holds before and after |
| `run_folder` | the folder of a run, and whose it is |
| `settings_file` | all settings of a command, as YAML |
| `command` | how a run is a command |
| `checkpoints` | saving and restoring |
| `metrics` | numbers for programs |
| `tensorboard` | the same for TensorBoard |
| `weights_and_biases` | the same for Weights & Biases |
| `pace` | how fast a run is, and how long it takes |
| `wording` | the same numbers for people |
| `report` | the page at the end |
| `figures` | curves |
| `signals` | Ctrl-C and SIGTERM |
| `memory` | what a step will need, and what it did |
"""

from bdia_jax.nn.losses import Sums
from bdia_jax.train.checkpoints import CheckpointError, restore_best
from bdia_jax.train.epochs import in_steps
from bdia_jax.train.errors import InexactInverseError, NonFiniteError
from bdia_jax.train.figures import plot_curves
from bdia_jax.train.gamma import choose_gamma
from bdia_jax.train.linear_probe import fit_head
from bdia_jax.train.loop import train
from bdia_jax.train.memory import StepMemory, evaluation_memory, step_memory
from bdia_jax.train.metrics import read_metrics
from bdia_jax.train.optimizers import make_optimizer
from bdia_jax.train.pieces import evaluate, training_step
from bdia_jax.train.placing import place_on_mesh, placed
from bdia_jax.train.programs import eval_batch_size
from bdia_jax.train.result import Result
from bdia_jax.train.run_folder import check_run_folder
from bdia_jax.train.settings import TrainSettings
from bdia_jax.train.settings_file import read_settings, to_yaml
from bdia_jax.train.signals import EXIT_TERMINATED
from bdia_jax.train.step import State, StepReport
from bdia_jax.train.tasks import (
    Distillation,
    Distilled,
    Fed,
    ImageClassification,
    LanguageModelling,
    MixedTexts,
    PackedTexts,
    Preferences,
    ResizedImages,
    Task,
    Translation,
    check_batch_size,
)

__all__ = [
    "EXIT_TERMINATED",
    "CheckpointError",
    "Distillation",
    "Distilled",
    "Fed",
    "ImageClassification",
    "InexactInverseError",
    "LanguageModelling",
    "MixedTexts",
    "NonFiniteError",
    "PackedTexts",
    "Preferences",
    "ResizedImages",
    "Result",
    "State",
    "StepMemory",
    "StepReport",
    "Sums",
    "Task",
    "TrainSettings",
    "Translation",
    "check_batch_size",
    "check_run_folder",
    "choose_gamma",
    "eval_batch_size",
    "evaluate",
    "evaluation_memory",
    "fit_head",
    "in_steps",
    "make_optimizer",
    "place_on_mesh",
    "placed",
    "plot_curves",
    "read_metrics",
    "read_settings",
    "restore_best",
    "step_memory",
    "to_yaml",
    "train",
    "training_step",
]
