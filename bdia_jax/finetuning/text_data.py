"""The texts of a fine-tuning: one set packed at once, or sources that are mixed or streamed."""

from __future__ import annotations

import functools
import itertools
import pathlib
from collections.abc import Iterable, Sequence

from bdia_jax.data import (
    ChatTemplate,
    Example,
    Mix,
    Packed,
    TextsInMemory,
    TextsOnDisk,
    TextSource,
    Tokenizer,
    pack,
)
from bdia_jax.data.example_files import read_by_record
from bdia_jax.finetuning.text_settings import FineTune
from bdia_jax.train import MixedTexts, PackedTexts, TrainSettings
from bdia_jax.train.run_folder import INDEX


def task_of(
    f: FineTune, tokenizer: Tokenizer, length: int, template: ChatTemplate | None
) -> tuple[PackedTexts | MixedTexts, list[Example]]:
    """What is trained on, and the texts for evaluation.

    Raises:
      ValueError: for data that are refused, or are too few; and for weights that are no shares.
    """
    paths = paths_of(f)
    name = " + ".join(path.name for path in paths)
    if f.weights is None and not f.stream:
        train, evaluation = split(f, tokenizer, length, template)
        task = PackedTexts(name, pack(train, length), pack(evaluation, length))
        print(
            f"{len(train):,} texts in {len(task.train.tokens):,} sequences of {length} tokens, "
            f"{full(task.train):.1%} full; {len(evaluation):,} texts for evaluation"
        )
        return task, evaluation
    read = reader(f, tokenizer, length, template)
    found = on_disk(f, tokenizer, length, template) if f.stream else in_memory(f, read)
    sources, evaluation = found
    # Before anything is packed: what is wrong with the weights is told at once.
    mix = Mix(sources, length, weights=f.weights, seed=f.train.seed % 2**32)
    if f.eval_data is not None:
        evaluation = flat(read(f.eval_data))
    return MixedTexts(name, mix, pack(evaluation, length)), evaluation


def paths_of(f: FineTune) -> tuple[pathlib.Path, ...]:
    """The data, of which there may be one or several."""
    return f.data if isinstance(f.data, tuple) else (f.data,)


def reader(f: FineTune, tokenizer: Tokenizer, length: int, template: ChatTemplate | None):
    """What reads a file or a folder whole: the examples of each record."""
    return functools.partial(
        read_by_record, tokenizer=tokenizer, length=length, too_long=f.too_long, template=template
    )


def split(
    f: FineTune, tokenizer: Tokenizer, length: int, template: ChatTemplate | None = None
) -> tuple[list[Example], list[Example]]:
    """Texts for training and for evaluation, of all data together."""
    read = reader(f, tokenizer, length, template)
    records = [record for path in paths_of(f) for record in read(path)]
    if f.eval_data is not None:
        return flat(records), flat(read(f.eval_data))
    return every_tenth(records, " + ".join(map(str, paths_of(f))))


def every_tenth(records: list[list[Example]], name: str) -> tuple[list[Example], list[Example]]:
    """The texts of all records but every tenth, and of those.

    Whole records, since the texts of one have much in common: answers of one conversation.
    """
    if len(records) < 10:
        raise ValueError(
            f"{name} has {len(records)} texts, of which every tenth would be for evaluation: give "
            "more, or eval_data (--eval-data)"
        )
    learned = [record for i, record in enumerate(records) if i % 10 != 9]
    tell_repeated(learned, records[9::10])
    return flat(learned), flat(records[9::10])


def tell_repeated(learned: list[list[Example]], held_out: list[list[Example]]) -> None:
    """Says how many of the records that are held out are learned, too, if any are.

    Data may have a record several times; the loss of such a one says little of others.
    """
    known = {_hash(record) for record in learned}
    if repeated := sum(_hash(record) in known for record in held_out):
        print(
            f"{repeated:,} of {len(held_out):,} held-out records are also among the training "
            "records"
        )


def _hash(record: list[Example]) -> int:
    """Of all its tokens: a number per record takes no memory to speak of."""
    return hash(tuple(tuple(example.tokens) for example in record))


def flat(records: Iterable[list[Example]]) -> list[Example]:
    """The texts of some records."""
    return [*itertools.chain.from_iterable(records)]


def in_memory(f: FineTune, read) -> tuple[list[TextSource], list[Example]]:
    """The sources, read whole, and what they hold out."""
    sources, evaluation = [], []
    for path in paths_of(f):
        records = read(path)
        texts, held_out = flat(records), []
        if f.eval_data is None:
            texts, held_out = every_tenth(records, str(path))
        evaluation += held_out
        sources.append(TextsInMemory(path.name, texts))
    return sources, evaluation


def on_disk(
    f: FineTune, tokenizer: Tokenizer, length: int, template: ChatTemplate | None
) -> tuple[list[TextSource], list[Example]]:
    """The sources, read as the run goes, and what they hold out."""
    # Without weights, all data are one set, in which each text is seen as often as any other.
    groups = [paths_of(f)] if f.weights is None else [(path,) for path in paths_of(f)]
    sources = [
        TextsOnDisk(
            group,
            tokenizer,
            length,
            too_long=f.too_long,
            template=template,
            hold_out=f.eval_data is None,
            folder=f.out.expanduser() / INDEX / str(number),
        )
        for number, group in enumerate(groups)
    ]
    return [*sources], [example for source in sources for example in source.held_out()]


def tell(task: PackedTexts | MixedTexts, settings: TrainSettings, evaluation: Sequence) -> None:
    """Says what each source has, and how often its texts will be seen."""
    if not isinstance(task, MixedTexts):
        return
    mix = task.mix
    for i, (source, share) in enumerate(zip(mix.sources, mix.shares)):
        first = mix.first_window(i)
        rows = mix.known_rows(i)
        if rows is None:
            source.tell(f"of the first {len(first.tokens):,} sequences, ")
        told = f"{rows:,}" if rows else f"about {len(first.tokens) * mix.windows[i]:,}"
        rows = rows or len(first.tokens) * mix.windows[i]
        times = share * settings.total_steps * settings.batch_size / rows
        print(
            f"{source.name}: {source.texts:,} texts in {told} sequences of {mix.length} tokens, "
            f"{full(first):.1%} full; {share:.1%} of all sequences, so that each text is seen "
            f"{times:.3g} times"
        )
    print(f"{len(evaluation):,} texts for evaluation")


def full(packed: Packed) -> float:
    """Share of the places in rows that hold a token."""
    return float((packed.segments > 0).mean())
