"""Conversations: transformers' text and tokens of them, and what of that is learned."""

import copy
import csv
import dataclasses
import datetime
import functools
import itertools
import json

import pytest
import tokenizers
from test_tokenizers import llama_2
from tokenizers import decoders, models, pre_tokenizers, trainers

from bdia_jax import data, interop
from bdia_jax.data.chats import TOOL_USE, ChatTemplate, conversation, read_chat_template

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}
{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{% set said = (system if loop.first else '') + message['content'] | trim %}
{{ bos_token + '[INST] ' + said + ' [/INST]' }}
{%- else %}
{{ ' ' + message['content'] | trim + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""
LLAMA_3 = """{{ bos_token }}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '<|im_end|>\\n\\n' + m.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant<|im_end|>\\n\\n' }}
{%- endif %}"""
THINKING = """{% for m in messages %}
{% set said = m.content %}
{% if m.role == 'assistant' and not loop.last %}
{% set said = said.split('</think>')[-1] %}
{% endif %}
{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MARKED = """{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role == 'assistant' -%}
{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else -%}{{ m.content + '<|im_end|>' }}{%- endif -%}
{{- '\n' -}}
{%- if m.role == 'skip' %}{% continue %}{% endif -%}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    "llama 2": LLAMA_2,
    "llama 3": LLAMA_3,
    "thinking": THINKING,
    "marked": MARKED,
}


def chat(*contents, system=None):
    roles = itertools.cycle(("user", "assistant"))
    begin = [] if system is None else [{"role": "system", "content": system}]
    return begin + [{"role": role, "content": text} for role, text in zip(roles, contents)]


CHATS = [
    chat("the cat", "sat"),
    chat("yes: no\n", "  yes no ", "1 + 1 =", "<think>\n2?\n</think>\n\n2\n\n", system="The dog. "),
    chat("the cat", "", "é <b>&amp; 'x' \U0001f600", "sat on\nthe mat", "the log"),
]


SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>"]


def of_bytes():
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the cat sat on the mat\n\nassistant user system " * 20], trainer)
    made.add_special_tokens(SPECIAL)
    return made


def of_llama_2(rstrip=False):
    """Which puts a space behind special tokens, or with ``rstrip`` drops one."""
    made = llama_2()
    made.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False, rstrip=rstrip) for token in SPECIAL]
    )
    return made


VOCABULARIES = {
    "bytes": of_bytes,
    "llama 2": of_llama_2,
    "llama 2, rstrip": functools.partial(of_llama_2, rstrip=True),
}


@pytest.fixture(scope="module")
def inner():
    return of_bytes()


@pytest.fixture(scope="module", params=itertools.product(TEMPLATES, VOCABULARIES), ids=", ".join)
def folder(request, tmp_path_factory):
    name, vocabulary = request.param
    folder = tmp_path_factory.mktemp("model")
    VOCABULARIES[vocabulary]().save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("messages", CHATS)
def test_texts_are_those_of_transformers(folder, theirs, messages):
    template = interop.load_chat_template(folder)
    for upto, prompt in itertools.product(range(1, len(messages) + 1), (False, True)):
        if messages[0]["role"] == "system" and upto == 1:
            continue
        some = messages[:upto]
        expected = theirs.apply_chat_template(some, tokenize=False, add_generation_prompt=prompt)
        assert template.text(some, prompt=prompt) == expected


@pytest.mark.parametrize("messages", CHATS)
def test_every_answer_is_learned_after_what_transformers_asks_with(folder, theirs, messages):
    before = copy.deepcopy(messages)
    tokenizer, template = data.load_tokenizer(folder), interop.load_chat_template(folder)
    examples = conversation(tokenizer, template, messages)
    assert messages == before
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    found = 0
    for example in examples:
        starts = [
            i for i, learned in enumerate(example.learned) if learned and not example.learned[i - 1]
        ]
        for start in starts:
            i = answers[found]
            asked = theirs.apply_chat_template(messages[:i], add_generation_prompt=True)
            assert example.tokens[:start] == asked.input_ids
            stop = (
                start + example.learned[start:].index(False)
                if False in example.learned[start:]
                else len(example.tokens)
            )
            said = tokenizer.decode(example.tokens[start:stop])
            # What a vocabulary can say of it.
            content = tokenizer.decode(tokenizer.encode(messages[i]["content"]))
            thought = tokenizer.decode(
                tokenizer.encode(messages[i]["content"].split("</think>")[-1])
            )
            assert said.strip() in (content.strip(), thought.strip())
            assert example.tokens[stop - 1] in tokenizer.special
            found += 1
    assert found == len(answers)
    if len(examples) == 1:
        (example,) = examples
        assert example.tokens == theirs.apply_chat_template(messages).input_ids


def test_what_is_generated_is_what_transformers_marks(inner, tmp_path):
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    theirs.chat_template = MARKED
    ours = data.Tokenizer(inner, inner.token_to_id("</s>"))
    for messages in CHATS:
        (example,) = conversation(ours, ChatTemplate(MARKED), messages)
        expected = theirs.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True
        )
        assert example.tokens == expected["input_ids"]
        assert example.learned == [bool(m) for m in expected["assistant_masks"]]


def test_an_answer_that_is_written_otherwise_later_has_a_text_of_its_own(inner):
    tokenizer = data.Tokenizer(inner, inner.token_to_id("</s>"))
    messages = chat("a", "<think>b</think>c", "d", "<think>e</think>f")
    examples = conversation(tokenizer, ChatTemplate(THINKING), messages)
    texts = [inner.decode(example.tokens, skip_special_tokens=False) for example in examples]
    first = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>b</think>c<|im_end|>\n"
    assert texts[0] == first
    assert texts[1] == first.replace("<think>b</think>", "") + (
        "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n<think>e</think>f<|im_end|>\n"
    )
    learned = [
        inner.decode([t for t, yes in zip(*example) if yes], skip_special_tokens=False)
        for example in examples
    ]
    assert learned == ["<think>b</think>c<|im_end|>", "<think>e</think>f<|im_end|>"]


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        ("{% for %}", CHATS[0], "is no template in Jinja"),
        ("{{ ''.__class__.__mro__ }}", CHATS[0], r"refuses the messages: access to attribute"),
        ("{{ messages.append(1) }}", CHATS[0], "refuses the messages"),
        ("{{ 1 / 0 }}", CHATS[0], "refuses the messages: division"),
        (LLAMA_2, chat("a", "b")[::-1], "refuses the messages: Roles must alternate"),
        ("{{ messages | length }}", CHATS[0], "does not begin an answer as it asks for one"),
        (CHATML, chat("a", "b")[::-1], "the first message is an answer, which the chat template"),
        (CHATML, [], r"must be a list such as \[.*got \[\]"),
        (CHATML, "hello", r"must be a list such as .*got 'hello'"),
        (CHATML, [{"role": "user"}], "message 1 must have content, a text"),
        (CHATML, [{"role": "user", "content": None}], "message 1 must have content"),
        (CHATML, ["hi"], "message 1 must have role, a text"),
        (CHATML, chat("a", "\ud800"), "message 2: content has a lone surrogate"),
        (CHATML, chat("a"), "must have an answer, of the role assistant; got the roles user"),
    ],
)
def test_conversations_that_are_refused(source, messages, message, inner):
    tokenizer = data.Tokenizer(inner, inner.token_to_id("</s>"))
    with pytest.raises(ValueError, match=message):
        conversation(tokenizer, ChatTemplate(source), messages)


def test_where_a_template_is_found():
    def config(value):
        return json.dumps({"chat_template": value, "eos_token": "</s>", "other": 1}).encode()

    assert read_chat_template({}) is None
    assert read_chat_template({"tokenizer_config.json": b"{}"}) is None
    found = read_chat_template({"tokenizer_config.json": config("a")})
    assert found == ChatTemplate("a", (("eos_token", "</s>"),))
    both = {"tokenizer_config.json": config("a"), "chat_template.jinja": b"b"}
    assert read_chat_template(both) == ChatTemplate("b", (("eos_token", "</s>"),))
    several = [{"name": "rag", "template": "c"}, {"name": "default", "template": "d"}]
    assert read_chat_template({"tokenizer_config.json": config(several)}).source == "d"
    # Names that only the other file has; where both have one, tokenizer_config.json says it.
    names = b'{"bos_token": {"content": "<s>"}, "eos_token": "no"}'
    found = read_chat_template(
        {"tokenizer_config.json": config("a"), "special_tokens_map.json": names}
    )
    assert dict(found.tokens) == {"bos_token": "<s>", "eos_token": "</s>"}
    with pytest.raises(ValueError, match="chat_template must be a text; got 3"):
        read_chat_template({"tokenizer_config.json": config(3)})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json cannot be read"):
        read_chat_template({"tokenizer_config.json": b"{"})


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_files_of_conversations(inner, tmp_path):
    tokenizer, template = data.Tokenizer(inner, inner.token_to_id("</s>")), ChatTemplate(CHATML)
    path = written(tmp_path / "chats.jsonl", [{"messages": m, "source": "x"} for m in CHATS])
    expected = [e for messages in CHATS for e in conversation(tokenizer, template, messages)]
    assert data.read_examples(path, tokenizer, 500, template=template) == expected
    (tmp_path / "chats.json").write_text(json.dumps([{"messages": m} for m in CHATS]))
    again = data.read_examples(tmp_path / "chats.json", tokenizer, 500, template=template)
    assert again == expected
    with pytest.raises(ValueError, match="must have a chat template; this one has none"):
        data.read_examples(path, tokenizer, 500)
    written(path, [{"messages": CHATS[0]}, {"messages": chat("a")}])
    with pytest.raises(ValueError, match=r"chats.jsonl, line 2: messages must have an answer"):
        data.read_examples(path, tokenizer, 500, template=template)
    written(path, [{"messages": CHATS[0]}, {"prompt": "a"}])
    with pytest.raises(ValueError, match=r'line 2: each line must be {"messages": \[.*got'):
        data.read_examples(path, tokenizer, 500, template=template)


def test_an_answer_that_begins_within_a_token_is_told(inner, tmp_path, caplog):
    """Of a template without special tokens around its messages."""
    tokenizer = data.Tokenizer(inner, inner.token_to_id("</s>"))
    plain = ChatTemplate(
        "{% for m in messages %}{{ m.role + ' ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}",
        (("eos_token", "</s>"),),
    )
    path = written(tmp_path / "chats.jsonl", [{"messages": chat("the", "cat")}])
    (example,) = data.read_examples(path, tokenizer, 500, template=plain)
    asked = tokenizer.encode("user the</s>assistant ")
    assert example.tokens[: len(asked)] == asked
    assert "1 text is learned with a token of the prompt" in caplog.text
    caplog.clear()
    data.read_examples(path, tokenizer, 500, template=ChatTemplate(CHATML))
    assert not caplog.text


def test_files_of_texts(inner, tmp_path):
    tokenizer = data.Tokenizer(inner, inner.token_to_id("</s>"))
    path = written(tmp_path / "texts.jsonl", [{"text": "the cat"}, {"text": "sat", "id": 3}])
    first, second = data.read_examples(path, tokenizer, 20)
    assert first.tokens == [*tokenizer.encode("the cat"), tokenizer.end]
    assert all(first.learned)
    assert second.tokens == [*tokenizer.encode("sat"), tokenizer.end]
    (tmp_path / "texts.csv").write_text("id,text\n1,the cat\n3,sat\n")
    assert data.read_examples(tmp_path / "texts.csv", tokenizer, 20) == [first, second]
    written(path, [{"text": "the cat"}, {"text": ""}])
    with pytest.raises(ValueError, match="line 2: the text must not be empty"):
        data.read_examples(path, tokenizer, 20)
    # A prompt goes before: its record has a text by chance.
    written(path, [{"prompt": "the", "completion": " cat", "text": "x"}])
    assert data.read_examples(path, tokenizer, 20) == [data.completion(tokenizer, "the", " cat")]


ASKED = [
    {"instruction": "the", "input": "", "output": "cat"},
    {"instruction": "the {}", "input": "cat", "output": "sat", "text": "the same once more"},
]
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nthe\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "the {}\n\n### Input:\ncat\n\n### Response:\n",
)


def test_files_of_instructions(inner, tmp_path):
    """In the words of those who made the format, or by the template of the model."""
    tokenizer = data.Tokenizer(inner, inner.token_to_id("</s>"))
    path = written(tmp_path / "a.jsonl", ASKED)
    outputs = ("cat", "sat")
    expected = [data.completion(tokenizer, *pair) for pair in zip(ALPACA, outputs)]
    assert data.read_examples(path, tokenizer, 500) == expected
    (tmp_path / "a.csv").write_text("output,instruction,input\ncat,the,\nsat,the {},cat\n")
    assert data.read_examples(tmp_path / "a.csv", tokenizer, 500) == expected
    (tmp_path / "b.csv").write_text("instruction,output\nthe,cat\n")
    assert data.read_examples(tmp_path / "b.csv", tokenizer, 500) == expected[:1]

    template = ChatTemplate(CHATML)
    chats = [chat("the", "cat"), chat("the {}\n\ncat", "sat")]
    expected = [data.conversation(tokenizer, template, messages) for messages in chats]
    found = data.read_examples(path, tokenizer, 500, template=template)
    assert found == [example for some in expected for example in some]

    written(path, [ASKED[0], {"instruction": "", "input": "x", "output": "cat"}])
    with pytest.raises(ValueError, match="line 2: the instruction must not be empty; its output"):
        data.read_examples(path, tokenizer, 500)
    written(path, [ASKED[0], {"instruction": "the"}])
    with pytest.raises(ValueError, match=r"line 2: .* output is missing"):
        data.read_examples(path, tokenizer, 500)


def test_an_input_is_read_wherever_it_is(inner, tmp_path):
    """Also where the first record has none."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    tokenizer = data.Tokenizer(inner, inner.token_to_id("</s>"))
    expected = [data.completion(tokenizer, *pair) for pair in zip(ALPACA, ("cat", "sat"))]
    some = [{"instruction": "the", "output": "cat"}, ASKED[1]]
    paths = [written(tmp_path / "a.jsonl", some), tmp_path / "a.parquet", tmp_path / "a.json"]
    parquet.write_table(pyarrow.Table.from_pylist([some[1], some[0]][::-1]), paths[1])
    paths[2].write_text(json.dumps(some))
    for path in paths:
        if path.suffix != ".parquet":
            assert data.read_examples(path, tokenizer, 500) == expected
        if path.suffix != ".json":
            source = data.TextsOnDisk([path], tokenizer, 500)
            assert source.read(range(source.blocks)) == data.read_examples(path, tokenizer, 500)


KINDS = {
    "messages": {"messages": chat("the", "cat")},
    "pairs": {"prompt": "the", "completion": " cat"},
    "instructions": {"instruction": "the", "output": "cat"},
}
UNREAD = {
    "system": ("be kind", r'as a message, \{"role": "system", .* in \{"messages": '),
    "history": ([["the", "cat"]], r'as messages before the others, in \{"messages": '),
    "chat_template_kwargs": ({"thinking": False}, r"into the .*jinja, .* \{% set enable_thinking"),
}


@pytest.mark.parametrize("field", UNREAD)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_what_would_be_left_out_is_refused(name, kind, field, inner, tmp_path):
    tokenizer, path = data.Tokenizer(inner, inner.token_to_id("</s>")), tmp_path / name
    (value, how), template = UNREAD[field], ChatTemplate(CHATML)
    # Empty, it says nothing.
    rows = [KINDS[kind], KINDS[kind] | {field: type(value)()}, KINDS[kind] | {field: value}]

    def write(rows):
        if name == "a.jsonl":
            written(path, rows)
        elif name == "a.json":
            path.write_text(json.dumps(rows))
        elif name == "a.csv":
            with open(path, "w", newline="") as file:
                table = csv.DictWriter(file, list(rows[-1]))
                table.writeheader()
                table.writerows(rows)
        else:
            parquet = pytest.importorskip("pyarrow.parquet")
            import pyarrow

            schema = pyarrow.Table.from_pylist([KINDS[kind] | {field: value}]).schema
            parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)

    if (name, kind) == ("a.csv", "messages"):
        pytest.skip("tables have no messages")
    reads = [
        lambda: data.read_examples(path, tokenizer, 500, template=template),
        lambda: data.TextsOnDisk([path], tokenizer, 500, template=template),
    ]
    write(rows)
    for read in reads[: 1 if name == "a.json" else 2]:
        with pytest.raises(ValueError, match=rf"(line|record) [34]: {field} would be left .*{how}"):
            read()
    write(rows[:2])
    assert len(reads[0]()) == 2
    # All of a text is learned, and what is said of it beside it is not.
    written(tmp_path / "b.jsonl", [{"text": "the cat", field: value}])
    data.read_examples(tmp_path / "b.jsonl", tokenizer, 500)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_answers_that_are_not_to_be_learned_are_refused(name, inner, tmp_path):
    """Weights of OpenAI's format: a conversation is learned as a whole."""
    tokenizer, path = data.Tokenizer(inner, inner.token_to_id("</s>")), tmp_path / name
    template, messages = ChatTemplate(CHATML), chat("the", "cat", "sat", "on")

    def write(*weights):
        said = [
            m if weight is None else m | {"weight": weight} for m, weight in zip(messages, weights)
        ]
        if name == "a.jsonl":
            written(path, [{"messages": said}])
            return
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist([{"messages": said}]), path)

    expected = conversation(tokenizer, template, messages)
    # A message of the user is never learned.
    for weights in ((None, 1, None, None), (0, 1, 0, 1.0)):
        write(*weights)
        assert data.read_examples(path, tokenizer, 500, template=template) == expected
    for weights, which in (((None, 0, None, 1), "2 has the weight 0,"), ((1, 1, 1, 0.5), "4 has")):
        write(*weights)
        for read in (
            lambda: data.read_examples(path, tokenizer, 500, template=template),
            lambda: data.TextsOnDisk([path], tokenizer, 500, template=template),
        ):
            with pytest.raises(ValueError, match=rf"(line|record) 1: message {which}"):
                read()


def test_an_end_that_is_written_and_an_answer_that_is_empty(inner, tmp_path, caplog):
    tokenizer = data.Tokenizer(inner, inner.token_to_id("</s>"))
    assert data.completion(tokenizer, "the", " cat</s>") == data.completion(
        tokenizer, "the", " cat"
    )
    # The end of a prompt is no end of what follows.
    assert data.completion(tokenizer, "the</s>", "").tokens[-2:] == [tokenizer.end] * 2
    path = written(tmp_path / "a.jsonl", [{"text": "the cat</s>"}, {"text": "the cat"}])
    first, second = data.read_examples(path, tokenizer, 500)
    assert first == second
    (tmp_path / "a.csv").write_text("prompt,completion\nthe,\na, cat\nthe,\n")
    data.read_examples(tmp_path / "a.csv", tokenizer, 500)
    assert "2 texts are learned with an empty completion" in caplog.text
    assert "(line 2 first)" in caplog.text


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": None}}}]
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\n' }}{% for t in tools %}{{ t | tojson + '\n' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if 'tool_calls' in m %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS = [
    {"role": "user", "content": "1 + 1"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": "1, 1"}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "2"},
]


def test_tools_are_given_to_the_template(inner, tmp_path):
    """As ``transformers`` gives them; from Parquet, too, whose objects all have the same keys."""
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    theirs.chat_template = WITH_TOOLS
    tokenizer, template = data.Tokenizer(inner, theirs.eos_token_id), ChatTemplate(WITH_TOOLS)
    expected = [
        theirs.apply_chat_template(messages, tools=tools).input_ids
        for messages, tools in ((CALLS, TOOLS), (CHATS[0], None))
    ]
    records = [
        {"messages": CALLS, "tools": json.dumps(TOOLS)},
        {"messages": CHATS[0], "tools": None},
    ]
    paths = [written(tmp_path / "a.jsonl", records), tmp_path / "a.parquet"]
    parquet.write_table(pyarrow.Table.from_pylist(records), paths[1])
    paths.append(written(tmp_path / "b.jsonl", [records[0] | {"tools": TOOLS}, records[1]]))
    for path in paths:
        source = data.TextsOnDisk([path], tokenizer, 500, template=template)
        for found in (
            data.read_examples(path, tokenizer, 500, template=template),
            source.read(range(source.blocks)),
        ):
            assert [example.tokens for example in found] == expected
    written(paths[0], [{"messages": CALLS, "tools": "add"}])
    with pytest.raises(ValueError, match=r"line 1: each line must be .*no JSON"):
        data.read_examples(paths[0], tokenizer, 500, template=template)
    written(paths[0], [{"messages": CALLS, "tools": {"add": 1}}])
    with pytest.raises(ValueError, match="line 1: tools must be a list; got"):
        data.read_examples(paths[0], tokenizer, 500, template=template)


@pytest.mark.parametrize("where", ["settings", "files", "both", "one file"])
def test_tools_have_a_template_of_their_own(where, inner, tmp_path):
    """That ``transformers`` takes; of names in the settings and files, too."""
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    inner.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    several = {"default": CHATML, "tool_use": WITH_TOOLS, "rag": "{{ documents }}"}
    if where in ("settings", "both", "one file"):
        listed = [{"name": name, "template": source} for name, source in several.items()]
        settings["chat_template"] = listed
    if where != "settings":
        (tmp_path / "chat_template.jinja").write_text("tools: " * (where == "both") + CHATML)
    if where in ("files", "both"):
        (tmp_path / TOOL_USE).parent.mkdir()
        (tmp_path / TOOL_USE).write_text("!" * (where == "both") + WITH_TOOLS)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text("{}")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = interop.load_chat_template(tmp_path)
    calls, said = CALLS[2:], {"tokenize": False}
    assert found.text(calls) == theirs.apply_chat_template(calls, **said)
    if where == "one file":
        # With it, the settings do not count, and it says nothing of tools.
        assert found.tool_use is None
        assert theirs.chat_template == found.source
        with pytest.raises(ValueError, match=r"does not read tools, so .* got \[\{'type'"):
            found.text(calls, tools=TOOLS)
        return
    assert found.text(CALLS, tools=TOOLS) == theirs.apply_chat_template(CALLS, tools=TOOLS, **said)
    assert found.tool_use != found.source
    # As it is learned.
    tokenizer = data.load_tokenizer(tmp_path)
    path = written(tmp_path / "a.jsonl", [{"messages": CALLS, "tools": TOOLS}])
    (example,) = data.read_examples(path, tokenizer, 500, template=found)
    assert example.tokens == theirs.apply_chat_template(CALLS, tools=TOOLS).input_ids
    # Data that are streamed are others with another template.
    digests = {
        data.TextsOnDisk([path], tokenizer, 500, template=each).digest
        for each in (found, dataclasses.replace(found, tool_use=None))
    }
    assert len(digests) == 2


def test_tools_that_a_template_does_not_read_are_refused(inner, tmp_path):
    tokenizer = data.Tokenizer(inner, inner.token_to_id("</s>"))
    record = {"messages": chat("the", "cat")}
    path = written(tmp_path / "a.jsonl", [record | {"tools": []}, record | {"tools": TOOLS}])
    source = data.TextsOnDisk([path], tokenizer, 500, template=ChatTemplate(CHATML))
    for read in (
        lambda: data.read_examples(path, tokenizer, 500, template=ChatTemplate(CHATML)),
        lambda: source.read(range(2)),
    ):
        with pytest.raises(ValueError, match=r"(line|record) 2: the chat template does not read"):
            read()
    with pytest.raises(ValueError, match="no template in Jinja"):
        ChatTemplate(CHATML, tool_use="{% if %}")


def test_an_answer_that_nothing_leads_to(inner):
    """It is learned where the template asks for it as it begins it."""
    tokenizer = data.Tokenizer(inner, inner.token_to_id("</s>"))
    (example,) = conversation(tokenizer, ChatTemplate(WITH_TOOLS), chat("a", "the cat")[1:])
    found = [token for token, yes in zip(*example) if yes]
    assert inner.decode(found, skip_special_tokens=False) == "the cat<|im_end|>"


def test_the_day_of_a_template_may_be_given():
    dated = ChatTemplate("{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}")
    then = dataclasses.replace(dated, now=datetime.datetime(2024, 2, 29))
    assert then.text(CHATS[0]) == "29 Feb 2024the cat"
    assert dated.text(CHATS[0]) == f"{datetime.datetime.now():%d %b %Y}the cat"


def test_an_answer_with_a_special_token_in_it_is_learned_whole(inner):
    """What is blank behind the token that ends it is not."""
    tokenizer = data.Tokenizer(inner, inner.token_to_id("</s>"))
    marked = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<|im_start|>' + m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    for said, learned in (("the cat", "the cat"), ("cat<|im_end|>\n", "cat<|im_end|>")):
        (example,) = conversation(tokenizer, marked, chat("hi", said))
        found = [token for token, yes in zip(*example) if yes]
        assert inner.decode(found, skip_special_tokens=False) == f"<|im_start|>{learned}"
