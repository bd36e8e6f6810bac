"""Low-rank updates: the same in peft, and in its files."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from test_hugging_face import theirs

from bdia_jax import interop
from bdia_jax.nn import Decoder, add_lora, llama, merge_lora
from bdia_jax.nn.lora import LowRankLinear

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


def with_updates(model, alpha=2.0, targets=("q", "v", "down")):
    add_lora(model, 4, alpha, targets, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(2)
    for layer in updates(model).values():
        for matrix in (layer.a, layer.b):
            matrix[...] = jnp.asarray(rng.normal(size=matrix.shape) / 4, jnp.float32)
    return model


@pytest.mark.parametrize("scale", [{}, {"lora_alpha": 2.5}, {"use_rslora": True}])
def test_adapters_of_peft(scale, base, tmp_path):
    """The same matrices and the same alpha give the same logits, merged or not."""
    expected = adapted(base, **scale)
    expected.save_pretrained(tmp_path / "adapter")
    model = load(base)
    paths = interop.load_adapter(model, tmp_path / "adapter")
    assert sorted(paths) == ["attention.q", "attention.v", "ffn.down"]
    expected = logits(expected)
    assert np.abs(expected - ours(load(base))).max() > 0.1
    np.testing.assert_allclose(ours(model), expected, atol=3e-4, rtol=3e-4)
    merge_lora(model)
    np.testing.assert_allclose(ours(model), expected, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("alpha", [None, 2.0, 7.0])
def test_peft_loads_ours(alpha, base, tmp_path):
    peft = pytest.importorskip("peft", reason="parity of low-rank updates needs peft")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    model = with_updates(load(base), alpha)
    interop.save_adapter(model, tmp_path / "adapter", like=base)
    back = transformers.AutoModelForCausalLM.from_pretrained(base)
    back = peft.PeftModel.from_pretrained(back, tmp_path / "adapter").eval()
    np.testing.assert_allclose(ours(model), logits(back), atol=3e-4, rtol=3e-4)
    assert back.peft_config["default"].target_modules == {
        "self_attn.q_proj",
        "self_attn.v_proj",
        "mlp.down_proj",
    }


def test_there_and_back_to_the_bit(base, tmp_path):
    model = with_updates(load(base))
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


def test_gpt2_has_updates_where_peft_has(tmp_path):
    """Its queries, keys and values are one matrix there; other layers are its own kind."""
    peft = pytest.importorskip("peft", reason="parity of low-rank updates needs peft")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    _, model = theirs("gpt2")
    model.save_pretrained(tmp_path / "base")
    mine = with_updates(load(tmp_path / "base"), targets=("attention.out", "up"))
    interop.save_adapter(mine, tmp_path / "adapter", like=tmp_path / "base")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    back = peft.PeftModel.from_pretrained(back, tmp_path / "adapter").eval()
    np.testing.assert_allclose(ours(mine), logits(back), atol=1e-3, rtol=1e-3)
    queries = with_updates(load(tmp_path / "base"), targets=("q",))
    with pytest.raises(ValueError, match=r"attention.q is a part of .*c_attn.weight in a folder"):
        interop.save_adapter(queries, tmp_path / "other", like=tmp_path / "base")
    assert not (tmp_path / "other").exists()


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
        (changed("use_dora", True), "use_dora must be False; got True"),
        (changed("bias", "all"), "bias must be none; got 'all'"),
        (changed("modules_to_save", ["lm_head"]), "modules_to_save must be None"),
        (changed("alpha_pattern", {"q_proj": 3}), "alpha_pattern must be None"),
        (changed("init_lora_weights", "pissa"), "init_lora_weights must be True; got 'pissa'"),
        (changed("r", 3), r"with r = 3, lora_A of blocks.stacked.* must have the shape \(3, "),
        (changed("lora_alpha", None), "must have r and lora_alpha; got 4, None"),
        (
            another_layer,
            "lm_head.lora_A.weight is no update of a linear layer of the model's blocks",
        ),
        (without_a_block, r"ffn.down must have both matrices in every block|must have both"),
        (without_a_matrix, "ffn.down must have both matrices in every block, from 0 to 1"),
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
    model.blocks.stacked.attention.q.scale = 3.0
    with pytest.raises(ValueError, match="all updates must have one rank and scale; got"):
        interop.save_adapter(model, tmp_path / "a", like=saved / "base")
