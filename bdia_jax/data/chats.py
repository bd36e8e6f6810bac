"""Conversations, through a model's own chat template.

A template is a program in Jinja that a model's folder brings. It makes one text of messages, with
the marks that the model knows. It may come from anywhere: it runs in Jinja's sandbox, as in
``transformers``, and sees nothing but the messages and the names of special tokens.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import pathlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from bdia_jax.data.examples import Example
from bdia_jax.data.tokenizers import Tokenizer

Message = Mapping[str, Any]
"""With ``role`` and ``content``, both texts; a template may know more fields."""
Span = tuple[int, int]
"""First character, and the one behind the last."""

GENERATED = "assistant"
"""The role whose messages a model writes."""
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TOOL_USE = f"{TEMPLATES}/tool_use.jinja"
"""Files of a model's folder: its template; others, by name; and the one for conversations with
tools, if it is another one."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How messages become one text.

    Raises:
      ValueError: for a source that is no template.
    """

    source: str
    """In Jinja."""
    tool_use: str | None = dataclasses.field(default=None, kw_only=True)
    """In Jinja, for conversations with tools; None if it is ``source`` for them, too."""
    tokens: tuple[tuple[str, str], ...] = ()
    """Special tokens by the names that a template calls them, such as ``("bos_token", "<s>")``."""
    now: datetime.datetime | None = None
    """For templates that write the day's date; None for the time at which they do."""

    def __post_init__(self):
        for source in filter(None, (self.source, self.tool_use)):
            _compiled(source)

    def text(
        self,
        messages: Sequence[Message],
        *,
        prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """The text of messages, without marks for training.

        Args:
          messages: of a conversation, from its first one.
          prompt: whether the model is to answer: the beginning of its message is added.
          tools: descriptions of those that the model may call.

        Raises:
          ValueError: for messages that the template refuses, and for tools that it does not read.
        """
        return self._rendered(messages, prompt, tools)[0]

    def generated(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> list[tuple[str, list[Span]]]:
        """Texts of a conversation, and what of them the model writes.

        Usually one text with all answers, as the model will write them. Where the template changes
        an answer once another follows (it drops its thoughts, say), one text per answer, which ends
        with that answer.

        Raises:
          ValueError: for messages that the template refuses, or a template whose prompt is not how
            its answers begin.
        """
        whole, marked = self._rendered(messages, False, tools)
        if marked:
            return [(whole, marked)]
        turns, spans, consistent = [], [], True
        for i, message in enumerate(messages):
            if message["role"] != GENERATED:
                continue
            before = self.text(messages[:i], prompt=True, tools=tools)
            until = self.text(messages[: i + 1], tools=tools)
            if not until.startswith(before) and not i:
                raise ValueError(
                    "the first message is an answer, which the chat template asks for otherwise "
                    "than it begins it: put a message of the user, or of the system, before it"
                )
            if not until.startswith(before):
                raise ValueError(
                    "the chat template does not begin an answer as it asks for one, so it is not "
                    "known which part of a text the model writes: use a template with "
                    "{% generation %}"
                )
            span = len(before), len(until)
            turns.append((until, [span]))
            spans.append(span)
            consistent &= whole.startswith(until)
        return [(whole, spans)] if consistent and spans else turns

    def _chosen(self, tools: Sequence[Any] | None) -> str:
        """The source for a conversation, with tools or without."""
        if tools is None:
            return self.source
        source = self.source if self.tool_use is None else self.tool_use
        if tools and "tools" not in source:
            raise ValueError(
                "the chat template does not read tools, so that they would be left out: give a "
                f"model whose template does, or add one as {TOOL_USE} to its folder, or leave the "
                f"tools out; got {repr(tools)[:80]}"
            )
        return source

    def _rendered(
        self, messages: Sequence[Message], prompt: bool, tools: Sequence[Any] | None
    ) -> tuple[str, list[Span]]:
        mark, now = secrets.token_hex(16), self.now or datetime.datetime.now()
        template = _compiled(self._chosen(tools))
        try:
            # Copies: a template may change neither the messages nor what they hold.
            text = template.render(
                **dict(self.tokens),
                messages=json.loads(json.dumps(messages)),
                add_generation_prompt=prompt,
                tools=json.loads(json.dumps(tools)),
                strftime_now=now.strftime,
                documents=None,
                _mark=mark,
            )
        except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        pieces = text.split(mark)
        ends = list(itertools.accumulate(map(len, pieces)))
        # Marks stand in pairs, around what is generated.
        return "".join(pieces), list(zip(ends[:-1:2], ends[1::2]))


def read_chat_template(files: Mapping[str, bytes]) -> ChatTemplate | None:
    """The template among the files of a model's folder; None if there is none.

    Args:
      files: contents by name; ``chat_template.jinja``, and perhaps
        ``additional_chat_templates/tool_use.jinja``, or else ``chat_template`` in
        ``tokenizer_config.json``: a text, or several by name, of which ``default`` is taken, and
        ``tool_use`` for conversations with tools. Names of special tokens are in that file, or in
        ``special_tokens_map.json``.

    Raises:
      ValueError: for files that are damaged.
    """
    config = _object_in(files, "tokenizer_config.json")
    named = named_templates(files, config)
    source, tool_use = named.get("default"), named.get("tool_use")
    if not source:
        return None
    for each in (source, tool_use):
        if each is not None and not isinstance(each, str):
            raise ValueError(f"chat_template must be a text; got {repr(each)[:80]}")
    tokens = {}
    for name, token in (_object_in(files, "special_tokens_map.json") | config).items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return ChatTemplate(source, tuple(tokens.items()), tool_use=tool_use)


def named_templates(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, Any]:
    """Templates by name, among the files of a folder and in its ``tokenizer_config.json``.

    As in ``transformers``: with a file for the default one, those of the settings do not count.
    """
    places = {at: pathlib.PurePath(at).stem for at in files if at.startswith(f"{TEMPLATES}/")}
    places |= {TEMPLATE: "default"}
    found = {name: files[at].decode() for at, name in places.items() if at in files}
    given = config.get("chat_template")
    if "default" in found or given is None:
        return found
    if isinstance(given, list):
        return {each.get("name"): each.get("template") for each in given} | found
    return {"default": given} | found


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is no template in Jinja: {error}") from error


def _object_in(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The settings in a file; none if there is no such file."""
    try:
        found = json.loads(files.get(name, b"{}").decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def conversation(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
) -> list[Example]:
    """A conversation as it is learned: the assistant's messages, up to the token that ends them.

    The tokens before an answer are those that a model is prompted with.

    Args:
      tokenizer: of the model.
      template: of the model.
      messages: of the whole conversation.
      tools: descriptions of those that the model may call; None for none.

    Returns:
      One example; or one per answer, as :meth:`ChatTemplate.generated` says.

    Raises:
      ValueError: for messages that are none, that have no answer, or that the template refuses.
    """
    return [example for example, _ in conversed(tokenizer, template, messages, tools)]


def conversed(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
) -> list[tuple[Example, bool]]:
    """A conversation as it is learned, and whether a token is across where an answer begins.

    (Or ends: a template without special tokens around its messages may make one.) Arguments and
    errors are those of :func:`conversation`.

    Returns:
      For each example, whether the text as a whole has other tokens than its parts.
    """
    check_messages(messages)
    found = []
    for text, spans in template.generated(messages, tools):
        cuts = [0, *itertools.chain.from_iterable(spans), len(text)]
        whole, pieces = tokenizer.encode(text), _apart(tokenizer, text, cuts)
        if [*itertools.chain(*pieces)] != whole:
            pieces = _in_turn(tokenizer, text, cuts)
        example = _example(tokenizer, pieces)
        found.append((example, example.tokens != whole))
    return found


def _apart(tokenizer: Tokenizer, text: str, cuts: Sequence[int]) -> list[list[int]]:
    """The tokens of the parts between ``cuts``, each by itself."""
    encode = itertools.chain([tokenizer.encode], itertools.repeat(tokenizer.continuation))
    return [f(text[start:stop]) for f, (start, stop) in zip(encode, itertools.pairwise(cuts))]


def _in_turn(tokenizer: Tokenizer, text: str, cuts: Sequence[int]) -> list[list[int]]:
    """The same, each as what a text up to its end has more than a text up to its beginning.

    Some vocabularies put a space behind special tokens, or drop one, so that a part by itself has
    other tokens. Where a token is across a cut, the part is by itself nevertheless.
    """
    upto = [tokenizer.encode(text[:cut]) for cut in cuts]
    return [
        whole[len(given) :] if whole[: len(given)] == given else alone
        for (given, whole), alone in zip(itertools.pairwise(upto), _apart(tokenizer, text, cuts))
    ]


def _example(tokenizer: Tokenizer, pieces: Sequence[list[int]]) -> Example:
    """Of the tokens of prompts and answers, in turn."""
    tokens: list[int] = []
    learned: list[bool] = []
    for number, piece in enumerate(pieces):
        until = _written(tokenizer, piece) if number % 2 else 0
        tokens += piece
        learned += [i < until for i in range(len(piece))]
    return Example(tokens, learned)


def _written(tokenizer: Tokenizer, answer: list[int]) -> int:
    """How many tokens of an answer a model writes: not the blanks behind the one that ends it."""
    ends = [i for i, token in enumerate(answer, 1) if token in tokenizer.special]
    if not ends or tokenizer.decode(answer[ends[-1] :]).strip():
        return len(answer)
    return ends[-1]


def check_messages(messages: Any) -> None:
    """A ``ValueError`` for no list of messages, no answer, or an answer that is not learned."""
    shape = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages must be a list such as {shape}; got {repr(messages)[:80]}")
    for number, message in enumerate(messages, 1):
        fields = message if isinstance(message, Mapping) else {}
        for field in ("role", "content"):
            text = fields.get(field)
            if field == "content" and text is None and fields.get("tool_calls"):
                continue
            if not isinstance(text, str):
                raise ValueError(
                    f"message {number} must have {field}, a text, as in {shape}; got "
                    f"{repr(message)[:80]}"
                )
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"message {number}: {field} has a lone surrogate, half of a character"
                ) from None
        # OpenAI's format has 0 for an answer that is not to be learned.
        if fields.get("role") == GENERATED and (weight := fields.get("weight")) not in (None, 1):
            raise ValueError(
                f"message {number} has the weight {weight!r}, but every answer of a conversation "
                "is learned, with the weight 1: leave the weight out, or give prompt and "
                "completion, of which the completion alone is learned"
            )
    if all(message["role"] != GENERATED for message in messages):
        raise ValueError(
            f"messages must have an answer, of the role {GENERATED}; got the roles "
            f"{', '.join(sorted({message['role'] for message in messages}))}"
        )


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` and ``{% endgeneration %}`` stand around what a model writes."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja wants it)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = jinja2.nodes.Name("_mark", "load")
        call = self.call_method("_marked", [mark])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, mark, caller):
        return f"{mark}{caller()}{mark}"


@functools.cache
def _environment() -> jinja2.Environment:
    """What templates may use: the same as in ``transformers``."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def refuse(message):
        raise jinja2.TemplateError(message)

    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    return made
