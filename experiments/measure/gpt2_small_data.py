"""Trains GPT-2's kind of decoder from scratch on little text, until it over-fits.

    python experiments/measure/gpt2_small_data.py                         # Python's own sources
    python experiments/measure/gpt2_small_data.py --text shakespeare.txt --share 0.05
    python experiments/measure/gpt2_small_data.py --gammas 0.5 0.0625 --signs block sample

Every method is trained with every γ, signs and dropout, from several seeds. ``--save`` keeps the
networks as Hugging Face folders.

Writes small-text-NAME-DEVICE.jsonl.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import sys
from typing import Any

from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


from bdia_jax import interop
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
from bdia_jax.steps import Signs
from bdia_jax.train import LanguageModelling, TrainSettings, command
from measure import curves, records, sources
from measure.runs import Run, dial, run_and_write, training

DEPENDS = (
    *sources.CORE,
    *sources.TEXT_LAYERS,
    *sources.TEXTS,
    *sources.ORDINARY_STEP,
    "bdia_jax/train/tasks/text.py",
    "experiments/measure/gpt2_small_data.py",
)
SMALL = DecoderConfig(width=128, depth=4, heads=4, max_length=64)
SOME = TrainSettings(
    steps=2000,
    batch_size=12,
    learning_rate=1e-3,
    warmup_steps=100,
    weight_decay=0.1,
    decayed="all",
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
    gammas: tuple[float, ...] = (0.5,)
    """Magnitudes of γ, each with every method that has one."""
    signs: tuple[Signs, ...] = ("block",)
    """Of γ, each with every method that has one."""
    dropouts: tuple[float, ...] = (0.0, 0.1)
    """Each with every method."""
    seeds: int = 3
    """Runs of each."""
    save: bool = False
    """Keep every network as a Hugging Face folder, with its tokenizer, in the folder of its run."""
    work: pathlib.Path = pathlib.Path("runs/gpt2_small_data")
    """Folder of the runs."""
    out: pathlib.Path | None = None
    """Folder of the results; by default runs/results."""
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
    runs = [
        run_of(s, task, tokenizer, name, config, seed)
        for seed in range(s.seeds)
        for name, config in networks(s, tokenizer.size).items()
    ]
    rows, path = run_and_write(
        f"small-text-{s.name}", runs, s.work / s.name, DEPENDS, curves.told, settings=s
    )
    text = curves.table(rows)
    print(f"\n{text}\n\nSee {path}")
    return text


def networks(s: SmallData, tokens: int) -> dict[str, DecoderConfig]:
    """By the name of a row."""
    found = {}
    for name, fields in dial(s.methods, s.gammas, s.signs).items():
        for dropout in s.dropouts:
            told = len(s.dropouts) > 1 or dropout
            config = dataclasses.replace(s.model, vocab_size=tokens, dropout=dropout, **fields)
            found[f"{name}, dropout {dropout:g}" if told else name] = config
    return found


def load(s: SmallData) -> tuple[TextData, Tokenizer]:
    """The text in tokens."""
    text = python_sources() if s.text is None else read_text(s.text)
    if s.vocabulary is not None:
        tokenizer = train_tokenizer([text[: int(0.9 * len(text) * s.share)]], s.vocabulary)
    else:
        tokenizer = byte_tokenizer() if s.tokenizer is None else load_tokenizer(s.tokenizer)
    return split_text(s.name, text, tokenizer, share=s.share), tokenizer


def run_of(
    s: SmallData,
    task: LanguageModelling,
    tokenizer: Tokenizer,
    name: str,
    config: DecoderConfig,
    seed: int,
) -> Run:
    """Trains one network."""

    def save(model: Decoder, folder: pathlib.Path) -> dict[str, Any]:
        if s.save:
            model.eval()
            interop.save(model, folder / "model")
            tokenizer.save(folder / "model")
        return {}

    return training(
        f"{curves.file_name(name)}_seed={seed}",
        lambda: Decoder(config, rngs=nnx.Rngs(seed)),
        task,
        dataclasses.replace(s.train, seed=seed),
        {"model": records.plain(config), "vocabulary": s.vocabulary, "save": s.save},
        save,
        curves.named(name, config) | {"seed": seed},
    )


if __name__ == "__main__":
    command.run(main, SmallData, __doc__, told=logging.WARNING)
