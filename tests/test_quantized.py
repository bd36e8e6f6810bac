"""A quantized base: the nearest codes, the network that they stand for, and its memory."""

import builtins
import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "experiments"))

from _rows import fast

from bdia_jax import data, interop
from bdia_jax.finetuning import texts as finetune
from bdia_jax.finetuning.settings import LowRank
from bdia_jax.finetuning.text_settings import FineTune
from bdia_jax.nn import Decoder, add_lora, expand_base, llama, merge_lora, quantize_base
from bdia_jax.nn.quantized import KINDS, Codes, QuantizedLinear, decode, encode
from bdia_jax.planning import plan
from bdia_jax.train import TrainSettings

TINY = llama(
    vocab_size=61,
    max_length=32,
    width=64,
    depth=3,
    heads=4,
    kv_heads=2,
    hidden=96,
    qkv_bias=True,
    dtype="bfloat16",
    param_dtype="bfloat16",
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 16)))
ALL = ("q", "k", "v", "out", "gate", "up", "down")


def normal_floats():
    """As the paper defines them: quantiles of a normal distribution, 8 of them positive, and 0."""
    offset = 0.9677083
    positive = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort([*positive, 0, *negative])
    return values / values.max()


VALUES = {
    "nf4": normal_floats(),
    "int4": np.arange(-8, 8) / 7.5,
    "int8": np.arange(-128, 128) / 127.5,
}
"""What codes stand for, of a group whose largest magnitude is 1."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [16, 128, 96])
def test_nearest_codes(kind, inputs):
    kernel = np.random.default_rng(1).normal(size=(2, inputs, 3)).astype(np.float32)
    kernel[0, 0] = 0
    group = {16: 16, 128: 64, 96: 48}[inputs]
    codes = encode(jnp.asarray(kernel), kind)
    assert codes.codes.shape == kernel.shape
    assert codes.scales.shape == (2, inputs // group, 3)
    groups = kernel.reshape(2, -1, group, 3)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    every = VALUES[kind][..., None, None, None, None] * largest
    nearest = np.abs(every - groups).min(0)
    found = np.asarray(decode(codes, kind))
    # Scales are rounded to 8 bits.
    distance = np.abs(found.reshape(groups.shape) - groups)
    assert np.all(distance <= nearest + 2**-8 * largest)
    assert found[0, 0].tolist() == [0, 0, 0]


def test_a_group_of_zeros():
    kernel = jnp.zeros((1, 64, 2))
    for kind in KINDS:
        assert not np.any(decode(encode(kernel, kind), kind))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    interop.save(Decoder(TINY, rngs=nnx.Rngs(0)), path)
    data.byte_tokenizer().save(path)
    return path


def same(a, b):
    a, b = (jax.tree.leaves(nnx.state(model, nnx.Not(nnx.RngState))) for model in (a, b))
    return len(a) == len(b) and all(map(np.array_equal, a, b))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_read_a_block_at_a_time(kind, folder, monkeypatch):
    """The same codes as of a model that was read and then quantized; expanded, its network."""
    whole = interop.load(folder, param_dtype="bfloat16")
    paths = quantize_base(whole, kind)
    assert len(paths) == 7
    assert "blocks.stacked.attention.q" in paths
    sizes = []
    stack = jnp.stack
    monkeypatch.setattr(jnp, "stack", lambda a, *b: sizes.append(a[0].dtype) or stack(a, *b))
    read = interop.load(folder, param_dtype="bfloat16", quantize=kind)
    # Codes and scales, and never a kernel.
    assert {str(dtype) for dtype in sizes} <= {"int4", "uint4", "int8", "bfloat16"}
    assert same(whole, read)

    read = interop.load(folder, quantize=kind, method="standard", dtype="float32")
    read.eval()
    before = read(TOKENS)
    expand_base(read)
    assert not [m for _, m in nnx.iter_modules(read) if isinstance(m, QuantizedLinear)]
    read.eval()
    np.testing.assert_allclose(read(TOKENS), before, rtol=1e-4, atol=1e-5)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("kind", "parts"), fast(1, [("int8", False), ("int4", False), ("nf4", True)])
)
def test_taken_back(kind, parts):
    """Every integer is reconstructed in bfloat16; in 8 bits with magnitudes that are trained."""
    config = dataclasses.replace(TINY, parts_as_steps=parts, gamma=1 / 8)
    model = Decoder(config, rngs=nnx.Rngs(0))
    quantize_base(model, kind)
    add_lora(model, 2, targets=ALL, dora=kind == "int8", rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(1), (2, 16, 64), jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
    found = model.blocks.check_reversible(x, model.angles(positions), None, key=jax.random.key(0))
    assert found.compared
    assert found.mismatched == 0


def gradients(model):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graph, params, rest)
        return model.loss(TOKENS, TOKENS, key=jax.random.key(2)).means()["loss"]

    return jax.grad(loss)(params)


@pytest.mark.slow
def test_gradients_are_those_of_the_expanded_network():
    """Of low-rank updates, in float64: the kernels are constants, however they are kept."""
    with jax.enable_x64(True):
        config = dataclasses.replace(TINY, dtype="float64", param_dtype="float64", gamma=1 / 8)
        model = Decoder(config, rngs=nnx.Rngs(0))
        quantize_base(model, "nf4")
        add_lora(model, 2, targets=ALL, rngs=nnx.Rngs(1))
        for _, module in nnx.iter_modules(model):
            if hasattr(module, "b") and hasattr(module, "a"):
                module.b[...] = jax.random.normal(jax.random.key(3), module.b.shape)
        found = gradients(model)
        expand_base(model)
        expected = gradients(model)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_only_codes_are_kept_for_the_derivative():
    layer = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    quantized = QuantizedLinear(layer, "nf4")
    _, vjp = jax.vjp(quantized, jnp.ones((4, 64)))
    kept = jax.tree.leaves(vjp)
    assert {str(leaf.dtype) for leaf in kept if leaf.size >= 64 * 32} == {"uint4"}


def test_merging_needs_kernels():
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    quantize_base(model)
    add_lora(model, 2, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="expand the model's kernels first"):
        merge_lora(model)
    expand_base(model)
    merge_lora(model)
    # All are parameters again, as those of a model that never was quantized.
    expected = nnx.state(Decoder(TINY, rngs=nnx.Rngs(0)), nnx.Param)
    assert jax.tree.structure(nnx.state(model, nnx.Param)) == jax.tree.structure(expected)


@pytest.mark.slow
def test_finetune(folder, tmp_path, capsys):
    """What is saved is the network that was trained; it goes on from its adapter, on the codes."""
    base = tmp_path / "base"
    config = dataclasses.replace(TINY, vocab_size=data.byte_tokenizer().size)
    interop.save(Decoder(config, rngs=nnx.Rngs(0)), base)
    data.byte_tokenizer().save(base)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{i} + {i}"}) + "\n" for i in range(40)))
    given = FineTune(
        model=str(base),
        data=texts,
        out=tmp_path / "run",
        length=32,
        gamma=1 / 8,
        quantize="nf4",
        dtype="float32",
        param_dtype="float32",
        lora=LowRank(rank=2, targets=("q", "down")),
        train=TrainSettings(
            steps=6, batch_size=2, learning_rate=1e-2, eval_every=3, checkpoint_every=3
        ),
    )
    found = finetune.main(given)
    assert found["loss"] < found["loss before"]
    ours = interop.load(tmp_path / "run/model")
    original = interop.load(base, quantize="nf4")
    for model in (ours, original):
        model.eval()
    expand_base(original)
    up = lambda model: model.blocks.stacked.ffn.up.kernel[...]  # noqa: E731
    assert np.array_equal(up(ours), up(original))

    lora = LowRank(adapter=tmp_path / "run/adapter")
    again = finetune.main(dataclasses.replace(given, out=tmp_path / "again", lora=lora))
    assert again["loss before"] == pytest.approx(found["loss"], rel=1e-5)
    assert "low-rank updates of attention.q, ffn.down" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.buffers
def test_planned():
    """An element of a kernel has 4 bits, and 16 for the scale of 64."""
    config = dataclasses.replace(TINY, hidden=128, qkv_bias=False)
    ways = ["BDIA, parts"]
    (need,) = plan.plan(config, 2, 16, lora=2, ways=ways)
    (quantized,) = plan.plan(config, 2, 16, lora=2, quantize="nf4", ways=ways)
    elements = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    spared = elements * 2 - (elements // 2 + elements // 64 * 2)
    assert need.frozen - quantized.frozen == spared
    assert need.parameters == quantized.parameters
    # The arguments of the program are smaller by as much.
    assert need.total - need.temporaries - (quantized.total - quantized.temporaries) == (
        pytest.approx(spared, rel=0.01)
    )
    with pytest.raises(ValueError, match="lora, the rank of updates, must be at least 1"):
        plan.plan(config, 2, 16, quantize="nf4")


def test_bad_input(monkeypatch):
    kernel = jnp.ones((64, 4))
    with pytest.raises(ValueError, match="one of nf4, int4, int8; got 'fp4'"):
        encode(kernel, "fp4")
    with pytest.raises(ValueError, match="groups of 16 to 64; got 67 inputs"):
        encode(jnp.ones((67, 4)), "nf4")
    with pytest.raises(ValueError, match="linear layers in a stack of the model; it has none"):
        quantize_base(nnx.Linear(64, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"give lora.rank or lora.adapter with quantize='nf4'"):
        FineTune(model="a", data="b", out="c", quantize="nf4")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "qwix":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "bdia_jax\[quantized\]"'):
        decode(Codes(kernel, kernel), "int8")


test_bad_input = pytest.mark.unchecked(test_bad_input)
