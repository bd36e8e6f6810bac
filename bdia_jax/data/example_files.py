"""Files of short texts to fine-tune on: conversations, prompts and completions, or texts."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

from bdia_jax.data.chats import ChatTemplate, conversed
from bdia_jax.data.examples import Example, completed, cut_up
from bdia_jax.data.reading import holds_records, read_text
from bdia_jax.data.records import fields_of_first, read_conversations, read_records
from bdia_jax.data.tokenizers import Tokenizer

LOGGER = logging.getLogger(__name__)

TooLong = Literal["truncate", "split", "error"]


class _Found(NamedTuple):
    """A text of a file."""

    where: str
    example: Example
    across: bool = False
    """Whether one token would be of the prompt and of the completion."""


def read_examples(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    length: int,
    *,
    too_long: TooLong = "truncate",
    template: ChatTemplate | None = None,
) -> list[Example]:
    """Texts to fine-tune on, from a file, or from all files of a folder, by name.

    What is cut or left out is counted in a warning of the logger ``bdia_jax``.

    Args:
      path: records (``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet``, see
        :func:`bdia_jax.data.read_records`), of the kind that the first one's fields say; or plain
        text, which is learned in pieces of ``length`` tokens. Each piece begins with what the
        tokenizer puts before a text, and with the last token of the piece before, so that every
        token but the first is learned once. Kinds of records:

        - ``messages``: a conversation, ``[{"role": "user", "content": "..."}, ...]``, of which the
          assistant's messages are learned (:func:`bdia_jax.data.conversation`);
        - ``prompt`` and ``completion``, of which completions are learned;
        - ``text``: all of it is learned.
      tokenizer: makes the tokens.
      length: most tokens of a text that are predicted.
      too_long: what becomes of a record with more tokens than ``length + 1``. ``"truncate"`` keeps
        its first ones; nothing is left to learn where the prompt alone is as long, and it is left
        out. ``"split"`` makes pieces of it, as of plain text, so that all of the completion is
        learned, of which later pieces see less of what is before them. ``"error"`` refuses it.
      template: the model's, for conversations.

    Raises:
      FileNotFoundError, PermissionError: if it cannot be opened.
      ValueError: for a folder without files, a file of neither kind, a record that is none,
        conversations without a template, a record that is too long with ``"error"``, or if all
        records are left out.
    """
    if too_long not in get_args(TooLong):
        raise ValueError(
            f"too_long must be one of {', '.join(get_args(TooLong))}; got {too_long!r}"
        )
    if length <= (added := len(tokenizer.begin)):
        raise ValueError(
            f"length must be at least {added + 1}, one more token than the tokenizer puts before a "
            f"text; got {length}"
        )
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if _is_data(file, path)]
        if not files:
            raise ValueError(f"the folder {path} must have files; it has none")
        read = functools.partial(
            read_examples, tokenizer=tokenizer, length=length, too_long=too_long, template=template
        )
        return [*itertools.chain.from_iterable(map(read, files))]
    if holds_records(path):
        return _fitting(path, _records(path, tokenizer, template), tokenizer, length, too_long)
    return list(cut_up(_whole(read_text(path), tokenizer), tokenizer.begin, length))


def _is_data(file: pathlib.Path, folder: pathlib.Path) -> bool:
    """A file that nothing on its way hides."""
    return file.is_file() and not any(p[0] == "." for p in file.relative_to(folder).parts)


def _records(
    path: pathlib.Path, tokenizer: Tokenizer, template: ChatTemplate | None
) -> Iterator[_Found]:
    """The texts of a file's records, of whatever kind these are."""
    fields = {*fields_of_first(path)}
    if "messages" in fields:
        yield from _conversations(path, tokenizer, template)
    elif "text" in fields and not fields & {"prompt", "completion"}:
        for where, (text,) in read_records(path, ("text",)):
            if not text:
                raise ValueError(f"{path}, {where}: the text must not be empty")
            yield _Found(where, _whole(text, tokenizer))
    else:
        for where, (prompt, text) in read_records(path, ("prompt", "completion")):
            if not prompt:
                raise ValueError(
                    f"{path}, {where}: the prompt must not be empty; its completion is "
                    f"{text[:80]!r}"
                )
            yield _Found(where, *completed(tokenizer, prompt, text))


def _conversations(
    path: pathlib.Path, tokenizer: Tokenizer, template: ChatTemplate | None
) -> Iterator[_Found]:
    if template is None:
        raise ValueError(
            f"{path} has conversations, for which a model must have a chat template; this one has "
            "none: take an instruction-tuned model, add a chat_template.jinja to its folder, or "
            "give records with prompt and completion"
        )
    for where, messages in read_conversations(path):
        try:
            examples = conversed(tokenizer, template, messages)
        except ValueError as error:
            raise ValueError(f"{path}, {where}: {error}") from None
        yield from (_Found(where, *each) for each in examples)


def _whole(text: str, tokenizer: Tokenizer) -> Example:
    """A text of which all is learned, but for what the tokenizer puts before it."""
    tokens = [*tokenizer.prompt_tokens(text), tokenizer.end]
    return Example(tokens, [i >= len(tokenizer.begin) for i in range(len(tokens))])


def _fitting(
    path: pathlib.Path,
    records: Iterator[_Found],
    tokenizer: Tokenizer,
    length: int,
    too_long: TooLong,
) -> list[Example]:
    """Texts of at most ``length + 1`` tokens."""
    most = f"{length + 1} tokens (length + 1)"
    examples, cut, left_out, across = [], [], [], []
    for where, example, goes_across in records:
        if goes_across:
            across.append(where)
        if len(example.tokens) <= length + 1:
            examples.append(example)
            continue
        if too_long == "error":
            raise ValueError(
                f"{path}, {where}: the text has {len(example.tokens)} tokens; allowed are {most}: "
                "give a larger length, a shorter text, or too_long = truncate or split"
            )
        pieces = cut_up(example, tokenizer.begin, length)
        some = [next(pieces)] if too_long == "truncate" else [*pieces]
        learned = [piece for piece in some if any(piece.learned[1:])]
        (cut if learned else left_out).append(where)
        examples += learned
    if not examples:
        raise ValueError(
            f"{path}: no prompt leaves room for its completion in {most}: give a larger length, or "
            "too_long = split"
        )
    done = "truncated to" if too_long == "truncate" else "split into pieces of"
    _warn(path, cut, f"{done} {most}: too_long, length")
    _warn(path, left_out, f"left out, since the prompt alone has {most} or more: length")
    _warn(
        path,
        across,
        "learned with a token of the prompt and one of the completion where a text without that "
        "boundary has one token for both, which is what a pretrained model knows: put the space "
        "between them at the start of the completion, not at the end of the prompt",
    )
    return examples


def _warn(path: pathlib.Path, where: list[str], what: str) -> None:
    if where:
        count = "1 text is" if len(where) == 1 else f"{len(where)} texts are"
        LOGGER.warning("%s: %s %s (%s first)", path, count, what, where[0])
