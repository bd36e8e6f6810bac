"""Conversations: transformers' text and tokens of them, and what of that is learned."""

import copy
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
from bdia_jax.data.chats import ChatTemplate, conversation, read_chat_template

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


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_what_would_be_left_out_of_instructions_is_refused(name, inner, tmp_path):
    tokenizer, path = data.Tokenizer(inner, inner.token_to_id("</s>")), tmp_path / name
    record = {"instruction": "the", "output": "cat", "system": "be kind"}
    if name == "a.jsonl":
        # Empty, it says nothing.
        written(path, [record | {"system": ""}, record])
    elif name == "a.csv":
        path.write_text("instruction,output,system\nthe,cat,\nthe,cat,be kind\n")
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        rows = [record | {"system": None}, record]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    for read in (
        lambda: data.read_examples(path, tokenizer, 500),
        lambda: data.TextsOnDisk([path], tokenizer, 500),
    ):
        with pytest.raises(ValueError, match=r"(line|record) [23]: system of an .* left out"):
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
