"""What the classes of a set of images are called."""

from __future__ import annotations

import pathlib

from bdia_jax.data import sets
from bdia_jax.data.images import EMBEDDED


def class_names(name: str, data_dir: str | pathlib.Path | None = None) -> list[str]:
    """The names of the classes, in order; numbers, as texts, where the set has none.

    Args:
      name, data_dir: of a set that is there, as of :func:`bdia_jax.data.load_images`.
    """
    if name in EMBEDDED:
        return [str(digit) for digit in range(10)]
    label = sets.find(name, data_dir, embedded=EMBEDDED).info.features["label"]
    return list(getattr(label, "names", None) or map(str, range(label.num_classes)))
