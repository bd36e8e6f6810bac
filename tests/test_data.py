"""Images: sets prepared by TFDS, whole and damaged; bad input; batches as pure functions.

No test here but the download needs TensorFlow: sets of ready PNG files can be prepared without it.
"""

import collections
import dataclasses
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import pathlib
import shutil
import sys
import tarfile
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from bdia_jax import data
from bdia_jax.data import images as image_data
from bdia_jax.data import sets
from bdia_jax.train import ImageClassification

KEY = jax.random.key(0)
CIFAR_LIKE = np.random.default_rng(0).integers(1, 256, (64, 16, 16, 3)).astype(np.uint8)


def numbered(n, classes=3):
    """Images that say which they are, with the label ``number % classes``."""
    pictures = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 4, 4, 3))
    return pictures.copy(), np.arange(n, dtype=np.int32) % classes


def image_set(n=20, **changes):
    pictures, labels = numbered(n)
    return data.ImageData(
        **{
            "name": "numbered",
            "train_images": pictures,
            "train_labels": labels,
            "eval_images": pictures[:5],
            "eval_labels": labels[:5],
            "num_classes": 3,
        }
        | changes
    )


# ---------------------------------------------------------------------------------------------
# In memory
# ---------------------------------------------------------------------------------------------


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": np.zeros((20, 4, 4, 3))}, "must be uint8.*got float64"),
        ({"train_images": np.zeros((20, 4, 4), np.uint8)}, r"channel\]; got uint8\[20, 4, 4\]"),
        ({"train_labels": np.zeros(19, int)}, r"train_labels must be 20 integers.*int64\[19\]"),
        ({"eval_labels": np.zeros(5)}, "eval_labels must be 5 integers.*got float64"),
        ({"eval_labels": np.array([0, 1, 2, 3, 0])}, r"\[0, 3\).*eval_labels from 0 to 3"),
        ({"eval_labels": np.full(5, -1)}, "eval_labels from -1 to -1"),
        ({"num_classes": None}, "num_classes must be an int >= 1; got None"),
        ({"num_classes": 0}, "num_classes must be an int >= 1; got 0"),
        (
            {"eval_images": np.zeros((0, 4, 4, 3), np.uint8), "eval_labels": np.zeros(0, int)},
            "both splits need samples; got 20 for training and 0",
        ),
        ({"eval_images": np.zeros((5, 4, 5, 3), np.uint8)}, "one shape; got .4, 4, 3. and .4, 5,"),
    ],
)
def test_arrays_that_do_not_fit_together(changes, message):
    with pytest.raises(ValueError, match=message):
        image_set(**changes)


def test_classes_that_are_not_the_models():
    data.check_classes("digits", 10, 10)
    for found in (9, 100):
        message = f"images of digits have {found} classes, the model 10: .*num_classes={found}"
        with pytest.raises(ValueError, match=message):
            data.check_classes("digits", found, 10)


def test_edited_images_have_another_fingerprint():
    edited = image_set().train_images.copy()
    edited[3, 1, 2, 0] += 1
    sets_of = [image_set(), image_set(name="renamed"), image_set(train_images=edited)]
    sets_of += [image_set(eval_labels=np.array([0, 1, 2, 0, 2])), image_set(num_classes=4)]
    found = [each.fingerprint for each in sets_of]
    assert found[0] == found[1]
    assert len({*found}) == 4


def test_digits_are_all_there_once_and_every_class_in_both_splits():
    from sklearn.datasets import load_digits

    whole, digits = load_digits(), data.load_images("digits")
    both = np.concatenate([digits.train_images, digits.eval_images])[..., 0]
    expected = np.round(whole.images * 255 / 16).astype(np.uint8)
    assert collections.Counter(x.tobytes() for x in both) == collections.Counter(
        x.tobytes() for x in expected
    )
    share = np.bincount(digits.eval_labels) / np.bincount(whole.target)
    np.testing.assert_allclose(share, 0.2, atol=0.005)


@pytest.mark.unchecked
def test_statistics_are_numpys_and_a_constant_channel_stays_finite():
    pictures = CIFAR_LIKE.copy()
    pictures[..., 1] = 7
    labels = np.zeros(len(pictures), int)
    mean, std = data.ImageData("x", pictures, labels, pictures, labels, 1).statistics
    np.testing.assert_allclose(mean, pictures.mean((0, 1, 2)), rtol=1e-7)
    np.testing.assert_allclose(std[[0, 2]], pictures.std((0, 1, 2))[[0, 2]], rtol=1e-7)
    assert mean.dtype == std.dtype == np.float32
    assert std[1] == 1
    assert not np.any(data.normalize(jnp.asarray(pictures), mean, std)[..., 1])


# ---------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2.0, True, "2", None, -1])
def test_batch_sizes_that_are_none(batch):
    with pytest.raises(ValueError, match=r"int in \[1, 50\].*got"):
        data.batch_indices(KEY, jnp.int32(0), batch, 50)


@pytest.mark.parametrize("augment", [False, True])
def test_training_batches_are_a_function_of_key_and_step(augment):
    task = ImageClassification(image_set(20), augment=augment)
    arrays = jax.tree.map(jnp.asarray, task.arrays())
    batch = jax.jit(lambda key, step: task.batch(arrays, key, step, 6))
    # As a run takes them, and as one that is resumed at step 4 does.
    _, (pictures, labels) = jax.device_get(
        jax.lax.scan(lambda step, _: (step + 1, batch(KEY, step)), jnp.int32(0), length=6)
    )
    resumed = batch(KEY, jnp.int32(4))
    np.testing.assert_array_equal(resumed[0], pictures[4])
    np.testing.assert_array_equal(resumed[1], labels[4])
    assert not np.array_equal(batch(jax.random.key(1), jnp.int32(4))[0], pictures[4])
    if augment:
        return
    mean, std = task.data.statistics
    number = np.round(pictures[..., 0, 0, 0] * std[0] + mean[0]).astype(int)
    np.testing.assert_array_equal(labels, number % 3)
    # 20 samples, in batches of 6: an epoch has 3 steps, and leaves out 2.
    assert [len({*epoch.tolist()}) for epoch in number.reshape(2, 18)] == [18, 18]
    assert not np.array_equal(number[:3], number[3:])


def windows(image, padding):
    """All crops of an image with zeros around it, found by a loop."""
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, channels), image.dtype)
    padded[padding : padding + height, padding : padding + width] = image
    for i, j in itertools.product(range(2 * padding + 1), repeat=2):
        yield (i, j), padded[i : i + height, j : j + width]


@pytest.mark.parametrize(
    ("name", "mirrored"), [("cifar10", True), ("emnist/letters", False), ("mnist:3.0.1", False)]
)
def test_augmented_images_are_windows_and_characters_are_not_mirrored(name, mirrored):
    augmented = np.asarray(data.augment(KEY, jnp.asarray(CIFAR_LIKE), name))
    assert augmented.dtype == np.uint8
    found = []
    for image, result in zip(CIFAR_LIKE, augmented, strict=True):
        # 16 pixels: moved by up to 2.
        found += [
            (flip, *at)
            for flip, view in enumerate((image, image[:, ::-1]))
            for at, window in windows(view, 2)
            if np.array_equal(window, result)
        ]
    flips, rows, columns = zip(*found, strict=True)
    assert len(found) == len(CIFAR_LIKE)
    assert {*flips} == ({0, 1} if mirrored else {0})
    assert {*rows} == {*columns} == {0, 1, 2, 3, 4}


@pytest.mark.optimized
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_batches_are_the_same_and_nothing_travels(axis_type):
    def batch(key, pictures):
        pictures = data.augment(key, pictures, "cifar10")
        return data.normalize(pictures, jnp.ones(3), jnp.full(3, 2.0))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        sharded = jax.device_put(CIFAR_LIKE, sharding)
        compiled = jax.jit(batch).lower(KEY, sharded).compile()
        result = compiled(KEY, sharded)
    assert result.sharding.is_equivalent_to(sharding, 4)
    assert not any(s in compiled.as_text() for s in ("all-gather", "all-reduce", "all-to-all"))
    np.testing.assert_array_equal(result, jax.jit(batch)(KEY, CIFAR_LIKE))


# ---------------------------------------------------------------------------------------------
# Prepared sets
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_tensorflow(monkeypatch):
    """Whatever imports it fails."""

    class Refuse:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == "tensorflow":
                raise ModuleNotFoundError(f"no {name} in this test", name=name)

    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Refuse(), *sys.meta_path])


def prepare(folder, splits=None, shape=(4, 4, 3), dtype=np.uint8, label=None):
    """A set ``numbers``, which TFDS then knows from its files alone."""

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.0")
        name = "numbers"

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=shape, dtype=dtype),
                "label": tfds.features.ClassLabel(num_classes=3) if label is None else label,
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            sizes = splits or {"train": 9, "test": 4}
            return {split: self._generate_examples(*numbered(n)) for split, n in sizes.items()}

        def _generate_examples(self, pictures, labels):
            for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
                yield i, {"image": Image.fromarray(picture), "label": int(label)}

    Builder(data_dir=folder).download_and_prepare(file_format="array_record")
    return folder / "numbers" / "1.2.0"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder)
    return folder


@pytest.mark.usefixtures("no_tensorflow")
def test_a_prepared_set_is_read_without_tensorflow(prepared):
    loaded = data.load_images("numbers", prepared)
    assert (loaded.name, loaded.num_classes) == ("numbers", 3)
    for pictures, labels, n in (
        (loaded.train_images, loaded.train_labels, 9),
        (loaded.eval_images, loaded.eval_labels, 4),
    ):
        order = pictures[:, 0, 0, 0]
        expected = [array[order] for array in numbered(n)]
        assert sorted(order) == [*range(n)]
        np.testing.assert_array_equal(pictures, expected[0])
        np.testing.assert_array_equal(labels, expected[1])
        assert labels.dtype == np.int32
    again = data.load_images("numbers:1.2.0", str(prepared))
    np.testing.assert_array_equal(again.train_images, loaded.train_images)


def test_evaluates_on_validation_if_there_is_no_test(tmp_path):
    prepare(tmp_path, {"train": 5, "validation": 3})
    assert len(data.load_images("numbers", tmp_path).eval_images) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"splits": {"train": 3}}, "needs a split 'train', and 'validation' or 'test'; it has"),
        ({"shape": (None, None, 3)}, "numbers vary in size"),
        ({"dtype": np.uint16}, "uint8.*those of numbers are uint16"),
        ({"label": tfds.features.Scalar(np.int64)}, "not an image classification set"),
        ({"shape": (5, 4, 3)}, r"image 0 of numbers, train has the shape \(4, 4, 3\)"),
    ],
)
def test_sets_that_do_not_fit(tmp_path, arguments, message):
    prepare(tmp_path, **arguments)
    with pytest.raises(ValueError, match=message):
        data.load_images("numbers", tmp_path)


def as_tfrecord(folder):
    path = folder / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": "tfrecord"}))


def counting(split, number):
    """Says that a split has so many images."""

    def change(folder):
        path = folder / "dataset_info.json"
        info = json.loads(path.read_text())
        next(s for s in info["splits"] if s["name"] == split)["shardLengths"] = [str(number)]
        path.write_text(json.dumps(info))

    return change


def describing(old, new):
    """Describes the features otherwise."""

    def change(folder):
        path = folder / "features.json"
        text = " ".join(path.read_text().split())
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def truncate(folder):
    (path,) = folder.glob("*-test.*")
    path.write_bytes(path.read_bytes()[:1000])


def corrupt(folder):
    (path,) = folder.glob("*-test.*")
    raw = bytearray(path.read_bytes())
    raw[100:140] = bytes(40)
    path.write_bytes(raw)


@pytest.mark.usefixtures("no_tensorflow")
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (as_tfrecord, ValueError, r"numbers.1\.2\.0 was prepared as tfrecord.*another data_dir"),
        (lambda f: next(f.glob("*-test.*")).unlink(), OSError, "damaged.*No such file"),
        (truncate, OSError, "damaged.*Delete that folder"),
        (corrupt, OSError, "damaged.*Delete that folder"),
        (lambda f: (f / "dataset_info.json").write_text("{"), ValueError, "cannot open 'numbers'"),
        (lambda f: (f / "dataset_info.json").unlink(), ValueError, "not read dataset info"),
        (lambda f: (f / "features.json").unlink(), ValueError, "is there, but.*features.json"),
        (lambda f: (f / "features.json").write_text("{"), ValueError, "cannot open 'numbers'"),
        (lambda f: next(f.glob("*-train.*")).write_bytes(b""), OSError, "damaged"),
        (counting("train", 10), OSError, "damaged.*out of bound"),
        (counting("test", 0), ValueError, "split 'test' of numbers must have images; got none"),
        (
            describing('"numClasses": "3"', '"numClasses": "2"'),
            ValueError,
            r"\[0, 2\).*from 0 to 2",
        ),
        (describing('"numClasses": "3"', ""), ValueError, "must have classes"),
        (describing('"3" ] }', '"1" ] }'), ValueError, "image 0 of numbers, train has the shape"),
        (
            describing('"label": {', '"fine_label": {'),
            ValueError,
            "needed are.*it has .*fine_label",
        ),
    ],
)
def test_damaged_sets(prepared, tmp_path, damage, error, message):
    folder = shutil.copytree(prepared, tmp_path / "copy")
    damage(folder / "numbers" / "1.2.0")
    with pytest.raises(error, match=message):
        data.load_images("numbers", folder)


@pytest.mark.usefixtures("no_tensorflow")
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("CIFAR-10", ValueError, "unknown.*list_builders.*did you mean.*cifar10"),
        ("digit", ValueError, "unknown.*did you mean.*digits"),
        # What TFDS would look up in the internet, or in folders above data_dir.
        ("huggingface:mnist", ValueError, "unknown data set 'huggingface:mnist'"),
        ("../numbers", ValueError, "unknown data set"),
        ("", ValueError, "unknown data set ''"),
        (None, ValueError, "unknown data set None"),
        ("cifar10:9.9.9", ValueError, r"cannot open 'cifar10:9\.9\.9'.*only: 3"),
        ("mnist/none", ValueError, "cannot open 'mnist/none'.*none not found"),
        ("numbers:7.0.0", ValueError, "unknown data set 'numbers:7.0.0'"),
        ("ag_news_subset", ValueError, r"needed are the features.*it has \['"),
    ],
)
def test_names_that_are_none(prepared, name, error, message):
    with pytest.raises(error, match=message):
        data.load_images(name, prepared)


def test_another_version_is_named(tmp_path):
    (tmp_path / "cifar10" / "1.0.0").mkdir(parents=True)
    (tmp_path / "cifar10" / "1.0.0" / "dataset_info.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"there is version 1\.0\.0: ask for name:version"):
        data.load_images("cifar10", tmp_path)


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError, match=r"a folder; got the file .*file"):
        data.load_images("cifar10", file)
    # The superuser, whom many containers run as, may read all folders.
    monkeypatch.setattr(sets.os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="no permission to read"):
        data.load_images("cifar10", tmp_path)


# ---------------------------------------------------------------------------------------------
# The first time
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Server:
    """A look-alike of CIFAR-10's archive on loopback, and how often it was asked for."""

    train: tuple
    test: tuple
    archive: bytes
    requests: int = 0


@pytest.fixture
def cifar10_server(monkeypatch):
    """TFDS's own CIFAR-10 code, pointed at an archive of 5 × 4 + 3 images, with its checksum."""
    from tensorflow_datasets.image_classification.cifar import Cifar10

    rng = np.random.default_rng(0)
    shapes = {"train": 20, "test": 3}
    content = {
        split: (rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n, np.uint8))
        for split, n in shapes.items()
    }

    def binary(pictures, labels):
        planes = pictures.transpose(0, 3, 1, 2).reshape(len(labels), -1)
        return np.concatenate([labels[:, None], planes], 1).tobytes()

    pictures, labels = content["train"]
    names = [f"class {i}" for i in range(10)]
    files = {
        f"data_batch_{i + 1}.bin": binary(pictures[4 * i : 4 * i + 4], labels[4 * i : 4 * i + 4])
        for i in range(5)
    } | {"test_batch.bin": binary(*content["test"]), "batches.meta.txt": "\n".join(names).encode()}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, raw in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(raw)
            tar.addfile(entry, io.BytesIO(raw))
    state = Server(content["train"], content["test"], stream.getvalue())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(state.archive)))
            self.end_headers()
            self.wfile.write(state.archive)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
    original = Cifar10._cifar_info
    monkeypatch.setattr(
        Cifar10, "_cifar_info", property(lambda self: original.fget(self)._replace(url=url))
    )
    checksum = tfds.core.download.checksums.UrlInfo(
        size=len(state.archive), checksum=hashlib.sha256(state.archive).hexdigest(), filename=None
    )
    Cifar10.url_infos = {url: checksum}  # before the inherited one, which reads TFDS's own files
    yield state
    del Cifar10.url_infos
    server.shutdown()
    server.server_close()


def test_without_tensorflow_nothing_is_downloaded(cifar10_server, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    folder = tmp_path / "new"
    message = r"looked in .*new.*tensorflow.*pip install \"bdia_jax\[prepare\]\""
    with pytest.raises(ModuleNotFoundError, match=message):
        data.load_images("cifar10", folder, download=True)
    assert cifar10_server.requests == 0
    assert not folder.exists()


def test_cifar10_is_downloaded_extracted_prepared_and_read(cifar10_server, tmp_path):
    needed = ("tensorflow", "importlib_resources")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"downloading needs {' and '.join(missing)}: not installed")
    with pytest.raises(FileNotFoundError, match="download=True"):
        data.load_images("cifar10", tmp_path)
    assert cifar10_server.requests == 0, "downloaded without being asked"

    right, cifar10_server.archive = cifar10_server.archive, cifar10_server.archive[:-10] + bytes(10)
    with pytest.raises(RuntimeError, match=r"cifar10 could not be downloaded.*checksum"):
        data.load_images("cifar10", tmp_path, download=True)
    assert not (tmp_path / "cifar10" / "3.0.2").exists(), "a half-made set was left"

    cifar10_server.archive = right
    loaded = data.load_images("cifar10", tmp_path / "new", download=True)
    splits = ((loaded.train_images, loaded.train_labels), (loaded.eval_images, loaded.eval_labels))
    for found, expected in zip(splits, (cifar10_server.train, cifar10_server.test), strict=True):
        # Read in an order of its own: every image is there once, with its label.
        assert len(found[0]) == len(expected[0])
        assert dict(zip(map(bytes, found[0]), found[1], strict=True)) == dict(
            zip(map(bytes, expected[0]), expected[1], strict=True)
        )
    asked = cifar10_server.requests
    again = data.load_images("cifar10", tmp_path / "new", download=True)
    np.testing.assert_array_equal(again.train_images, loaded.train_images)
    assert cifar10_server.requests == asked, "downloaded twice"


def test_a_test_is_kept_apart_where_there_is_a_validation(tmp_path):
    prepare(tmp_path, splits={"train": 9, "test": 4, "validation": 3})
    loaded = data.load_images("numbers", tmp_path)
    assert (len(loaded.train_labels), len(loaded.eval_labels)) == (9, 3)


def test_real_cifar10():
    folder = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data" / "tfds"
    if not (folder / "cifar10").is_dir():
        pytest.skip("no prepared CIFAR-10 beside the repository")
    builder = sets.find("cifar10", folder)
    assert image_data._splits(builder) == ("train", "test")
    pictures, labels = image_data._read(builder, "test[:200]")
    assert pictures.shape == (200, 32, 32, 3)
    assert {*labels} == {*range(10)}


@pytest.mark.parametrize(("batch", "samples"), [(10, 50), (7, 50), (50, 50)])
def test_an_epoch_shows_every_sample_once(batch, samples):
    steps = samples // batch
    order = jax.jit(lambda step: data.batch_indices(KEY, step, batch, samples))
    epochs = [np.concatenate([order(e * steps + i) for i in range(steps)]) for e in range(3)]
    for epoch in epochs:
        assert len({*epoch.tolist()}) == steps * batch
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.unchecked
def test_normalized_images_have_mean_0_and_deviation_1():
    digits = data.load_images("digits")
    x = data.normalize(jnp.asarray(digits.train_images), *digits.statistics)
    np.testing.assert_allclose(x.mean(), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(), 1, rtol=1e-5)
