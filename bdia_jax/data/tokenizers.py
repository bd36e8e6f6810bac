"""Tokenizers: read from files, or made from texts."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

from bdia_jax.files import leads_out, write_json

END = "<|endoftext|>"
"""The end of a text, in the vocabularies that are made here."""
_OF_GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast")
"""Classes of ``transformers`` that cut texts into words as GPT-2 does."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
"""Of added tokens: where in a text they are found, and which blanks around belong to them."""
_CONVERT = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"


_OF_MODEL = ("generation_config.json", "config.json")
"""Files of a model's folder that say what ends a text, in the order in which they count."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token numbers, and back."""

    inner: tokenizers.Tokenizer
    """A tokenizer of the ``tokenizers`` package."""
    end: int
    """The token that ends a text."""
    other_ends: frozenset[int] = frozenset()
    """More tokens after which a model that generates stops: the end of a message, for instance."""
    known: int | None = None
    """How many tokens the model has: a text with another one is refused. None for all."""

    def __post_init__(self):
        # Settings that the file kept of another training: they would cut texts off, add tokens to
        # them, or split words at random.
        self.inner.no_truncation()
        self.inner.no_padding()
        if getattr(self.inner.model, "dropout", None):
            self.inner.model.dropout = None

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.inner.get_vocab_size()

    @property
    def ends(self) -> frozenset[int]:
        """All tokens after which a model that generates stops."""
        return self.other_ends | {self.end}

    @functools.cached_property
    def begin(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text: the BOS token of Llama and Gemma, or nothing."""
        # By a text that is sure to have a token: what is put after it is left out.
        encoded = self.inner.encode(self.inner.id_to_token(self.end))
        added = zip(encoded.ids, encoded.special_tokens_mask)
        return tuple(token for token, _ in itertools.takewhile(lambda pair: pair[1], added))

    @functools.cached_property
    def special(self) -> frozenset[int]:
        """Tokens that stand for no text, such as ends of texts or of messages."""
        added = self.inner.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, and no others.

        Raises:
          ValueError: for a token that the model does not have.
        """
        return self._checked(self.inner.encode(text, add_special_tokens=False).ids)

    def _checked(self, tokens: list[int]) -> list[int]:
        if self.known is not None and (highest := max(tokens, default=0)) >= self.known:
            raise ValueError(
                f"the text has the token {self.inner.id_to_token(highest)!r}, number {highest}; "
                f"the model has {self.known} tokens"
            )
        return tokens

    def prompt_tokens(self, text: str) -> list[int]:
        """The tokens that a model is given to go on with: :attr:`begin`, then the text's.

        These are ``tokenizer(text).input_ids`` of ``transformers``, with two exceptions. A text
        that has :attr:`begin` written out, as chat templates do, does not get it twice. And
        nothing is put after the text, for it goes on.
        """
        tokens, begin = self.encode(text), [*self.begin]
        return tokens if begin and tokens[: len(begin)] == begin else begin + tokens

    def continuation(self, text: str) -> list[int]:
        """The tokens of a text that continues another: no space is put before it."""
        return self._checked(self._within.encode(text, add_special_tokens=False).ids)

    @functools.cached_property
    def _within(self) -> tokenizers.Tokenizer:
        """The tokenizer, but for the space that it puts before a text."""
        described = json.loads(self.inner.to_str())
        for part in ("normalizer", "pre_tokenizer"):
            described[part] = _without_prefix(described[part])
        return tokenizers.Tokenizer.from_str(json.dumps(described))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self.inner.decode(list(tokens))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes ``tokenizer.json`` and what ``transformers`` wants beside it.

        A chat template that is in the folder stays, and a model that is there also stops at
        :attr:`end`.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        end = self.inner.id_to_token(self.end)
        begin = {"bos_token": self.inner.id_to_token(self.begin[0])} if self.begin else {}
        write_json(folder / "tokenizer.json", json.loads(self.inner.to_str()))
        before = _settings(folder / "tokenizer_config.json")
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **begin,
                "eos_token": end,
                "pad_token": end,
                "clean_up_tokenization_spaces": False,
                **{name: before[name] for name in ("chat_template",) if name in before},
            },
        )
        # transformers looks into the second one where there is no first one.
        models = (folder / name for name in _OF_MODEL)
        if (model := next((path for path in models if path.exists()), None)) is not None:
            numbers = [self.end, *sorted(_numbers(model) - {self.end})]
            ends = numbers if len(numbers) > 1 else self.end
            write_json(model, _settings(model) | {"eos_token_id": ends})


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

    Truncation, padding and random merges that a ``tokenizer.json`` may ask for are left out.

    Args:
      path: a ``tokenizer.json``; or a folder with that, or with ``vocab.json`` and ``merges.txt``
        (GPT-2's format, with tokens that ``tokenizer_config.json`` or ``added_tokens.json`` add).
        The end of a text is the ``eos_token`` of ``tokenizer_config.json`` or
        ``special_tokens_map.json``, or the ``eos_token_id`` of ``generation_config.json`` or
        ``config.json``, or, where none is named, ``<|endoftext|>``.

    Raises:
      FileNotFoundError: without these files.
      ValueError: for files that cannot be read, a vocabulary without such an end, or a symbolic
        link that leads out of the folder.
    """
    path = pathlib.Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    folder = file.parent
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    has_merges = path.is_dir() and vocab.exists() and merges.exists()
    if not file.exists() and not has_merges:
        convert = (
            "; the tokenizer.model of SentencePiece must be converted first, by transformers: "
            f"{_CONVERT}"
        )
        raise FileNotFoundError(
            f"a tokenizer is a tokenizer.json, or a folder with one or with vocab.json and "
            f"merges.txt; there is none at {path}"
            f"{convert * (folder / 'tokenizer.model').exists()}"
        )
    # What the user names may be a link; what a folder from anywhere holds is not followed.
    for inside in (file, vocab, merges) if path.is_dir() else ():
        if (elsewhere := leads_out(inside, folder)) is not None:
            raise ValueError(
                f"{inside} is a symbolic link to {elsewhere}, outside the folder, and is not "
                "followed: put the file itself there"
            )
    try:
        if file.exists():
            inner = tokenizers.Tokenizer.from_file(str(file))
        else:
            inner = _of_gpt2(vocab, merges, folder)
    except Exception as error:
        # Most are of no other type than Exception.
        raise ValueError(f"the tokenizer at {path} cannot be read: {error}") from error
    return Tokenizer(inner, _end(inner, folder), _other_ends(inner, folder))


def _of_gpt2(vocab: pathlib.Path, merges: pathlib.Path, folder: pathlib.Path):
    _check_cuts_as_gpt2(folder)
    inner = _byte_level(*tokenizers.models.BPE.read_file(str(vocab), str(merges)))
    config = _settings(folder / "tokenizer_config.json")
    if config.get("add_prefix_space"):
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    special = _special_tokens(folder)
    added = _added_tokens(folder, special)
    # All at once, and each once: its flags are those with which it is first added. Special ones of
    # the vocabulary are not new, but never a part of a text.
    others = [
        token
        for text, token in special.items()
        if text not in added and inner.token_to_id(text) is not None
    ]
    inner.add_tokens([token for _, token in added.values()] + others)
    for text, (number, _) in added.items():
        if (found := inner.token_to_id(text)) != number:
            raise ValueError(
                f"the added token {text} must have the number {number}; after the tokens of "
                f"vocab.json, it would have {found}: write it into vocab.json, with its number"
            )
    # In a tokenizer.json, the processor says what is put before a text; here, a setting does.
    if config.get("add_bos_token"):
        begin = _named(folder, "bos_token") or END
        if (number := inner.token_to_id(begin)) is not None:
            inner.post_processor = tokenizers.processors.TemplateProcessing(
                single=[begin, "$A"], special_tokens=[(begin, number)]
            )
    return inner


def _check_cuts_as_gpt2(folder: pathlib.Path) -> None:
    """A ``ValueError`` for a vocabulary with merges that is of another class.

    The files do not say how a text is cut into words, within which tokens are merged.
    """
    name = _setting(folder / "tokenizer_config.json", "tokenizer_class")
    name = name or _setting(folder / "config.json", "tokenizer_class")
    kind = _setting(folder / "config.json", "model_type")
    if name in _OF_GPT2 or (name is None and kind in (None, "gpt2")):
        return
    raise ValueError(
        f"without a tokenizer.json, tokenizer_class must be {' or '.join(_OF_GPT2)}, as another "
        f"may cut texts into other words; got {name or f'none, and the model_type {kind}'}: "
        f"convert the tokenizer by transformers, {_CONVERT}"
    )


def _special_tokens(folder: pathlib.Path) -> dict[str, tokenizers.AddedToken]:
    """Special tokens by their texts, as a folder names them; and GPT-2's end of a text."""
    named: list[Any] = []
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        for name, token in _settings(folder / file).items():
            if name.endswith("_special_tokens") and isinstance(token, list):
                named += token
            elif name.endswith("_token"):
                named.append(token)
    named.append(END)
    texts = [{"content": token} if isinstance(token, str) else token for token in named]
    # The first one counts; some settings that end so are no tokens.
    return {
        token["content"]: _added_token(token, special=True)
        for token in reversed(texts)
        if isinstance(token, dict)
    }


def _added_tokens(
    folder: pathlib.Path, special: dict[str, tokenizers.AddedToken]
) -> dict[str, tuple[int, tokenizers.AddedToken]]:
    """Tokens beside the vocabulary, by their texts, with their numbers, in the order of these.

    Args:
      folder: with ``added_tokens_decoder`` in ``tokenizer_config.json``, or ``added_tokens.json``.
      special: those that are named in it, which are special whatever is said of them there.
    """
    described: Any = _setting(folder / "tokenizer_config.json", "added_tokens_decoder")
    if described is None:
        numbers = _settings(folder / "added_tokens.json")
        described = {number: {"content": text} for text, number in numbers.items()}
    return {
        token["content"]: (
            int(number),
            _added_token(token, special=token.get("special", False) or token["content"] in special),
        )
        for number, token in sorted(described.items(), key=lambda pair: int(pair[0]))
    }


def _added_token(described: dict[str, Any], special: bool) -> tokenizers.AddedToken:
    flags = {flag: described[flag] for flag in _FLAGS if flag in described}
    return tokenizers.AddedToken(described["content"], special=special, **flags)


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
    return Tokenizer(made, made.get_vocab()[END])


def _without_prefix(part: Any) -> Any:
    """A normalizer's or pre-tokenizer's description, without what puts a space before a text."""
    if isinstance(part, list):
        return [_without_prefix(each) for each in part if each["type"] != "Prepend"]
    if not isinstance(part, dict):
        return part
    match part.get("type"):
        case "Sequence":
            return {name: _without_prefix(value) for name, value in part.items()}
        case "Prepend":
            return None
        case "Metaspace":
            return part | {"prepend_scheme": "never"}
        case "ByteLevel":
            return part | {"add_prefix_space": False}
    return part


def _end(inner: tokenizers.Tokenizer, folder: pathlib.Path) -> int:
    named = _named(folder, "eos_token")
    if named is not None and (number := inner.token_to_id(named)) is not None:
        return number
    for file in _OF_MODEL:
        number = _setting(folder / file, "eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and number >= 0 and inner.id_to_token(number) is not None:
            return number
    if named is not None:
        raise ValueError(
            f"the tokenizer in {folder} has no end of a text: tokenizer_config.json names {named}, "
            "which is not in its vocabulary, and config.json has no eos_token_id that is"
        )
    if (number := inner.token_to_id(END)) is None:
        raise ValueError(
            f"the tokenizer in {folder} has no end of a text: neither eos_token in "
            f"tokenizer_config.json, nor eos_token_id in config.json, nor {END}"
        )
    return number


def _other_ends(inner: tokenizers.Tokenizer, folder: pathlib.Path) -> frozenset[int]:
    """Those of ``generation_config.json``, which transformers stops at; or of ``config.json``."""
    for file in _OF_MODEL:
        if numbers := _numbers(folder / file):
            return frozenset(n for n in numbers if inner.id_to_token(n) is not None)
    return frozenset()


def _numbers(file: pathlib.Path) -> set[int]:
    """The ``eos_token_id`` in a file: one, several, or none."""
    found = _setting(file, "eos_token_id")
    given = found if isinstance(found, list) else [found]
    return {n for n in given if isinstance(n, int) and not isinstance(n, bool) and n >= 0}


def _named(folder: pathlib.Path, which: str) -> str | None:
    """The text of a special token, which may be described by it or by an object that has it."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        named = _setting(folder / file, which)
        if isinstance(named, dict):
            named = named.get("content")
        if isinstance(named, str):
            return named
    return None


def _setting(file: pathlib.Path, name: str) -> Any:
    return _settings(file).get(name)


def _settings(file: pathlib.Path) -> dict[str, Any]:
    """The object in a file; an empty one without the file."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must be an object in JSON; got {repr(settings)[:80]}")
    return settings
