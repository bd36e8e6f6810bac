"""Families of decoders whose blocks differ, or have norms, windows and caps of their own."""

import copy
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_hugging_face import COMMON, LLAMA, WINDOWS, YARN, theirs

from bdia_jax import BDIA, interop
from bdia_jax.interop.families import FAMILIES, read
from bdia_jax.interop.families.family import kind_of
from bdia_jax.interop.families.rotary import read_rope, write_rope, write_share
from bdia_jax.nn import Decoder, add_lora, choose_gamma, expand_base, generate, quantize_base
from bdia_jax.nn.stacked import PerBlock

OLD_GEMMA3 = {
    "rope_theta": 5e5,
    "rope_local_base_freq": 2e3,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window_pattern": 2,
    "sliding_window": 8,
}

PHI = {
    "model_type": "phi3",
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 16,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.5],
        "long_factor": [1.0, 2.0, 4.0],
    },
}
"""As configurations of Phi-4-mini are written."""
ORIGINAL = {"original_max_position_embeddings": 16}


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """A tiny Gemma 3 of transformers, and its folder."""
    _, model = theirs("gemma3_text")
    folder = tmp_path_factory.mktemp("gemma3")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text", "mistral"])
def test_padding(family, tmp_path):
    """Texts of several lengths, padded left or right, longer and shorter than the window."""
    torch, model = theirs(family)
    model.save_pretrained(tmp_path)
    ours = interop.load(tmp_path, method="standard")
    ours.eval()
    model.double()
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 61, size).tolist() for size in (17, 6)]
    run = jax.jit(lambda *args: ours(args[0], segments=args[1], positions=args[2]))
    for left in (True, False):
        tokens, present = np.zeros((2, 17), np.int32), np.zeros((2, 17), np.int32)
        for i, text in enumerate(texts):
            where = slice(17 - len(text), None) if left else slice(len(text))
            tokens[i, where], present[i, where] = text, 1
        positions = np.maximum(present.cumsum(1) - 1, 0)
        with torch.no_grad():
            given = (torch.tensor(a) for a in (tokens, present, positions))
            names = ("input_ids", "attention_mask", "position_ids")
            expected = model(**dict(zip(names, given))).logits.numpy()
        found = np.asarray(run(tokens, present, positions))
        there = present.astype(bool)
        np.testing.assert_allclose(found[there], expected[there], atol=1e-4, rtol=1e-4)
    for text, new in zip(texts, generate(ours, texts, 20), strict=True):
        expected = model.generate(torch.tensor([text]), max_new_tokens=20, do_sample=False)
        assert new == expected[0, len(text) :].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "linear", "factor": 8.0},
        YARN,
        YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 0.9, "truncate": False},
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_stretched_wavelengths(settings):
    """Those of transformers, of heads of the usual size."""
    pytest.importorskip("torch", reason="parity with transformers needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    rope = settings | {"rope_theta": 1e4}
    config = transformers.LlamaConfig(head_dim=128, rope_parameters=rope)
    of_kind = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]]
    expected, amplitude = of_kind(config, "cpu")
    theta, scaling = read_rope(config.to_dict(), 1.0)
    plain = theta ** (-jnp.arange(64, dtype=jnp.float32) / 64)
    found = scaling.frequencies(plain, theta, 4096)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
    assert np.abs(found / plain - 1).max() > 0.5
    assert scaling.amplitude == pytest.approx(amplitude)
    written = write_rope(theta, scaling)
    assert read_rope(written, 1.0) == (theta, scaling)


def test_shares_of_a_head():
    for head_dim in range(2, 257, 2):
        for turned in range(2, head_dim + 1, 2):
            assert int(head_dim * write_share(turned, head_dim)) == turned


@pytest.mark.slow
def test_long_factors(tmp_path):
    """Short texts have the short ones; in a network of long sequences, all have the long ones."""
    torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**PHI, **LLAMA, **COMMON)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    model.save_pretrained(tmp_path / "theirs")
    for length, settings in ((16, {}), (17, {"max_length": 64})):
        ours = interop.load(tmp_path / "theirs", method="standard", **settings)
        ours.eval()
        assert ours.config.max_length == settings.get("max_length", 16)
        tokens = np.arange(length)[None]
        with torch.no_grad():
            expected = model(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(ours(jnp.asarray(tokens)), expected, atol=1e-4, rtol=1e-4)
    interop.save(ours, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").double()
    with torch.no_grad():
        found = back(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("phi3", {n: v for n, v in PHI.items() if n != "model_type"}),
        ("mistral", {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 8}),
        ("smollm3", {}),
        ("smollm3", {"no_rope_layer_interval": 2}),
        ("smollm3", {"no_rope_layer_interval": 2, "use_sliding_window": True}),
        ("smollm3", {"no_rope_layer_interval": 2, "use_sliding_window": True} | WINDOWS),
        ("smollm3", {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8}),
        ("gemma", {}),
        ("gemma", {"hidden_act": "gelu"}),
        ("gemma2", {}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gemma2", {"sliding_window_pattern": 3}),
        ("gemma3_text", {}),
        ("gemma3_text", OLD_GEMMA3),
        ("gemma3_text", WINDOWS | {"layer_types": ["full_attention"] * 3}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}),
        ("qwen3_moe", {}),
        ("mixtral", {}),
        ("olmoe", {}),
        ("gpt_neox", {"hidden_act": "gelu_fast"}),
        ("gpt_neox", {}),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 5000}),
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
        ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("olmo2", {"rope_scaling": YARN}),
        ("olmo3", {}),
        ("olmo3", {"rope_theta": 5e5, "rope_scaling": YARN | {"rope_theta": None}}),
    ],
)
def test_settings_that_are_not_given(family, settings):
    """What transformers makes of them, in an old form or left out, is read as they are."""
    transformers = pytest.importorskip("transformers", reason="names are those of transformers")
    given = LLAMA | COMMON | settings
    if family not in ("mistral", "qwen2", "qwen3", "gemma", "phi3", "mixtral", "qwen3_moe"):
        # Of those, as many as there are large models' heads.
        del given["num_key_value_heads"]
    whole = transformers.AutoConfig.for_model(family, **json.loads(json.dumps(given))).to_dict()
    found = FAMILIES[family].read(given)
    assert found == FAMILIES[family].read(whole)
    kinds = whole.get("layer_types") or ["sliding_attention"] * 3
    window = whole.get("sliding_window")
    shown = None if window is None or window >= 64 else window
    assert found.windows == tuple(shown if "sliding" in kind else None for kind in kinds)
    assert FAMILIES[family].read(FAMILIES[family].whole(found)) == found


@pytest.mark.parametrize(
    "settings",
    [
        {"use_parallel_residual": False, "hidden_act": "gelu_new"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "rotary_pct": 1.0},
    ],
)
def test_other_networks_of_pythia(settings, tmp_path):
    """With the same weights: one part after the other, another GELU, all of a head rotated."""
    torch, model = theirs("gpt_neox")
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # Old folders have masks and wavelengths, too.
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("bias", "masked_bias", "rotary_emb.inv_freq"):
        tensors[f"gpt_neox.layers.0.attention.{name}"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    before = interop.load(tmp_path, method="standard")
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    after = interop.load(tmp_path, method="standard")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = np.random.default_rng(0).integers(0, 61, (2, 20))
    with torch.no_grad():
        expected = expected.double()(torch.tensor(tokens)).logits.numpy()
    for ours in (before, after):
        ours.eval()
    assert np.abs(before(jnp.asarray(tokens)) - expected).max() > 1e-2
    np.testing.assert_allclose(after(jnp.asarray(tokens)), expected, atol=1e-4, rtol=1e-4)
    interop.save(after, tmp_path / "again", like=tmp_path)
    interop.save(after, tmp_path / "alone")
    for folder in ("again", "alone"):
        assert interop.read_config(tmp_path / folder) == interop.read_config(tmp_path)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be None"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "must be False or None; got True"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "default"}},
            "full_attention and sliding",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": YARN}},
            "rope_type of sliding_attention must be default, because",
        ),
        ("gemma3", {"text_config": {}, "tie_word_embeddings": False}, "must be True; got False"),
        ("gemma2", {"query_pre_attn_scalar": 20.5}, "must be a whole number >= 1; got 20.5"),
        ("gemma", {"hidden_activation": "relu"}, "hidden_activation must be .*; got 'relu'"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "got chunked_attention"),
        ("olmo3", {"layer_types": ["full_attention"] * 2}, "num_hidden_layers = 3; got 2"),
        ("mistral", WINDOWS, "must be sliding_attention, because transformers ignores them"),
        ("phi3", WINDOWS | {"layer_types": ["full_attention"] * 3}, "transformers ignores them"),
        ("gpt_neox", {"hidden_act": "relu"}, "hidden_act must be gelu or .*; got 'relu'"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must .* = 3; got 1"),
        ("qwen2", WINDOWS, "layer_types must be full_attention; got sliding_attention"),
        ("llama", {"rope_scaling": PHI["rope_scaling"]}, "rope_type must be .*; got 'longrope'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1; got 0.5"),
        ("phi3", {"rope_scaling": YARN}, "rope_type must be one of default, longrope; got 'yarn'"),
        (
            "phi3",
            {"rope_scaling": PHI["rope_scaling"] | ORIGINAL},
            "in rope_scaling alone.* got 16",
        ),
        ("gpt_neox", {"rope_theta": 50.0}, "rotary_emb_base must be given.* rope_theta = 50.0"),
        (
            "gpt_neox",
            {"rope_theta": 50.0, "rotary_emb_base": 1e4},
            "rotary_emb_base is 10000.0, rope_theta is 50.0",
        ),
        ("olmo3", {"rope_theta": 777.0}, "rope_parameters must say .* got rope_theta = 777.0"),
        ("llama", {"rope_parameters": YARN | {"original_max_position_embeddings": 16.7}}, "16.7"),
        # In transformers, these make every family attend to all positions.
        ("qwen2", {"is_causal": False}, "is_causal must be True or None; got False"),
        ("llama", {"use_bidirectional_attention": True}, "must be False or None; got True"),
        ("gemma3", {"text_config": {"is_causal": False}}, "is_causal must be True or None"),
        # What is no number, or no name.
        ("llama", {"rms_norm_eps": None}, "norm_epsilon must be a number; got None"),
        ("llama", {"rms_norm_eps": "1e-6"}, "norm_epsilon must be a number; got '1e-6'"),
        ("llama", {"tie_word_embeddings": "false"}, "tied_head must be true or false; got 'false'"),
        ("llama", {"attention_bias": None}, "qkv_bias must be true or false; got None"),
        ("llama", {"rope_theta": 0}, "rope_theta must be positive; got 0"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be positive"),
        ("llama", {"rope_scaling": YARN | {"beta_slow": 0}}, "slow must be positive; got 0"),
        ("llama", {"rope_parameters": [1]}, "config.json of a llama model: .*'list'"),
        ("llama", {"rope_scaling": "linear"}, "config.json of a llama model: .*'str'"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "must be a list of names; got 'Llama"),
        ("llama", {"architectures": 5}, "architectures must be a list of names; got 5"),
        ("llama", {"model_type": ["llama"]}, r"model_type must be one of .*; got \['llama'\]"),
    ],
)
def test_refused(family, settings, message):
    with pytest.raises(interop.FolderError, match=message):
        read({"model_type": family} | LLAMA | COMMON | settings)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo3"])
def test_networks_made_here(family, tmp_path):
    """Without windows, with the same base everywhere, and with two: as transformers has them."""
    torch, model = theirs(family)
    transformers = pytest.importorskip("transformers")
    kind = read(model.config.to_dict())
    two = {"rope_theta": 5e3, "window_rope_theta": None, "rope_scaling": None}
    networks = [{"window": None, "windowed": None, "window_rope_theta": None}]
    if family != "gemma2":
        networks += [two, two | {"window_rope_theta": 7e2}]
    tokens = np.random.default_rng(0).integers(0, 61, (2, 20))
    for settings in networks:
        ours = Decoder(dataclasses.replace(kind, method="standard", **settings), rngs=nnx.Rngs(0))
        ours.eval()
        interop.save(ours, tmp_path)
        back = interop.load(tmp_path)
        assert kind_of(back.config) == kind_of(ours.config)
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).double().eval()
        with torch.no_grad():
            expected = saved(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(ours(jnp.asarray(tokens)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_decoder_of_a_model_of_images(tmp_path):
    """Is read from its folder, and is a text model by itself; its updates are the whole one's."""
    torch, text = theirs("gemma3_text")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 28}
    text.config.tie_word_embeddings = True
    config = transformers.Gemma3Config(
        text_config=text.config,
        vision_config=sizes | {"num_attention_heads": 1},
        image_token_index=60,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.save_pretrained(tmp_path / "theirs")
    ours = interop.load(tmp_path / "theirs", method="standard")
    ours.eval()
    tokens = np.arange(20)[None]
    with torch.no_grad():
        expected = model.double().eval()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours(jnp.asarray(tokens)), expected, atol=1e-4, rtol=1e-4)
    interop.save(ours, tmp_path / "ours", like=tmp_path / "theirs")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(back, transformers.Gemma3ForCausalLM)
    for name, tensor in text.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], tensor), name

    # What peft gives updates to is the whole network.
    add_lora(ours, 2, rngs=nnx.Rngs(0))
    interop.save_adapter(ours, tmp_path / "adapter", like=tmp_path / "theirs")
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    layers = {re.sub(r"^base_model.model.|lora_[AB]\.", "", name) for name in names}
    assert len(layers) == 6
    assert layers <= set(model.state_dict())


@pytest.mark.slow
def test_updates_of_peft(gemma3, tmp_path):
    """The same matrices give the same logits, in and out; and nothing else is trained."""
    peft = pytest.importorskip("peft", reason="parity of low-rank updates needs peft")
    torch = pytest.importorskip("torch", reason="parity needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    _, folder = gemma3
    model = interop.load(folder, method="standard")
    add_lora(model, 2, 3.0, ("q", "out", "down"), rngs=nnx.Rngs(0))
    updates = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.1, updates))
    interop.save_adapter(model, tmp_path, like=folder)
    back = transformers.AutoModelForCausalLM.from_pretrained(folder)
    back = peft.PeftModel.from_pretrained(back, tmp_path).double().eval()
    tokens = np.arange(20)[None]
    with torch.no_grad():
        expected = back(torch.tensor(tokens)).logits.numpy()
    again = interop.load(folder, method="standard")
    interop.load_adapter(again, tmp_path)
    assert len(jax.tree.leaves(nnx.state(again, nnx.Param))) == 6
    again.eval()
    np.testing.assert_allclose(again(jnp.asarray(tokens)), expected, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_the_scale_of_the_embedding_is_rounded(kept, gemma3):
    """As transformers rounds it, to the bit: the root of 32 has no end."""
    torch = pytest.importorskip("torch", reason="parity needs torch")
    model, folder = gemma3
    embed = copy.deepcopy(model.model.embed_tokens).to(torch.bfloat16)
    ours = interop.load(folder, dtype="bfloat16", param_dtype=kept)
    tokens = np.arange(61)[None]
    with torch.no_grad():
        expected = embed(torch.tensor(tokens)).float().numpy()
    found = ours._embed(jnp.asarray(tokens), jnp.zeros_like(tokens))
    np.testing.assert_array_equal(found.astype(jnp.float32), expected)


@pytest.mark.slow
def test_a_quantized_base(gemma3):
    """Is read as it would be quantized, with what differs from block to block."""
    _, folder = gemma3
    read = interop.load(folder, method="standard", quantize="int8")
    whole = interop.load(folder, method="standard")
    quantize_base(whole, "int8")
    leaves = [jax.tree.leaves(nnx.state(m, nnx.Not(nnx.RngState))) for m in (read, whole)]
    assert all(map(np.array_equal, *leaves))
    numbers = jax.tree.leaves(nnx.state(read, PerBlock))
    assert sorted(n.tolist() for n in numbers) == [[0, 1, 0], [8, 64, 8]]
    for model in (read, whole):
        model.eval()
    expand_base(whole)
    tokens = jnp.arange(20)[None]
    np.testing.assert_allclose(read(tokens), whole(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_gamma_is_chosen(gemma3):
    """A model that is measured is one that takes steps; evaluation is transformers' network."""
    _, folder = gemma3
    model = interop.load(folder, gamma=0.5)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)), jnp.int32)

    def loss(model, tokens, key):
        return model.loss(tokens, jnp.roll(tokens, -1, 1), key=key).means()["loss"]

    calls = [(tokens, jax.random.key(3))]
    choice = choose_gamma(model, loss, calls, gammas=(1 / 2, 1 / 64), signs=("sample",))
    losses = {trial.gamma: trial.loss for trial in choice.trials}
    assert abs(losses[1 / 64] - choice.standard) < abs(losses[1 / 2] - choice.standard)
    assert model.blocks.step == BDIA(1 / 2)
