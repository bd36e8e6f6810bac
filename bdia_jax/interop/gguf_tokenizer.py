"""The tokenizer that a GGUF file describes.

Such a file has the tokens, their kinds, the merges, and a name for the way in which text is split
before it is merged. What each name stands for is defined by llama.cpp (``src/llama-vocab.cpp``),
after the tokenizers of the models; a name that is not known here is refused, since a wrong split
would go unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from bdia_jax.interop.checkpoint import FolderError

Metadata = Mapping[str, Any]
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
"""Kinds of tokens."""
_SPACE = "▁"
"""How SentencePiece writes a space."""


class _Split(NamedTuple):
    """How text is split into words, of which the bytes are merged."""

    words: str | None = None
    """A regular expression; None for GPT-2's."""
    single_digits: bool = False
    """Whether every digit is a word, before anything else."""
    composed: bool = False
    """Whether characters are composed first (Unicode's form NFC)."""
    whole_words: bool = False
    """Whether a word that is a token stays whole, whatever the merges make of it."""
    begins: bool = False
    """Whether a text begins with a token for that, unless the file says otherwise."""


_LLAMA3 = _Split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    whole_words=True,
    begins=True,
)
_QWEN2 = _Split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    composed=True,
)
SPLITS = {
    "gpt-2": _Split(),
    "smollm": _Split(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def read_tokenizer(metadata: Metadata) -> tuple[tokenizers.Tokenizer, int]:
    """The tokenizer that metadata describe, and the number of the token that ends a text.

    Raises:
      FolderError: for metadata that are missing, or a kind of tokenizer that is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    makers = {"gpt2": _byte_level, "llama": _sentence_piece}
    if kind not in makers:
        raise FolderError(f"tokenizer.ggml.model must be one of {', '.join(makers)}; got {kind!r}")
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    vocab = {token: i for i, token in enumerate(tokens)}
    end = metadata.get("tokenizer.ggml.eos_token_id")
    if len(vocab) != len(tokens) or not isinstance(end, int) or end >= len(tokens):
        raise FolderError(
            "tokenizer.ggml.tokens must be different from each other, and "
            f"tokenizer.ggml.eos_token_id one of their numbers; got {len(tokens)} tokens, of which "
            f"{len(vocab)} are different, and {end!r}"
        )
    made, begins = makers[kind](metadata, vocab)
    kinds = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    made.add_special_tokens([_whole(t, True) for t, kind in zip(tokens, kinds) if kind == _CONTROL])
    made.add_tokens([_whole(t, False) for t, kind in zip(tokens, kinds) if kind == _USER_DEFINED])
    around = [
        ("bos", metadata.get("tokenizer.ggml.add_bos_token", begins)),
        ("eos", metadata.get("tokenizer.ggml.add_eos_token", False)),
    ]
    added = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name, put in around if put}
    special = [(tokens[i], i) for i in added.values() if i is not None]
    if special:
        texts = {name: [tokens[i]] for name, i in added.items() if i is not None}
        template = [*texts.get("bos", []), "$A", *texts.get("eos", [])]
        made.post_processor = processors.TemplateProcessing(
            single=template, pair=[*template, "$B"], special_tokens=special
        )
    return made, end


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """A tokenizer_config.json of ``transformers``, which names the special tokens."""
    tokens = metadata["tokenizer.ggml.tokens"]
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    numbers = {
        ours: metadata.get(f"tokenizer.ggml.{name}_token_id") for ours, name in named.items()
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokens[i] for name, i in numbers.items() if i is not None},
    }


def _whole(token: str, special: bool) -> tokenizers.AddedToken:
    """A token that is found in a text before anything is split."""
    return tokenizers.AddedToken(token, normalized=False, special=special)


def _byte_level(metadata: Metadata, vocab: dict[str, int]) -> tuple[tokenizers.Tokenizer, bool]:
    """Merged bytes, as of GPT-2; and whether a text begins with a token for that."""
    name = metadata.get("tokenizer.ggml.pre")
    if name is None and metadata["general.architecture"] == "gpt2":
        # Files from before there were names.
        name = "gpt-2"
    if name not in SPLITS:
        raise FolderError(f"tokenizer.ggml.pre must be one of {', '.join(SPLITS)}; got {name!r}")
    split = SPLITS[name]
    merges = [_pair(merge) for merge in metadata.get("tokenizer.ggml.merges", [])]
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=split.whole_words))
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.words is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(split.words), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.words is None))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    if split.composed:
        made.normalizer = normalizers.NFC()
    return made, split.begins


def _sentence_piece(metadata: Metadata, vocab: dict[str, int]) -> tuple[tokenizers.Tokenizer, bool]:
    """Merged characters, as of SentencePiece and Llama 2; unknown ones as bytes."""
    if "tokenizer.ggml.merges" in metadata:
        merges = [_pair(merge) for merge in metadata["tokenizer.ggml.merges"]]
    else:
        merges = _merges(vocab, metadata["tokenizer.ggml.scores"])
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            merges,
            unk_token=None if unknown is None else metadata["tokenizer.ggml.tokens"][unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    made.pre_tokenizer = pre_tokenizers.Metaspace(
        _SPACE, prepend_scheme="first" if prefix else "never", split=False
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(
        [*steps, decoders.Strip(content=" ", left=1)] if prefix else steps
    )
    return made, True


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ", 1)
    return left, right


def _merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece keeps no merges: it makes the token of the highest score of two neighbors."""
    found = [
        (-scores[i], -cut, token[:cut], token[cut:])
        for token, i in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for *_, left, right in found]
