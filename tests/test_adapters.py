"""Low-rank updates: the same in peft, and in its files."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from test_hugging_face import theirs

from bdia_jax import interop
from bdia_jax.nn import Decoder, add_lora, llama, merge_lora
from bdia_jax.nn.lora import DecomposedLinear, LowRankLinear

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 20))
NAMES = {"q": "q_proj", "v": "v_proj", "down": "down_proj"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny Llama of transformers."""
    _, model = theirs("llama")
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def adapted(base, **settings):
    """A model of peft with updates that are not zero."""
    torch = pytest.importorskip("torch", reason="parity needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    peft = pytest.importorskip("peft", reason="parity of low-rank updates needs peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 7, "target_modules": [*NAMES.values()]} | settings
    model = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.25)
    return model


def logits(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model.double()(torch.tensor(TOKENS)).logits.numpy()


def ours(model):
    model.eval()
    return np.asarray(model(jnp.asarray(TOKENS)))


def load(base):
    return interop.load(base, method="standard")


def updates(model):
    return {p[-1]: m for p, m in nnx.iter_modules(model) if isinstance(m, LowRankLinear)}


def with_updates(model, alpha=2.0, targets=("q", "v", "down"), dora=False):
    add_lora(model, 4, alpha, targets, dora=dora, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(2)
    for layer in updates(model).values():
        for matrix in (layer.a, layer.b):
            matrix[...] = jnp.asarray(rng.normal(size=matrix.shape) / 4, jnp.float32)
        if dora:
            layer.magnitude[...] *= jnp.asarray(rng.uniform(0.5, 2, layer.magnitude.shape))
    return model


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_adapters_of_peft(settings, base, tmp_path):
    """The same matrices and the same alpha give the same logits, merged or not."""
    expected = adapted(base, **settings)
    expected.save_pretrained(tmp_path / "adapter")
    model = load(base)
    paths = interop.load_adapter(model, tmp_path / "adapter")
    assert sorted(paths) == ["attention.q", "attention.v", "ffn.down"]
    expected = logits(expected)
    assert np.abs(expected - ours(load(base))).max() > 0.1
    np.testing.assert_allclose(ours(model), expected, atol=3e-4, rtol=3e-4)
    merge_lora(model)
    np.testing.assert_allclose(ours(model), expected, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize(("alpha", "dora"), [(None, False), (7.0, False), (2.0, True)])
def test_peft_loads_ours(alpha, dora, base, tmp_path):
    model = with_updates(load(base), alpha, dora=dora)
    interop.save_adapter(model, tmp_path / "adapter", like=base)
    back = loaded_by_peft(base, tmp_path / "adapter")
    np.testing.assert_allclose(ours(model), logits(back), atol=3e-4, rtol=3e-4)
    assert back.peft_config["default"].target_modules == {
        "self_attn.q_proj",
        "self_attn.v_proj",
        "mlp.down_proj",
    }


@pytest.mark.parametrize("dora", [False, True])
def test_there_and_back_to_the_bit(dora, base, tmp_path):
    model = with_updates(load(base), dora=dora)
    interop.save_adapter(model, tmp_path / "adapter", like=base)
    # Once more, over the first one.
    interop.save_adapter(model, tmp_path / "adapter", like=base)
    again = load(base)
    interop.load_adapter(again, tmp_path / "adapter")
    for name, layer in updates(model).items():
        other = updates(again)[name]
        assert layer.scale == other.scale
        np.testing.assert_array_equal(layer.a[...], other.a[...])
        np.testing.assert_array_equal(layer.b[...], other.b[...])
        if dora:
            np.testing.assert_array_equal(layer.magnitude[...], other.magnitude[...])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["granite", "ernie4_5"])
def test_updates_of_rewritten_weights(family, tmp_path):
    """Scaled and put in order as the weights are, in and out."""
    peft = pytest.importorskip("peft", reason="parity of low-rank updates needs peft")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    _, model = theirs(family)
    base = tmp_path / "base"
    model.save_pretrained(base)
    expected = adapted(base)
    expected.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"weights of {family} are rewritten .*give like"):
        interop.load_adapter(load(base), tmp_path / "adapter")
    mine = load(base)
    interop.load_adapter(mine, tmp_path / "adapter", like=base)
    expected = logits(expected)
    assert np.abs(expected - ours(load(base))).max() > 0.1
    np.testing.assert_allclose(ours(mine), expected, atol=3e-4, rtol=3e-4)
    interop.save_adapter(mine, tmp_path / "again", like=base)
    back = transformers.AutoModelForCausalLM.from_pretrained(base)
    back = peft.PeftModel.from_pretrained(back, tmp_path / "again").eval()
    np.testing.assert_allclose(logits(back), expected, atol=3e-4, rtol=3e-4)


FUSED = {
    "gpt2": (["c_attn", "mlp.c_proj"], ("q", "v", "down")),
    "phi3": (["qkv_proj", "gate_up_proj"], ("q", "k", "up")),
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], ("k", "v", "down")),
}
"""Families, their names of matrices that are several of ours, and some of ours."""


@pytest.fixture(scope="module")
def fused(request, tmp_path_factory):
    """A folder of such a family, and its names."""
    _, model = theirs(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, *FUSED[request.param]


def loaded_by_peft(base, adapter):
    peft = pytest.importorskip("peft", reason="parity of low-rank updates needs peft")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("fused", FUSED, indirect=True)
def test_matrices_that_are_several_of_ours(fused, tmp_path):
    """An update of peft is one of each of ours; several of ours are one of peft."""
    base, theirs_of, ours_of = fused
    whole = adapted(base, target_modules=theirs_of)
    whole.save_pretrained(tmp_path / "theirs")
    mine = load(base)
    interop.load_adapter(mine, tmp_path / "theirs", like=base)
    assert {"q", "k", "v"} < {*updates(mine)}
    expected = logits(whole)
    assert np.abs(expected - ours(load(base))).max() > 0.1
    np.testing.assert_allclose(ours(mine), expected, atol=1e-3, rtol=1e-3)

    mine = with_updates(load(base), targets=ours_of)
    interop.save_adapter(mine, tmp_path / "ours", like=base)
    np.testing.assert_allclose(
        logits(loaded_by_peft(base, tmp_path / "ours")), ours(mine), atol=1e-3, rtol=1e-3
    )
    again = load(base)
    interop.load_adapter(again, tmp_path / "ours", like=base)
    assert {*updates(again)} == {*ours_of}
    for name, layer in updates(mine).items():
        other = updates(again)[name]
        assert layer.scale == other.scale
        np.testing.assert_array_equal(layer.a[...], other.a[...])
        np.testing.assert_array_equal(layer.b[...], other.b[...])


@pytest.mark.slow
@pytest.mark.parametrize("fused", ["gpt2", "gpt_neox"], indirect=True)
def test_magnitudes_of_matrices_that_are_several_of_ours(fused, tmp_path):
    base, theirs_of, _ = fused
    whole = adapted(base, target_modules=theirs_of[:1], use_dora=True)
    whole.save_pretrained(tmp_path / "theirs")
    mine = load(base)
    interop.load_adapter(mine, tmp_path / "theirs", like=base)
    expected = logits(whole)
    np.testing.assert_allclose(ours(mine), expected, atol=1e-3, rtol=1e-3)
    interop.save_adapter(mine, tmp_path / "ours", like=base)
    back = loaded_by_peft(base, tmp_path / "ours")
    np.testing.assert_allclose(logits(back), expected, atol=1e-3, rtol=1e-3)
    # Values keep the norms that they have.
    some = with_updates(load(base), targets=("q", "k"), dora=True)
    interop.save_adapter(some, tmp_path / "some", like=base)
    back = loaded_by_peft(base, tmp_path / "some")
    np.testing.assert_allclose(logits(back), ours(some), atol=1e-3, rtol=1e-3)
    again = load(base)
    paths = interop.load_adapter(again, tmp_path / "some", like=base)
    assert sorted(paths) == ["attention.k", "attention.q"]
    np.testing.assert_array_equal(ours(again), ours(some))


def test_scales_of_matrices_that_are_several_of_ours(tmp_path):
    _, model = theirs("gpt2")
    model.save_pretrained(tmp_path / "base")
    mine = with_updates(load(tmp_path / "base"), targets=("q", "v"))
    updates(mine)["v"].scale = 3.0
    with pytest.raises(ValueError, match=r"q, .*v must have one scale, .*; got 0.5, 3.0"):
        interop.save_adapter(mine, tmp_path / "a", like=tmp_path / "base")


def test_ranks_and_scales_of_layers(base, tmp_path):
    """Patterns of peft, in and out; with rsLoRA, too."""
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"mlp.down_proj": 3}}
    expected = adapted(base, use_rslora=True, **patterns)
    expected.save_pretrained(tmp_path / "theirs")
    mine = load(base)
    interop.load_adapter(mine, tmp_path / "theirs")
    assert {name: layer.a.shape[-1] for name, layer in updates(mine).items()} == {
        "q": 4,
        "v": 2,
        "down": 4,
    }
    expected = logits(expected)
    np.testing.assert_allclose(ours(mine), expected, atol=3e-4, rtol=3e-4)
    interop.save_adapter(mine, tmp_path / "ours", like=base)
    back = logits(loaded_by_peft(base, tmp_path / "ours"))
    np.testing.assert_allclose(back, expected, atol=3e-4, rtol=3e-4)


def test_gradients_with_magnitudes_are_those_of_peft(base, tmp_path):
    """In float64. Norms are constants there, too."""
    torch = pytest.importorskip("torch", reason="parity needs torch")
    expected = adapted(base, use_dora=True)
    expected.save_pretrained(tmp_path / "adapter")
    expected.double().requires_grad_(True)
    weights = np.random.default_rng(3).normal(size=(2, 20, 61))
    (expected(torch.tensor(TOKENS)).logits * torch.tensor(weights)).sum().backward()
    of_peft = {
        name: parameter.grad.numpy()
        for name, parameter in expected.named_parameters()
        if "layers.1.self_attn.q_proj.lora" in name
    }
    with jax.enable_x64(True):
        wide = {"dtype": "float64", "param_dtype": "float64"}
        model = interop.load(base, method="standard", **wide)
        interop.load_adapter(model, tmp_path / "adapter")
        model.eval()
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        @jax.grad
        def gradient(params):
            return jnp.sum(nnx.merge(graph, params, rest)(jnp.asarray(TOKENS)) * weights)

        found = gradient(params)["blocks"]["stacked"]["attention"]["q"]
        for name, which, turned in (
            ("A", "a", True),
            ("B", "b", True),
            ("mag", "magnitude", False),
        ):
            (theirs_,) = [value for key, value in of_peft.items() if f"lora_{name}" in key]
            mine = found[which][...][1]
            np.testing.assert_allclose(mine.T if turned else mine, theirs_, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_updates_with_magnitudes_start_as_none(family, tmp_path):
    """And what is merged is what was there; Qwen's queries have biases, which are not scaled."""
    _, model = theirs(family)
    model.save_pretrained(tmp_path)
    model = load(tmp_path)
    before, whole = ours(model), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    add_lora(model, 2, targets=("q", "down"), dora=True, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(ours(model), before, atol=1e-5, rtol=1e-5)
    merge_lora(model)
    chex.assert_trees_all_close(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)), whole, atol=1e-6, rtol=1e-6
    )


def test_an_adapter_of_more_ranks_than_there_are(base, tmp_path):
    """Peft allows it; and a model has the updates of one adapter."""
    expected = adapted(base, r=24, target_modules=["k_proj"])
    expected.save_pretrained(tmp_path)
    model = load(base)
    assert interop.load_adapter(model, tmp_path) == ["attention.k"]
    np.testing.assert_allclose(ours(model), logits(expected), atol=3e-4, rtol=3e-4)
    with pytest.raises(ValueError, match="the model has low-rank updates already: merge them"):
        interop.load_adapter(model, tmp_path)


def test_layers_by_the_names_of_peft(base, tmp_path):
    model = load(base)

    def targets(*names):
        return interop.lora_targets(model, names, like=base)

    assert targets("q_proj", "mlp.down_proj", "q", "out") == (
        *("attention.q", "ffn.down"),
        *("q", "out"),
    )
    every = ("attention.q", "attention.k", "attention.v", "attention.out")
    assert sorted(targets("all-linear")) == sorted((*every, "ffn.gate", "ffn.up", "ffn.down"))
    _, gpt2 = theirs("gpt2")
    gpt2.save_pretrained(tmp_path)
    found = interop.lora_targets(load(tmp_path), ("c_attn",), like=tmp_path)
    assert sorted(found) == ["attention.k", "attention.q", "attention.v"]


# ---------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of ours with weights, and one with an adapter for them."""
    folder = tmp_path_factory.mktemp("saved")
    config = llama(vocab_size=61, width=16, depth=2, heads=2, hidden=24, method="standard")
    model = Decoder(config, rngs=nnx.Rngs(0))
    interop.save(model, folder / "base")
    interop.save_adapter(with_updates(model), folder / "adapter", like=folder / "base")
    return folder


def changed(name, value):
    def change(config, tensors):
        config[name] = value

    return change


def another_layer(config, tensors):
    key = next(iter(tensors))
    tensors["base_model.model.lm_head.lora_A.weight"] = tensors.pop(key)


def without_a_block(config, tensors):
    for key in [key for key in tensors if ".1.mlp" in key]:
        del tensors[key]


def without_a_matrix(config, tensors):
    for key in [key for key in tensors if "mlp.down_proj.lora_B" in key]:
        del tensors[key]


def of_a_wider_block(config, tensors):
    (key,) = [key for key in tensors if ".1." in key and "q_proj.lora_A" in key]
    tensors[key] = np.zeros((4, 17), np.float32)


def without_the_last_block(config, tensors):
    for key in [key for key in tensors if ".1." in key]:
        del tensors[key]


def of_another_width(config, tensors):
    for key in [key for key in tensors if "q_proj.lora_A" in key]:
        tensors[key] = np.ascontiguousarray(tensors[key][:, :7])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("peft_type", "IA3"), "peft_type must be LORA; got 'IA3'"),
        (
            changed("use_dora", True),
            "must have A, B, magnitude in every block, from 0 to 1; magnit",
        ),
        (changed("bias", "all"), "bias must be none; got 'all'"),
        (changed("modules_to_save", ["lm_head"]), "modules_to_save must be None"),
        (changed("alpha_pattern", {"0.*q_proj": 3}), r"q_proj one value in all blocks; got 3, 2"),
        (changed("rank_pattern", {"*q_proj": 3}), "rank_pattern must be of expressions: nothing"),
        (changed("init_lora_weights", "pissa"), "init_lora_weights must be True; got 'pissa'"),
        (changed("r", 3), r"with r = 3, lora_A of .* must have 3 rows; got .*\(4, "),
        (changed("lora_alpha", None), "must have r and lora_alpha; got 4, None"),
        (
            another_layer,
            "lm_head.lora_A.weight is no update of a linear layer of the model's blocks",
        ),
        (without_a_block, r"lora_A of .*ffn.down must have .* in each of 2 blocks; got .* in 1"),
        (without_a_matrix, "mlp.down_proj must have A, B in every block, from 0 to 1; B is there"),
        (of_another_width, r"lora_A of .*attention.q must have the shape \(4, 16\).*got \(4, 7\)"),
        (of_a_wider_block, r"must have one shape in all blocks; got \(4, 16\), \(4, 17\)"),
        (without_the_last_block, r"in each of 2 blocks; got \(.*\) in 1"),
    ],
)
def test_adapters_that_do_not_fit(change, message, saved, tmp_path):
    config = json.loads((saved / "adapter/adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(saved / "adapter/adapter_model.safetensors")
    change(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = load(saved / "base")
    with pytest.raises(interop.FolderError, match=message):
        interop.load_adapter(model, tmp_path)
    assert not updates(model), "nothing has changed"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_of_fewer_bits(dtype, saved, tmp_path):
    shutil.copy(saved / "adapter/adapter_config.json", tmp_path)
    tensors = safetensors.numpy.load_file(saved / "adapter/adapter_model.safetensors")
    rounded = {name: t.astype(jnp.dtype(dtype)) for name, t in tensors.items()}
    safetensors.numpy.save_file(rounded, tmp_path / "adapter_model.safetensors")
    model = load(saved / "base")
    interop.load_adapter(model, tmp_path)
    expected = rounded["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    found = updates(model)["q"].a[1]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.float32(expected).T)


def test_folders_without_an_adapter(saved, tmp_path):
    model = load(saved / "base")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        interop.load_adapter(model, tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"there is no .*adapter_config.json"):
        interop.load_adapter(model, tmp_path)
    config = (saved / "adapter/adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(FileNotFoundError, match=r"there is no .*adapter_model.safetensors"):
        interop.load_adapter(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(interop.FolderError, match="is damaged, or no safetensors file"):
        interop.load_adapter(model, tmp_path)


def test_models_without_updates(saved, tmp_path):
    with pytest.raises(ValueError, match="the model has no low-rank updates"):
        interop.save_adapter(load(saved / "base"), tmp_path / "a", like=saved / "base")
    model = with_updates(load(saved / "base"))
    q = model.blocks.stacked.attention.q
    model.blocks.stacked.attention.q = DecomposedLinear(q.base, 4, 2.0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"all updates must have magnitudes .*, or none; got both"):
        interop.save_adapter(model, tmp_path / "a", like=saved / "base")


def test_columns_of_zeros_stay_so():
    """Of pruned or padded kernels, whose magnitude is 0."""
    base = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    base.kernel[...] = base.kernel[...].at[:, 1].set(0)
    layer = DecomposedLinear(base, 2, 2.0, rngs=nnx.Rngs(1))
    x = jnp.ones((2, 5))
    gradient = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((layer(x), gradient)))
    np.testing.assert_array_equal(layer.updated()[:, 1], 0)
