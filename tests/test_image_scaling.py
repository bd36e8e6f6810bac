"""Images become the squares that transformers makes of them: from folders, and from memory."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bdia_jax import interop
from bdia_jax.data import Augmentation, ImageData, load_image_folder, read_image
from bdia_jax.data.augmentation import augment_to, crop_and_resize, random_resized_crop
from bdia_jax.data.scaling import FILTERS, Scaling, square_of, squares_of
from bdia_jax.finetuning import images as finetune_images
from bdia_jax.interop.folder import Folder
from bdia_jax.interop.vision import preprocessing
from bdia_jax.train import ResizedImages

DRAWN = np.random.default_rng(0)
SHAPES = ((24, 24), (20, 45), (45, 20), (90, 33))
PHOTOS = [DRAWN.integers(0, 256, (2, *shape, 3), np.uint8) for shape in SHAPES]
MODEL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
MODEL |= {"intermediate_size": 32, "image_size": 32}


def pillows(images, size, scaling):
    return np.stack(
        [np.asarray(square_of(Image.fromarray(image), size, scaling)) for image in images]
    )


@pytest.mark.parametrize("filter", FILTERS)
def test_squares_in_jax_are_those_of_pillow(filter):
    """To the last bit: larger, smaller, both at once, squashed, and cut out of the middle."""
    for images in PHOTOS:
        for scaling in (
            Scaling(resample=filter),
            Scaling(True, 8 / 7, filter),
            Scaling(False, 1.2, filter),
        ):
            found = squares_of(jnp.asarray(images), 28, scaling)
            np.testing.assert_array_equal(found, pillows(images, 28, scaling))


# ---------------------------------------------------------------------------------------------
# As transformers does
# ---------------------------------------------------------------------------------------------

CUT = {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}}
SQUASHED = {"size": {"height": 37, "width": 37}, "crop_size": 32, "do_center_crop": True}
NUMBERS = {"size": 37, "crop_size": 32}
MEAN = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
# The family, what the file says, and the size of the squares.
PREPARED = {
    "ViT, of which nothing is said": ("vit", {"image_processor_type": "ViTImageProcessor"}, 224),
    "no kind at all, ViT": ("vit", {"do_resize": True}, 224),
    "no kind at all, DINOv2": ("dinov2", {"do_resize": True}, 224),
    "no kind at all, SigLIP": ("siglip", {"do_resize": True}, 224),
    "ViT, a number": ("vit", {"feature_extractor_type": "ViTFeatureExtractor", "size": 32}, 32),
    "ViT, not told to cut": ("vit", {"size": 32, "crop_size": 24, "resample": 3}, 32),
    "ViT, told to cut": ("vit", {**SQUASHED, "resample": 1}, 32),
    "ViT, cut out": ("vit", {**CUT, "do_center_crop": True, **MEAN}, 32),
    "DeiT, of which nothing is said": ("vit", {"image_processor_type": "DeiTImageProcessor"}, 224),
    "DeiT": ("vit", {"image_processor_type": "DeiTImageProcessorFast", **SQUASHED}, 32),
    "DeiT, numbers": ("vit", {"image_processor_type": "DeiTImageProcessor", **NUMBERS}, 32),
    "DINOv2": ("dinov2", {"image_processor_type": "BitImageProcessor", **CUT, **MEAN}, 32),
    "DINOv2, numbers": ("dinov2", {"feature_extractor_type": "BitFeatureExtractor", **NUMBERS}, 32),
    "CLIP": ("clip", {"feature_extractor_type": "CLIPFeatureExtractor", **NUMBERS}, 32),
    "CLIP, squashed": ("clip", {**SQUASHED, "crop_size": None, "do_center_crop": False}, 37),
    "SigLIP": ("siglip", {"image_processor_type": "SiglipImageProcessor", "size": [32, 32]}, 32),
    "SigLIP, told to cut": ("siglip", {**NUMBERS, "do_center_crop": True}, 32),
}


def model_folder(path, family, said):
    path.mkdir(exist_ok=True)
    tower = MODEL | ({"mlp_ratio": 1} if family == "dinov2" else {})
    config = {"vision_config": tower} if family in ("clip", "siglip") else tower
    (path / "config.json").write_text(json.dumps({"model_type": family, **config}))
    (path / "preprocessor_config.json").write_text(json.dumps(said))
    return path


def theirs(transformers, folder, images):
    """What transformers makes of images, by its Pillow backend: the one without torchvision."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    made = processor([Image.fromarray(image) for image in images], return_tensors="np")
    return np.moveaxis(np.asarray(made["pixel_values"]), 1, -1)


@pytest.mark.parametrize("name", PREPARED)
def test_images_are_those_of_transformers(name, tmp_path):
    """From files and from arrays, of the folder that is read, and of what is saved for a size."""
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    family, said, size = PREPARED[name]
    folder = model_folder(tmp_path / "theirs", family, said)
    scaling, (mean, std) = interop.load_scaling(folder), interop.load_normalization(folder)
    smaller = model_folder(tmp_path / "ours", family, said)
    with Folder(folder) as opened:
        for file, text in preprocessing.for_size(opened, 20).items():
            (smaller / file).write_bytes(text)
    assert interop.load_scaling(smaller).squash == scaling.squash
    for images in PHOTOS[1::2]:
        for place, side in ((folder, size), (smaller, 20)):
            expected = theirs(transformers, place, images)
            assert expected.shape == (2, side, side, 3)
            found = (np.asarray(squares_of(jnp.asarray(images), side, scaling)) - mean) / std
            np.testing.assert_allclose(found, expected, atol=1e-5)
        Image.fromarray(images[1]).save(tmp_path / "photo.png")
        found = read_image(tmp_path / "photo.png", side, scaling=scaling)
        np.testing.assert_allclose((found - mean) / std, expected[1], atol=1e-5)


def test_a_folder_that_says_nothing_of_images(tmp_path):
    """As its family's processor scales; normalized as the family was pretrained."""
    for family, expected in (
        ("vit", Scaling(squash=True, resample=2)),
        ("dinov2", Scaling()),
        ("clip", Scaling()),
        ("siglip", Scaling(squash=True)),
    ):
        folder = model_folder(tmp_path, family, {})
        (folder / "preprocessor_config.json").unlink()
        assert interop.load_scaling(folder) == expected
    assert interop.load_normalization(model_folder(tmp_path, "dinov2", {})).mean[0] / 255 == (
        pytest.approx(0.48145466)
    )
    (tmp_path / "preprocessor_config.json").unlink()
    assert interop.load_normalization(tmp_path).mean[0] / 255 == pytest.approx(0.485)


DEIT = {"image_processor_type": "DeiTImageProcessor"}
REFUSED = {
    "a rectangle": ({"size": {"height": 32, "width": 24}}, "size must be the side of a square"),
    "a word": ({"size": "large"}, "size must be .*, or shortest_edge; got 'large'"),
    "two edges": (
        {"size": {"shortest_edge": 32, "longest_edge": 64}},
        r"size must be .*; got \{'shortest_edge': 32, 'longest_edge': 64\}",
    ),
    "a truth": ({"size": True}, "size must be .*; got True"),
    "no square cut out": (
        {**DEIT, "crop_size": {"height": 32, "width": 24}},
        "crop_size must be one of a square, of at most 256 .*; got {'height': 32",
    ),
    "more cut out than there is": (
        {**DEIT, "size": 24, "crop_size": 32},
        "crop_size must be .* of at most 24 pixels .*; got 32",
    ),
    "nothing to cut out": ({"do_center_crop": True}, "crop_size must be .*; got None"),
    "oblong images": ({"size": {"shortest_edge": 32}}, "must make squares of images: do_center_cr"),
    "as they are": ({"do_resize": False}, "must scale images, .*; got do_resize = False"),
    "wider": ({"do_pad": True}, "must scale images, .* do_pad = True"),
    "an unknown filter": ({"resample": 9}, r"resample must be .*, 3 \(bicubic\); got 9"),
    "a filter's name": ({"resample": "bicubic"}, "resample must be .*; got 'bicubic'"),
    "another processor": (
        {"image_processor_type": "ConvNextImageProcessor"},
        "one of the image processors ViTImageProcessor, .*; got 'ConvNextImageProcessor'",
    ),
    "no object": ([1], r"preprocessor_config\.json must hold an object; got \[1\]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what, tmp_path):
    said, message = REFUSED[what]
    with pytest.raises(interop.FolderError, match=message):
        interop.load_scaling(model_folder(tmp_path, "vit", said))


def test_damaged_files_are_named(tmp_path):
    folder = model_folder(tmp_path, "vit", {})
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).write_text("{")
        for read in (interop.load_scaling, interop.load_normalization):
            with pytest.raises(interop.FolderError, match=f"{name} is not JSON"):
                read(folder)


# ---------------------------------------------------------------------------------------------
# Sets in memory, and what is trained
# ---------------------------------------------------------------------------------------------

ZERO, ONE = np.zeros(1), np.ones(1)


def of(images, name="drawn"):
    labels = np.arange(len(images)) % 2
    return ImageData(name, images, labels, images, labels, 2)


def seen(task, size=2):
    """A training batch, sorted; and an evaluation batch."""
    arrays = jax.device_put(task.arrays())
    trained = np.asarray(task.batch(arrays, jax.random.key(0), jnp.int32(0), size)[0])
    order = np.argsort(trained.sum((1, 2, 3)))
    return trained[order], np.asarray(task.eval_batch(arrays, jnp.int32(0), size)[0])


@pytest.mark.parametrize("kind", ["cut", "squashed"])
def test_sets_in_memory_are_scaled_as_transformers_does(kind, tmp_path):
    """For evaluation, for a new head, and for training without crops."""
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    said = {"cut": {"do_center_crop": True, **CUT}, "squashed": {**SQUASHED, "resample": 3}}[kind]
    folder = model_folder(tmp_path, "vit", said)
    (mean, std), scaling = interop.load_normalization(folder), interop.load_scaling(folder)
    images = PHOTOS[1]
    expected = theirs(transformers, folder, images)
    for how in (None, Augmentation(smallest=1, flip=False)):
        task = ResizedImages(of(images), 32, mean, std, augmentation=how, scaling=scaling)
        trained, evaluated = seen(task)
        np.testing.assert_allclose(evaluated, expected, atol=1e-5)
        np.testing.assert_allclose(
            trained, expected[np.argsort(expected.sum((1, 2, 3)))], atol=1e-5
        )
    found = task.middles({"mean": mean, "std": std}, jnp.asarray(images))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_fine_tuning_scales_both_kinds_of_data_as_the_folder_says(tmp_path):
    folder = model_folder(tmp_path / "model", "vit", {**SQUASHED, "resample": 2})
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(PHOTOS[2][i]).save(tmp_path / "data" / name / f"{i}.png")
    given = types.SimpleNamespace(data="digits", data_dir=None, download=False)
    *_, scaling = finetune_images.images(given, folder, 32, 3)
    assert scaling == Scaling(squash=True, edge=37 / 32, resample=2)
    given.data = str(tmp_path / "data")
    data, names, again = finetune_images.images(given, folder, 32, 3)
    assert names == ["a", "b"]
    # These are squares already, and cut out.
    np.testing.assert_array_equal(data.eval_images[0], pillows(PHOTOS[2], 32, scaling)[1])
    assert again == Scaling(squash=True, resample=2)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": "large"}))
    for data in ("digits", given.data):
        given.data = data
        with pytest.raises(interop.FolderError, match="size must be"):
            finetune_images.images(given, folder, 32, 3)


def test_training_images_without_crops_show_their_middle():
    images = DRAWN.integers(0, 256, (2, 22, 22, 3), np.uint8)
    for how in (None, Augmentation(smallest=1, flip=False)):
        task = ResizedImages(of(images), 20, ZERO, ONE, augmentation=how, middle=20 / 22)
        middles = images[:, 1:-1, 1:-1]
        trained, _ = seen(task)
        np.testing.assert_array_equal(trained, middles[np.argsort(middles.sum((1, 2, 3)))])


def test_random_crops_are_scaled_as_whole_images_are():
    """By the same kernel; and a ratio of sides is that in the square."""
    images = jnp.asarray(PHOTOS[1])
    whole = jnp.broadcast_to(jnp.float32([20, 45]), (2, 2))
    crops = random_resized_crop(jax.random.key(0), images, 16, 1 - 1e-6, 1.0, Scaling(True, 1.0, 2))
    linear = crop_and_resize(images, 0 * whole, whole, 16, "linear")
    np.testing.assert_allclose(crops, linear, atol=0.1)
    assert np.abs(crops - crop_and_resize(images, 0 * whole, whole, 16)).max() > 1
    varied = augment_to(
        jax.random.key(0),
        images,
        16,
        Augmentation(smallest=1 - 1e-6, stretch=1, flip=False),
        Scaling(True, 1.0, 2),
    )
    np.testing.assert_allclose(varied, crops, atol=1)


BAD = {
    "no size": ({"size": 0}, "size must be an int >= 1, in pixels; got 0"),
    "half a pixel": ({"size": 2.5}, "size must be an int >= 1, in pixels; got 2.5"),
    "no deviation": ({"std": np.zeros(3)}, "std must be of finite positive numbers; got"),
    "no number": ({"mean": np.full(3, np.nan)}, "mean must be of finite numbers; got"),
    "other channels": ({"mean": np.zeros(4)}, r"a number for each of 3 .* the shape \(4,\)"),
    "an edge": ({"scaling": Scaling(edge=0.5)}, "edge of a scaling must be at least 1; got 0.5"),
    "a filter": ({"scaling": Scaling(resample=9)}, r"resample must be 0 \(NEAREST\), .*; got 9"),
}


@pytest.mark.unchecked
@pytest.mark.parametrize("what", BAD)
def test_bad_tasks(what):
    given, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        ResizedImages(of(PHOTOS[0]), **{"size": 8, "mean": ZERO, "std": ONE} | given)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 0}, "size must be an int >= 1, in pixels; got 0"),
        ({"size": 8.0}, "size must be an int >= 1, in pixels; got 8.0"),
        ({"larger": 0.5}, "larger must be at least 1; got 0.5"),
        ({"scaling": Scaling(edge=0.9)}, "edge of a scaling must be at least 1; got 0.9"),
    ],
)
def test_bad_sizes_of_folders(given, message, tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=message):
        load_image_folder(tmp_path, **{"size": 8} | given)
