"""Images: sources, the whole path of a download, and batches as functions of a key and a step."""

import http.server
import importlib.util
import io
import pathlib
import re
import tarfile
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdia_jax import data
from bdia_jax.data import images

REAL = pathlib.Path(__file__).parents[2] / "shared" / "data" / "tfds"
KEY = jax.random.key(0)


def test_digits_are_split_without_overlap():
    digits = data.load_images("digits")
    assert digits.train_images.shape == (1438, 8, 8, 1)
    assert digits.eval_images.shape == (359, 8, 8, 1)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_images.max() == 255
    assert {*digits.train_labels} == {*digits.eval_labels} == {*range(10)}


def test_normalized_images_have_mean_0_and_deviation_1():
    digits = data.load_images("digits")
    x = data.normalize(jnp.asarray(digits.train_images), *digits.statistics)
    np.testing.assert_allclose(x.mean(), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(), 1, rtol=1e-5)


@pytest.mark.parametrize(("batch", "samples"), [(10, 50), (7, 50), (50, 50)])
def test_an_epoch_shows_every_sample_once(batch, samples):
    steps = samples // batch
    order = jax.jit(lambda step: data.batch_indices(KEY, step, batch, samples))
    epochs = [np.concatenate([order(e * steps + i) for i in range(steps)]) for e in range(3)]
    for epoch in epochs:
        assert len({*epoch.tolist()}) == steps * batch
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(order(3), order(3))


def test_crops_are_windows_of_the_padded_image_and_flips_are_mirrored():
    x = np.random.default_rng(0).integers(1, 256, (40, 6, 5, 3)).astype(np.uint8)
    cropped = np.asarray(jax.jit(data.random_crop, static_argnums=2)(KEY, x, 2))
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    found = set()
    for image, crop in zip(padded, cropped):
        windows = {(i, j): image[i : i + 6, j : j + 5] for i in range(5) for j in range(5)}
        fits = [at for at, window in windows.items() if np.array_equal(window, crop)]
        assert len(fits) == 1
        found.update(fits)
    assert len(found) > 12
    flipped = np.asarray(data.random_flip(KEY, x))
    mirrored = [np.array_equal(f, image[:, ::-1]) for f, image in zip(flipped, x)]
    same = [np.array_equal(f, image) for f, image in zip(flipped, x)]
    assert all(a != b for a, b in zip(mirrored, same))
    assert 5 < sum(mirrored) < 35


def test_augmentation_is_a_function_of_the_key():
    x = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    for name in ("digits", "cifar10"):
        once, again = (data.augment(KEY, x, name) for _ in range(2))
        np.testing.assert_array_equal(once, again)
        assert not np.array_equal(once, data.augment(jax.random.key(1), x, name))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("cifar11",), ValueError, "unknown data set 'cifar11'.*did you mean.*cifar10"),
        (("glue",), ValueError, "unknown|not an image classification set"),
        (("imagenet2012",), ValueError, "vary in size"),
        (("cifar10", "/no/such/folder"), FileNotFoundError, "existing folder; got '/no/such"),
    ],
)
def test_wrong_names_and_folders(arguments, error, message):
    with pytest.raises(error, match=message):
        data.load_images(*arguments)


def test_a_set_that_is_not_prepared(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"looked in {re.escape(str(tmp_path))}.*download=True"
    ):
        data.load_images("mnist", tmp_path)


@pytest.mark.parametrize("batch", [0, 51])
def test_batches_larger_than_the_data(batch):
    with pytest.raises(ValueError, match=rf"\[1, 50\].*got {batch}"):
        data.batch_indices(KEY, jnp.int32(0), batch, 50)


def test_real_cifar10_is_read_without_tensorflow():
    if not (REAL / "cifar10").is_dir():
        pytest.skip("no prepared CIFAR-10 beside the repository")
    builder = images._tfds_builder("cifar10", REAL)
    assert images._splits(builder) == ("train", "test")
    pictures, labels = images._read(builder, "test[:200]")
    assert pictures.shape == (200, 32, 32, 3)
    assert {*labels} == {*range(10)}


# The path of a set that is downloaded and prepared for the first time.


@pytest.fixture
def look_alike(tmp_path_factory):
    """A data set of three classes, registered with TFDS, whose archive is served on loopback."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("builder")
    rng = np.random.default_rng(0)
    content = {
        split: (rng.integers(0, 256, (n, 4, 4, 3), np.uint8), rng.integers(0, 3, n, np.uint8))
        for split, n in (("train", 30), ("test", 9))
    }
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for split, arrays in content.items():
            for kind, array in zip(("images", "labels"), arrays):
                entry = tarfile.TarInfo(f"look-alike/{split}-{kind}.bin")
                entry.size = array.nbytes
                tar.addfile(entry, io.BytesIO(array.tobytes()))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(archive.getbuffer().nbytes))
            self.end_headers()
            self.wfile.write(archive.getvalue())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/look-alike.tar.gz"

    class LookAlikeImages(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(4, 4, 3)),
                    "label": tfds.features.ClassLabel(num_classes=3),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            folder = dl_manager.download_and_extract(url) / "look-alike"
            return {split: self._generate_examples(folder, split) for split in content}

        def _generate_examples(self, folder, split):
            labels = np.frombuffer((folder / f"{split}-labels.bin").read_bytes(), np.uint8)
            raw = np.frombuffer((folder / f"{split}-images.bin").read_bytes(), np.uint8)
            for i, (image, label) in enumerate(zip(raw.reshape(-1, 4, 4, 3), labels)):
                yield i, {"image": image, "label": int(label)}

    yield content
    server.shutdown()
    server.server_close()
    tfds.core.registered._DATASET_REGISTRY.pop("look_alike_images")


def test_download_extraction_and_preparation(look_alike, tmp_path):
    if importlib.util.find_spec("tensorflow") is None:
        with pytest.raises(ModuleNotFoundError, match=r'tensorflow.*"bdia_jax\[prepare\]"'):
            data.load_images("look_alike_images", tmp_path, download=True)
        assert not list(tmp_path.iterdir()), "something was done before the error"
        pytest.skip("TensorFlow is not installed: only the error was tested, not the download")
    loaded = data.load_images("look_alike_images", tmp_path, download=True)
    # The set is read in an order of its own; every image is there with its label.
    for split in ("train", "test"):
        expected = {image.tobytes(): label for image, label in zip(*look_alike[split])}
        name = "eval" if split == "test" else split
        pictures, labels = getattr(loaded, f"{name}_images"), getattr(loaded, f"{name}_labels")
        assert {p.tobytes(): label for p, label in zip(pictures, labels)} == expected
    assert loaded.num_classes == 3
    again = data.load_images("look_alike_images", tmp_path)
    np.testing.assert_array_equal(again.train_images, loaded.train_images)
