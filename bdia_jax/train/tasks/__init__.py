"""What is trained, by kind: batches, a loss, and an evaluation, as pure functions."""

from bdia_jax.train.tasks.distillation import Distillation, Distilled
from bdia_jax.train.tasks.fed import FED, Fed
from bdia_jax.train.tasks.images import ImageClassification
from bdia_jax.train.tasks.mixed_texts import MixedTexts
from bdia_jax.train.tasks.preferences import Preferences, Rivals
from bdia_jax.train.tasks.resized_images import ResizedImages
from bdia_jax.train.tasks.task import Task, check_batch_size
from bdia_jax.train.tasks.text import LanguageModelling, PackedTexts, Tokens
from bdia_jax.train.tasks.translation import Translation

__all__ = [
    "FED",
    "Distillation",
    "Distilled",
    "Fed",
    "ImageClassification",
    "LanguageModelling",
    "MixedTexts",
    "PackedTexts",
    "Preferences",
    "ResizedImages",
    "Rivals",
    "Task",
    "Tokens",
    "Translation",
    "check_batch_size",
]
