"""Files of short texts to fine-tune on: conversations, prompts and completions, or texts."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from bdia_jax.data.chats import ChatTemplate, conversed
from bdia_jax.data.examples import Example, completed, cut_up
from bdia_jax.data.fitting import Fitting, Found, TooLong
from bdia_jax.data.reading import holds_records, read_text
from bdia_jax.data.record_kinds import MESSAGES, PAIR, TEXT, kind_of
from bdia_jax.data.records import fields_of_first, read_conversations, read_records
from bdia_jax.data.tokenizers import Tokenizer

LOGGER = logging.getLogger(__name__)

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)
"""The prompt for models without a template of their own, as others who train with this format have
it (Taori et al., "Stanford Alpaca: An Instruction-following LLaMA model", 2023)."""


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
        :func:`bdia_jax.data.read_records`), whose kind is known by the fields of the first one; or
        plain text, which is learned in pieces of ``length`` tokens. Each piece begins with what the
        tokenizer puts before a text, and with the last token of the piece before, so that every
        token but the first is learned once. Kinds of records:

        - ``messages``: a conversation, ``[{"role": "user", "content": "..."}, ...]``, of which the
          assistant's messages are learned (:func:`bdia_jax.data.conversation`);
        - ``prompt`` and ``completion``, of which completions are learned;
        - ``instruction``, ``output``, and ``input`` if there is one, of which outputs are learned.
          To a model with a template the first two are a user's message (``input`` below
          ``instruction``); to others they are put in the words of Stanford's Alpaca;
        - ``text``: all of it is learned.
      tokenizer: makes the tokens.
      length: most tokens of a text that are predicted.
      too_long: what becomes of a record with more tokens than ``length + 1``. ``"truncate"`` keeps
        its first ones; nothing is left to learn where the prompt alone is as long, and it is left
        out. ``"split"`` makes pieces of it, as of plain text, so that all of the completion is
        learned; later pieces see less of what comes before them. ``"drop"`` leaves it out,
        and ``"error"`` refuses it.
      template: the model's, for conversations.

    Raises:
      FileNotFoundError, PermissionError: if it cannot be opened.
      ValueError: for a folder without files, a file of neither kind, a record that is none,
        conversations without a template, a record that is too long with ``"error"``, or if all
        records are left out.
    """
    records = read_by_record(path, tokenizer, length, too_long=too_long, template=template)
    return [*itertools.chain.from_iterable(records)]


def read_by_record(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    length: int,
    *,
    too_long: TooLong = "truncate",
    template: ChatTemplate | None = None,
) -> list[list[Example]]:
    """Texts to fine-tune on, by record; a plain text by the pieces in which it is learned.

    A record has several examples where its text is split, or where a template has a text per
    answer. Arguments and errors are those of :func:`read_examples`.

    Returns:
      For each record, or each piece, its examples.
    """
    path = pathlib.Path(path).expanduser()
    fitting = Fitting(str(path), tokenizer, length, too_long)
    if path.is_dir():
        files = files_of(path)
        read = functools.partial(
            read_by_record, tokenizer=tokenizer, length=length, too_long=too_long, template=template
        )
        return [*itertools.chain.from_iterable(map(read, files))]
    if holds_records(path):
        texts = _records(path, tokenizer, template)
        records = (
            [example for text in of_record for example in fitting.fit(text)]
            for _, of_record in itertools.groupby(texts, lambda text: text.where)
        )
        if not (examples := [record for record in records if record]):
            raise fitting.nothing()
        fitting.tell()
        return examples
    text = read_text(path)
    try:
        passage = whole(text, tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    pieces = cut_up(passage, tokenizer.begin, length)
    return [[piece] for piece in pieces]


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
    """The file; or all files of the folder that are not empty, by name.

    Raises:
      ValueError: for a folder without files.
    """
    if not path.is_dir():
        return [path]
    found = [file for file in sorted(path.rglob("*")) if _is_data(file, path)]
    files = [file for file in found if file.stat().st_size]
    if not files:
        raise ValueError(f"the folder {path} must have files that are not empty; it has none")
    if empty := len(found) - len(files):
        LOGGER.warning("%s: left out, of %d files: %d that are empty", path, len(found), empty)
    return files


def _is_data(file: pathlib.Path, folder: pathlib.Path) -> bool:
    """A file that nothing on its way hides."""
    return file.is_file() and not any(p[0] == "." for p in file.relative_to(folder).parts)


def _records(
    path: pathlib.Path, tokenizer: Tokenizer, template: ChatTemplate | None
) -> Iterator[Found]:
    """The texts of a file's records, of whatever kind these are."""
    fields = kind_of(fields_of_first(path))
    name = str(path)
    if fields == MESSAGES:
        check_template(name, template)
        records = ((where, tuple(values)) for where, *values in read_conversations(path))
    else:
        records = iter(read_records(path, fields))
    for where, values in records:
        yield from found_in(name, where, fields, values, tokenizer, template)


def check_template(name: str, template: ChatTemplate | None) -> None:
    """A ``ValueError`` without a template, for a file of conversations."""
    if template is None:
        raise ValueError(
            f"{name} has conversations, for which a model must have a chat template; this one has "
            "none: take an instruction-tuned model, add a chat_template.jinja to its folder, or "
            "give records with prompt and completion"
        )


def found_in(
    name: str,
    where: str,
    fields: tuple[str, ...],
    values: tuple[Any, ...],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
) -> Iterator[Found]:
    """The texts of a record, of which ``values`` are the ``fields`` of its kind.

    Raises:
      ValueError: for a text or a prompt that is empty, and a conversation or a token that is
        refused.
    """
    if fields != MESSAGES:
        refuse_empty(name, where, fields, values)
    try:
        yield from _made_of(where, fields, values, tokenizer, template)
    except ValueError as error:
        raise ValueError(f"{name}, {where}: {error}") from None


def _made_of(where, fields, values, tokenizer, template) -> Iterator[Found]:
    """The same of a record that is not empty."""
    if fields == MESSAGES:
        assert template is not None
        for example, across in conversed(tokenizer, template, *values):
            yield Found(where, example, across)
        return
    silent = not values[-1]
    if fields == TEXT:
        yield Found(where, whole(values[0], tokenizer))
    elif fields == PAIR:
        yield Found(where, *completed(tokenizer, *values), silent)
    else:
        instruction, context, output = values
        if template is not None:
            asked = "\n\n".join(filter(None, (instruction, context)))
            said = {"user": asked, "assistant": output}
            messages = [{"role": role, "content": text} for role, text in said.items()]
            for example, across in conversed(tokenizer, template, messages):
                yield Found(where, example, across, silent)
        else:
            words = ALPACA_WITH_INPUT if context else ALPACA
            prompt = words.format(instruction, context)
            yield Found(where, *completed(tokenizer, prompt, output), silent)


def refuse_empty(name: str, where: str, fields: tuple[str, ...], values: tuple[str, ...]) -> None:
    """A ``ValueError`` for an empty text, prompt or instruction."""
    if values[0]:
        return
    completion = "" if fields == TEXT else f"; its {fields[-1]} is {values[-1][:80]!r}"
    raise ValueError(f"{name}, {where}: the {fields[0]} must not be empty{completion}")


def whole(text: str, tokenizer: Tokenizer, *, ends: bool = True) -> Example:
    """A text of which all is learned, but for what the tokenizer puts before it.

    Without ``ends``, the text goes on where it is cut off, and its end is not learned.
    """
    tokens = tokenizer.prompt_tokens(text)
    if ends and tokens[-1] != tokenizer.end:
        tokens = [*tokens, tokenizer.end]
    return Example(tokens, [i >= len(tokenizer.begin) for i in range(len(tokens))])
