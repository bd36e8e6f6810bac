"""Tokenizers as people have them, and prompts with completions: what transformers makes of them."""

import dataclasses
import itertools
import json
import shutil

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from bdia_jax import data

WORDS = "the cat sat on the mat, and the dog sat on the log. yes: no\nyes no\n1 + 1 = 2 " * 20
LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789"
BEGIN, END = "<s>", "</s>"
METASPACE = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)


def trained(kind, inner, trainer, decoder, bos=True):
    """Trained on a few words; its post-processor puts ``<s>`` before a text, as Llama's does."""
    inner.train_from_iterator([WORDS, LETTERS], trainer(special_tokens=["<unk>", BEGIN, END]))
    inner.decoder = decoder
    if bos:
        begin = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
        # Llama 3 has both.
        levels = [processors.ByteLevel(trim_offsets=True), begin]
        inner.post_processor = processors.Sequence(levels) if kind == "llama 3" else begin
    return inner


def bpe(**more):
    return lambda **some: trainers.BpeTrainer(vocab_size=400, show_progress=False, **some, **more)


def byte_level(**more):
    return bpe(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **more)


def llama_2():
    """The space before a text comes from the normalizer; so in Llama 2's own tokenizer.json."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained("llama 2", inner, bpe(), METASPACE)
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.pre_tokenizer = None
    return inner


def metaspace(scheme):
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return trained("metaspace", inner, bpe(), METASPACE)


def unigram():
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")

    def trainer(**some):
        return trainers.UnigramTrainer(
            vocab_size=90, unk_token="<unk>", show_progress=False, **some
        )

    return trained("unigram", inner, trainer, decoders.Metaspace(prepend_scheme="always"))


def llama_3():
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained("llama 3", inner, byte_level(), decoders.ByteLevel())


def prefixed_bytes():
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return trained("bytes", inner, byte_level(), decoders.ByteLevel(), bos=False)


def gpt_2():
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained("gpt 2", inner, byte_level(), decoders.ByteLevel(), bos=False)


KINDS = {
    "llama 2": llama_2,
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "unigram": unigram,
    "llama 3": llama_3,
    "bytes after a space": prefixed_bytes,
    "gpt 2": gpt_2,
}


def saved(inner, folder):
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END})
    )
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return saved(KINDS[request.param](), tmp_path_factory.mktemp("tokenizer") / request.param)


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------
# Prompts and completions
# ---------------------------------------------------------------------------------------------

APART = [
    ("the cat", " sat"),
    ("the cat sat on", " the mat, and the dog"),
    ("yes:", " no"),
    ("yes:", "no"),
    ("1 + 1 =", " 2"),
    ("the dog\n", "sat on"),
    ("the log.", "\nyes no"),
    ("é", " the mat"),
    (" the", " cat"),
]
"""Pairs whose boundary is one between tokens in all vocabularies here."""
ACROSS = [("the cat ", "sat"), ("1 + 1 = ", "2"), ("the ca", "t sat"), ("the  ", "  dog")]
"""Pairs whose boundary is within a token in some."""


@pytest.mark.parametrize("pair", APART)
def test_what_is_learned_is_how_transformers_reads_the_whole(folder, theirs, pair):
    prompt, text = pair
    tokens, learned = data.completion(data.load_tokenizer(folder), prompt, text)
    given = theirs(prompt).input_ids
    assert tokens == [*theirs(prompt + text).input_ids, theirs.eos_token_id]
    assert learned == [False] * len(given) + [True] * (len(tokens) - len(given))


@pytest.mark.parametrize("pair", APART + ACROSS)
def test_a_prompt_is_learned_as_transformers_will_give_it(folder, theirs, pair):
    prompt, text = pair
    tokenizer = data.load_tokenizer(folder)
    tokens, learned = data.completion(tokenizer, prompt, text)
    given = theirs(prompt).input_ids
    assert tokenizer.prompt_tokens(prompt) == given
    assert tokens[: len(given)] == given
    assert not any(learned[: len(given)])
    assert all(learned[len(given) :])
    whole = theirs.decode(theirs(prompt + text).input_ids, skip_special_tokens=True)
    assert theirs.decode(tokens, skip_special_tokens=True) == whole


@pytest.mark.parametrize("space", ["before", "after"])
def test_a_model_that_knows_every_token_by_heart_says_the_completions(folder, theirs, space):
    """Twelve pairs; what was learned after what, then generation from transformers' prompts."""
    pairs = [(f"the {word} is", f" number {i}") for i, word in enumerate("abcdefghijkl")]
    if space == "before":
        pairs = [(prompt + " ", text[1:]) for prompt, text in pairs]
    tokenizer, known = data.load_tokenizer(folder), {}
    for prompt, text in pairs:
        tokens, learned = data.completion(tokenizer, prompt, text)
        known |= {tuple(tokens[:i]): t for i, t in enumerate(tokens) if learned[i]}
    for prompt, text in pairs:
        given = said = tuple(theirs(prompt).input_ids)
        while (token := known[said]) != theirs.eos_token_id:
            said = (*said, token)
        before = theirs.decode(given, skip_special_tokens=True)
        after = theirs.decode(said, skip_special_tokens=True)
        assert " ".join(after.removeprefix(before).split()) == text.strip()


@hypothesis.given(st.text("the cat\n=é", min_size=1, max_size=8), st.text("at ć\nsy", max_size=8))
def test_no_prompt_is_learned_otherwise_than_it_is_given(folder, prompt, text):
    tokenizer = data.load_tokenizer(folder)
    tokens, learned = data.completion(tokenizer, prompt, text)
    given = tokenizer.prompt_tokens(prompt)
    assert tokens[: len(given)] == given
    assert learned == [i >= len(given) for i in range(len(tokens))]
    assert tokens[-1] == tokenizer.end


def test_where_white_space_is_lost_the_whole_is_learned_from_where_it_differs():
    inner = unigram()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), inner.pre_tokenizer]
    )
    tokenizer = data.Tokenizer(inner, 2)
    given, whole = tokenizer.prompt_tokens("the ca"), tokenizer.prompt_tokens("the cat sat")
    same = sum(a == b for a, b in zip(given, whole))
    assert 1 < same < len(given), "this test needs a token across the boundary"
    tokens, learned = data.completion(tokenizer, "the ca", "t sat")
    assert tokens == [*whole, 2]
    assert learned == [i >= same for i in range(len(tokens))]


# ---------------------------------------------------------------------------------------------
# What is put before a text
# ---------------------------------------------------------------------------------------------


def test_what_begins_a_text_is_what_transformers_puts_there(folder, theirs):
    tokenizer = data.load_tokenizer(folder)
    bare = theirs("the cat", add_special_tokens=False).input_ids
    assert [*tokenizer.begin, *bare] == theirs("the cat").input_ids
    assert tokenizer.encode("the cat") == bare


@pytest.mark.parametrize(
    "processor",
    [
        lambda: processors.TemplateProcessing(
            single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, 1), (END, 2)]
        ),
        lambda: processors.RobertaProcessing((END, 2), (BEGIN, 1)),
        lambda: processors.BertProcessing((END, 2), (BEGIN, 1)),
    ],
)
def test_nothing_is_put_after_a_text_that_goes_on(processor):
    inner = gpt_2()
    inner.post_processor = processor()
    tokenizer = data.Tokenizer(inner, 2)
    assert inner.encode("the").ids == [1, *tokenizer.encode("the"), 2]
    assert tokenizer.prompt_tokens("the") == [1, *tokenizer.encode("the")]
    assert tokenizer.prompt_tokens("") == [1]


def test_a_text_with_its_own_beginning_does_not_get_two():
    tokenizer = data.Tokenizer(llama_3(), 2)
    assert tokenizer.begin == (1,)
    assert tokenizer.prompt_tokens(f"{BEGIN}the") == tokenizer.prompt_tokens("the")
    tokens, learned = data.completion(tokenizer, f"{BEGIN}the", " cat")
    assert (tokens, learned) == data.completion(tokenizer, "the", " cat")


def test_long_texts_begin_so_too(tmp_path):
    tokenizer = data.Tokenizer(llama_2(), 2)
    text = "the cat sat on the mat, and the dog sat on the log."
    tokens = [*tokenizer.encode(text), tokenizer.end]
    (tmp_path / "a.txt").write_text(text)
    pieces = data.read_examples(tmp_path / "a.txt", tokenizer, 5)
    assert all(piece.tokens[0] == 1 and not piece.learned[0] for piece in pieces)
    assert all(len(piece.tokens) <= 6 for piece in pieces)
    learned = [t for piece in pieces for t, yes in zip(*piece, strict=True) if yes]
    assert learned == tokens
    # The first token after the beginning is the last of the piece before, for context.
    for before, piece in itertools.pairwise(pieces):
        assert piece.tokens[1] == before.tokens[-1]
        assert piece.learned[:3] == [False, False, True]
    found = data.split_text("words", WORDS, tokenizer)
    assert found.train[0] == found.eval[0] == 1
    with pytest.raises(ValueError, match=r"length must be at least 2, one more.*got 1"):
        data.read_examples(tmp_path / "a.txt", tokenizer, 1)


def test_a_vocabulary_with_merges_begins_as_its_settings_say(tmp_path):
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    inner = gpt_2()
    inner.add_special_tokens(["<|endoftext|>"])
    inner.model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": len(vocab)}))
    for settings in ({}, {"add_bos_token": True}, {"add_bos_token": True, "bos_token": BEGIN}):
        settings = {"tokenizer_class": "GPT2Tokenizer", **settings}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        ours = data.load_tokenizer(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert ours.prompt_tokens("the cat") == theirs("the cat").input_ids


ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>")
PLAIN = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}


def merges_with(folder, settings, in_vocabulary, **files):
    """A folder in GPT-2's format, whose settings are made of the number of its first new token."""
    gpt_2().model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    count = len(vocab)
    if in_vocabulary:
        vocab |= {text: count + i for i, text in enumerate(ADDED)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    given = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}
    for name, made in {"tokenizer_config": settings, **files}.items():
        more = given if name == "tokenizer_config" else {}
        (folder / f"{name}.json").write_text(json.dumps(more | made(count)))


def decoder(first, **flags):
    """As transformers writes it, but with some flags of the second token."""
    some = [PLAIN | {"content": text, "special": text != "<think>"} for text in ADDED]
    some[1] |= flags
    return {"added_tokens_decoder": {str(first + i): token for i, token in enumerate(some)}}


def listed(first):
    return {text: first + i for i, text in enumerate(ADDED)}


BESIDE = {
    "in the settings": (decoder, {}),
    "with flags": (lambda n: decoder(n, rstrip=True, lstrip=True), {}),
    "in a file": (lambda n: {}, {"added_tokens": listed}),
    "named in another file": (
        lambda n: {},
        {
            "added_tokens": listed,
            "special_tokens_map": lambda n: {
                "additional_special_tokens": ["<|im_start|>"],
                "pad_token": {"content": "<think>", **PLAIN},
            },
        },
    ),
    "named alone": (
        lambda n: {"bos_token": {"__type": "AddedToken", "content": "<|im_start|>", **PLAIN}},
        {},
    ),
    "a space before a text": (lambda n: decoder(n) | {"add_prefix_space": True}, {}),
}


@pytest.mark.parametrize("in_vocabulary", [True, False])
@pytest.mark.parametrize("where", BESIDE)
def test_tokens_beside_a_vocabulary_with_merges(where, in_vocabulary, tmp_path):
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    if where == "named alone" and not in_vocabulary:
        pytest.skip("transformers would make new ones, which a model does not know")
    settings, files = BESIDE[where]
    merges_with(tmp_path, settings, in_vocabulary, **files)
    ours = data.load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the <|im_start|> cat sat<|im_end|>\n<think> 1 + 1<|endoftext|><|im_start|>yes"
    for each in (text, "the cat", "<|im_start|> the"):
        assert ours.encode(each) == theirs(each).input_ids
    assert ours.end == theirs.eos_token_id
    assert ours.size == len(theirs)
    assert ours.special >= {*theirs.all_special_ids}
    if where == "in the settings":
        assert ours.special == {theirs.convert_tokens_to_ids(token) for token in ADDED[:3]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda n: {"tokenizer_class": "Qwen2Tokenizer"}, "got Qwen2Tokenizer: convert the "),
        (lambda n: {"tokenizer_class": None}, "got none, and the model_type qwen2: convert the"),
        (lambda n: decoder(n + 2), r"<\|endoftext\|> must have the number \d+; .* would have \d+"),
        (lambda n: {"added_tokens_decoder": {"a": {}}}, "the tokenizer at .* cannot be read"),
    ],
)
def test_vocabularies_with_merges_that_are_refused(settings, message, tmp_path):
    """What they need is not in their files, or contradicts itself."""
    merges_with(tmp_path, settings, False, config=lambda n: {"model_type": "qwen2"})
    with pytest.raises(ValueError, match=message):
        data.load_tokenizer(tmp_path)
    # Once converted, the file says it all.
    saved(gpt_2(), tmp_path)
    assert data.load_tokenizer(tmp_path).end == 2


def test_ends_of_what_is_generated(folder, tmp_path):
    """All that transformers stops at; a tokenizer that is saved to the folder adds its own."""
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"eos_token_id": [3, 4]}')
    tokenizer = data.load_tokenizer(tmp_path / "model")
    assert tokenizer.ends == {tokenizer.end, 3, 4}
    generation = tmp_path / "model/generation_config.json"
    # What is no token of the vocabulary never comes.
    generation.write_text('{"eos_token_id": [5, 100000], "top_k": 7}')
    assert data.load_tokenizer(tmp_path / "model").ends == {tokenizer.end, 5}
    settings = tmp_path / "model/tokenizer_config.json"
    before = json.loads(settings.read_text()) if settings.exists() else {}
    settings.write_text(json.dumps(before | {"chat_template": "{{ messages }}"}))
    dataclasses.replace(tokenizer, end=6).save(tmp_path / "model")
    assert json.loads(settings.read_text())["chat_template"] == "{{ messages }}"
    assert json.loads(generation.read_text()) == {"eos_token_id": [6, 5, 100000], "top_k": 7}
    generation.unlink()
    dataclasses.replace(tokenizer, end=6).save(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["eos_token_id"] == [6, 3, 4]


def test_a_saved_tokenizer_still_begins_so(folder, tmp_path):
    tokenizer = data.load_tokenizer(folder)
    tokenizer.save(tmp_path)
    again = data.load_tokenizer(tmp_path)
    assert again.prompt_tokens("the cat") == tokenizer.prompt_tokens("the cat")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the cat").input_ids == tokenizer.prompt_tokens("the cat")
    assert theirs.bos_token_id == (tokenizer.begin[0] if tokenizer.begin else None)


# ---------------------------------------------------------------------------------------------
# What a file kept of another training
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_on", ["truncation", "padding", "both", "dropout"])
def test_what_was_left_on_is_left_out(tmp_path, left_on):
    inner = gpt_2()
    saved(inner, tmp_path)
    long, short = WORDS[:400], "the"
    expected = [inner.encode(text).ids for text in (long, short)]
    if left_on in ("truncation", "both"):
        inner.enable_truncation(17)
    if left_on in ("padding", "both"):
        inner.enable_padding(length=30, pad_id=0, pad_token="<unk>")
    if left_on == "dropout":
        inner.model.dropout = 0.9
    saved(inner, tmp_path)
    ours = data.load_tokenizer(tmp_path)
    assert [ours.encode(text) for text in (long, short)] == expected
    if left_on != "dropout":
        transformers = pytest.importorskip("transformers", reason="parity needs transformers")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert [theirs(text).input_ids for text in (long, short)] == expected
    ours.save(tmp_path / "again")
    described = json.loads((tmp_path / "again/tokenizer.json").read_text())
    assert (described["truncation"], described["padding"]) == (None, None)
    assert described["model"]["dropout"] is None


# ---------------------------------------------------------------------------------------------
# Folders that differ
# ---------------------------------------------------------------------------------------------


def write(name, text):
    def change(folder):
        (folder / name).write_text(text, encoding="utf-8")

    return change


def remove(name):
    return lambda folder: (folder / name).unlink()


def linked(name):
    def change(folder):
        elsewhere = folder.parent / "elsewhere"
        (folder / name).rename(elsewhere)
        (folder / name).symlink_to(elsewhere)

    return change


def only_sentencepiece(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # The number of the end of a text, or an error.
        ([], 2),
        ([write("tokenizer_config.json", '\ufeff{"eos_token": "<s>"}')], 1),
        ([write("tokenizer_config.json", '{"eos_token": {"content": "<s>", "lstrip": true}}')], 1),
        ([write("tokenizer_config.json", '{"eos_token": null}')], "has no end of a text"),
        (
            [
                write("tokenizer_config.json", "{}"),
                write("special_tokens_map.json", '{"eos_token": {"content": "<s>"}}'),
            ],
            1,
        ),
        (
            [
                write("tokenizer_config.json", '{"eos_token": "<new>"}'),
                write("config.json", '{"eos_token_id": [2, 1]}'),
            ],
            2,
        ),
        (
            [remove("tokenizer_config.json"), write("config.json", '{"eos_token_id": -1}')],
            "has no end of a text",
        ),
        (
            [remove("tokenizer_config.json"), write("config.json", '{"eos_token_id": []}')],
            "has no end of a text",
        ),
        ([write("tokenizer_config.json", '{"eos_')], "tokenizer_config.json cannot be read"),
        ([write("tokenizer_config.json", "[]")], r"must be an object in JSON; got \[\]"),
        ([write("tokenizer.json", '{"version"')], "the tokenizer at .* cannot be read"),
        ([write("tokenizer.json", "")], "the tokenizer at .* cannot be read"),
        ([remove("tokenizer.json")], "there is none at"),
        (
            [write("tokenizer_config.json", '{"eos_token": "<new>"}')],
            "names <new>, which is not in its vocabulary",
        ),
        ([linked("tokenizer.json")], "a symbolic link to .*elsewhere, outside the folder"),
        ([only_sentencepiece], r"tokenizer\.model of SentencePiece must be converted"),
    ],
)
def test_folders_of_tokenizers(tmp_path, changes, expected):
    saved(gpt_2(), tmp_path)
    for change in changes:
        change(tmp_path)
    if isinstance(expected, int):
        assert data.load_tokenizer(tmp_path).end == expected
    else:
        with pytest.raises((ValueError, FileNotFoundError), match=expected):
            data.load_tokenizer(tmp_path)
