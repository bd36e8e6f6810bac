"""Residual blocks in plain JAX, for measurements.

Each is ``block(params_k, x, key_k)`` and returns the update ``h_k(x)``. Parameters are float32
and cast to the dtype of ``x``; normalization and softmax compute in float32, as layers do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

HEAD_DIM = 32
Params = dict[str, Array]
OneKey = Key[Array, ""]
Points = Float[Array, "batch *shape width"]
Tokens = Float[Array, "batch length width"]
Images = Float[Array, "batch height width channel"]


def mlp(p: Params, x: Points, key: OneKey, *, dropout: float = 0.0) -> Points:
    """Norm, linear, GELU, linear."""
    y = jax.nn.gelu(_norm(x) @ _cast(p["up"], x))
    return _dropped(y, key, dropout) @ _cast(p["down"], x)


def attend(p: Params, x: Tokens, key: OneKey, *, dropout: float = 0.0) -> Tokens:
    """Norm, self-attention, linear."""
    weights_key, out_key = jax.random.split(key)
    q, k, v = _queries_keys_values(p, x)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * HEAD_DIM**-0.5).astype(x.dtype)
    a = jnp.einsum("bhqk,bkhd->bqhd", _dropped(weights, weights_key, dropout), v)
    return _dropped(a.reshape(x.shape) @ _cast(p["out"], x), out_key, dropout)


def attend_by_library(p: Params, x: Tokens, key: OneKey, *, dropout: float = 0.0) -> Tokens:
    """The same by ``jax.nn.dot_product_attention``, which picks the device's own kernel."""
    a = jax.nn.dot_product_attention(*_queries_keys_values(p, x))
    return _dropped(a.reshape(x.shape) @ _cast(p["out"], x), key, dropout)


def convolution(p: Params, x: Images, key: OneKey, *, dropout: float = 0.0) -> Images:
    """Norm, 3×3 convolution, SiLU, 3×3 convolution."""
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = jax.nn.silu(convolve(_norm(x), _cast(p["up"], x)))
    return convolve(_dropped(y, key, dropout), _cast(p["down"], x))


PARTS: dict[str, tuple[Callable[..., Array], ...]] = {
    "attention": (attend, mlp),
    "dot_product_attention": (attend_by_library, mlp),
    "mlp": (mlp,),
    "convolution": (convolution,),
}
"""The parts of each kind of block; the first two are pre-norm transformer blocks."""


def make_block(
    kind: str, *, dropout: float = 0.0, parts: bool = False
) -> Callable[..., Array] | tuple[Callable[..., Array], ...]:
    """A block of a kind, whole, or as its parts."""
    functions = tuple(functools.partial(part, dropout=dropout) for part in PARTS[kind])
    if parts:
        return functions

    def block(p, x, key):
        update = jnp.zeros_like(x)
        for function, part_key in zip(functions, jax.random.split(key, len(functions))):
            update += function(p, x + update, part_key)
        return update

    return functions[0] if len(functions) == 1 else block


def stacked_params(
    kind: str, key: OneKey, depth: int, width: int, hidden: int, *, gain: float = 1.0
) -> Params:
    """Weights of ``depth`` blocks, of variance 1/fan-in; ``gain`` scales the updates."""
    window = (3, 3) if kind == "convolution" else ()
    shapes = {"up": (*window, width, hidden), "down": (*window, hidden, width)}
    if kind.endswith("attention"):
        shapes |= {name: (width, width) for name in ("query", "key", "value", "out")}
    params = {}
    for i, (name, shape) in enumerate(shapes.items()):
        fan_in = shape[-2] * 9 ** (kind == "convolution")
        scale = fan_in**-0.5 * (gain if name in ("down", "out") else 1.0)
        params[name] = scale * jax.random.normal(jax.random.fold_in(key, i), (depth, *shape))
    return params


def _queries_keys_values(p, x):
    y, heads = _norm(x), (*x.shape[:2], -1, HEAD_DIM)
    return tuple((y @ _cast(p[name], x)).reshape(heads) for name in ("query", "key", "value"))


def _norm(x):
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-5)).astype(x.dtype)


def _dropped(x, key, rate):
    if not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def _cast(leaf, x):
    return leaf.astype(x.dtype)
