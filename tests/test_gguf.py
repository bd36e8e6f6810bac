"""GGUF files, against what transformers makes of the same file, and of the model it was made of."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from bdia_jax import interop
from bdia_jax.interop.families.rotary import _divisors
from bdia_jax.interop.gguf_tokenizer import SPLITS, read_tokenizer
from bdia_jax.nn import RotaryScaling, generate

gguf = pytest.importorskip("gguf", reason="GGUF files need the gguf package")

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 20))
TEXT = (
    "the quick brown fox jumps over the lazy dog. The dog's 12 friends don't mind; it's 2024!\n"
    "def f(x):\n    return x + 1\n  naïve café déjà vu, übergröße, 日本語 テキスト, emoji 🙂🙃\n"
) * 3
HARD = [
    "",
    " ",
    "Hello world",
    "  two  spaces\tand\t\ttabs\r\n\n\n  newlines \n",
    "12345 6789 0.5 1e-10 x=3",
    "naïve café — “quotes” … don't I'LL we've",
    "日本語のテキスト 🙂👩‍👩‍👧",
    "<|user|>Hi<|end|>\n<|user|>\n\nHi <|end|> <|end|",
    "def f(x):\n    return {'a': x**2}  # <code>\n",
    "\u00a0\u2003wide\u200bzero \x00\x7f",
    "a" * 100,
]
IN_GGUF = ("gpt2", "llama", "qwen2", "qwen3")
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>\n{% endfor %}"
SCALING = RotaryScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)


def network(family):
    """A randomly initialized model of transformers, biases and norms included."""
    torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    common = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
    }
    config = {
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, initializer_range=0.2, **common
        ),
        "llama": lambda: transformers.LlamaConfig(**sizes, **common),
        "qwen2": lambda: transformers.Qwen2Config(tie_word_embeddings=True, **sizes, **common),
        # transformers assumes that heads of Qwen 3 have 128 features, whatever the file says.
        "qwen3": lambda: transformers.Qwen3Config(head_dim=128, **sizes, **common),
    }[family]()
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return torch, made


def as_llama_cpp(name, array, config):
    """What its converter does to the tensors of a model before it writes them."""
    if config.model_type == "gpt2" and array.ndim == 2 and ".h." in name:
        return np.ascontiguousarray(array.T)
    if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
    return array


KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def write(path, made, *, kinds=("F32",), tokenizer=None, tensors=None, **metadata):
    """A GGUF file of a model of transformers, matrices stored as the given kinds in turn."""
    c = made.config
    writer = gguf.GGUFWriter(path, c.model_type)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    if c.model_type == "gpt2":
        writer.add_feed_forward_length(4 * c.hidden_size)
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(head_dim)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    for name, value in metadata.items():
        kinds_of = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        kinds_of.get(type(value), writer.add_string)(name.replace("__", "."), value)
    for name, value in (tokenizer or {}).items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    architecture = {text: arch for arch, text in gguf.MODEL_ARCH_NAMES.items()}[c.model_type]
    names = gguf.get_tensor_name_map(architecture, c.num_hidden_layers)
    matrices = 0
    for name, tensor in made.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        array = as_llama_cpp(name, tensor.numpy(), c)
        kind = gguf.GGMLQuantizationType.F32
        if array.ndim == 2:
            kind = gguf.GGMLQuantizationType[kinds[matrices % len(kinds)]]
            matrices += 1
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")),
            gguf.quantize(array, kind),
            raw_dtype=kind,
        )
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(pre="gpt-2", **metadata):
    """Metadata of a tokenizer that merges bytes, trained on a few words."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|begin|>", "<|end|>", "<|user|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT], trainer)
    model = json.loads(inner.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": TEMPLATE,
        "general.architecture": "llama",
        **metadata,
    }


def without_architecture(metadata):
    return {name: v for name, v in metadata.items() if name != "general.architecture"}


def logits(torch, made):
    with torch.no_grad():
        return made(torch.tensor(TOKENS)).logits.numpy()


def ours(path):
    loaded = interop.load(path, method="standard")
    loaded.eval()
    return loaded


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", IN_GGUF)
def test_parity(family, tmp_path):
    """Logits and greedy tokens; the file, the folder made of it, and its tokenizer."""
    torch, made = network(family)
    import transformers

    path = write(
        tmp_path / "model.gguf", made, tokenizer=without_architecture(byte_level()), kinds=KINDS
    )
    reading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    expected = logits(torch, reading.eval())
    loaded = ours(path)
    assert loaded.config.norm_epsilon == 1e-5
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(loaded(jnp.asarray(TOKENS)), expected, atol=1e-3)
    with torch.no_grad():
        generated = reading.generate(torch.tensor(TOKENS), max_new_tokens=20, do_sample=False)
    end = generated[:, 20:].tolist()
    greedy = generate(loaded, TOKENS.tolist(), 20)
    for a, b in zip(greedy, end):
        # transformers stops at the end of a text.
        stop = b.index(1) if 1 in b else len(b)
        assert a[:stop] == b[:stop]

    # A folder that transformers loads without knowing where it came from.
    interop.save(loaded, tmp_path / "folder", like=path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    np.testing.assert_allclose(logits(torch, again), expected, atol=1e-4)
    assert (again.config.bos_token_id, again.config.eos_token_id) == (0, 1)
    assert interop.read_config(tmp_path / "folder") == interop.read_config(path)
    if family == "llama":
        same_tokenizers(path, tmp_path / "folder")


def same_tokenizers(path, folder):
    import transformers

    tokenizer = interop.gguf.load_tokenizer(path)
    inner, end = tokenizer.inner, tokenizer.end
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    saved = transformers.AutoTokenizer.from_pretrained(folder)
    assert end == theirs.eos_token_id == saved.eos_token_id
    assert saved.bos_token_id == theirs.bos_token_id
    for text in HARD:
        for special in (False, True):
            ids = inner.encode(text, add_special_tokens=special).ids
            assert ids == theirs.encode(text, add_special_tokens=special), text
            assert ids == saved.encode(text, add_special_tokens=special), text
        assert inner.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    messages = [{"role": "user", "content": "Hi"}]
    assert saved.chat_template == theirs.chat_template
    chats = [t.apply_chat_template(messages, tokenize=False) for t in (theirs, saved)]
    assert chats[0] == chats[1] != ""


@pytest.mark.parametrize("family", IN_GGUF)
def test_the_model_that_a_file_was_made_of(family, tmp_path):
    """Every weight, bit for bit, and the settings."""
    torch, made = network(family)
    loaded = ours(write(tmp_path / "model.gguf", made))
    made.save_pretrained(tmp_path / "folder")
    assert loaded.config == ours(tmp_path / "folder").config
    interop.save(loaded, tmp_path / "back")
    import transformers

    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    for name, tensor in made.state_dict().items():
        assert torch.equal(back[name], tensor), name


def test_biases_of_llama(tmp_path):
    """The metadata do not say that there are any; the rows of q and k are reordered in them too."""
    torch, made = network("llama")
    import transformers

    config = transformers.LlamaConfig(
        **(made.config.to_dict() | {"attention_bias": True, "mlp_bias": True})
    )
    made = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    loaded = ours(write(tmp_path / "model.gguf", made))
    np.testing.assert_allclose(loaded(jnp.asarray(TOKENS)), logits(torch, made), atol=1e-4)


def test_scaled_positions(tmp_path):
    """Llama 3.1's are in a tensor; which transformers' own reading of such files ignores."""
    torch, made = network("llama")
    import transformers

    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e6,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(**(made.config.to_dict() | {"rope_parameters": rope}))
    made = transformers.LlamaForCausalLM(config).eval()
    divisors = _divisors(1e6, 16, SCALING).astype(np.float32)
    # From transformers itself, not from our own formula.
    scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    plain = 1e6 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(divisors, plain / scaled.numpy(), rtol=1e-5)
    assert divisors.min() == 1
    assert len(set(divisors.tolist())) > 2
    path = tmp_path / "model.gguf"
    loaded = ours(write(path, made, tensors={"rope_freqs.weight": divisors}))
    assert loaded.config.rope_scaling == SCALING
    np.testing.assert_allclose(loaded(jnp.asarray(TOKENS)), logits(torch, made), atol=1e-4)
    write(path, made, tensors={"rope_freqs.weight": np.ones(8, np.float32)})
    assert interop.read_config(path).rope_scaling is None
    write(path, made, tensors={"rope_freqs.weight": divisors[::-1].copy()})
    with pytest.raises(interop.FolderError, match=r"rope_freqs.weight must hold what Rotary.*8\.0"):
        interop.load(path)


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0},
        # As llama.cpp reads files without a kind, and those from before there were kinds.
        {"llama__rope__scaling__factor": 4.0},
        {"llama__rope__scale_linear": 4.0},
    ],
)
def test_positions_that_are_divided(metadata, tmp_path):
    torch, made = network("llama")
    import transformers

    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    config = transformers.LlamaConfig(**(made.config.to_dict() | {"rope_parameters": rope}))
    scaled = transformers.LlamaForCausalLM(config).eval()
    path = tmp_path / "model.gguf"
    loaded = ours(write(path, scaled, **metadata))
    np.testing.assert_allclose(loaded(jnp.asarray(TOKENS)), logits(torch, scaled), atol=1e-4)
    none = {"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0}
    write(path, scaled, **none)
    assert interop.read_config(path).rope_scaling is None
    divisors = _divisors(1e4, 16, SCALING).astype(np.float32)
    write(path, scaled, tensors={"rope_freqs.weight": divisors}, **metadata)
    with pytest.raises(interop.FolderError, match=r"scaling.factor must be 1 with rope_freqs.*4"):
        interop.load(path)


def test_a_head_of_its_own_is_noticed(tmp_path):
    """One that repeats the embedding is tied, as the model was that the file was made of."""
    _, made = network("gpt2")
    embedding = made.state_dict()["transformer.wte.weight"].numpy()
    path = tmp_path / "model.gguf"
    write(path, made, tensors={"output.weight": embedding})
    assert interop.load(path).config.tied_head
    write(path, made, tensors={"output.weight": embedding + 1})
    assert not interop.read_config(path).tied_head


def test_files_that_are_not_read(tmp_path):
    _, made = network("llama")
    path = tmp_path / "model.gguf"
    for metadata, message in [
        ({"split__count": 3}, "is one of 3 files"),
        ({"llama__expert_count": 8}, "expert_count must be 0; got 8"),
        ({"llama__rope__scaling__type": "yarn"}, "must be none or linear; got 'yarn'"),
        ({"llama__attention__causal": False}, "attention.causal must be True; got False"),
        ({"llama__attention__sliding_window": 5}, "attention.sliding_window must be 0; got 5"),
        ({"llama__attention__scale": 0.3}, "attention.scale must be 0 or 1; got 0.3"),
    ]:
        write(path, made, **metadata)
        with pytest.raises(interop.FolderError, match=message):
            interop.load(path)
    write(path, made, tensors={"blk.0.extra.weight": np.ones(2, np.float32)})
    with pytest.raises(interop.FolderError, match=r"no parameter is made from: blk\.0"):
        interop.load(path)
    with pytest.raises(interop.FolderError, match=r"tokenizer.ggml.model must be one of .*None"):
        interop.gguf.load_tokenizer(path)
    whole = write(path, made).read_bytes()
    for size in (0, 3, 30, 400, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:size])
        with pytest.raises(interop.FolderError, match="is damaged, or no GGUF file"):
            interop.load(path)
    for name, message in [
        ("mamba", r"architecture must be one of .* got 'mamba'"),
        # Families of which only folders are read.
        *((name, rf"must be one of [^;]*; got '{name}'") for name in ("gemma2", "olmo2", "phi3")),
        ("llama", "lacks 'block_count' of a llama model"),
    ]:
        writer = gguf.GGUFWriter(path, name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(interop.FolderError, match=message):
            interop.read_config(path)


# ---------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------


def their_tokenizer(metadata):
    """What transformers makes of the same metadata."""
    pytest.importorskip("transformers", reason="parity needs transformers")
    made = pytest.importorskip("transformers.integrations.gguf", reason="since transformers 5")
    names = made.gguf_tokenizer_mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
    described = {
        theirs: metadata[f"tokenizer.{key}"]
        for key, theirs in names.items()
        if f"tokenizer.{key}" in metadata
    }
    return made.convert_gguf_tokenizer(metadata["general.architecture"], described)[0]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level(pre):
    metadata = byte_level(pre)
    inner, end = read_tokenizer(metadata)
    assert end == 1
    theirs = their_tokenizer(metadata)
    for text in HARD:
        ids = inner.encode(text, add_special_tokens=False).ids
        assert inner.decode(ids, skip_special_tokens=False) == text
        if pre != "smollm" or not any(c.isnumeric() for c in text):
            assert ids == theirs.encode(text, add_special_tokens=False).ids, text
    begins = inner.encode("a").ids[0] == 0
    assert begins == (pre == "llama-bpe")


def test_a_template_for_tools(tmp_path):
    _, made = network("llama")
    named = {"tokenizer.chat_template.tool_use": "{{ tools }}"}
    path = write(tmp_path / "a.gguf", made, tokenizer=without_architecture(byte_level(**named)))
    found = interop.load_chat_template(path)
    assert (found.source, found.tool_use) == (TEMPLATE, "{{ tools }}")


def test_splits_are_those_of_the_models():
    """Where transformers' own reading of GGUF files is not what it does with these models."""
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    metadata = byte_level("qwen2")
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    qwen = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
    composed = "e\u0301 cafe\u0301 \uac00"
    assert (
        read_tokenizer(metadata)[0].encode(composed).ids
        == qwen.backend_tokenizer.encode(composed, add_special_tokens=False).ids
    )
    # SmolLM: every digit is a word, of any script, and does not begin with the space before it.
    smollm, _ = read_tokenizer(byte_level("smollm"))
    words = smollm.pre_tokenizer.pre_tokenize_str("x  12 ½")
    assert [word for word, _ in words] == ["x", "ĠĠ", "1", "2", "Ġ", "Â½"]
    # Llama 3: a word that is a token is not made of what the merges make of it.
    metadata = byte_level("llama-bpe")
    metadata["tokenizer.ggml.tokens"][-1] = "Ġxyzzy"
    metadata["tokenizer.ggml.merges"] = metadata["tokenizer.ggml.merges"][:-1]
    assert read_tokenizer(metadata)[0].encode(" xyzzy", add_special_tokens=False).ids == [319]
    metadata["tokenizer.ggml.pre"] = "gpt-2"
    assert len(read_tokenizer(metadata)[0].encode(" xyzzy").ids) > 1


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece(prefix):
    # The score, not the number, says what is merged first: "he" before "th" and "▁t".
    merged = ["th", "▁t", "he", "▁the", "▁th", "qu", "ck", "▁▁"]
    scores = {"he": -1.0, "▁the": -2.0, "qu": -3.0, "ck": -4.0, "▁▁": -5.0}
    pieces = [*"▁theqick", "u", *merged]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    kind = gguf.TokenType
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *bytes_, *pieces],
        "tokenizer.ggml.scores": [0.0] * 259 + [scores.get(p, -9.0) for p in pieces],
        "tokenizer.ggml.token_type": [int(kind.UNKNOWN), *[int(kind.CONTROL)] * 2]
        + [int(kind.BYTE)] * 256
        + [int(kind.NORMAL)] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.add_eos_token": True,
    }
    inner, end = read_tokenizer(metadata)
    assert end == 2
    assert inner.encode("the").ids[0] == 1
    assert inner.encode("the").ids[-1] == 2
    tokens = inner.encode("the quick", add_special_tokens=False).tokens
    start = ["▁the"] if prefix else ["t", "he"]
    assert tokens == [*start, "▁", "qu", "i", "ck"]
    theirs = their_tokenizer(metadata)
    for text in ["the quick", "  the  the\n", "naïve 日本 🙂", "</s>the</s> the", ""]:
        ids = inner.encode(text, add_special_tokens=False).ids
        if not text.startswith(" "):
            # One that does loses a space, in transformers as well.
            assert inner.decode(ids, skip_special_tokens=False) == text
        if prefix:
            assert ids == theirs.encode(text, add_special_tokens=False).ids, text


def test_kinds_of_tokens():
    """A control token is special, one of the user's own is not, and neither is split."""
    metadata = byte_level(
        **{"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    )
    metadata["tokenizer.ggml.tokens"][-1] = "<think>"
    metadata["tokenizer.ggml.token_type"][-1] = int(gguf.TokenType.USER_DEFINED)
    metadata["tokenizer.ggml.merges"] = metadata["tokenizer.ggml.merges"][:-1]
    inner, _ = read_tokenizer(metadata)
    ids = inner.encode("<think>a<|user|>").ids
    assert ids[:2] + ids[-2:] == [0, 319, 2, 1]
    assert inner.decode(ids) == "<think>a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model must be one of gpt2, llama; got 'bert'"),
        ({"pre": "tekken"}, f"pre must be one of {', '.join(SPLITS)}; got 'tekken'"),
        ({"pre": None}, "tokenizer.ggml.pre must be one of .*; got None"),
        ({"eos_token_id": None}, "eos_token_id one of their numbers; got 320 tokens"),
        ({"eos_token_id": 320}, "eos_token_id one of their numbers; got 320 tokens"),
        ({"tokens": ["a", "a"]}, "got 2 tokens, of which 1 are different"),
    ],
)
def test_tokenizers_that_are_not_known(changes, message):
    metadata = byte_level() | {f"tokenizer.ggml.{name}": v for name, v in changes.items()}
    with pytest.raises(interop.FolderError, match=message):
        read_tokenizer({name: v for name, v in metadata.items() if v is not None})


def test_files_from_before_splits_had_names():
    metadata = byte_level(**{"general.architecture": "gpt2"})
    del metadata["tokenizer.ggml.pre"]
    assert read_tokenizer(metadata)[0].encode("the dog").ids


# ---------------------------------------------------------------------------------------------
# A real one
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2(tmp_path):
    try:
        path = interop.packaged_model()
    except ImportError as error:
        pytest.skip(str(error))
    torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    loaded = ours(path)
    assert (loaded.config.depth, loaded.config.width, loaded.config.tied_head) == (30, 576, True)
    with interop.models.open_checkpoint(path) as checkpoint:
        (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
        for name, content in checkpoint.beside().items():
            (tmp_path / name).write_bytes(content)
    same_tokenizers(path, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer.encode("The capital of France is Paris, and the capital of Germany is")
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits.numpy()
        generated = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    np.testing.assert_allclose(loaded(jnp.asarray([prompt])), expected, atol=1e-3)
    greedy = generate(loaded, [prompt], 8)[0]
    assert greedy == generated[0, len(prompt) :].tolist()
    assert tokenizer.decode(greedy).startswith(" Berlin.")
