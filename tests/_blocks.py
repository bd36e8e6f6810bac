"""What several tests share: small blocks of the usual kinds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

BATCH = 3


def _norm(x, scale):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.var(x, axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale


def _dropout(x, key, rate):
    if not rate:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def mlp(p, x, key, shift, mask, *, dropout=0.0):
    """Of [batch, 5]: a width that fills no word of side bits."""
    y = jnp.tanh(_norm(x, p["scale"]) @ p["w"] + p["b"] + shift) * mask
    return _dropout(y, key, dropout) @ p["v"]


def attention(p, x, key, shift, mask, *, dropout=0.0, library=False):
    """Pre-norm self-attention with two heads and a feed-forward layer, of [batch, 4, 8]."""
    keys = jax.random.split(key)
    y = _norm(x, p["scale"]) + shift
    q, k, v = ((y @ p[name]).reshape(*x.shape[:2], 2, 4) for name in ("query", "key", "value"))
    if library:
        a = jax.nn.dot_product_attention(q, k, v, mask=mask)
    else:
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2
        a = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(mask, scores, -1e4)), v)
    a = _dropout(a.reshape(x.shape), keys[0], dropout) @ p["w"]
    y = jax.nn.gelu(_norm(x + a, p["scale"]) @ p["up"] + p["b"])
    return a + _dropout(y, keys[1], dropout) @ p["down"]


def conv(p, x, key, shift, mask, *, dropout=0.0):
    """Two 3×3 convolutions, of [batch, 4, 4, 3]."""
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = jax.nn.silu(convolve(_norm(x, p["scale"]) + shift, p["w"]) + p["b"]) * mask
    return convolve(_dropout(y, key, dropout), p["v"])


def gate(p, x, key, shift, mask, *, dropout=0.0):
    """A part that reads one parameter, and no constant."""
    del shift, mask
    return _dropout(jnp.tanh(x) * p["scale"] / 4, key, dropout)


def drift(p, x, key, shift, mask, *, dropout=0.0):
    """A part that reads one constant, and no parameter."""
    del p, mask
    return _dropout(jnp.cos(x) * jnp.mean(shift), key, dropout)


_SHAPES = {
    "mlp": ((5,), {"scale": (5,), "w": (5, 7), "b": (7,), "v": (7, 5)}),
    "attention": (
        (4, 8),
        {name: (8, 8) for name in ("query", "key", "value", "w")}
        | {"scale": (8,), "up": (8, 12), "b": (12,), "down": (12, 8)},
    ),
    "conv": ((4, 4, 3), {"scale": (3,), "w": (3, 3, 3, 4), "b": (4,), "v": (3, 3, 4, 3)}),
}
_BLOCKS = {
    "mlp": mlp,
    "attention": attention,
    "conv": conv,
    "dot_product_attention": functools.partial(attention, library=True),
}


def case(kind, depth, *, parts=1, dropout=0.0, dtype=jnp.float32, param_dtype=None, seed=0):
    """A block of so many parts, stacked parameters, an input, and consts: a vector and a mask."""
    shape, shapes = _SHAPES["attention" if kind == "dot_product_attention" else kind]
    rng = np.random.default_rng(seed)

    def draw(shape, scale):
        return jnp.asarray(rng.normal(size=shape) * scale, param_dtype or dtype)

    params = {
        name: draw((depth, *s), np.prod(s[:-1]) ** -0.5 if len(s) > 1 else 0.3)
        for name, s in shapes.items()
    }
    params["scale"] += 1
    x = jnp.asarray(rng.normal(size=(BATCH, *shape)) * 2, dtype)
    width = {"mlp": 7, "conv": 3}.get(kind, 8)
    shift = draw((width,), 0.1)
    mask = jnp.asarray(rng.random(7) < 0.8) if kind == "mlp" else jnp.bool_(True)
    if "attention" in kind:
        mask = jnp.tril(jnp.ones((4, 4), bool))
    first, *others = (
        functools.partial(part, dropout=dropout) for part in (_BLOCKS[kind], gate, drift)[:parts]
    )
    return (first, *others) if others else first, params, x, (shift, mask)
