"""A head for new classes, fitted to what a pretrained network makes of some images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from bdia_jax.nn.vision import VisionTower
from bdia_jax.train.placing import merged, mesh_of, split
from bdia_jax.train.tasks.resized_images import ResizedImages

INVERSE_PENALTY = 0.01
"""Of the weights, for features of variance 1: scikit-learn's C."""


def fit_head(
    model: VisionTower,
    task: ResizedImages,
    count: int = 1000,
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> float:
    """Fits the head by logistic regression, in place; the rest of the network stays as it is.

    A head of zeros gives the same output whatever the blocks do, so γ cannot be chosen by its loss.
    And training would begin with large, meaningless gradients, which spoil the pretrained weights.
    (Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
    Out-of-Distribution", 2022.)

    Args:
      model: its head is replaced.
      task: with the images; training images are taken as evaluation ones are, without variation.
      count: how many of them, drawn at random, at most.
      seed: of the draw.
      progress: whether to show a bar; None for: on a terminal.

    Returns:
      The share of these images that the fitted head classifies rightly.

    Raises:
      ValueError: for a head of another number of classes; for no images, or those of one class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes = task.data.num_classes
    if model.config.num_classes != classes:
        raise ValueError(
            f"the head must have the {classes} classes of {task.name}; it has "
            f"{model.config.num_classes}"
        )
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise ValueError(f"count must be an int >= 1; got {count!r}")
    rows = np.random.default_rng(seed).permutation(task.samples)[:count]
    images, labels = task.data.train_images[rows], task.data.train_labels[rows]
    if len(np.unique(labels)) < 2:
        raise ValueError(f"count must be large enough to see two classes; got {count}")
    graph, state = nnx.split(model)
    mesh = mesh_of(model)

    @jax.jit
    def pooled(state, statistics, images):
        network = merged(mesh, graph, state)
        # This one alone: the model that was given stays in its mode.
        network.eval()
        return network.pooled(task.middles(statistics, split(mesh, images)))

    statistics = {"mean": task.mean, "std": task.std}
    size = min(task.eval_batch_size, len(rows))
    found = []
    for start in tqdm(
        range(0, len(rows), size), disable=None if progress is None else not progress, leave=False
    ):
        # Of one shape, or there would be two programs.
        some = np.resize(images[start : start + size], (size, *images.shape[1:]))
        found.append(np.asarray(pooled(state, statistics, some)))
    features = np.concatenate(found)[: len(rows)]
    scaler, regression = StandardScaler(), LogisticRegression(C=INVERSE_PENALTY, max_iter=1000)
    fitted = make_pipeline(scaler, regression).fit(features, labels)
    weights, bias = np.asarray(regression.coef_), np.asarray(regression.intercept_)
    if len(weights) == 1:
        # Of two classes scikit-learn has the difference.
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    scale, mean = np.asarray(scaler.scale_), np.asarray(scaler.mean_)
    kernel = np.zeros((features.shape[1], classes))
    # A class that no image is of is as unlikely as the least likely one.
    offset = np.full(classes, bias.min())
    kernel[:, regression.classes_] = (weights / scale).T
    offset[regression.classes_] = bias - (weights / scale) @ mean
    for weight, value in ((model.head.kernel, kernel), (model.head.bias, offset)):
        assert weight is not None
        weight[...] = jnp.asarray(value, weight.dtype)
    return float(fitted.score(features, labels))
