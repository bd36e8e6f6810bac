"""Sentence pairs, and the script that translates."""

import dataclasses
import pathlib
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow_datasets as tfds

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "experiments"))

import translate

from bdia_jax.data import cldr_pairs, clean, pack_pairs, split_pairs, tfds_pairs
from bdia_jax.nn import EncoderDecoderConfig
from bdia_jax.train import TrainSettings

WORDS = st.sampled_from([f"w{i}" for i in range(12)])


def test_locale_data_are_pairs():
    found = clean(cldr_pairs())
    assert len(found) > 2500
    assert {("Germany", "Allemagne"), ("1 grain", "1 grain")} <= set(found)
    assert any(a.startswith("Arabic (") and b.startswith("arabe (") for a, b in found)
    copied = np.mean([a == b for a, b in found])
    assert 0 < copied < 0.2


def test_cleaning():
    pairs = [
        (" a\u00a0 b ", "e\u0301\u202f?"),
        ("", "x"),
        ("a b", "é ?"),
        ("a" * 5, "b" * 36),
        ("a" * 60, "b"),
        ("c" * 9, "d"),
    ]
    assert clean(pairs) == [("a b", "é ?"), ("c" * 9, "d")]
    assert clean(pairs, longest=8) == [("a b", "é ?")]


@hypothesis.given(st.lists(st.tuples(WORDS, WORDS), unique=True), st.randoms())
def test_no_text_is_on_both_sides(pairs, random):
    train, evaluation = split_pairs(pairs, 0.3)
    assert sorted(train + evaluation) == sorted(pairs)
    for side in (0, 1):
        assert not {p[side] for p in train} & {p[side] for p in evaluation}
    # Whatever their order.
    shuffled = [*pairs]
    random.shuffle(shuffled)
    assert set(split_pairs(shuffled, 0.3)[1]) == set(evaluation)


def test_about_as_many_are_held_out_as_asked_for():
    pairs = [(f"a{i}", f"b{i}") for i in range(4000)]
    assert 300 < len(split_pairs(pairs, 0.1)[1]) < 500


LENGTHS = st.tuples(st.integers(1, 12), st.integers(0, 11))


@hypothesis.given(st.lists(LENGTHS, min_size=1, max_size=40))
def test_packing_loses_and_mixes_nothing(sizes):
    pairs = [([2 + i] * a, [3 + i] * b) for i, (a, b) in enumerate(sizes)]
    packed = pack_pairs(pairs, 12, end=1)
    found = []
    for row in range(len(packed.tokens)):
        for segment in range(1, packed.segments[row].max() + 1):
            source, target = (
                segments[row] == segment for segments in (packed.source_segments, packed.segments)
            )
            tokens, targets = packed.tokens[row][target], packed.targets[row][target]
            assert tokens[0] == targets[-1] == 1
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            assert packed.weights[row][target].all()
            for positions, where in ((packed.source_positions, source), (packed.positions, target)):
                np.testing.assert_array_equal(positions[row][where], np.arange(where.sum()))
            found.append((packed.source[row][source].tolist(), targets[:-1].tolist()))
    assert sorted(found) == sorted(pairs)
    assert packed.weights.sum() == sum(b + 1 for _, b in sizes)


def test_packing_refuses():
    for pairs, message in (
        ([], "at least one"),
        ([([], [1])], "pair 0 has 0 and 1"),
        ([([1], [1] * 4)], "pair 0 has 1 and 4"),
    ):
        with pytest.raises(ValueError, match=message):
            pack_pairs(pairs, 4, end=0)


def test_a_translation_set(tmp_path):
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "sentences"

        def _info(self):
            features = tfds.features.Translation(languages=["en", "fr"])
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples("ab"), "test": self._generate_examples("c")}

        def _generate_examples(self, letters):
            for letter in letters:
                yield letter, {"en": letter, "fr": f"é{letter}"}

    Builder(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    found = tfds_pairs("sentences", "en", "fr", tmp_path)
    assert sorted(found) == [("a", "éa"), ("b", "éb"), ("c", "éc")]
    with pytest.raises(ValueError, match="must have the languages en and de; it has en, fr"):
        tfds_pairs("sentences", "en", "de", tmp_path)
    with pytest.raises(ValueError, match=r"unknown data set 'sentence'.*embedded \(none is"):
        tfds_pairs("sentence", "en", "fr", tmp_path)


@pytest.mark.slow
def test_translate(tmp_path, capsys):
    """Trains, scores, compares with copying; and a saved network translates the same."""
    settings = translate.Translate(
        count=300,
        vocabulary=400,
        work=tmp_path / "work",
        out=tmp_path,
        decode=12,
        beams=2,
        model=EncoderDecoderConfig(
            width=16, heads=2, hidden=16, encoder_depth=1, decoder_depth=1, max_length=48
        ),
        train=TrainSettings(steps=6, batch_size=2, eval_every=3, checkpoint_every=6),
    )
    text = translate.main(settings)
    assert "| bdia" in text
    assert "Copying the source: BLEU" in text
    assert [*tmp_path.glob("translation-cldr-*.jsonl")]
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    source, told, _ = (cell.strip() for cell in rows[2].strip("| ").split(" | "))
    again = translate.main(dataclasses.replace(settings, translate=source))
    assert again == told
    with pytest.raises(FileNotFoundError, match="no trained network"):
        translate.main(dataclasses.replace(settings, translate="x", work=tmp_path / "other"))
