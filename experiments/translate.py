"""Translates: trains an encoder-decoder reversibly, evaluates it, and uses it.

    python experiments/translate.py                          # names and phrases; minutes on 2 cores
    python experiments/translate.py --translate "3 kilometers"
    python experiments/translate.py --pairs fra-eng.zip --longest 40
    python experiments/translate.py --pairs fra-eng.zip --longest 40 --translate - < texts.txt
    python experiments/translate.py --pairs fra-eng.zip --methods standard bdia --seeds 3
    python experiments/translate.py --memory                 # of a base-size model; not run

Without a file of pairs, the data are English and French names and phrases from Unicode's locale
data. Both languages share a byte-pair vocabulary, made from the training split and saved with the
run. Several methods or seeds are compared in a table.

Writes translation-NAME-DEVICE.jsonl.

What is cleaned away: pairs with an empty side, or of very different lengths, or that are there
twice; white space is made plain. What is held out shares no sentence, of either language, with what
is trained on.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import sys
from typing import Any

import numpy as np
import translator
from flax import nnx
from measure import costs, curves, records, sources
from measure.runs import Run, dial, run_and_write, training

from bdia_jax import files
from bdia_jax.data import (
    Tokenizer,
    cldr_pairs,
    clean,
    pack_pairs,
    read_pairs,
    split_pairs,
    tfds_pairs,
    train_tokenizer,
)
from bdia_jax.nn import EncoderDecoder, EncoderDecoderConfig
from bdia_jax.steps import Signs
from bdia_jax.train import TrainSettings, Translation, command

DEPENDS = (
    *sources.CORE,
    *sources.TEXT_LAYERS,
    "bdia_jax/nn/encoder_decoder.py",
    "bdia_jax/nn/generation.py",
    "bdia_jax/nn/prompts.py",
    "bdia_jax/data/pairs.py",
    *sources.TEXTS,
    *sources.ORDINARY_STEP,
    "bdia_jax/train/tasks/t*.py",
    "experiments/translate.py",
    "experiments/translator.py",
    "experiments/measure/decoding.py",
)
SMALL = EncoderDecoderConfig(
    width=128, heads=4, hidden=256, encoder_depth=3, decoder_depth=3, max_length=128
)
SOME = TrainSettings(
    steps=900,
    batch_size=8,
    learning_rate=2e-3,
    warmup_steps=100,
    weight_decay=0.01,
    decayed="all",
    log_every=50,
    eval_every=150,
    checkpoint_every=150,
    keep_last=1,
)


@dataclasses.dataclass(frozen=True)
class Translate:
    """Translates: trains an encoder-decoder reversibly, evaluates it, and uses it."""

    pairs: pathlib.Path | None = None
    """A file with a text, a tab and its translation per line, or a zip of one; by default, names
    and phrases from Unicode's locale data."""
    tfds: str | None = None
    """Instead: a translation set of TensorFlow Datasets, such as para_crawl/enfr."""
    languages: tuple[str, str] = ("en", "fr")
    """Of that set: from, and to."""
    data_dir: pathlib.Path | None = None
    """Where prepared sets of TensorFlow Datasets are."""
    download: bool = False
    """Prepare the set if it is not there, which needs TensorFlow."""
    count: int | None = None
    """Number of pairs, drawn from all; None for all."""
    longest: int | None = None
    """Most characters of a text; None for all that fit into max_length tokens."""
    held_out: float = 0.05
    """Share of the pairs for evaluation."""
    vocabulary: int = 2000
    """Size of the byte-pair vocabulary."""
    separate: bool = False
    """A vocabulary for each language."""
    methods: tuple[str, ...] = ("bdia",)
    """How to train."""
    gamma: tuple[float, ...] = (0.5,)
    """Magnitudes of γ: 2^-m for bdia, m bits per activation and block; each with every method that
    has one."""
    signs: tuple[Signs, ...] = ("block",)
    """Of γ: drawn per block or per sample, or always minus or plus; each with every method that has
    one."""
    seeds: int = 1
    """Runs of each method."""
    label_smoothing: float = 0.1
    """Share of a target that is spread over the vocabulary."""
    beams: int = 4
    """Of the beam search."""
    length_penalty: float = 0.6
    """Of the beam search: the higher, the longer the translations."""
    decode: int = 1000
    """Most held-out pairs that are translated and scored."""
    translate: str | None = None
    """A text to translate with the network that was trained last (by the first method, with seed
    0); - for the lines of standard input."""
    memory: bool = False
    """Only compile: the memory of training a base-size model, by way and depth."""
    work: pathlib.Path = pathlib.Path("runs/translate")
    """Folder of the runs."""
    out: pathlib.Path | None = None
    """Folder of the results; by default runs/results."""
    model: EncoderDecoderConfig = SMALL
    """The network; a row of pairs has its max_length. Vocabularies, method,
    gamma and signs are set here."""
    train: TrainSettings = SOME
    """How to train it; a batch has batch_size rows, each full of pairs."""

    def __post_init__(self):
        if self.count is not None and self.count < 1:
            raise ValueError(f"count must be at least 1, or None; got {self.count}")
        if self.pairs is not None and self.tfds is not None:
            raise ValueError(f"give pairs or tfds, not both; got {self.pairs} and {self.tfds}")
        for name in ("seeds", "beams", "decode"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("methods", "gamma", "signs"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one; got none")

    @property
    def name(self) -> str:
        """Of the data."""
        if self.tfds is not None:
            return self.tfds.replace("/", "-")
        return "cldr" if self.pairs is None else self.pairs.stem


@dataclasses.dataclass(frozen=True)
class Data:
    """Both splits, of texts and their translations; and the vocabularies."""

    train: list[tuple[str, str]]
    evaluation: list[tuple[str, str]]
    source: Tokenizer
    target: Tokenizer

    def asked(self, most: int) -> tuple[list[str], list[str]]:
        """Texts that are translated, and how they should be."""
        some = self.evaluation[:most]
        return [source for source, _ in some], [target for _, target in some]

    def tokens(self, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Of pairs of texts."""
        return [(self.source.encode(a), self.target.encode(b)) for a, b in pairs]


def main(t: Translate) -> str:
    """Trains what is missing, and translates."""
    if t.memory:
        return measure_memory(t)
    if t.translate is not None:
        return use(t)
    data = load(t)
    task = packed_task(t, data)
    texts, references = data.asked(t.decode)
    copied = translator.score(texts, references)
    note = "Copying the source: " + ", ".join(f"{k} {v:.3g}" for k, v in copied.items()) + "."
    runs = [
        run_of(t, data, task, name, config, seed)
        for seed in range(t.seeds)
        for name, config in networks(t, data).items()
    ]
    work = t.work / t.name
    rows, path = run_and_write(
        f"translation-{t.name}", runs, work, DEPENDS, told, settings=t, note=note
    )
    # Of the first γ, signs and seed.
    for method, folder in {row["method"]: row["folder"] for row in reversed(rows)}.items():
        files.write_text(work / f"{method}.latest", folder)
    text = f"{curves.table(rows)}\n\n{note}"
    print(f"\n{text}\n\nSee {path}")
    return text


def packed_task(t: Translate, data: Data) -> Translation:
    """What is trained: all pairs that fit, in rows.

    Raises:
      ValueError: if none of a split does.
    """
    length = t.model.max_length
    training, evaluation = (
        [
            (source, target)
            for source, target in data.tokens(pairs)
            if 1 <= len(source) <= length and len(target) < length
        ]
        for pairs in (data.train, data.evaluation)
    )
    if not training or not evaluation:
        raise ValueError(
            f"both splits need pairs of at most {length} tokens (model.max_length); there are "
            f"{len(training)} to train on and {len(evaluation)} to evaluate on"
        )
    order = np.random.default_rng(0).permutation(len(training))
    rows = pack_pairs([training[i] for i in order], length, end=data.target.end)
    print(
        f"{t.name}: {len(training)} pairs to train on, in {len(rows.tokens)} rows of {length} "
        f"tokens; {len(evaluation)} held out",
        flush=True,
    )
    held_out = pack_pairs(evaluation, length, end=data.target.end)
    return Translation(t.name, rows, held_out, label_smoothing=t.label_smoothing)


def run_of(
    t: Translate, data: Data, task: Translation, name: str, config: EncoderDecoderConfig, seed: int
) -> Run:
    """A network, trained, saved and scored."""

    def scored(model: EncoderDecoder, folder: pathlib.Path) -> dict[str, Any]:
        trained = translator.Translator(model, data.source, data.target)
        trained.save(folder)
        texts, references = data.asked(t.decode)
        said = trained(texts, beams=t.beams, length_penalty=t.length_penalty, cut=True)
        examples = [[*three] for three in zip(texts, said, references)][:10]
        return {"scores": translator.score(said, references), "examples": examples}

    # What the data are made from, and how translations are scored; the others are of a run.
    others = "methods", "gamma", "signs", "seeds", "model", "train"
    others += "data_dir", "download", "translate", "memory", "work", "out"
    return training(
        f"{curves.file_name(name)}_seed={seed}",
        lambda: EncoderDecoder(config, rngs=nnx.Rngs(seed)),
        task,
        dataclasses.replace(t.train, seed=seed),
        records.plain(t, *others) | {"model": records.plain(config)},
        scored,
        curves.named(name, config) | {"seed": seed},
    )


def told(record: dict[str, Any]) -> str:
    """A line about a run, and some of its translations."""
    header = ["source", "translation", "reference"]
    return f"{curves.told(record)}\n{records.markdown(header, record.get('examples', []))}"


def load(t: Translate) -> Data:
    """Pairs, cleaned and split; vocabularies of the training split."""
    if t.tfds is not None:
        pairs = tfds_pairs(t.tfds, *t.languages, t.data_dir, download=t.download)
    else:
        pairs = cldr_pairs() if t.pairs is None else read_pairs(t.pairs)
    pairs = clean(pairs, longest=t.longest)
    # In any order but the file's, in which short ones may come first.
    pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))[: t.count]]
    training, evaluation = split_pairs(pairs, t.held_out)
    sides = [[pair[side] for pair in training] for side in (0, 1)]
    if t.separate:
        source, target = (train_tokenizer(texts, t.vocabulary) for texts in sides)
    else:
        source = target = train_tokenizer(sides[0] + sides[1], t.vocabulary)
    return Data(training, evaluation, source, target)


def networks(t: Translate, data: Data) -> dict[str, EncoderDecoderConfig]:
    """By the name of a row."""
    sizes = {
        "source_vocab": data.source.size,
        "target_vocab": data.target.size if t.separate else None,
    }
    return {
        name: dataclasses.replace(t.model, **sizes, **fields)
        for name, fields in dial(t.methods, t.gamma, t.signs).items()
    }


def use(t: Translate) -> str:
    """Translates with a saved run."""
    latest = t.work / t.name / f"{t.methods[0]}.latest"
    if not latest.exists():
        raise FileNotFoundError(
            f"there is no trained network ({latest}): run the same command without --translate "
            "first"
        )
    saved = translator.load(latest.with_name(latest.read_text(encoding="utf-8")))
    texts = sys.stdin.read().rstrip("\n").split("\n") if t.translate == "-" else [t.translate]
    said = saved(texts, beams=t.beams, length_penalty=t.length_penalty)
    print("\n".join(said))
    return "\n".join(said)


def measure_memory(t: Translate) -> str:
    """What lies beside weights and gradients at the peak, with 6 + 6 and 24 + 24 blocks."""
    found = costs.main(
        costs.Costs(
            "activations",
            networks=("translation",),
            ways=("standard", "checkpointed", "BDIA", "BDIA, parts"),
            dtypes=("float32", "bfloat16"),
            values=(6, 24),
            out=t.out,
        )
    )
    return costs.memory_table(found["translation"])


if __name__ == "__main__":
    command.run(main, Translate, __doc__, told=logging.WARNING)
