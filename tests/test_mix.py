"""Texts that are mixed by weights, and read as a run goes: their order, and what is in memory."""

import collections
import itertools
import json
import logging
import os
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from bdia_jax import data
from bdia_jax.data.blocks import PASSAGE, blocks_of
from bdia_jax.data.order import permuted, shares_of, whose_turn

TOKENIZER = data.byte_tokenizer()
LENGTH = 16
CHAT = data.ChatTemplate("{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}")


def texts_of(rows):
    """The texts in packed rows."""
    for row in zip(*rows):
        row = data.Packed(*row)
        for segment in range(1, row.segments.max() + 1):
            yield TOKENIZER.decode(row.tokens[row.segments == segment])


def write_lines(path, records, end="\n"):
    path.write_text("".join(json.dumps(record) + end for record in records))
    return path


def in_memory(name, count):
    texts = [f"{name}{i}" for i in range(count)]
    return [name + text for text in texts], data.TextsInMemory(
        name, [data.completion(TOKENIZER, name, t) for t in texts]
    )


def small_windows(monkeypatch, rows=2):
    monkeypatch.setattr("bdia_jax.data.mix.WINDOW", rows)


# ---------------------------------------------------------------------------------------------
# Orders and turns
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_an_order_has_everything_once(count):
    found = permuted(np.arange(count), count, (0, 1))
    assert sorted(found) == list(range(count))
    # A part of it is that part of the whole.
    assert [*permuted(np.arange(count // 2, count), count, (0, 1))] == [*found[count // 2 :]]
    if count >= 64:
        others = [permuted(np.arange(count), count, seed) for seed in ((0, 2), (1, 1), (1, 0))]
        assert all(np.mean(found == other) < 0.2 for other in others)


def test_an_order_is_random():
    """Every thing as often at every place, up to chance: chi squared, of 16 degrees of freedom."""
    counts = np.zeros((5, 5))
    for seed in range(400):
        counts[np.arange(5), permuted(np.arange(5), 5, (seed,))] += 1
    assert ((counts - 80) ** 2 / 80).sum() < 40
    # And neighbours are not neighbours in it: 2 of 999 pairs would be expected.
    assert (np.abs(np.diff(permuted(np.arange(1000), 1000, (0,)))) == 1).sum() < 10


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1, 0, 3), (1,), (1e-3, 1, 1, 7)])
def test_turns_keep_to_the_shares(weights):
    shares, given = shares_of(weights, len(weights)), [0] * len(weights)
    for n in range(1, 500):
        given[whose_turn(given, shares)] += 1
        ahead = np.asarray(given) - n * np.asarray(shares)
        assert ahead.max() < 1
        assert ahead.min() > -2
    assert all(had == 0 for had, weight in zip(given, weights) if not weight)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1, 2), r"one for each of the 3 data; got 2: \[1, 2\]"),
        ((1, -2, 3), r"0 or positive, and finite; got \[1, -2, 3\]"),
        ((1, float("nan"), 3), "and finite"),
        ((1, float("inf"), 3), "and finite"),
        ((0, 0, 0), "at least one of the weights must be positive"),
    ],
)
def test_weights_that_are_none(weights, message):
    sources = [in_memory(name, 2)[1] for name in "abc"]
    with pytest.raises(ValueError, match=message):
        data.Mix(sources, LENGTH, weights=weights)
    with pytest.raises(ValueError, match="at least one source"):
        data.Mix([], LENGTH)
    with pytest.raises(ValueError, match="a must have texts for training"):
        data.TextsInMemory("a", [])


# ---------------------------------------------------------------------------------------------
# A mix
# ---------------------------------------------------------------------------------------------


def test_every_text_is_seen_once_before_any_again(monkeypatch):
    small_windows(monkeypatch)
    (a, of_a), (b, of_b) = in_memory("a", 50), in_memory("b", 17)
    mix = data.Mix([of_a, of_b], LENGTH, weights=(1, 3), seed=5)
    assert min(mix.windows) > 1
    rows, _ = mix.take(mix.start(), 80)
    seen = {"a": [], "b": []}
    for row in zip(*rows):
        (name,) = {text[0] for text in texts_of([[x] for x in row])}
        seen[name].append([*texts_of([[x] for x in row])])
    assert [len(rows) for rows in seen.values()] == [20, 60]
    for texts, rows in ((a, seen["a"]), (b, seen["b"])):
        flat = [*itertools.chain.from_iterable(rows)]
        epochs = [flat[i : i + len(texts)] for i in range(0, len(flat), len(texts))]
        assert len(epochs) > 1
        assert all(sorted(epoch) == sorted(texts) for epoch in epochs[:-1])
        assert collections.Counter(epochs[-1]).most_common(1)[0][1] == 1
        assert epochs[0] != epochs[1]


def test_any_position_can_be_entered(monkeypatch):
    small_windows(monkeypatch)
    made = lambda: data.Mix(  # noqa: E731
        [in_memory("a", 30)[1], in_memory("b", 9)[1]], LENGTH, weights=(2, 1), seed=1
    )
    whole, _ = made().take(made().start(), 40)
    for cut in (1, 7, 24):
        mix = made()
        _, position = mix.take(mix.start(), cut)
        # As a checkpoint keeps it.
        position = json.loads(json.dumps(position))
        again, behind = made().take(position, 40 - cut)
        assert all(np.array_equal(x[cut:], y) for x, y in zip(whole, again))
        assert sum(place.given for place in behind) == 40
    other, _ = data.Mix(made().sources, LENGTH, weights=(2, 1), seed=2).take(made().start(), 40)
    assert not np.array_equal(whole.tokens, other.tokens)
    shapes = made().shapes(40)
    assert [(a.shape, a.dtype) for a in whole] == [(s.shape, s.dtype) for s in shapes]


def test_a_digest_is_of_all_that_decides_the_rows(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(20)])

    def digest(seed=0, weights=(1, 2), length=LENGTH, tokenizer=TOKENIZER, **options):
        disk = data.TextsOnDisk([tmp_path / "a.jsonl"], tokenizer, length, **options)
        return data.Mix([in_memory("b", 3)[1], disk], length, weights=weights, seed=seed).digest

    first = digest()
    assert first == digest() == digest(weights=(2, 4))
    others = [
        digest(seed=1),
        digest(weights=(2, 1)),
        digest(length=15),
        digest(tokenizer=data.train_tokenizer(["a1 a2"], 300)),
        digest(too_long="split"),
        digest(template=CHAT),
        digest(hold_out=True),
    ]
    write_lines(tmp_path / "a.jsonl", [{"text": f"b{i}"} for i in range(20)])
    assert len({first, *others, digest()}) == 9


# ---------------------------------------------------------------------------------------------
# Files that are read as a run goes
# ---------------------------------------------------------------------------------------------

RECORDS = [{"prompt": f"{i}?", "completion": "é\u2028" * (i % 3)} for i in range(25)]
PAIRS = [tuple(record.values()) for record in RECORDS]


def parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=4)


def table(path):
    rows = [f'"{a}","{b} ""x"",\n\n"' for a, b in PAIRS]
    path.write_bytes("\r\n".join(["\ufeffprompt,completion", *rows]).encode())


FILES = {
    "a.jsonl": lambda path: path.write_bytes(
        b"\n\xef\xbb\xbf" + "\r\n\n".join(map(json.dumps, RECORDS)).encode()
    ),
    "a.csv": table,
    "a.parquet": parquet,
    "a.txt": lambda path: path.write_text(
        "".join(f"line {i} of some text\r\n" for i in range(9000)) + "\n \n"
    ),
    "folder": lambda path: (
        path.mkdir(),
        *(FILES[name](path / name) for name in ("a.jsonl", "a.csv", "a.parquet")),
    ),
    "chats.jsonl": lambda path: write_lines(
        path,
        [
            {"messages": [{"role": r, "content": f"{i}"} for r in ("user", "assistant")]}
            for i in range(12)
        ],
    ),
    "asked.jsonl": lambda path: write_lines(
        path, [{"instruction": f"{i}", "input": "x" * (i % 2), "output": "y"} for i in range(12)]
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_read_as_it_goes_is_what_is_read_at_once(name, tmp_path):
    FILES[name](tmp_path / name)
    length = 64 if name != "a.txt" else 3 * PASSAGE
    whole = data.read_examples(tmp_path / name, TOKENIZER, length, template=CHAT)
    source = data.TextsOnDisk([tmp_path / name], TOKENIZER, length, template=CHAT)
    blocks = [source.read([block]) for block in range(source.blocks)]
    found = source.read(range(source.blocks))
    assert found == [example for block in blocks for example in block]
    if name == "a.txt":
        # Passages begin and end at lines; only the last one has an end.
        assert len(blocks) == source.texts > 2
        text = "".join(TOKENIZER.decode(example.tokens) for example in found)
        assert text == data.read_text(tmp_path / name)
        ends = [example.tokens[-1] == TOKENIZER.end for example in found]
        assert ends == [False] * (len(found) - 1) + [True]
        return
    assert found == whole
    assert source.texts == len(whole)
    # Row groups are read whole, records of other files one by one.
    assert (len(blocks) < len(whole)) == (name in ("a.parquet", "folder"))


def test_every_tenth_record_is_held_out(tmp_path):
    for name in ("a.jsonl", "a.parquet"):
        FILES[name](tmp_path / name)
        whole = data.read_examples(tmp_path / name, TOKENIZER, 64)
        source = data.TextsOnDisk([tmp_path / name], TOKENIZER, 64, hold_out=True)
        assert source.held_out() == [whole[9], whole[19]]
        found = source.read(range(source.blocks))
        assert found == [t for i, t in enumerate(whole) if i not in (9, 19)]
        assert source.texts == len(found) == 23
    write_lines(tmp_path / "few.jsonl", RECORDS[:9])
    with pytest.raises(ValueError, match=r"few\.jsonl has 9 records, of which every tenth"):
        data.TextsOnDisk([tmp_path / "few.jsonl"], TOKENIZER, 64, hold_out=True)


WRONG = {
    "a.json": (b"[]", r"a\.json: a \.json file is read whole.*\(\.jsonl\) or Parquet"),
    "a.jsonl": (b'{"text": "a"}\n\n{"text": 1}\n', "a.jsonl, line 3: .*text is no text; got 1"),
    "b.jsonl": (b'{"text": "a"}\n{"text": "b', "line 2: .*no JSON.*is it cut off"),
    "c.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: no text in UTF-8"),
    "d.jsonl": (b'{"text": "a"}\n{"text": ""}\n', "line 2: the text must not be empty"),
    "e.jsonl": (b'{"messages": []}\n', "has conversations, for which a model must have"),
    "f.jsonl": (b" \n\n", r"f\.jsonl is empty"),
    "a.csv": (b"prompt,completion\na,b\nc\n", "line 3: 1 columns, where"),
    "b.csv": (b"prompt,completion\n", r"b\.csv has no records"),
    "c.csv": (b"messages\n1\n", "conversations must be in"),
    "a.parquet": (b"PAR1", "is no Parquet file that can be read"),
    "a.txt": (b"a\nb\0\n", "line 2: no text in UTF-8, for it has zero bytes"),
    "a.gz": (b"", "is neither"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_refused_before_anything_is_trained(name, tmp_path):
    (tmp_path / name).write_bytes(WRONG[name][0])
    with pytest.raises(ValueError, match=WRONG[name][1]):
        data.TextsOnDisk([tmp_path / name], TOKENIZER, 64, folder=tmp_path / "index")
    # What is half made is no index.
    assert not (tmp_path / "index" / "about.json").exists()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        data.TextsOnDisk([tmp_path / "none.jsonl"], TOKENIZER, 64)


def test_messages_are_checked_before_anything_is_trained(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(ValueError, match="line 1: messages must have an answer"):
        data.TextsOnDisk([path], TOKENIZER, 64, template=CHAT)


def test_an_index_is_made_once(tmp_path, monkeypatch):
    path, folder = write_lines(tmp_path / "a.jsonl", RECORDS), tmp_path / "index"
    first = data.TextsOnDisk([path], TOKENIZER, 64, folder=folder)
    mix = data.Mix([first], 64)
    assert mix.known_rows(0) is None
    rows = mix.epoch_rows(0)
    read = []
    kind = type(blocks_of(path))
    monkeypatch.setattr(kind, "cut", lambda self, sha: read.append(self) or iter(()))
    again = data.TextsOnDisk([path], TOKENIZER, 64, folder=folder)
    assert (again.digest, again.texts, read) == (first.digest, first.texts, [])
    assert data.Mix([again], 64).known_rows(0) == rows
    # Written to, it is read again, though the size and the time of the last change are the same.
    before = path.stat()
    path.write_text(path.read_text().replace("1?", "7?"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=r"a\.jsonl has no records"):
        data.TextsOnDisk([path], TOKENIZER, 64, folder=folder)
    assert len(read) == 1
    with pytest.raises(ValueError, match="has changed while it was read"):
        first.read([3])
    monkeypatch.undo()
    assert data.TextsOnDisk([path], TOKENIZER, 64, folder=folder).digest != first.digest


def test_long_texts_are_told_and_a_source_without_any_is_refused(tmp_path, caplog):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a" * (i + 1)} for i in range(12)])
    source = data.TextsOnDisk([path], TOKENIZER, 8, too_long="drop")
    mix = data.Mix([source], 8)
    assert sorted(map(len, texts_of(mix.first_window(0)))) == [*range(1, 9)]
    with caplog.at_level(logging.WARNING, "bdia_jax"):
        source.tell("of some, ")
        assert mix.epoch_rows(0) == len(mix.first_window(0).tokens)
    told = "4 texts are left out, of more than 9 tokens"
    assert [f"a.jsonl: {some}{told}" in caplog.text for some in ("of some, ", "")] == [True, True]
    none = data.TextsOnDisk([path], TOKENIZER, 8, too_long="error")
    with pytest.raises(ValueError, match=r"a\.jsonl, record \d+: the text has \d+ tokens"):
        data.Mix([none], 8).first_window(0)
    write_lines(path, [{"prompt": "a" * 20, "completion": "b"}] * 3)
    none = data.TextsOnDisk([path], TOKENIZER, 8)
    with pytest.raises(ValueError, match=r"a\.jsonl has nothing to learn in sequences of 8"):
        data.Mix([none], 8).take([[0, 0, 0]], 1)


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


def peak_of(path):
    """Bytes that Python and NumPy hold at most, for the index and for some batches."""
    tracemalloc.start()
    source = data.TextsOnDisk([path], TOKENIZER, 64)
    mix = data.Mix([source], 64)
    mix.take(mix.take(mix.start(), 64)[1], 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return source.texts, peak


@pytest.mark.slow
@pytest.mark.unchecked
def test_memory_does_not_grow_with_the_set(tmp_path, monkeypatch):
    """Of 20 times as many lines, not a tenth more is held at the peak."""
    small_windows(monkeypatch, 16)
    peaks = []
    for count in (400, 8000):
        path = tmp_path / f"{count}.jsonl"
        with open(path, "w") as file:
            file.writelines(f'{{"text": "{i:06} {"word " * 5}"}}\n' for i in range(count))
        texts, peak = peak_of(path)
        assert texts == count
        peaks.append(peak)
    assert peaks[1] < 1.1 * peaks[0]
