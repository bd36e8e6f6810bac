"""Fences, and what is read to keep residuals alive; programs for other devices, and exported ones.

What a fence becomes is decided where a program is lowered. A program can be lowered for devices
that are not there, and read.
"""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bdia_jax import BDIA, Checkpoint, Direct, Euler, Midpoint, Online, pinning, reversible_scan
from bdia_jax.pinning import fence, touch

CONSTRAINT, BARRIER = "LayoutConstraint", "optimization_barrier"
CONSTRAINTS = (CONSTRAINT, "CustomSPMDPartitioning")
"""On one device, or where each is told apart; and on several, for a partitioner."""
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def lowered(function, *arguments, platform="cuda"):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def gradient(params, x, step=BDIA(signs="plus"), adjoint=Online()):  # noqa: B008
    def loss(params, x):
        y = reversible_scan(
            lambda w, x, key: jnp.tanh(x @ w), params, x, step=step, adjoint=adjoint
        )
        return jnp.sum(y**2)

    return jax.grad(loss, (0, 1))(params, x)


def arguments(batch=4):
    return jnp.ones((3, 8, 8)) / 8, jnp.ones((batch, 8))


@pytest.mark.optimized
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_fence_lays_arrays_out_by_rows_on_a_single_accelerator(platform):
    """Those that have two axes and more: other arrays, and keys, can be laid out in one way."""
    tree = {
        "matrix": jnp.ones((2, 3)),
        "rank 3": jnp.ones((2, 3, 4), jnp.int32),
        "vector": jnp.ones(3),
        "scalar": jnp.float32(1),
        "keys": jax.random.split(jax.random.key(0), (2, 2)),
    }
    text = lowered(fence, tree, platform=platform)
    assert text.count(CONSTRAINT) == (0 if platform == "cpu" else 2)
    assert text.count(BARRIER) == 1


@pytest.mark.optimized
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_both_passes_are_fenced(platform):
    """As many constraints around the block in one as in the other; only around pinned blocks."""
    text = lowered(gradient, *arguments(), platform=platform)
    assert BARRIER in text
    # A state, the weights, the update and two residuals in either pass, and more of them or less.
    assert text.count(CONSTRAINT) == 0 if platform == "cpu" else text.count(CONSTRAINT) >= 8
    for adjoint in (Checkpoint(), Direct()):
        other = lowered(functools.partial(gradient, adjoint=adjoint), *arguments())
        assert CONSTRAINT not in other
        assert BARRIER in other
    free = lowered(functools.partial(gradient, step=Euler(), adjoint=Direct()), *arguments())
    assert BARRIER not in free


@pytest.mark.optimized
@pytest.mark.parametrize("around", ["vmap", "scan", "checkpoint", "jit"])
def test_fences_stay_inside_other_transformations(around):
    params, x = arguments()
    function = {
        "vmap": jax.vmap(gradient, (None, 0)),
        "scan": lambda p, xs: jax.lax.scan(lambda c, x: (c, gradient(p, x)), 0, xs)[1],
        "checkpoint": jax.checkpoint(jax.vmap(gradient, (None, 0))),
        "jit": jax.jit(jax.vmap(gradient, (None, 0))),
    }[around]
    assert CONSTRAINT in lowered(function, params, x[None])
    assert CONSTRAINT not in lowered(function, params, x[None], platform="cpu")


@pytest.mark.optimized
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_partitioner_is_told_that_each_device_lays_out_its_part(devices, kind):
    """A constraint as it is would have it gather the array."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])
    params, x = arguments()
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        text = lowered(gradient, params, x)
        assert not any(name in lowered(gradient, params, x, platform="cpu") for name in CONSTRAINTS)
    assert [name in text for name in CONSTRAINTS] == [devices == 1, devices == 2]
    assert BARRIER in text


@pytest.mark.parametrize("devices", [1, 2])
def test_within_shard_map_there_is_no_partitioner(devices):
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    mapped = jax.shard_map(
        gradient, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P("data"))
    )
    text = lowered(mapped, *arguments())
    assert [name in text for name in CONSTRAINTS] == [True, False]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_layouts_of_parts_send_nothing(kind, monkeypatch):
    """Compiled for two devices of this platform, as for others."""
    monkeypatch.setattr(pinning, "_by_rows", pinning._parts_laid_out)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])
    params, x = arguments()
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        compiled = jax.jit(fence).lower((params, x)).compile()
    assert not any(name in compiled.as_text() for name in ("all-", "collective", "custom-call"))
    assert compiled.output_shardings[1].is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.optimized
def test_devices_are_those_of_the_program():
    """Eight are here; a program for one of them has constraints, however many there are."""
    assert jax.device_count() > 1
    assert CONSTRAINT in lowered(gradient, *arguments())


# ---------------------------------------------------------------------------------------------
# What is read of a residual
# ---------------------------------------------------------------------------------------------


@pytest.mark.optimized
@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "float64",
        "bfloat16",
        "float16",
        "float8_e4m3fn",
        "complex64",
        "complex128",
        "int8",
        "int32",
        "bool",
    ],
)
def test_a_residual_of_any_type_is_read(dtype):
    with jax.enable_x64(dtype.endswith(("64", "128"))):
        x = jnp.arange(1, 7).reshape(2, 3).astype(dtype)
        word = touch(x)
        assert word.dtype == jnp.uint32
        assert word.shape == ()
        assert word != touch(jnp.zeros_like(x)) or dtype in ("float64", "complex128")
        assert BARRIER not in str(jax.make_jaxpr(touch)(x))


@pytest.mark.optimized
def test_keys_empty_arrays_and_scalars_are_read():
    assert touch(jax.random.key(3)) == 3 or touch(jax.random.key(3)) == 0
    assert touch(jnp.zeros((0, 3))) == 0
    assert touch(jnp.uint32(5)) == 5
    assert touch(jnp.float32(jnp.nan)) != 0


# ---------------------------------------------------------------------------------------------
# Exported programs
# ---------------------------------------------------------------------------------------------

EXPORTED = {
    "online": (BDIA(0.25, "sample", 9, 1), Online()),
    "midpoint": (Midpoint(), Online()),
    "checkpoint": (BDIA(), Checkpoint()),
    "rounded checkpoint": (Euler(), Checkpoint(bits=4)),
    "direct": (BDIA(), Direct()),
    "standard": (Euler(9), Direct()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_a_scan_is_exported_with_a_symbolic_batch(name):
    """Values and gradients; also when written to bytes and read again, which needs flatbuffers."""
    step, adjoint = EXPORTED[name]
    params = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 5)) / 3, jnp.float32)

    @jax.jit
    def function(params, x):
        def loss(params, x):
            settings = {"key": jax.random.key(1), "step": step, "adjoint": adjoint}
            block = (lambda w, x, key: jnp.tanh(x @ w), lambda w, x, key: jnp.sin(x))
            y = reversible_scan(block, params, x, **settings)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    (batch,) = export.symbolic_shape("b")
    shapes = (
        jax.ShapeDtypeStruct(params.shape, params.dtype),
        jax.ShapeDtypeStruct((batch, 5), jnp.float32),
    )
    exported = export.export(function, platforms=("cpu",))(*shapes)
    if importlib.util.find_spec("flatbuffers"):
        exported = export.deserialize(bytearray(exported.serialize()))
    else:
        with pytest.raises(ImportError, match="install 'flatbuffers'"):
            exported.serialize()
    for size in (1, 4):
        x = jnp.asarray(np.random.default_rng(size).normal(size=(size, 5)), jnp.float32)
        found, expected = exported.call(params, x), function(params, x)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert math.prod(exported.out_avals[0].shape) == params.size


def test_exporting_a_pinned_gradient_for_an_accelerator_takes_leave():
    """Of JAX, which promises nothing about constraints of layouts in programs on disk."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments())
    with pytest.raises(ValueError, match=f"no compatibility guarantees.*[\\s\\S]*{CONSTRAINT}"):
        export.export(jax.jit(gradient), platforms=("cuda",))(*shapes)
    leave = [export.DisabledSafetyCheck.custom_call(CONSTRAINT)]
    exported = export.export(jax.jit(gradient), platforms=("cuda",), disabled_checks=leave)(*shapes)
    assert CONSTRAINT in exported.mlir_module()
