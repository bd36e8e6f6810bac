"""Networks that are on a mesh before they are trained, and never whole on one device."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from bdia_jax import interop
from bdia_jax.data import ImageData, TextData
from bdia_jax.nn import Decoder, DecoderConfig, VisionTower, VisionTowerConfig, add_lora
from bdia_jax.train import (
    LanguageModelling,
    ResizedImages,
    TrainSettings,
    choose_gamma,
    evaluate,
    fit_head,
    place_on_mesh,
    placed,
)
from bdia_jax.train.mesh import state_shardings
from bdia_jax.train.placing import check_mesh, mesh_of
from bdia_jax.train.programs import Programs

CONFIG = DecoderConfig(
    vocab_size=48, max_length=16, width=64, depth=2, heads=4, hidden=64, dtype="float32"
)
TEXT = np.arange(600, dtype=np.int32) % 48
TASK = LanguageModelling(TextData("numbers", TEXT, TEXT[:400], 48), 16)
MESH = "data=2,fsdp=4"
several = pytest.mark.skipif(jax.device_count() != 8, reason="there must be 8 devices")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("placed") / "model"
    interop.save(Decoder(CONFIG, rngs=nnx.Rngs(0)), path)
    return path


def arrays(model):
    """Those of a model, by their paths; keys as words."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.as_pure(nnx.state(model)))
    return {
        jax.tree_util.keystr(path): jax.random.key_data(a)
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)
        else a
        for path, a in leaves
    }


@several
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_loaded_network_is_split_as_in_training(folder, quantize):
    if quantize is not None:
        pytest.importorskip("qwix")
    whole = interop.load(folder, quantize=quantize)
    model = interop.load(folder, quantize=quantize, place=placed(MESH))
    kernels = [a for path, a in arrays(model).items() if "kernel" in path or "codes" in path]
    assert len(kernels) == 6
    for kernel in kernels:
        assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    # What is added is placed then.
    for one in (whole, model):
        add_lora(one, 2, 4.0, rngs=nnx.Rngs(1))
    place_on_mesh(model, MESH)
    mesh = mesh_of(model)
    assert mesh is not None
    assert mesh.shape == {"data": 2, "fsdp": 4}
    expected = arrays(whole)
    for path, found in arrays(model).items():
        assert found.sharding.is_equivalent_to(state_shardings(mesh, found), found.ndim), path
        np.testing.assert_array_equal(found, expected[path])


@several
def test_it_is_measured_and_evaluated_there(folder):
    """With the same numbers, but for the order of sums."""
    found = {}
    for mesh in (None, MESH):
        model = interop.load(folder, place=placed(mesh))
        choice = choose_gamma(
            model, TASK, 8, batches=1, gammas=(0.5, 0.25), signs=("block", "sample")
        )
        # 24 windows in the text: no multiple of 5, and 5 none of the devices.
        losses = [evaluate(model, TASK, eval_batch_size=size)["loss"] for size in (5, 8)]
        found[mesh] = [choice.standard, *(t.loss for t in choice.trials), *losses]
        assert (mesh_of(model) is None) == (mesh is None)
    np.testing.assert_allclose(found[MESH], found[None], rtol=1e-5)


@several
@pytest.mark.buffers
@pytest.mark.parametrize("what", ["evaluation", "choice"])
def test_samples_are_split_there(folder, what, monkeypatch):
    """By itself, every device would compute the whole batch."""
    wide = dataclasses.replace(CONFIG, hidden=1024)
    needed = {}
    jit = jax.jit

    def noting(function, *args, **kwargs):
        compiled = jit(function, *args, **kwargs)

        def call(*given):
            if mesh in needed:
                needed[mesh] = max(needed[mesh], temporaries(compiled, *given))
            return compiled(*given)

        return call

    def temporaries(compiled, *given):
        return compiled.lower(*given).compile().memory_analysis().temp_size_in_bytes

    for mesh in (None, "data=8"):
        model = Decoder(wide, rngs=nnx.Rngs(0))
        place_on_mesh(model, mesh)
        needed[mesh] = 0
        monkeypatch.setattr(jax, "jit", noting)
        if what == "evaluation":
            evaluate(model, TASK, eval_batch_size=24)
        else:
            choose_gamma(model, TASK, 24, batches=1, gammas=(0.5,), signs=("block",))
        monkeypatch.undo()
    assert needed["data=8"] < needed[None] / 3, needed


@several
def test_the_optimizers_state_is_made_in_parts(monkeypatch):
    """No device makes all of it, to send it to the others."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    programs = Programs(model, TASK, TrainSettings(batch_size=8, mesh="fsdp=8"))
    made = []
    new_state = programs._new_state

    def noted(params):
        state = new_state(params)
        made.append(all(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(state.opt_state)))
        return state

    monkeypatch.setattr(programs, "_new_state", noted)
    state = programs.first_state(model)
    assert made == [True]
    assert jax.tree.map(lambda a: a.sharding, state) == programs._shardings


@several
@pytest.mark.slow
def test_the_head_of_a_vision_tower_is_fitted_there():
    """With the same classes, and another loss by no more than the order of sums."""
    config = VisionTowerConfig(
        image_size=8, patch_size=4, width=16, depth=2, heads=2, hidden=32, num_classes=2
    )
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 2
    images = (rng.integers(0, 156, (48, 8, 8, 3)) + 100 * labels[:, None, None, None]).astype("u1")
    data = ImageData("stripes", images, labels, images, labels, 2)
    task = ResizedImages(data, 8, np.full(3, 127.0), np.full(3, 64.0), augmentation=None)
    found = {}
    for mesh in (None, MESH):
        model = VisionTower(dataclasses.replace(config, dtype="float32"), rngs=nnx.Rngs(0))
        place_on_mesh(model, mesh)
        right = fit_head(model, task, 48)
        found[mesh] = [right, *evaluate(model, task).values()]
        assert (mesh_of(model) is None) == (mesh is None)
    np.testing.assert_allclose(found[MESH], found[None], rtol=1e-4)


@several
@pytest.mark.parametrize(
    ("mesh", "message"),
    [("fsdp=3", "is of 3 devices; there are 8"), ("fsdp=8", "must divide a micro-batch of 6")],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    with pytest.raises(ValueError, match=message):
        check_mesh(TrainSettings(batch_size=12, accumulate=2, mesh=mesh))


def test_without_a_mesh_nothing_is_placed():
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    before = nnx.state(model)
    place_on_mesh(model, None)
    assert mesh_of(model) is None
    for one, other in zip(*map(jax.tree.leaves, (before, nnx.state(model))), strict=True):
        assert one is other
