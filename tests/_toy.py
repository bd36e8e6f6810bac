"""A task and a reversible model small enough to be compiled in a second or two; and a command.

    python tests/_toy.py FOLDER '{"steps": 8}'

trains it (or resumes), and prints a digest of the parameters and of the lines of metrics.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdia_jax import data
from bdia_jax.nn import ReversibleSettings, ReversibleStack
from bdia_jax.train import Sums, TrainSettings, read_metrics, train


class Block(nnx.Module):
    def __init__(self, width, dropout, rngs):
        self.inner = nnx.Linear(width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x):
        return self.dropout(jnp.tanh(self.inner(x)))


class Toy(nnx.Module):
    def __init__(self, width=16, depth=3, method="bdia", dropout=0.1, block=Block, seed=0):
        rngs, trained = nnx.Rngs(seed), ReversibleSettings(method=method)
        self.embed = nnx.Linear(4, width, rngs=rngs)
        self.stack = ReversibleStack(
            lambda rngs: block(width, dropout, rngs),
            depth,
            step=trained.step(),
            adjoint=trained.adjoint(),
            rngs=rngs,
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x, key=None):
        return self.head(self.norm(self.stack(self.embed(x), key=key)))[..., 0]


class Regression:
    """The sum of four numbers; targets of step ``poison`` are NaN."""

    name, best, unit = "toy", "-loss", "samples"
    samples, eval_samples, eval_batch_size = None, 64, 32

    def __init__(self, poison=None, evaluation_poison=False):
        self.poison, self.evaluation_poison, self.traces = poison, evaluation_poison, 0

    def arrays(self):
        x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
        return {"x": x, "y": x.sum(1)}

    def batch(self, arrays, key, step, size):
        self.traces += 1
        index = jax.random.randint(jax.random.fold_in(key, step), (size,), 0, 64)
        y = arrays["y"][index]
        if self.poison is not None:
            y = jnp.where(step == self.poison, jnp.nan, y)
        return arrays["x"][index], y

    def eval_batch(self, arrays, step, size):
        rows = jnp.minimum(step * size + jnp.arange(size), 63)
        y = jnp.where(step * size + jnp.arange(size) < 64, arrays["y"][rows], jnp.inf)
        return arrays["x"][rows], y

    def loss(self, model, batch, key):
        x, y = batch
        weights = jnp.float32(y != jnp.inf)
        error = model(x, key=key) - jnp.where(y == jnp.inf, 0, y)
        absolute = jnp.sum(weights * jnp.abs(error))
        return Sums(jnp.sum(weights * error**2), jnp.sum(weights), {"absolute": absolute})

    def evaluate(self, model, batch):
        sums = self.loss(model, batch, None)
        return sums._replace(loss=sums.loss * jnp.nan) if self.evaluation_poison else sums


class FromFiles(Regression):
    """The sum of four tokens, of two files that are mixed and read as the run goes."""

    name, unit = "toy files", "sequences"

    def __init__(self, folder):
        super().__init__()
        for name, count in (("a", 30), ("b", 7)):
            path = folder / f"{name}.jsonl"
            if not path.exists():
                lines = (json.dumps({"text": chr(97 + i % 26) * 3}) for i in range(count))
                path.write_text("\n".join(lines))
        made = functools.partial(data.TextsOnDisk, tokenizer=data.byte_tokenizer(), length=4)
        self.mix = data.Mix([made([folder / f"{name}.jsonl"]) for name in "ab"], 4, weights=(2, 1))

    def arrays(self):
        digest = np.frombuffer(bytes.fromhex(self.mix.digest), np.uint8)
        return super().arrays() | {"digest": digest}

    def start(self):
        return [[*place] for place in self.mix.start()]

    def feed(self, position, size):
        rows, behind = self.mix.take(position, size)
        return {"x": rows.tokens / np.float32(64)}, [[*place] for place in behind]

    def fed_shapes(self, size):
        return {"x": jax.ShapeDtypeStruct((size, 4), np.float32)}

    def epoch(self):
        return sum(self.mix.epoch_rows(i) for i in (0, 1))

    def batch(self, arrays, key, step, size):
        x = arrays["fed"]["x"]
        return x, x.sum(1)


SETTINGS = {
    "steps": 8,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "log_every": 2,
    "eval_every": 4,
    "checkpoint_every": 4,
}


def settings(**changes) -> TrainSettings:
    return TrainSettings(**(SETTINGS | changes))


def run(folder, *, model=None, task=None, resume=False, own_optimizer=None, about=None, **changes):
    """Trains a toy; the result and the model."""
    model = Toy() if model is None else model
    task = Regression() if task is None else task
    result = train(
        model,
        task,
        settings(**changes),
        folder,
        resume=resume,
        optimizer=own_optimizer,
        about=about,
    )
    return result, model


def parameters(model) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(v.get_value()) for path, v in flat}


def digest(model) -> str:
    sha = hashlib.sha256()
    for name, value in sorted(parameters(model).items()):
        sha.update(name.encode() + value.tobytes())
    return sha.hexdigest()


def lines(folder) -> list[dict]:
    """The metrics, but for the time, and for what the device tells."""
    measured = ("seconds", "per_second", "tokens_per_second", "peak_bytes")
    return [{k: v for k, v in r.items() if k not in measured} for r in read_metrics(folder)]


def main(folder: pathlib.Path, changes: dict) -> None:
    width, slow_save = changes.pop("width", 16), changes.pop("slow_save", 0)
    if slow_save:
        from bdia_jax.train.checkpoints import Checkpoints

        save = Checkpoints.save
        Checkpoints.save = lambda *arguments: (time.sleep(slow_save), save(*arguments))
    files = changes.pop("files", None)
    task = None if files is None else FromFiles(pathlib.Path(files))
    _, model = run(folder, model=Toy(width), task=task, resume=True, **changes)
    told = {"parameters": digest(model), "lines": lines(folder)}
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))
