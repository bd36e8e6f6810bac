"""Text: tokenizers, windows, packing, and what is trained on them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from bdia_jax import data
from bdia_jax.data import Example
from bdia_jax.nn import Decoder, DecoderConfig
from bdia_jax.nn.losses import Sums
from bdia_jax.train import LanguageModelling, PackedTexts, TrainSettings, evaluate, train

BPE = pathlib.Path(__file__).resolve().parents[2] / "shared/data/gpt2-bpe"
TINY = DecoderConfig(vocab_size=257, max_length=16, width=16, depth=2, heads=2)
WORDS = "the cat sat on the mat, and the dog sat on the log. " * 20


# ---------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_bytes_come_back(text):
    tokenizer = data.byte_tokenizer()
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode([*tokens, tokenizer.end]) == text


def test_a_trained_vocabulary_is_smaller_in_tokens_and_comes_back_from_its_folder(tmp_path):
    tokenizer = data.train_tokenizer([WORDS], 270)
    assert tokenizer.size == 270
    assert len(tokenizer.encode(WORDS)) < len(WORDS) / 2
    tokenizer.save(tmp_path)
    again = data.load_tokenizer(tmp_path)
    assert again.encode(WORDS) == tokenizer.encode(WORDS)
    assert (again.end, again.size) == (tokenizer.end, tokenizer.size)
    assert data.load_tokenizer(tmp_path / "tokenizer.json").decode(again.encode("a dog")) == "a dog"


def test_transformers_reads_a_saved_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    tokenizer = data.train_tokenizer([WORDS], 270)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("the cat\n sat") == tokenizer.encode("the cat\n sat")
    assert theirs.eos_token_id == tokenizer.end


def test_gpt2_vocabulary():
    if not BPE.exists():
        pytest.skip(f"GPT-2's vocabulary is not at {BPE}")
    tokenizer = data.load_tokenizer(BPE)
    assert (tokenizer.size, tokenizer.end) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.decode([15496, 995, 50256]) == "Hello world"


def test_the_end_of_a_text_is_what_the_folder_says(tmp_path):
    data.train_tokenizer([WORDS], 270).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "a"}}')
    a = data.load_tokenizer(tmp_path).inner.token_to_id("a")
    assert data.load_tokenizer(tmp_path).end == a
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"eos_token_id": [7, 8]}')
    assert data.load_tokenizer(tmp_path).end == 7


def test_tokenizers_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is none at"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        data.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"above 257.*got 200"):
        data.train_tokenizer([WORDS], 200)


# ---------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------


def test_python_sources_are_text():
    text = data.python_sources(50_000)
    assert 10_000 < len(text.encode()) <= 51_000
    assert "import" in text


def test_split_text():
    found = data.split_text("words", "abcdefghij" * 10, data.byte_tokenizer(), share=0.5)
    assert (len(found.train), len(found.eval), found.vocab_size) == (45, 10, 257)
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]; got 0"):
        data.split_text("words", "abc", data.byte_tokenizer(), share=0)
    with pytest.raises(ValueError, match=r"held_out must lie in \(0, 1\); got 1"):
        data.split_text("words", "abc", data.byte_tokenizer(), held_out=1)


def test_examples_from_files(tmp_path):
    tokenizer = data.byte_tokenizer()
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "ab", "completion": "c"}\n\n{"prompt": "d", "completion": ""}\n')
    first, second = data.read_examples(path, tokenizer, 8)
    assert tokenizer.decode(first.tokens) == "abc"
    assert first.learned == [False, False, True, True]
    assert (first.tokens[-1], second.learned) == (tokenizer.end, [False, True])
    with pytest.raises(ValueError, match=r"line 1: the text has 4 tokens; allowed are 3"):
        data.read_examples(path, tokenizer, 2, too_long="error")
    for line in ("no", '{"prompt": "a"}', "[1]"):
        path.write_text(line)
        with pytest.raises(ValueError, match="line 1: each line must be"):
            data.read_examples(path, tokenizer, 8)
    text = tmp_path / "a.txt"
    text.write_text("abcdefghij")
    pieces = data.read_examples(text, tokenizer, 4)
    # Every token but the first is predicted once.
    assert [len(p.tokens) - 1 for p in pieces] == [4, 4, 2]
    assert tokenizer.decode([t for p in pieces for t in p.tokens[1:]]) == "bcdefghij"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=30))
def test_packing_keeps_every_text_whole(sizes):
    start = np.cumsum([0, *sizes])
    examples = [
        Example(list(range(a + 1, a + n + 1)), [i % 2 == 0 for i in range(n)])
        for a, n in zip(start, sizes)
    ]
    packed = data.pack(examples, 8)
    found = []
    for row in range(len(packed.tokens)):
        for segment in range(1, packed.segments[row].max() + 1):
            (where,) = np.nonzero(packed.segments[row] == segment)
            tokens, targets = packed.tokens[row, where], packed.targets[row, where]
            assert list(packed.positions[row, where]) == list(range(len(where)))
            assert list(tokens[1:]) == list(targets[:-1])
            weights = list(packed.weights[row, where] == 1)
            found.append(([tokens[0], *targets], weights))
    assert sorted(found) == sorted((e.tokens, e.learned[1:]) for e in examples)
    assert not packed.weights[packed.segments == 0].any()
    # No two rows could be one.
    used = np.sort((packed.segments > 0).sum(axis=1))
    assert len(used) == 1 or used[0] + used[1] > 8


def test_texts_that_cannot_be_packed():
    with pytest.raises(ValueError, match="got none"):
        data.pack([], 8)
    with pytest.raises(ValueError, match=r"from 2 to 9 tokens.*text 1 has 1, and 1 more"):
        data.pack(
            [Example([1] * 9, [True] * 9), Example([1], [True]), Example([1] * 10, [True] * 10)], 8
        )


# ---------------------------------------------------------------------------------------------
# Training on them
# ---------------------------------------------------------------------------------------------


def test_windows_of_a_text():
    text = data.TextData(
        "numbers", np.arange(50, dtype=np.int32), np.arange(36, dtype=np.int32), 50
    )
    task = LanguageModelling(text, 8)
    arrays = jax.device_put(task.arrays())
    batch = task.batch(arrays, jax.random.key(0), jnp.int32(3), 64)
    assert batch.tokens.shape == (64, 8)
    assert np.array_equal(batch.targets, batch.tokens + 1)
    assert batch.tokens.min() >= 0
    assert batch.targets.max() < 50

    class Counts:
        """Counts how often a token is asked for."""

        def loss(self, tokens, targets, weights, **_):
            asked = jnp.zeros(36).at[targets].add(weights)
            return Sums(asked, weights.sum(), {})

    # 4 windows of 8 in the 35 tokens that can be predicted, in batches of 3.
    assert task.eval_samples == 4
    batches = [task.eval_batch(arrays, jnp.int32(i), 3) for i in range(2)]
    sums = [task.evaluate(Counts(), batch) for batch in batches]
    assert np.array_equal(sum(s.loss for s in sums), [0] + [1] * 32 + [0] * 3)
    assert sum(float(s.weight) for s in sums) == 32


def test_texts_too_short_for_a_window():
    text = data.TextData("numbers", np.arange(50, dtype=np.int32), np.arange(8, dtype=np.int32), 50)
    with pytest.raises(ValueError, match=r"9 tokens \(length \+ 1\); the eval text.*has 8"):
        LanguageModelling(text, 8)
    nothing = data.pack([Example([1, 2], [True, False])], 4)
    with pytest.raises(ValueError, match="the training texts must have tokens to learn"):
        PackedTexts("none", nothing, nothing)


@pytest.mark.slow
def test_packed_texts_are_learned_one_by_one(tmp_path):
    """Loss of a packed batch is that of its texts alone; training is exact and lowers it."""
    tokenizer = data.byte_tokenizer()
    texts = [data.completion(tokenizer, f"{i}?", "yes" if i % 2 else "no") for i in range(24)]
    task = PackedTexts("answers", data.pack(texts, 16), data.pack(texts[:5], 16), eval_batch_size=2)
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    before = evaluate(model, task)
    model.eval()
    total = count = 0.0
    for example in texts[:5]:
        tokens = jnp.array([example.tokens])
        sums = model.loss(tokens[:, :-1], tokens[:, 1:], jnp.array([example.learned[1:]], float))
        total, count = total + sums.loss, count + sums.weight
    # The same on the grid, but for roundings to it.
    assert before["loss"] == pytest.approx(float(total / count), rel=1e-3)
    settings = TrainSettings(
        steps=30, batch_size=4, learning_rate=1e-2, eval_every=30, log_every=10
    )
    result = train(model, task, settings, tmp_path / "run")
    assert result.last("eval", "loss") < before["loss"] / 2
    assert all(r["mismatched"] == 0 for r in result.history if r["split"] == "train")
    written = json.loads((tmp_path / "run/settings.json").read_text())["data"]
    assert written["name"] == "answers"
    assert written["sha256"] == data.fingerprint(task.arrays())
