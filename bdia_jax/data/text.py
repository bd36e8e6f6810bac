"""Text: tokenizers, windows of a long text, and short texts packed into full sequences."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sysconfig
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Float, Int32

from bdia_jax.files import write_json

END = "<|endoftext|>"
"""The end of a text, in the vocabularies that are made here."""


# ---------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token numbers, and back."""

    inner: tokenizers.Tokenizer
    """Of the ``tokenizers`` package."""
    end: int
    """The token that ends a text."""

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, and no others."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self.inner.decode(list(tokens))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes ``tokenizer.json`` and what ``transformers`` wants beside it."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        end = self.inner.id_to_token(self.end)
        write_json(folder / "tokenizer.json", json.loads(self.inner.to_str()))
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": end,
                "pad_token": end,
                "clean_up_tokenization_spaces": False,
            },
        )


def byte_tokenizer() -> Tokenizer:
    """One token per byte of UTF-8, and one for the end of a text; no file is needed."""
    return _finished(_byte_level({c: i for i, c in enumerate(_byte_names())}, []))


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-pair vocabulary made from ``texts``.

    Of ``size`` tokens, the end of a text included; of fewer where ``texts`` are short.

    Raises:
      ValueError: for a size that is not above 257, the bytes and the end.
    """
    if size <= 257:
        raise ValueError(f"size must be above 257, the bytes and the end of a text; got {size}")
    made = _byte_level(None, None)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - 1, initial_alphabet=_byte_names(), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return _finished(made)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """A tokenizer from files.

    Args:
      path: a ``tokenizer.json``; or a folder with that, or with ``vocab.json`` and ``merges.txt``
        (GPT-2's format). The end of a text is the ``eos_token`` of ``tokenizer_config.json``, or
        the ``eos_token_id`` of ``generation_config.json`` or ``config.json``, or ``<|endoftext|>``.

    Raises:
      FileNotFoundError: without these files.
      ValueError: for files that cannot be read, or a vocabulary without such an end.
    """
    path = pathlib.Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    folder = file.parent
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        if file.exists():
            inner = tokenizers.Tokenizer.from_file(str(file))
        elif path.is_dir() and vocab.exists() and merges.exists():
            inner = _byte_level(*tokenizers.models.BPE.read_file(str(vocab), str(merges)))
            if inner.token_to_id(END) is not None:
                # Not a new one, but never a part of a text.
                inner.add_special_tokens([END])
        else:
            raise FileNotFoundError(
                f"a tokenizer is a tokenizer.json, or a folder with one or with vocab.json and "
                f"merges.txt; there is none at {path}"
            )
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"the tokenizer at {path} cannot be read: {error}") from error
    return Tokenizer(inner, _end(inner, folder))


def _byte_names() -> list[str]:
    """The characters that stand for bytes, in a fixed order."""
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def _byte_level(vocab: dict[str, int] | None, merges: list | None) -> tokenizers.Tokenizer:
    """As GPT-2's: bytes, merged within words."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


def _finished(made: tokenizers.Tokenizer) -> Tokenizer:
    made.add_special_tokens([END])
    return Tokenizer(made, made.token_to_id(END))


def _end(inner: tokenizers.Tokenizer, folder: pathlib.Path) -> int:
    named = _setting(folder / "tokenizer_config.json", "eos_token")
    if isinstance(named, dict):
        named = named.get("content")
    if named is not None and (number := inner.token_to_id(named)) is not None:
        return number
    for file in ("generation_config.json", "config.json"):
        number = _setting(folder / file, "eos_token_id")
        number = number[0] if isinstance(number, list) else number
        if number is not None and inner.id_to_token(number) is not None:
            return number
    if (number := inner.token_to_id(END)) is None:
        raise ValueError(
            f"the tokenizer in {folder} has no end of a text: neither eos_token in "
            f"tokenizer_config.json, nor eos_token_id in config.json, nor {END}"
        )
    return number


def _setting(file: pathlib.Path, name: str):
    try:
        return json.loads(file.read_text()).get(name)
    except FileNotFoundError:
        return None


# ---------------------------------------------------------------------------------------------
# One long text
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class TextData:
    """A long text of tokens to train on, and one to evaluate on, in host memory."""

    name: str
    train: Int32[np.ndarray, "train"]
    eval: Int32[np.ndarray, "eval"]
    vocab_size: int


def python_sources(limit: int = 1_000_000) -> str:
    """Sources of Python's standard library, in the order of their names, up to ``limit`` bytes.

    They differ between versions of Python.
    """
    parts, total = [], 0
    for file in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        raw = file.read_bytes()
        total += len(raw)
        if total > limit:
            break
        parts.append(raw.decode("utf-8", errors="replace"))
    if not parts:
        raise FileNotFoundError(
            f"there are no sources of the standard library in {sysconfig.get_path('stdlib')}; "
            "give a text file"
        )
    return "\n".join(parts)


def read_text(path: str | os.PathLike) -> str:
    """A text file in UTF-8.

    Raises:
      FileNotFoundError, IsADirectoryError, PermissionError: if it cannot be opened.
      ValueError: if it is empty, or no UTF-8.
    """
    path = pathlib.Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    if not text:
        raise ValueError(f"{path} is empty")
    return text


def split_text(
    name: str, text: str, tokenizer: Tokenizer, *, share: float = 1.0, held_out: float = 0.1
) -> TextData:
    """The end of a text for evaluation, and what is before it for training.

    Args:
      name: of the text.
      text: all of it.
      tokenizer: makes the tokens.
      share: of what is not held out, from its start, that is trained on.
      held_out: share of the text (of its characters) for evaluation.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1]; got {share}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie in (0, 1); got {held_out}")
    cut = int(len(text) * (1 - held_out))
    parts = text[: int(cut * share)], text[cut:]
    train, evaluation = (np.asarray(tokenizer.encode(part), np.int32) for part in parts)
    return TextData(name, train, evaluation, tokenizer.size)


# ---------------------------------------------------------------------------------------------
# Short texts
# ---------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A short text, and which of its tokens are to be learned."""

    tokens: list[int]
    learned: list[bool]


class Packed(NamedTuple):
    """Short texts, packed into rows of one length."""

    tokens: Int32[np.ndarray, "rows length"]
    """0 where there is none."""
    targets: Int32[np.ndarray, "rows length"]
    """The next token of the same text; 0 where there is none."""
    weights: Float[np.ndarray, "rows length"]
    """1 where the target is to be learned, else 0; float32."""
    segments: Int32[np.ndarray, "rows length"]
    """Numbers of the texts in a row, from 1; 0 where there is none."""
    positions: Int32[np.ndarray, "rows length"]
    """Of a token in its text."""


def completion(tokenizer: Tokenizer, prompt: str, text: str) -> Example:
    """A prompt, which is not learned, what follows it, and the end of a text, which are."""
    given, told = tokenizer.encode(prompt), [*tokenizer.encode(text), tokenizer.end]
    return Example([*given, *told], [False] * len(given) + [True] * len(told))


def pack(examples: Sequence[Example], length: int) -> Packed:
    """Packs texts into as few rows as the best-fit-decreasing rule finds.

    The longest text goes first; each goes into the fullest row that has room for it.

    Args:
      examples: texts of at least 2 and at most ``length + 1`` tokens (the last is a target only).
      length: of the rows.

    Raises:
      ValueError: for no texts, or one that is too short, or too long.
    """
    sizes = [len(example.tokens) - 1 for example in examples]
    if not sizes:
        raise ValueError("there must be at least one text; got none")
    if min(sizes) < 1 or max(sizes) > length:
        wrong = [i for i, size in enumerate(sizes) if not 1 <= size <= length]
        raise ValueError(
            f"texts must have from 2 to {length + 1} tokens (length + 1); text {wrong[0]} has "
            f"{sizes[wrong[0]] + 1}, and {len(wrong) - 1} more do not fit"
        )
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        room = next((r for r in range(sizes[i], length + 1) if with_room[r]), None)
        if room is None:
            room = length
            rows.append([])
            with_room[room].append(len(rows) - 1)
        row = with_room[room].pop()
        rows[row].append(i)
        with_room[room - sizes[i]].append(row)
    packed = Packed(*(np.zeros((len(rows), length), np.int32) for _ in Packed._fields))
    packed = packed._replace(weights=packed.weights.astype(np.float32))
    for row, texts in enumerate(rows):
        start = 0
        for segment, i in enumerate(texts, 1):
            tokens, where = examples[i].tokens, (row, slice(start, start + sizes[i]))
            packed.tokens[where], packed.targets[where] = tokens[:-1], tokens[1:]
            packed.weights[where] = examples[i].learned[1:]
            packed.segments[where], packed.positions[where] = segment, np.arange(sizes[i])
            start += sizes[i]
    return packed


def read_examples(path: str | os.PathLike, tokenizer: Tokenizer, length: int) -> list[Example]:
    """Texts to fine-tune on, from a file.

    Args:
      path: ``*.jsonl``, with an object ``{"prompt": ..., "completion": ...}`` per line, of which
        completions are learned; or any text, which is learned in pieces of ``length`` tokens.
      tokenizer: makes the tokens.
      length: most tokens of a text that are predicted.

    Raises:
      FileNotFoundError, IsADirectoryError, PermissionError: if it cannot be opened.
      ValueError: for a line that is no such object, or a text that is too long.
    """
    path = pathlib.Path(path).expanduser()
    text = read_text(path)
    if path.suffix != ".jsonl":
        tokens = [*tokenizer.encode(text), tokenizer.end]
        pieces = (tokens[i : i + length + 1] for i in range(0, len(tokens) - 1, length))
        return [Example(piece, [True] * len(piece)) for piece in pieces]
    examples = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt, completed = record["prompt"], record["completion"]
            if not isinstance(prompt, str) or not isinstance(completed, str) or not prompt:
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{path}, line {number}: each line must be {{"prompt": "...", "completion": '
                f'"..."}}, the prompt not empty; got {line[:80]!r}'
            ) from None
        example = completion(tokenizer, prompt, completed)
        if len(example.tokens) > length + 1:
            raise ValueError(
                f"{path}, line {number}: the text has {len(example.tokens)} tokens; allowed are "
                f"{length + 1} (length + 1): give a larger length, or a shorter text"
            )
        examples.append(example)
    return examples
