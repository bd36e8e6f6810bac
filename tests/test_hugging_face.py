"""Weights of transformers' own models, in and out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from bdia_jax import interop
from bdia_jax.interop import saving
from bdia_jax.interop.families import FAMILIES, NORM_AFTER_SUM, NORM_OF_UPDATE
from bdia_jax.interop.families.llama import Llama
from bdia_jax.nn import Decoder, beam_search, generate, llama

COMMON = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
WINDOWS = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def theirs(family):
    """A randomly initialized model of transformers, biases and norms included."""
    torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    config = {
        "gpt2": lambda: transformers.GPT2Config(
            n_positions=64, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3, **COMMON
        ),
        "llama": lambda: transformers.LlamaConfig(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            **LLAMA,
            **COMMON,
        ),
        "qwen2": lambda: transformers.Qwen2Config(
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
            **LLAMA,
            **COMMON,
        ),
        "qwen3": lambda: transformers.Qwen3Config(head_dim=16, **LLAMA, **COMMON),
        "mistral": lambda: transformers.MistralConfig(
            head_dim=16, sliding_window=8, **LLAMA, **COMMON
        ),
        "seed_oss": lambda: transformers.SeedOssConfig(
            head_dim=16, attention_bias=True, attention_out_bias=False, **LLAMA, **COMMON
        ),
        # Of 8 features, 2 are rotated.
        "gpt_neox": lambda: transformers.GPTNeoXConfig(
            **{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, **COMMON
        ),
        "mixtral": lambda: transformers.MixtralConfig(
            num_local_experts=4, num_experts_per_tok=2, sliding_window=8, **LLAMA, **COMMON
        ),
        # Of 32 features, where a block with one network would have 48.
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            head_dim=16,
            num_experts=5,
            num_experts_per_tok=3,
            moe_intermediate_size=32,
            **LLAMA,
            **COMMON,
        ),
        "olmoe": lambda: transformers.OlmoeConfig(
            num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, **LLAMA, **COMMON
        ),
        # Of which grouped queries make parts of unequal size; of 8 features, 6 are rotated.
        "phi3": lambda: transformers.Phi3Config(
            tie_word_embeddings=False, partial_rotary_factor=0.75, **LLAMA, **COMMON
        ),
        # Factors that are no powers of 2.
        "granite": lambda: transformers.GraniteConfig(
            embedding_multiplier=12.0,
            attention_multiplier=0.3,
            residual_multiplier=0.22,
            logits_scaling=0.7,
            attention_bias=True,
            mlp_bias=True,
            **LLAMA,
            **COMMON,
        ),
        "ernie4_5": lambda: transformers.Ernie4_5Config(
            head_dim=16, use_bias=True, tie_word_embeddings=True, **LLAMA, **COMMON
        ),
        "smollm3": lambda: transformers.SmolLM3Config(
            no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=8, **LLAMA, **COMMON
        ),
        "gemma": lambda: transformers.GemmaConfig(head_dim=16, **LLAMA, **COMMON),
        # Caps that bend what there is. (An untied head, or every token would be the one before.)
        "gemma2": lambda: transformers.Gemma2Config(
            head_dim=16,
            sliding_window=8,
            query_pre_attn_scalar=20,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
            tie_word_embeddings=False,
            **LLAMA,
            **COMMON,
        ),
        "gemma3_text": lambda: transformers.Gemma3TextConfig(
            head_dim=16,
            query_pre_attn_scalar=20,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
            tie_word_embeddings=False,
            **WINDOWS,
            **LLAMA,
            **COMMON,
        ),
        "olmo2": lambda: transformers.Olmo2Config(rope_parameters=YARN, **LLAMA, **COMMON),
        "olmo3": lambda: transformers.Olmo3Config(
            rope_parameters={
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            **WINDOWS,
            **LLAMA,
            **COMMON,
        ),
    }[family]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if hasattr(config, "num_experts_per_tok"):
        # The only one that computes in float64.
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            assert parameter.std() > 0, name
    return torch, model


# The last one, of a folder with another network, too, is tested with the other things it is.
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma3"])
def test_parity(family, tmp_path):
    """Logits, greedy tokens, and the way there and back, bit for bit; windows are shorter."""
    torch, model = theirs(family)
    model.save_pretrained(tmp_path / "theirs")
    ours = interop.load(tmp_path / "theirs", method="standard")
    ours.eval()
    tokens = np.random.default_rng(0).integers(0, 61, (2, 20))
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # In float64: on a CPU that was busy, torch's float32 logits were once off by 2e-4.
    model.double()
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
        generated = model.generate(torch.tensor(tokens), max_new_tokens=30, do_sample=False)
    logits = np.asarray(ours(jnp.asarray(tokens)))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
    assert generate(ours, tokens.tolist(), 30) == generated[:, 20:].tolist()
    assert len({*generated[0, 20:].tolist()}) > 2

    # By themselves, these families' networks are taken for Llama's, which they are.
    like = tmp_path / "theirs" if family in ("phi3", "granite", "ernie4_5") else None
    interop.save(ours, tmp_path / "ours", like=like)
    transformers = pytest.importorskip("transformers")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    state = back.state_dict()
    assert set(state) == set(original)
    for name, tensor in original.items():
        if family == "granite":
            # There and back by a factor: one rounding, and another one.
            torch.testing.assert_close(state[name], tensor, rtol=2**-23, atol=0)
        else:
            assert torch.equal(state[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["granite", "ernie4_5"])
def test_rewritten_weights_are_those_of_a_llama(family, tmp_path):
    torch, model = theirs(family)
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path / "theirs")
    interop.save(interop.load(tmp_path / "theirs"), tmp_path / "ours")
    tokens = torch.tensor(np.random.default_rng(0).integers(0, 61, (2, 20)))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert back.config.model_type == "llama"
    with torch.no_grad():
        expected, found = (m.double()(tokens).logits.numpy() for m in (model, back))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_tied_head_that_is_scaled_apart(tmp_path):
    """Granite's stays one matrix: the last norm takes up the difference."""
    torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    torch.manual_seed(0)
    config = transformers.GraniteConfig(
        embedding_multiplier=12.0, logits_scaling=0.7, tie_word_embeddings=True, **LLAMA, **COMMON
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "theirs")
    ours = interop.load(tmp_path / "theirs", method="standard")
    assert ours.config.tied_head
    ours.eval()
    tokens = np.random.default_rng(0).integers(0, 61, (2, 20))
    state = model.state_dict()
    with torch.no_grad():
        expected = model.double()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours(jnp.asarray(tokens)), expected, atol=1e-4, rtol=1e-4)
    interop.save(ours, tmp_path / "ours", like=tmp_path / "theirs")
    interop.save(ours, tmp_path / "llama")
    for name, kind in (("ours", "granite"), ("llama", "llama")):
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert (back.config.model_type, back.config.tie_word_embeddings) == (kind, True)
        if name == "ours":
            torch.testing.assert_close(back.state_dict(), state, rtol=2**-23, atol=0)
        with torch.no_grad():
            again = back.double()(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(again, expected, atol=1e-4, rtol=1e-4)

    weights = tmp_path / "theirs/model.safetensors"
    tensors = load_file(weights)
    head = np.roll(tensors["model.embed_tokens.weight"], 1, axis=0)
    save_file(tensors | {"lm_head.weight": head}, weights, metadata={"format": "pt"})
    untied = interop.load(tmp_path / "theirs", method="standard")
    untied.eval()
    assert not untied.config.tied_head
    found = np.asarray(untied(jnp.asarray(tokens)))
    np.testing.assert_allclose(found, np.roll(expected, 1, axis=-1), atol=1e-4, rtol=1e-4)


def test_multipliers_that_are_none(tmp_path):
    given = LLAMA | COMMON | {"model_type": "granite"}
    for name, value in [
        ("logits_scaling", 0.0),
        ("attention_multiplier", None),
        ("embedding_multiplier", "12"),
        ("residual_multiplier", float("inf")),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(given | {name: value}))
        with pytest.raises(interop.FolderError, match=f"{name} must be a positive number; got"):
            interop.read_config(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"head_dim": None}], ids=["missing", "null"])
def test_settings_that_ernie_does_not_give(settings, tmp_path):
    """Those of transformers, also where they are not Llama's."""
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    given = LLAMA | COMMON | settings
    del given["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(given | {"model_type": "ernie4_5"}))
    expected = transformers.AutoConfig.for_model("ernie4_5", **given)
    found = interop.read_config(tmp_path)
    assert found.norm_epsilon == expected.rms_norm_eps == 1e-5
    assert found.rope_theta == expected.rope_parameters["rope_theta"] == 5e5
    assert found.kv_heads == expected.num_key_value_heads == 2
    assert found.size_of_head == expected.head_dim
    assert found.tied_head == expected.tie_word_embeddings


@pytest.mark.parametrize("kind", [*NORM_AFTER_SUM, *NORM_OF_UPDATE, "opt"])
def test_norms_elsewhere(kind, tmp_path):
    """Are refused, with the reason."""
    transformers = pytest.importorskip("transformers", reason="names are those of transformers")
    assert kind in transformers.CONFIG_MAPPING
    reason = r"norm\(x \+ h\(x\)\), not x \+ h\(x\)"
    if kind in NORM_OF_UPDATE:
        reason = r"x \+ norm\(h\(x\)\), which has an inverse, but its names and settings are not"
    given = {"model_type": kind, "do_layer_norm_before": False}
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(interop.FolderError, match=f"^a block of {kind} is {reason}.*one of gpt2"):
        interop.read_config(tmp_path)


def test_most_sizes_of_opt_are_just_not_known(tmp_path):
    """For they have their norms before."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    with pytest.raises(interop.FolderError, match=r"^model_type must be one of .*; got 'opt'$"):
        interop.read_config(tmp_path)


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "qwen3_moe", "seed_oss", "phi3", "granite", "ernie4_5", "gemma"]
)
def test_size_of_heads_that_is_not_given(family):
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    given = LLAMA | COMMON | {"model_type": family}
    config = transformers.AutoConfig.for_model(**given)
    expected = getattr(config, "head_dim", None) or 32 // 4
    assert FAMILIES[family].read(given).size_of_head == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["gpt2", "qwen3", "phi3", "gpt_neox", "granite", "ernie4_5", "gemma3_text"]
)
def test_bfloat16_there_and_back(family, tmp_path):
    torch, model = theirs(family)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    for kept in ("float32", "bfloat16"):
        ours = interop.load(tmp_path / "theirs", param_dtype=kept)
        like = tmp_path / "theirs" if family in ("granite", "ernie4_5") else None
        interop.save(ours, tmp_path / kept, dtype="bfloat16", like=like)
        from safetensors.torch import load_file

        state = load_file(tmp_path / kept / "model.safetensors")
        for name, tensor in model.state_dict().items():
            if name in state:
                # Granite's weights are scaled, which float32 can undo.
                rtol = 2**-7 if (family, kept) == ("granite", "bfloat16") else 0
                torch.testing.assert_close(state[name], tensor, rtol=rtol, atol=0)


def small(tmp_path, monkeypatch=None, **settings):
    model = Decoder(
        llama(vocab_size=31, max_length=24, width=16, depth=3, heads=4, **settings),
        rngs=nnx.Rngs(0),
    )
    if monkeypatch is not None:
        monkeypatch.setattr(saving, "SHARD_BYTES", 6000)
    interop.save(model, tmp_path)
    return model


def same(a, b):
    a, b = (nnx.state(m, nnx.Param) for m in (a, b))
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


@pytest.mark.slow
@pytest.mark.parametrize("ends", [[1], [1, 5, 9]])
def test_beams(ends, tmp_path):
    """Prompts of several lengths, one or several ends, short and long texts preferred."""
    torch, model = theirs("qwen3")
    model.save_pretrained(tmp_path)
    ours = interop.load(tmp_path, method="standard", dtype="float32")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, 61, size).tolist() for size in (6, 3, 5, 6, 4, 6, 6, 2, 6, 6)]
    tokens = torch.tensor([[0] * (6 - len(prompt)) + prompt for prompt in prompts])
    given = {"attention_mask": (tokens > 0).long(), "max_new_tokens": 10, "do_sample": False}
    given |= {"eos_token_id": ends, "pad_token_id": 0, "early_stopping": "never"}
    lengths = set()
    for penalty in (-1.0, 0.0, 0.6, 2.0):
        found = beam_search(ours, prompts, 10, beams=4, length_penalty=penalty, end=ends)
        expected = model.generate(
            tokens,
            num_beams=4,
            length_penalty=penalty,
            output_scores=True,
            return_dict_in_generate=True,
            **given,
        )
        texts = [
            [t for t in text if t not in (0, *ends)] for text in expected.sequences[:, 6:].tolist()
        ]
        assert [text for text, _ in found] == texts
        scores = [score for _, score in found]
        np.testing.assert_allclose(scores, expected.sequences_scores.numpy(), rtol=1e-3)
        lengths |= set(map(len, texts))
    # A search by itself ends when nothing can get better, and finds the same.
    for prompt, text in zip(prompts, texts, strict=True):
        ((alone, _),) = beam_search(ours, [prompt], 10, beams=4, length_penalty=penalty, end=ends)
        assert alone == text
    assert len(lengths) > 1


def test_several_files(tmp_path, monkeypatch):
    model = small(tmp_path, monkeypatch)
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    assert same(interop.load(tmp_path), model)


def test_settings_of_ours(tmp_path):
    small(tmp_path)
    model = interop.load(
        tmp_path, method="standard", dtype="bfloat16", dropout=0.1, ffn_chunk=8, gamma=0.25
    )
    assert model.config.method == "standard"
    assert model.blocks.stacked.dropout.rate == 0.1
    # The folder knows nothing of them.
    interop.save(model, tmp_path / "again")
    assert same(interop.load(tmp_path / "again"), model)
    interop.save(model, tmp_path / "again", like=tmp_path)
    assert interop.read_config(tmp_path / "again") == interop.read_config(tmp_path)


def test_wrong_folders(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        interop.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        interop.load(tmp_path / "nothing.gguf")
    with pytest.raises(FileNotFoundError, match=r"there is no .*config.json"):
        interop.load(tmp_path)
    small(tmp_path, monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"config\.json is neither"):
        interop.load(tmp_path / "config.json")
    config = json.loads((tmp_path / "config.json").read_text())

    def changed(**values):
        (tmp_path / "config.json").write_text(json.dumps(config | values))

    for values, message in [
        ({"model_type": "mamba"}, "model_type must be one of gpt2, .*; got 'mamba'"),
        ({"hidden_act": "relu"}, "hidden_act must be silu or swish; got 'relu'"),
        ({"num_hidden_layers": 4}, r"the tensor model.layers.3.*weight is missing"),
        ({"num_hidden_layers": 2}, r"no parameter is made from: model.layers.2."),
        ({"intermediate_size": 8}, r"the tensor model.layers.0.mlp.*gives \(64, 16\)"),
        ({"num_attention_heads": 5}, r"config.json of a llama model: .*divide"),
    ]:
        changed(**values)
        with pytest.raises(interop.FolderError, match=message):
            interop.load(tmp_path)
    del config["hidden_size"]
    changed()
    with pytest.raises(interop.FolderError, match="lacks 'hidden_size'"):
        interop.load(tmp_path)


def test_damaged_files(tmp_path, monkeypatch):
    small(tmp_path, monkeypatch)
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:50])
    with pytest.raises(interop.FolderError, match="is damaged"):
        interop.load(tmp_path)
    victim.unlink()
    with pytest.raises(interop.FolderError, match=f"{victim.name}, which are not there"):
        interop.load(tmp_path)
    for name in ("model.safetensors.index.json", "config.json"):
        for content, message in [("[]", "must hold an object"), ("{", "is not JSON")]:
            (tmp_path / name).write_text(content)
            with pytest.raises(interop.FolderError, match=f"{name} {message}"):
                interop.load(tmp_path)


def test_no_family_has_such_networks(tmp_path):
    model = Decoder(
        llama(vocab_size=31, width=16, depth=1, norm="layer", heads=4), rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match="no family of"):
        interop.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_family(tmp_path, monkeypatch):
    """Is a class, and a line in the table."""
    torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")

    class Mistral(Llama):
        name = "mistral"
        architecture = "MistralForCausalLM"

    monkeypatch.setitem(FAMILIES, "mistral", Mistral())
    config = transformers.MistralConfig(sliding_window=None, head_dim=16, **LLAMA, **COMMON)
    model = transformers.MistralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "theirs")
    ours = interop.load(tmp_path / "theirs", method="standard")
    interop.save(ours, tmp_path / "ours", like=tmp_path / "theirs")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(back, transformers.MistralForCausalLM)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
