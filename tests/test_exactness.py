"""Every integer of every block is reconstructed: types, blocks, precisions and depths.

This is about the compiler, not about mathematics: the backward pass must recompute each block to
the last bit (``bdia_jax.pinning``). All programs here are compiled as in training, as one.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _blocks import BATCH, case
from _rows import covering, fast, names

from bdia_jax import BDIA, BackwardReport, Online, Update, check_reversible, reversible_scan

pytestmark = pytest.mark.optimized


def supported(row):
    """JAX's own attention does not run in float16 on a CPU; one written with einsum does."""
    return {
        "dot_product_attention": row["dtype"] != "float16",
        "attention": row["dtype"] == "float16",
    }.get(row["kind"], True)


ROWS = covering(
    supported,
    kind=["mlp", "conv", "dot_product_attention", "attention"],
    dtype=["float32", "bfloat16", "float16"],
    precision=[None, "bfloat16", "float32"],
    param_dtype=["float32", "bfloat16"],
    frac_bits=[9, 5],
    m=[1, 0, 2, 3, 4],
    signs=["block", "sample", "minus", "plus"],
    r=[0, 1],
    dropout=[0.1, 0.0],
    parts=[1, 3],
    update=[False, True],
    keep_in=["device", "host"],
)


def in_compute_dtype(block):
    """Parameters of whatever type are cast to that of ``x``, as layers do."""
    if isinstance(block, tuple):
        return tuple(map(in_compute_dtype, block))

    def cast(params, x, key, *consts):
        def to_dtype(leaf):
            is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
            return leaf.astype(x.dtype) if is_float else leaf

        return block(*jax.tree.map(to_dtype, (params, x)), key, *map(to_dtype, consts))

    return cast


def train_step(block, depth, step, update=False, keep_in="device"):
    """Loss, gradients and the report of the backward pass, in one program."""

    def descend(params, grads, state):
        return jax.tree.map(lambda p, g: p - p.dtype.type(1e-3) * g, params, grads), state

    @jax.jit
    def train(params, x, shift, mask, key):
        def loss(probe, params, x, shift):
            updating = Update(descend, params, jnp.zeros(depth)) if update else None
            y = reversible_scan(
                block,
                params,
                x,
                key=key,
                consts=(shift, mask),
                step=step,
                adjoint=Online(probe, updating, keep_in),
            )
            return jnp.mean(jnp.sin(y.astype(jnp.float32)))

        gradients = jax.grad(loss, (0, 1, 2, 3))
        report, *others = gradients(BackwardReport.zeros(depth), params, x, shift)
        return report, others

    return train


def assert_exact(train, arguments, seeds=3):
    for seed in range(seeds):
        report, gradients = train(*arguments, jax.random.key(seed))
        assert not report.mismatched.any()
        assert not report.corrected.any()
        chex.assert_tree_all_finite(gradients)


# The first rows have the most pairs.
@pytest.mark.parametrize("row", fast(6, ROWS), ids=names(ROWS))
def test_nothing_is_mismatched(row):
    depth = 6
    step = BDIA(2.0 ** -row["m"], row["signs"], row["frac_bits"], row["r"])
    with jax.default_matmul_precision(row["precision"]):
        block, params, x, consts = case(
            row["kind"],
            depth,
            parts=row["parts"],
            dropout=row["dropout"],
            dtype=row["dtype"],
            param_dtype=row["param_dtype"],
        )
        train = train_step(in_compute_dtype(block), depth, step, row["update"], row["keep_in"])
        assert_exact(train, (params, x, *consts))


@pytest.mark.parametrize(
    ("kind", "depth"), [("mlp", 1), ("mlp", 2), ("mlp", 48), ("dot_product_attention", 48)]
)
def test_nothing_is_mismatched_at_any_depth(kind, depth):
    block, params, x, consts = case(kind, depth, dtype="bfloat16", param_dtype="float32")
    train = train_step(in_compute_dtype(block), depth, BDIA())
    assert_exact(train, (params, x, *consts))


@pytest.mark.slow
def test_the_audit_finds_nothing():
    """Integer by integer, against the states of the forward pass themselves."""
    kind, parts = "dot_product_attention", 3
    block, params, x, consts = case(kind, 6, parts=parts, dropout=0.1, dtype="bfloat16")
    found = check_reversible(
        block, params, x, key=jax.random.key(0), consts=consts, step=BDIA(1 / 8, "sample")
    )
    assert found.compared == 6 * parts * x.size
    assert (found.mismatched, found.corrected, found.deviation) == (0, 0, 0.0)
    assert found.exact
    assert found.tolerance_bits == 0


def test_the_audit_finds_what_is_not_reversible():
    """A block whose value depends on how often it ran: the audit must not call it exact."""
    state = np.random.default_rng(0)

    def noise(shape):
        return state.normal(size=shape).astype(np.float32)

    def block(w, x, key):
        return w * jax.pure_callback(lambda: noise(x.shape), jax.typeof(x)) + jnp.tanh(x)

    found = check_reversible(block, jnp.ones(3), jnp.ones((BATCH, 8)), key=jax.random.key(0))
    assert not found.exact
    assert found.mismatched > 0.9 * found.compared
    assert found.deviation > 1
    assert found.tolerance_bits > 1


def test_the_audit_says_when_no_tolerance_will_do():
    arguments = lambda p, x, key: p * x, jnp.ones(3), jnp.full((BATCH, 8), jnp.nan)
    found = check_reversible(*arguments, key=jax.random.key(0))
    assert not found.exact
    assert found.tolerance_bits is None
    assert "no tolerance bits will do" in str(found)


def test_the_audit_is_asked_outside_of_a_trace():
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda x: check_reversible(lambda p, x, key: p * x, jnp.ones(3), x).compared)(
            jnp.ones((BATCH, 8))
        )
    # Also where what is traced is an array that the block holds.
    x = jnp.ones((BATCH, 8))
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda scale: check_reversible(lambda p, x, key: scale * p * x, jnp.ones(3), x))(
            1.0
        )
