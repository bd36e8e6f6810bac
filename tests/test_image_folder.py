"""Folders of images, how they are varied, and a pretrained network fine-tuned on them."""

import dataclasses
import json
import pathlib
import shutil
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image, ImageEnhance, ImageOps
from safetensors.numpy import load_file, save_file
from scipy import stats

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "experiments"))

from bdia_jax import interop
from bdia_jax.data import (
    Augmentation,
    class_names,
    load_image_folder,
    load_images,
    rand_augment,
    read_image,
)
from bdia_jax.data.augmentation import crop_and_resize, mix, random_resized_crop
from bdia_jax.data.batches import batch_indices
from bdia_jax.data.scaling import Scaling, squares_of
from bdia_jax.finetuning import images as finetune_images
from bdia_jax.finetuning.settings import LowRank
from bdia_jax.nn import VisionTower, VisionTowerConfig
from bdia_jax.train import ResizedImages, TrainSettings, evaluate, fit_head

DRAWN = np.random.default_rng(0)


def wave(kind, height, width, rng=DRAWN):
    """Stripes that lie or stand, in noise."""
    along = np.mgrid[:height, :width][kind]
    values = 128 + 80 * np.sin(along + rng.uniform(0, 6)) + rng.normal(0, 20, (height, width))
    return np.uint8(values.clip(0, 255))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of 20 images of many sizes."""
    root = tmp_path_factory.mktemp("photos")
    for kind, name in enumerate(("lying", "standing")):
        (root / name).mkdir()
        for i in range(20):
            Image.fromarray(wave(kind, 20 + i, 40 - i)).save(root / name / f"{i:02}.png")
    (root / "lying" / "notes.txt").write_text("no image")
    # Some systems and programs leave images of their own in folders like these.
    for hidden in (
        ".ipynb_checkpoints",
        "lying/.Trash",
        "standing/more/__MACOSX",
        "__MACOSX/lying",
    ):
        (root / hidden).mkdir(parents=True)
        Image.new("L", (8, 8)).save(root / hidden / "00.png")
    return root


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def test_a_folder(photos, caplog):
    data = load_image_folder(photos, 16)
    assert data.class_names == ("lying", "standing")
    assert data.train_images.shape == (36, 16, 16, 3)
    assert data.eval_labels.tolist() == [0, 0, 1, 1]
    assert "1 files" in caplog.text
    assert "notes.txt" in caplog.text
    tenth = read_image(photos / "lying" / "09.png", 16)
    np.testing.assert_array_equal(data.eval_images[0], tenth)


def test_a_folder_with_splits(photos, tmp_path):
    for split, count in (("train", 6), ("val", 3)):
        for name in ("lying", "standing"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                source = photos / name / f"{i:02}.png"
                (tmp_path / split / name / source.name).write_bytes(source.read_bytes())
    data = load_image_folder(tmp_path, 8, channels=1)
    assert data.train_images.shape == (12, 8, 8, 1)
    assert len(data.eval_images) == 6
    (tmp_path / "val" / "leaning").mkdir()
    (tmp_path / "val" / "leaning" / "0.png").write_bytes(source.read_bytes())
    with pytest.raises(ValueError, match=r"must be those in .*train; got, besides, leaning"):
        load_image_folder(tmp_path, 8)


def save(image, path, **options):
    image.save(path, **options)
    return path


def test_depths_and_modes(tmp_path):
    grey = wave(0, 12, 12)
    expected = np.repeat(grey[..., None], 3, axis=-1)
    deep = Image.fromarray(np.uint16(grey) * 257)
    found = {
        "grey": read_image(save(Image.fromarray(grey), tmp_path / "a.png"), 12),
        "16 bits": read_image(save(deep, tmp_path / "b.png"), 12),
        "16 bits, TIFF": read_image(save(deep, tmp_path / "c.tif"), 12),
        "16 bits, PGM": read_image(save(deep, tmp_path / "g.pgm"), 12),
        "palette": read_image(save(Image.fromarray(grey).convert("P"), tmp_path / "d.gif"), 12),
    }
    for name, image in found.items():
        np.testing.assert_array_equal(image, expected, err_msg=name)
    clear = Image.new("RGBA", (5, 5), (0, 0, 0, 0))
    assert np.all(read_image(save(clear, tmp_path / "e.png"), 5) == 255)
    # Whatever the numbers: those of 32 bits may be of 8, of 16, or of anything.
    for kind in (np.float32, np.int32):
        for scale in (1, 257, 2**16):
            image = Image.fromarray((grey.astype(np.int64) * scale).astype(kind))
            name = {np.float32: "F", np.int32: "I"}[kind]
            with pytest.raises(ValueError, match=rf"must have 8 or 16 bits; got 32 \({name}\), "):
                read_image(save(image, tmp_path / "f.tif"), 12)


def tiff(path, values, bits, inverted):
    """One of a strip of 16 bits a number, or of 12 bits, two numbers in three bytes."""
    height, width = values.shape
    high, low = np.uint16(values).ravel()[::2], np.uint16(values).ravel()[1::2]
    in_twelve = np.uint8([high >> 4, ((high & 15) << 4) | (low >> 8), low & 255]).T.tobytes()
    strip = in_twelve if bits == 12 else values.astype("<u2").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if inverted else 1}
    tags |= {273: 8, 277: 1, 278: height, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(strip))
    path.write_bytes(head + strip + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


def test_shades_of_more_than_eight_bits(tmp_path):
    """Whatever the file takes for white; what is transparent becomes white."""
    grey = wave(0, 12, 12)
    for bits, inverted in ((12, False), (16, False), (16, True)):
        deep = np.round(grey / 255.0 * (2**bits - 1))
        given = (2**bits - 1) - deep if inverted else deep
        found = read_image(tiff(tmp_path / "a.tif", given, bits, inverted), 12, 1)
        np.testing.assert_array_equal(found[..., 0], grey, err_msg=f"{bits} {inverted}")
    deep = Image.fromarray(np.uint16(grey) * 257)
    clear = int(grey[3, 4])
    found = read_image(save(deep, tmp_path / "b.png", transparency=clear * 257), 12, 1)
    np.testing.assert_array_equal(found[..., 0], np.where(grey == clear, 255, grey))


def test_turned_by_the_camera(tmp_path):
    image = Image.fromarray(wave(0, 12, 12))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = read_image(save(image, tmp_path / "a.png", exif=exif), 12, 1)
    np.testing.assert_array_equal(turned[..., 0], np.rot90(np.asarray(image), -1))


def test_the_middle_of_a_long_image(tmp_path):
    values = np.zeros((8, 24), np.uint8)
    values[:, 8:16] = 200
    assert np.all(read_image(save(Image.fromarray(values), tmp_path / "a.png"), 8) == 200)


PREPROCESSORS = {
    "squashed": {"size": {"height": 20, "width": 20}, "resample": 2},
    "cut out": {
        "size": {"shortest_edge": 24},
        "crop_size": {"height": 20, "width": 20},
        "do_center_crop": True,
        "resample": 3,
    },
}


@pytest.mark.parametrize("how", PREPROCESSORS)
def test_images_are_evaluated_as_transformers_sees_them(how, pretrained, tmp_path):
    """Of any shape, to the last bit, with the settings that are written for them."""
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    kind = {"squashed": "ViTImageProcessor", "cut out": "BitImageProcessor"}[how]
    given = {"image_processor_type": kind, "do_resize": True, **PREPROCESSORS[how]}
    folder = shutil.copytree(pretrained, tmp_path / "model")
    (folder / "preprocessor_config.json").write_text(json.dumps(given))
    processor = getattr(transformers, kind)(
        **PREPROCESSORS[how], do_rescale=False, do_normalize=False
    )
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("Testing", 1)):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
                path = tmp_path / "data" / split / name / f"{i}.png"
                small.resize((90, 40), Image.Resampling.BICUBIC).save(path)
    scaling = interop.load_scaling(folder)
    found = load_image_folder(tmp_path / "data", 20, scaling=scaling, larger=9 / 8)
    assert found.train_images.shape == (4, 22, 22, 3)
    paths = sorted((tmp_path / "data" / "Testing").rglob("*.png"))
    theirs = processor([Image.open(path) for path in paths], return_tensors="np")
    expected = np.moveaxis(np.asarray(theirs["pixel_values"]), 1, -1)
    np.testing.assert_array_equal(found.eval_images, expected)
    # Training images show more: all of the shorter side, or 22 of 24 pixels.
    assert found.middle == pytest.approx(1 if how == "squashed" else 20 / 22)


@pytest.mark.parametrize("splits", [("Training", "Testing"), ("train", "dev"), ("train", "Val")])
def test_splits_of_other_names(splits, photos, tmp_path):
    for split in splits:
        for name in ("lying", "standing"):
            (tmp_path / split / name).mkdir(parents=True)
            shutil.copy(photos / name / "00.png", tmp_path / split / name)
    assert load_image_folder(tmp_path, 8).class_names == ("lying", "standing")
    (tmp_path / splits[1]).rename(tmp_path / "others")
    (tmp_path / "others" / "README").write_text("beside them")
    with pytest.raises(ValueError, match=r" hold the folders lying, standing: are they splits"):
        load_image_folder(tmp_path, 8)
    # One of another name may lack a class.
    shutil.rmtree(tmp_path / "others" / "standing")
    with pytest.raises(
        ValueError, match=f"{splits[0]} in .* holds the folders lying, standing: are"
    ):
        load_image_folder(tmp_path, 8)


def test_a_class_may_be_named_as_a_split_is(photos, tmp_path):
    """It has images itself, or in a folder."""
    for name in ("train/more", "car"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(2):
            shutil.copy(photos / "lying" / f"0{i}.png", tmp_path / name)
    (tmp_path / "train" / "notes").mkdir()
    assert load_image_folder(tmp_path, 8).class_names == ("car", "train")


def test_an_image_of_each_class_is_too_few(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        save_text(tmp_path / name / "0.png")  # which cannot be read
    with pytest.raises(ValueError, match=r"must have an image to evaluate, .* got 2 images of 2"):
        load_image_folder(tmp_path, 8)
    (tmp_path / "train").mkdir()
    for name in "ab":
        (tmp_path / name).rename(tmp_path / "train" / name)
    (tmp_path / "dev").mkdir()
    with pytest.raises(ValueError, match=r"must have an image to evaluate, .* got 2 images of 2"):
        load_image_folder(tmp_path, 8)


def test_what_cannot_be_read(photos, tmp_path):
    for name in ("lying", "standing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes((photos / name / "00.png").read_bytes()[:-100])
        (tmp_path / name / "1.png").write_bytes((photos / name / "01.png").read_bytes())
    with pytest.raises(ValueError, match=r"2 of 4 images cannot be read: .*0\.png \(.*Mend or"):
        load_image_folder(tmp_path, 8)


BAD = {
    "no folder": (lambda root: root / "none", FileNotFoundError, "must exist; got"),
    "a file": (lambda root: save_text(root / "a"), NotADirectoryError, "got the file"),
    "one class": (lambda root: (root / "one").parent, ValueError, "at least two classes; it has"),
    "an empty class": (lambda root: made(root / "x" / "empty"), ValueError, "none in empty"),
}


def save_text(path):
    path.write_text("")
    return path


def made(path):
    path.mkdir(parents=True)
    return path.parent


@pytest.mark.parametrize("what", BAD)
def test_bad_folders(what, tmp_path):
    given, error, message = BAD[what]
    with pytest.raises(error, match=message):
        load_image_folder(given(tmp_path), 8)


# ---------------------------------------------------------------------------------------------
# Varying
# ---------------------------------------------------------------------------------------------

IMAGES = np.stack([np.stack([wave(i, 30, 40)] * 3, -1) for i in (0, 1)])


def test_rectangles_are_those_of_pillow():
    """Cubic kernels of both have a = -0.5; Pillow rounds to 8 bits twice, on its way."""
    top_left = jnp.float32([[3, 5], [0.5, 2.25]])
    sides = jnp.float32([[20, 30], [25, 11]])
    found = crop_and_resize(jnp.asarray(IMAGES), top_left, sides, 12)
    for image, (top, left), (height, width), ours in zip(
        IMAGES, top_left, sides, found, strict=True
    ):
        box = tuple(map(float, (left, top, left + width, top + height)))
        theirs = Image.fromarray(image).resize((12, 12), Image.Resampling.BICUBIC, box=box)
        # At the border, Pillow leaves out what lies beyond the rectangle.
        inner = (slice(2, -2), slice(2, -2))
        np.testing.assert_allclose(ours[inner], np.asarray(theirs)[inner], atol=2)


def test_what_is_not_scaled_is_the_same():
    whole = squares_of(jnp.asarray(IMAGES), 30, Scaling())
    np.testing.assert_array_equal(whole, IMAGES[:, :, 5:35])
    middle = squares_of(jnp.asarray(IMAGES), 20, Scaling(edge=30 / 20))
    np.testing.assert_array_equal(middle, IMAGES[:, 5:25, 10:30])


def test_random_crops(monkeypatch):
    """Areas and ratios are distributed as they are said to be, and rectangles lie inside."""
    from bdia_jax.data import augmentation

    drawn = []

    def record(images, place, sides, size, method):
        drawn.append((place, sides))
        return images[:, :size, :size]

    monkeypatch.setattr(augmentation, "crop_and_resize", record)
    images = jnp.zeros((4000, 40, 40, 1))
    random_resized_crop(jax.random.key(0), images, 8, 0.1, 4 / 3)
    ((place, sides),) = drawn
    assert np.all(place >= 0)
    assert np.all(place + sides <= 40 + 1e-4)
    area, ratio = sides.prod(-1) / 1600, sides[:, 0] / sides[:, 1]
    inside = area < 0.7  # no side can be longer than the image
    assert stats.kstest(area[inside], stats.uniform(0.1, 0.6).cdf).pvalue > 1e-3
    log = np.log(ratio[inside]) / np.log(4 / 3)
    assert stats.kstest(log, stats.uniform(-1, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("name", "flip", "expected"),
    [
        ("digits", None, False),
        ("emnist/letters", None, False),
        ("cifar10", None, True),
        ("digits", True, True),
        ("cifar10", False, False),
    ],
)
def test_characters_are_not_mirrored(name, flip, expected):
    """Unless it is asked for."""
    images = dataclasses.replace(load_images("digits"), name=name)
    zero, one = np.zeros(1), np.ones(1)
    task = ResizedImages(images, 8, zero, one, augmentation=Augmentation(smallest=1, flip=flip))
    seen = task.batch(jax.device_put(task.arrays()), jax.random.key(0), jnp.int32(0), 64)[0]
    order = jax.random.split(jax.random.key(0))[0]
    rows = batch_indices(order, jnp.int32(0), 64, task.samples)
    given = images.train_images[np.asarray(rows)].astype(np.float32)
    same = [np.allclose(a, b, atol=1e-3) for a, b in zip(seen, given)]
    mirrored = [np.allclose(a, b[:, ::-1], atol=1e-3) for a, b in zip(seen, given)]
    assert np.all(np.logical_or(same, mirrored))
    assert expected == (not np.all(same))


def test_mixing():
    images = jnp.arange(4.0)[:, None, None, None]
    mixed, share = mix(jax.random.key(0), images, 0.2)
    assert np.all(share >= 0.5)
    expected = share * jnp.arange(4) + (1 - share) * jnp.arange(4)[::-1]
    np.testing.assert_allclose(mixed.ravel(), expected, rtol=1e-6)
    many = mix(jax.random.key(1), jnp.zeros((5000, 1, 1, 1)), 0.4)[1]
    folded = stats.beta(0.4, 0.4)
    assert stats.kstest(many, lambda s: 2 * folded.cdf(s) - 1).pvalue > 1e-3


class Told(nnx.Module):
    """A network that says the same of every image."""

    def __init__(self, logits):
        self.logits = nnx.Param(jnp.asarray(logits))

    def __call__(self, images, key=None):
        return jnp.broadcast_to(self.logits[...], (len(images), len(self.logits)))


@pytest.mark.slow
def test_the_loss_is_shared_between_both_labels(photos):
    data = load_image_folder(photos, 8)
    how = Augmentation(mixup=0.5)
    zeros, ones = np.zeros(3), np.ones(3)
    task = ResizedImages(data, 8, zeros, ones, augmentation=how, label_smoothing=0.1)
    arrays = jax.device_put(task.arrays())
    batch = task.batch(arrays, jax.random.key(0), jnp.int32(0), 12)
    images, labels, others, share = batch
    assert images.shape == (12, 8, 8, 3)
    assert np.any(labels != others)
    assert np.any(share < 1)
    sums = task.loss(Told([1.0, -1.0]), batch, None)
    log = jax.nn.log_softmax(jnp.asarray([1.0, -1.0]))
    smoothed = np.stack([0.95 * log[0] + 0.05 * log[1], 0.05 * log[0] + 0.95 * log[1]])
    expected = -(share * smoothed[labels] + (1 - share) * smoothed[others]).sum()
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-5)
    assert float(sums.weight) == 12
    # Without variation, it is the middle of the image, normalized.
    task = ResizedImages(data, 6, zeros + 3, ones * 2, augmentation=None, middle=3 / 4)
    images = task.batch(jax.device_put(task.arrays()), jax.random.key(0), jnp.int32(0), 36)[0]
    middles = (data.train_images[:, 1:-1, 1:-1] - 3.0) / 2
    assert sorted(np.round(images.sum((1, 2, 3)))) == sorted(np.round(middles.sum((1, 2, 3))))
    # Those for evaluation are seen whole.
    task = ResizedImages(data, 8, zeros + 3, ones * 2, augmentation=None, middle=3 / 4)
    images = task.eval_batch(jax.device_put(task.arrays()), jnp.int32(0), 4)[0]
    np.testing.assert_allclose(images, (data.eval_images - 3.0) / 2, atol=1e-3)
    with pytest.raises(ValueError, match=r"middle must lie in \(0, 1\]; got 0"):
        ResizedImages(data, 8, zeros, ones, middle=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"smallest": 0}, r"smallest must lie in \(0, 1\]; got 0"),
        ({"stretch": 0.5}, "stretch must be at least 1; got 0.5"),
        ({"mixup": -1}, "mixup must be at least 0; got -1"),
        ({"operations": -1}, "operations must be at least 0; got -1"),
        ({"magnitude": 31}, r"magnitude must lie in \[0, 30\]; got 31"),
    ],
)
def test_bad_augmentation(given, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**given)


operate = jax.jit(rand_augment.operate, static_argnums=3)


def by_pillow(image, name, sign, share):
    """The operation, and fourteen of them in all, as Pillow does it."""
    height, width = image.shape[:2]
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    grey = 128 if picture.mode == "L" else (128, 128, 128)
    factor = 1 + sign * 0.9 * share
    shear, x, y = sign * 0.3 * share, *(sign * 150 / 331 * share * side for side in (width, height))
    of = {
        "identity": lambda: picture,
        "brightness": lambda: ImageEnhance.Brightness(picture).enhance(factor),
        "color": lambda: ImageEnhance.Color(picture).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(picture).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(factor),
        "posterize": lambda: ImageOps.posterize(picture, 8 - round(4 * share)),
        "solarize": lambda: ImageOps.solarize(picture, 255 * (1 - share)),
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "shear_x": lambda: affine(1, shear, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, shear, 1, 0),
        "translate_x": lambda: affine(1, 0, x, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, y),
        "rotate": lambda: picture.rotate(sign * 30 * share, fillcolor=grey),
    }

    def affine(*numbers):
        return picture.transform(picture.size, Image.Transform.AFFINE, numbers, fillcolor=grey)

    found = np.asarray(of[name]())
    return found.reshape(image.shape), len(of)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", rand_augment.OPERATIONS)
def test_operations_are_those_of_pillow(name, channels):
    rng = np.random.default_rng(channels)
    ramp = 20 + 8.0 * np.arange(24)[:, None, None] + 3.0 * np.arange(16)[None, :, None]
    image = (ramp + rng.normal(scale=20, size=(24, 16, channels))).clip(0, 255).astype(np.uint8)
    number = rand_augment.OPERATIONS.index(name)
    for share in (0.3, 1.0):
        for sign in (-1.0, 1.0):
            expected, count = by_pillow(image, name, sign, share)
            assert count == len(rand_augment.OPERATIONS)
            found = operate(jnp.asarray(image, jnp.float32), number, sign, share)
            difference = np.abs(found - expected.astype(np.float32))
            # Pillow cuts fractions off, here and there; a pixel on the border of two comes from
            # either.
            moves = name in rand_augment.MOVES
            assert (difference > 1).mean() <= (0.01 if moves else 0), (share, sign)


def test_operations_are_drawn_for_each_image():
    """Whole values come out, of an image of one value, too; and another key draws others."""
    images = jnp.full((8, 6, 6, 3), 77, jnp.uint8)
    draw = jax.jit(lambda key: rand_augment.rand_augment(key, images, 2, 9.0))
    first, second = (np.asarray(draw(jax.random.key(seed))) for seed in (0, 1))
    assert (first == first.round()).all()
    assert 0 <= first.min() < first.max() <= 255
    assert len(np.unique(first.mean((1, 2, 3)))) > 2
    assert (first != second).any()
    with pytest.raises(ValueError, match="1 or 3 channels; got 4"):
        rand_augment.rand_augment(jax.random.key(0), jnp.zeros((1, 6, 6, 4)), 2, 9.0)


# ---------------------------------------------------------------------------------------------
# Fine-tuning
# ---------------------------------------------------------------------------------------------

TINY = VisionTowerConfig(
    image_size=16,
    patch_size=8,
    width=32,
    depth=2,
    heads=2,
    hidden=32,
    num_classes=2,
    dtype="bfloat16",
)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder as transformers writes it."""
    path = tmp_path_factory.mktemp("vit")
    config = {
        "model_type": "vit",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 8,
        "id2label": {"0": "a", "1": "b"},
    }
    (path / "config.json").write_text(json.dumps(config))
    model = VisionTower(dataclasses.replace(TINY, dtype="float32"), rngs=nnx.Rngs(0))
    interop.save_vision(model, path, like=path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
def test_the_head_is_fitted(photos, classes):
    """The network classifies as scikit-learn says that the fitted head does."""
    data = load_image_folder(photos, 16)
    if classes == 3:  # of which one has no image
        data = dataclasses.replace(data, num_classes=3, class_names=())
    task = ResizedImages(data, 16, np.full(3, 127.0), np.full(3, 64.0), augmentation=None)
    model = VisionTower(
        dataclasses.replace(TINY, num_classes=classes, method="standard", dtype="float32"),
        rngs=nnx.Rngs(0),
    )
    right = fit_head(model, task, 100)
    assert right > 0.6
    assert not model.blocks.deterministic
    model.eval()
    assert fit_head(model, task, 100) == right
    assert model.blocks.deterministic
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"count must be an int >= 1; got {count}"):
            fit_head(model, task, count)
    whole = dataclasses.replace(data, eval_images=data.train_images, eval_labels=data.train_labels)
    again = ResizedImages(whole, 16, task.mean, task.std)
    assert evaluate(model, again)["accuracy"] == pytest.approx(right)
    with pytest.raises(ValueError, match=r"must have the 4 classes of .*; it has"):
        fit_head(
            model, ResizedImages(dataclasses.replace(data, num_classes=4), 16, task.mean, task.std)
        )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_finetune(pretrained, photos, tmp_path, capsys, rank):
    """The loss falls; the folder has the weights of the best evaluation, and names of classes."""
    given = finetune_images.FineTuneImages(
        pretrained=str(pretrained),
        data=str(photos),
        out=tmp_path / "run",
        gamma=1 / 8 if rank else "auto",
        lora=LowRank(rank, targets=("q", "fc1"), dora=True) if rank else LowRank(),
        augmentation=Augmentation(mixup=0.2 * rank, operations=rank // 2),
        train=TrainSettings(
            steps=20, batch_size=12, learning_rate=3e-3, eval_every=10, checkpoint_every=10
        ),
    )
    need = finetune_images.main(dataclasses.replace(given, plan="here"))
    assert need["total"] > need["parameters"] + need["frozen"] + need["optimizer"]
    assert not given.out.exists()
    found = finetune_images.main(given)
    assert found["loss"] < found["loss before"]
    assert ("measuring which γ" in capsys.readouterr().out) == (rank == 0)
    ours = interop.load_vision(tmp_path / "run/model", dtype="bfloat16")
    data, names, scaling = finetune_images.images(given, pretrained, 16, 3)
    assert names == ["lying", "standing"]
    mean, std = interop.load_normalization(pretrained)
    task = ResizedImages(data, 16, mean, std, scaling=scaling, middle=data.middle)
    assert evaluate(ours, task)["loss"] == pytest.approx(found["loss"], rel=0.02)
    written = json.loads((tmp_path / "run/model/config.json").read_text())
    assert written["id2label"] == {"0": "lying", "1": "standing"}
    if rank:
        adapted = interop.load_vision(pretrained, num_classes=2, image_size=16, dtype="bfloat16")
        interop.load_adapter(adapted, tmp_path / "run/adapter", like=pretrained)
        assert evaluate(adapted, task)["loss"] == pytest.approx(found["loss"], rel=0.02)
        lora = LowRank(adapter=tmp_path / "run/adapter")
        again = dataclasses.replace(given, out=tmp_path / "again", lora=lora)
        assert finetune_images.main(again)["loss before"] == pytest.approx(found["loss"], rel=0.02)
        assert "new head" not in capsys.readouterr().out
        # An adapter without a head gets a new one.
        folder = tmp_path / "run/adapter"
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(
            {k: t for k, t in tensors.items() if "classifier" not in k},
            folder / "adapter_model.safetensors",
        )
        finetune_images.main(dataclasses.replace(again, out=tmp_path / "headless"))
        assert "new head" in capsys.readouterr().out
    else:
        again = dataclasses.replace(given, resume=True)
        assert finetune_images.main(again)["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_names_of_classes():
    assert class_names("digits") == [*"0123456789"]


def test_bad_fine_tuning(pretrained, tmp_path):
    given = {"pretrained": str(pretrained), "out": tmp_path / "run"}
    with pytest.raises(ValueError, match="the same loss with every γ: give gamma, or head_images"):
        finetune_images.FineTuneImages(data="digits", head_images=0, **given)
    with pytest.raises(FileNotFoundError, match=r"must exist; got '\./none'"):
        finetune_images.main(finetune_images.FineTuneImages(data="./none", **given))
    with pytest.raises(interop.FolderError, match="one of vit, dinov2, clip"):
        finetune_images.main(
            finetune_images.FineTuneImages(
                pretrained=str(other_folder(tmp_path)), data="digits", out=tmp_path / "run"
            )
        )


def other_folder(path):
    (path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    return path
