"""Pretrained vision towers: what transformers computes, in and out, at other sizes, reversibly."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from _rows import fast
from flax import nnx

from bdia_jax import interop
from bdia_jax.data.scaling import Scaling
from bdia_jax.interop.vision import families
from bdia_jax.nn import VisionTower, VisionTowerConfig, add_lora, merge_lora, unfreeze

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 6,
}
KINDS = ("vit", "dinov2", "clip", "siglip")
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 24, 24, 3)).astype(np.float32))


def theirs(kind):
    """A random classifier of transformers."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    tower = SIZES | ({} if kind == "dinov2" else {"intermediate_size": 80})
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    both = {"vision_config": tower, "text_config": text, "num_labels": 5}
    name, settings = {
        "vit": ("ViT", tower | {"num_labels": 5}),
        "dinov2": ("Dinov2", tower | {"num_labels": 5}),
        "clip": ("CLIP", both),
        "siglip": ("Siglip", both),
    }[kind]
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForImageClassification")(config).eval()
    for parameter in model.parameters():  # Also zeros and ones tell something.
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def logits(model, images, **options):
    import torch

    with torch.no_grad():
        pixels = torch.tensor(np.asarray(images).transpose(0, 3, 1, 2))
        return model(pixels, **options).logits.numpy()


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """A kind, its model, and the folder that transformers writes."""
    model = theirs(request.param)
    place = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(place)
    return request.param, model, place


def test_logits_and_back(folder, tmp_path):
    _, model, place = folder
    ours = interop.load_vision(place, method="standard")
    ours.eval()
    expected = logits(model, IMAGES)
    np.testing.assert_allclose(ours(IMAGES), expected, rtol=1e-4, atol=2e-5)
    ours.blocks.stacked.ffn.down.bias[...] += 0.5
    interop.save_vision(ours, tmp_path, like=place)
    again = type(model).from_pretrained(tmp_path)
    np.testing.assert_allclose(logits(again.eval(), IMAGES), ours(IMAGES), rtol=1e-4, atol=2e-5)
    back = interop.load_vision(tmp_path, method="standard")
    for a, b in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (back, ours)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_images_of_another_size(folder, tmp_path):
    kind, model, place = folder
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 36, 36, 3)), jnp.float32)
    expected = logits(model, images, interpolate_pos_encoding=True) if kind != "dinov2" else None
    if expected is None:  # interpolates always
        expected = logits(model, images)
    ours = interop.load_vision(place, method="standard", image_size=36)
    ours.eval()
    np.testing.assert_allclose(ours(images), expected, rtol=1e-4, atol=2e-5)
    interop.save_vision(ours, tmp_path, like=place)
    again = type(model).from_pretrained(tmp_path).eval()
    np.testing.assert_allclose(logits(again, images), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_a_tower_without_a_head(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind, model, place = folder
    if kind in ("vit", "dinov2"):
        base = getattr(model, kind)
    else:
        base = model.vision_model
        if kind == "siglip":
            base = transformers.SiglipVisionModel(model.config.vision_config)
            base.load_state_dict(model.vision_model.state_dict())
    base.save_pretrained(tmp_path)
    with pytest.raises(interop.FolderError, match="no classifier: give num_classes"):
        interop.load_vision(tmp_path, method="standard")
    ours = interop.load_vision(tmp_path, num_classes=7, method="standard")
    ours.eval()
    assert not np.any(ours(IMAGES))
    whole = interop.load_vision(place, method="standard")
    whole.eval()
    np.testing.assert_array_equal(ours.features(IMAGES), whole.features(IMAGES))
    interop.save_vision(ours, tmp_path / "new", like=tmp_path, labels=list("abcdefg"))
    again = type(model).from_pretrained(tmp_path / "new")
    assert [*again.config.id2label.values()] == list("abcdefg")


@pytest.mark.optimized
@pytest.mark.parametrize("folder", fast(1, ["dinov2", "siglip"]), indirect=True)
def test_reversible_in_bfloat16(folder):
    kind, _, place = folder
    parts = kind == "dinov2"
    model = interop.load_vision(
        place, method="bdia", gamma=1 / 16, signs="sample", dtype="bfloat16", parts_as_steps=parts
    )
    x = model._embed(IMAGES).astype(jnp.bfloat16)
    found = model.blocks.check_reversible(x, key=jax.random.key(1))
    assert found.compared > 0
    assert found.mismatched == 0


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["clip"], indirect=True)
def test_low_rank_updates_are_trained_and_merged(folder, tmp_path):
    _, model, place = folder
    ours = interop.load_vision(place, method="standard")
    add_lora(ours, 2, targets=("q", "v", "up"), rngs=nnx.Rngs(0))
    ours.blocks.stacked.attention.q.b[...] += 0.1
    ours.eval()
    expected = ours(IMAGES)
    with pytest.raises(ValueError, match="merge low-rank updates"):
        interop.save_vision(ours, tmp_path, like=place)
    merge_lora(ours)
    interop.save_vision(ours, tmp_path, like=place)
    again = type(model).from_pretrained(tmp_path).eval()
    np.testing.assert_allclose(logits(again, IMAGES), expected, rtol=1e-4, atol=2e-5)


def test_adapters_of_peft(folder, tmp_path):
    """In and out, with the head; ViT's with magnitudes, and of older names, those of tensors."""
    peft = pytest.importorskip("peft", reason="parity of low-rank updates needs peft")
    torch = pytest.importorskip("torch")
    kind, model, place = folder

    def pretrained():
        return type(model).from_pretrained(place)

    targets = ["q_proj", "v_proj", "fc2"]
    settings = {"r": 2, "target_modules": targets, "modules_to_save": ["classifier"]}
    expected = peft.get_peft_model(
        pretrained(), peft.LoraConfig(use_dora=kind == "vit", **settings)
    ).eval()
    for name, parameter in expected.named_parameters():
        if "lora_" in name or "classifier" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    expected.save_pretrained(tmp_path / "theirs")
    ours = interop.load_vision(place, method="standard")
    before = ours(IMAGES)
    paths = interop.load_adapter(ours, tmp_path / "theirs", like=place)
    assert sorted(paths) == ["attention.q", "attention.v", "ffn.down"]
    ours.eval()
    assert np.abs(before - ours(IMAGES)).max() > 0.1
    np.testing.assert_allclose(ours(IMAGES), logits(expected, IMAGES), rtol=1e-3, atol=1e-4)

    trained = [path for path, _ in nnx.to_flat_state(nnx.state(ours, nnx.Param))]
    assert {path[-1] for path in trained if path[0] == "head"} == {"kernel", "bias"}
    assert {path[-1] for path in trained if path[0] != "head"} <= {"a", "b", "magnitude"}
    interop.save_adapter(ours, tmp_path / "ours", like=place)
    back = peft.PeftModel.from_pretrained(pretrained(), tmp_path / "ours").eval()
    np.testing.assert_allclose(logits(back, IMAGES), ours(IMAGES), rtol=1e-3, atol=1e-4)

    if kind == "vit":
        path = tmp_path / "theirs/adapter_model.safetensors"
        tensors = {
            name.replace("vit.layers", "vit.encoder.layer")
            .replace("attention.q_proj", "attention.attention.query")
            .replace("attention.v_proj", "attention.attention.value")
            .replace("mlp.fc2", "output.dense"): tensor
            for name, tensor in safetensors.numpy.load_file(path).items()
        }
        safetensors.numpy.save_file(tensors, path)
        older = interop.load_vision(place, method="standard")
        interop.load_adapter(older, tmp_path / "theirs", like=place)
        older.eval()
        np.testing.assert_array_equal(older(IMAGES), ours(IMAGES))


def test_adapters_that_do_not_fit(tmp_path):
    model = theirs("vit")
    model.save_pretrained(tmp_path / "base")
    ours = interop.load_vision(tmp_path / "base", method="standard")
    add_lora(ours, 2, rngs=nnx.Rngs(0))
    unfreeze(ours.head)
    interop.save_adapter(ours, tmp_path / "adapter", like=tmp_path / "base")
    other = interop.load_vision(tmp_path / "base", num_classes=7, method="standard")
    message = r"classifier.weight must have the shape \(7, 32\); got \(5, 32\)"
    with pytest.raises(interop.FolderError, match=message):
        interop.load_adapter(other, tmp_path / "adapter", like=tmp_path / "base")
    with pytest.raises(ValueError, match="for a vision tower, give like"):
        interop.load_adapter(other, tmp_path / "adapter")
    for names in (("q_proj", "fc1"), ("query", "intermediate.dense")):
        found = interop.lora_targets(other, names, like=tmp_path / "base")
        assert found == ("attention.q", "ffn.up")


def test_normalization(tmp_path):
    config = {"model_type": "vit", "id2label": {"0": "a", "1": "b"}, **SIZES}
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    assert interop.load_normalization(tmp_path).mean == pytest.approx([127.5] * 3)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.25]})
    )
    found = interop.load_normalization(tmp_path)
    assert found.mean == pytest.approx([25.5, 51, 76.5])
    assert found.std == pytest.approx([127.5, 127.5, 63.75])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"rescale_factor": 1}))
    with pytest.raises(interop.FolderError, match="must scale pixels by 1/255; got rescale_factor"):
        interop.load_normalization(tmp_path)


def processor_of(kind, **settings):
    """What transformers makes ready images and texts with; it writes one file for both."""
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    tokenizers = pytest.importorskip("tokenizers", reason="a processor has a tokenizer")
    words = tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="<unk>", pad_token="a"
    )
    images = getattr(transformers, f"{kind}ImageProcessor")(**settings)
    return getattr(transformers, f"{kind}Processor")(image_processor=images, tokenizer=tokenizer)


def sees_as(transformers, place, **scaling):
    """Whether images are read as transformers reads them, and are scaled in this way."""
    theirs, found = transformers.AutoImageProcessor.from_pretrained(place), interop.load_scaling
    assert found(place) == Scaling(resample=theirs.resample, **scaling)
    mean, std = interop.load_normalization(place)
    np.testing.assert_allclose(mean / 255, theirs.image_mean, rtol=1e-6)
    np.testing.assert_allclose(std / 255, theirs.image_std, rtol=1e-6)
    size, crop = theirs.size, theirs.crop_size
    return (size.height or size.shortest_edge), crop and crop.height


@pytest.mark.parametrize("folder", ["clip", "siglip"], indirect=True)
def test_how_images_are_prepared_is_found_where_transformers_looks(folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    kind, _, place = folder
    place = shutil.copytree(place, tmp_path / "theirs")
    given = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    if kind == "clip":
        given |= {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 24}}
    else:
        given |= {"size": {"height": 24, "width": 24}}
    processor_of({"clip": "CLIP", "siglip": "Siglip"}[kind], **given).save_pretrained(place)
    assert not (place / "preprocessor_config.json").exists()
    how = {"clip": {"edge": 30 / 24}, "siglip": {"squash": True}}[kind]
    sizes = {"clip": (30, 24), "siglip": (24, None)}[kind]
    assert sees_as(transformers, place, **how) == sizes
    # It counts where there are both files.
    other = given | {"image_processor_type": "ViTImageProcessor", "image_mean": [0.7] * 3}
    other |= {"do_center_crop": "crop_size" in given}
    (place / "preprocessor_config.json").write_text(json.dumps(other))
    assert sees_as(transformers, place, **how) == sizes
    # What is saved for images of another size says so in both.
    tower = interop.load_vision(place, num_classes=3, image_size=48)
    interop.save_vision(tower, tmp_path / "ours", like=place)
    assert sees_as(transformers, tmp_path / "ours", **how) == {(30, 24): (60, 48)}.get(
        sizes, (48, None)
    )
    one, both = (
        json.loads((tmp_path / "ours" / f"{name}_config.json").read_text())
        for name in ("preprocessor", "processor")
    )
    assert one["size"] == both["image_processor"]["size"]
    assert both["processor_class"] == f"{'CLIP' if kind == 'clip' else 'Siglip'}Processor"
    # A file of older versions says nothing of images.
    (place / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert interop.load_normalization(place).mean == pytest.approx([0.7 * 255] * 3)
    wrong = {"image_processor": given | {"rescale_factor": 1}}
    (place / "processor_config.json").write_text(json.dumps(wrong))
    with pytest.raises(interop.FolderError, match=r": processor_config\.json must scale pixels"):
        interop.load_normalization(place)


BAD = {
    "another architecture": ({"model_type": "resnet"}, "one of vit, dinov2, clip"),
    "rectangles": ({"image_size": [24, 48]}, r"must be an int, for squares; got \[24, 48\]"),
    "an activation": ({"hidden_act": "relu"}, "hidden_act must be gelu or"),
    "a size": ({"patch_size": 7}, "patch_size must divide image_size = 24; got 7"),
    "nothing": ({"hidden_size": None}, "lacks 'hidden_size'"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_refused(what):
    changed, message = BAD[what]
    config = {"model_type": "vit", "intermediate_size": 8, **SIZES} | changed
    config = {name: value for name, value in config.items() if value is not None}
    with pytest.raises(interop.FolderError, match=message):
        families.read(config)


def test_a_gated_network_is_refused():
    with pytest.raises(interop.FolderError, match="use_swiglu_ffn must be False; got True"):
        families.read({"model_type": "dinov2", "use_swiglu_ffn": True, **SIZES})


def test_a_hidden_layer_without_end_is_refused():
    with pytest.raises(interop.FolderError, match=r"config\.json of a dinov2 model: .* infinity"):
        families.read({"model_type": "dinov2", "mlp_ratio": float("inf"), **SIZES})


def test_another_family_is_refused(folder, tmp_path):
    kind, _, place = folder
    other = VisionTower(
        VisionTowerConfig(
            image_size=24, patch_size=6, width=32, depth=3, heads=4, hidden=80, num_classes=5
        ),
        rngs=nnx.Rngs(0),
    )
    if kind != "vit":
        with pytest.raises(ValueError, match="like must be of the model's family; they differ in"):
            interop.save_vision(other, tmp_path, like=place)
    with pytest.raises(ValueError, match="labels must be 5 different names"):
        interop.save_vision(other, tmp_path, like=place, labels=["a"] * 5)
