"""Trains GPT-2's kind of decoder from scratch on little text, until it over-fits.

    python experiments/gpt2_small_data.py                                 # Python's own sources
    python experiments/gpt2_small_data.py --text shakespeare.txt --share 0.05 --train.steps 5000

Every method is trained with every dropout, from several seeds; what comes out is a table and the
curves of training and validation loss. ``--save`` keeps the networks as Hugging Face folders.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from typing import Any

import command
import jax
import results
from curves import best, draw, summary, table
from flax import nnx

from bdia_jax import files, interop
from bdia_jax.data import (
    TextData,
    Tokenizer,
    byte_tokenizer,
    load_tokenizer,
    python_sources,
    read_text,
    split_text,
    train_tokenizer,
)
from bdia_jax.nn import Decoder, DecoderConfig
from bdia_jax.train import LanguageModelling, TrainSettings, train

SMALL = DecoderConfig(width=128, depth=4, heads=4, max_length=64)
SOME = TrainSettings(
    steps=2000,
    batch_size=12,
    learning_rate=1e-3,
    warmup_steps=100,
    weight_decay=0.1,
    log_every=250,
    eval_every=250,
)


@dataclasses.dataclass(frozen=True)
class SmallData:
    """Trains GPT-2's kind of decoder from scratch on little text, until it over-fits."""

    text: pathlib.Path | None = None
    """A text file, of which the last tenth is for validation; by default, sources of Python's
    standard library."""
    share: float = 1.0
    """Of the training text, from its start."""
    vocabulary: int | None = None
    """Size of a byte-pair vocabulary, made from the training text; None for bytes."""
    tokenizer: pathlib.Path | None = None
    """Instead: a tokenizer.json, or a folder with vocab.json and merges.txt."""
    methods: tuple[str, ...] = ("standard", "bdia")
    """How to train."""
    dropouts: tuple[float, ...] = (0.0, 0.1)
    """Each with every method."""
    seeds: int = 3
    """Runs of each."""
    save: bool = False
    """Keep every network as a Hugging Face folder, with its tokenizer, in the folder of its run."""
    work: pathlib.Path = pathlib.Path("runs/gpt2_small_data")
    """Folder of the runs; what is there is continued."""
    out: pathlib.Path | None = None
    """Folder of the results; by default experiments/results."""
    model: DecoderConfig = SMALL
    """The network; windows have its max_length. Tokens, method and dropout are set here."""
    train: TrainSettings = SOME
    """How to train it."""

    def __post_init__(self):
        if self.vocabulary is not None and self.tokenizer is not None:
            raise ValueError(
                f"give vocabulary or tokenizer, not both; got {self.vocabulary} and "
                f"{self.tokenizer}"
            )
        if self.seeds < 1 or not self.methods or not self.dropouts:
            raise ValueError(
                "there must be at least one seed, method and dropout; got "
                f"{self.seeds}, {self.methods} and {self.dropouts}"
            )

    @property
    def name(self) -> str:
        """Of the text, and its share."""
        text = "python" if self.text is None else self.text.stem
        return text if self.share == 1 else f"{text}-{self.share:g}"


def main(s: SmallData) -> str:
    """Runs what is missing; the table."""
    data, tokenizer = load(s)
    task = LanguageModelling(data, s.model.max_length)
    configs = {
        f"{method}, dropout {dropout:g}": dataclasses.replace(
            s.model, vocab_size=tokenizer.size, method=method, dropout=dropout
        )
        for method in s.methods
        for dropout in s.dropouts
    }
    # Seeds of a network share its programs.
    jax.config.update("jax_compilation_cache_dir", str((s.work / "compiled").resolve()))
    curves: dict[str, list[list[dict[str, Any]]]] = {}
    for seed in range(s.seeds):
        for name, config in configs.items():
            history = run(s, task, tokenizer, name, config, seed)
            curves.setdefault(name, []).append(history)
    found = {name: summary(runs) for name, runs in curves.items()}
    text = table(found, digits={"at step": 0})
    out = s.out or results.FOLDER
    path = results.write(f"gpt2_small_data-{s.name}", s, {"found": found, "curves": curves}, out)
    files.write_text(path.with_suffix(".md"), text + "\n")
    draw(curves, path.with_suffix(".png"))
    print(f"\n{text}\n\nSee {path}")
    return text


def load(s: SmallData) -> tuple[TextData, Tokenizer]:
    """The text in tokens."""
    text = python_sources() if s.text is None else read_text(s.text)
    if s.vocabulary is not None:
        tokenizer = train_tokenizer([text[: int(0.9 * len(text) * s.share)]], s.vocabulary)
    else:
        tokenizer = byte_tokenizer() if s.tokenizer is None else load_tokenizer(s.tokenizer)
    return split_text(s.name, text, tokenizer, share=s.share), tokenizer


def run(
    s: SmallData,
    task: LanguageModelling,
    tokenizer: Tokenizer,
    name: str,
    config: DecoderConfig,
    seed: int,
) -> list[dict[str, Any]]:
    """Trains one network; its records."""
    folder = s.work / s.name / name.replace(", ", "_").replace(" ", "=") / f"seed={seed}"
    model = Decoder(config, rngs=nnx.Rngs(seed))
    settings = dataclasses.replace(s.train, seed=seed)
    about = {"model": dataclasses.asdict(config)}
    result = train(model, task, settings, folder / "run", resume=True, about=about)
    print(
        f"{name}, seed {seed}: validation loss {result.last('eval', 'loss'):.3f}, at best "
        f"{-best(result.history)[0]:.3f}; {result.seconds_per_step * 1e3:.1f} ms per step",
        flush=True,
    )
    if s.save:
        model.eval()
        interop.save(model, folder / "model")
        tokenizer.save(folder / "model")
    return result.history


if __name__ == "__main__":
    command.run(main, SmallData, __doc__, told=logging.WARNING)
