"""What exactness is counted of: blocks, by a covering set of settings, and models."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax import BDIA, BackwardReport, Online, Step, Update, reversible_scan
from bdia_jax.nn import DecoderConfig, EncoderDecoderConfig, Probe, ViTConfig, llama
from measure.blocks import make_block, stacked_params
from measure.networks import KINDS

FACTORS = {
    "dtype": ("float32", "bfloat16", "float16"),
    "dropout": (0.0, 0.1),
    "m": (1, 0, 2, 3, 4),
    "signs": ("block", "sample", "minus", "plus"),
    "r": (0, 1, 2),
    "frac_bits": (9, 5, 0, -2),
    "precision": ("default", "bfloat16", "tensorfloat32", "highest"),
    "depth": (1, 2, 6, 48),
    "block": ("attention", "mlp", "convolution"),
    "parts_as_steps": (False, True),
    "update_in_backward": (False, True),
}
SHAPES = {"attention": (32, 128), "mlp": (32, 128), "convolution": (16, 16, 16)}
"""Of one sample: 4096 elements each."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """Blocks, what they are given, and how they are scanned."""

    block: Callable[..., jax.Array] | tuple[Callable[..., jax.Array], ...]
    params: Any
    x: jax.Array
    step: Step
    consts: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table."""

    settings: dict[str, Any]
    stacks: list[Stack]
    gradient: Callable[[jax.Array], Any]
    """From a key to a tree with the reports of the backward pass, by the program that trains."""


def covering(factors: dict[str, tuple]) -> list[dict[str, Any]]:
    """Rows of settings in which every pair of settings meets; greedily few."""
    draw = random.Random(0)

    def pairs(row):
        return set(itertools.combinations(row.items(), 2))

    missing = {
        ((a, x), (b, y))
        for (a, some), (b, others) in itertools.combinations(factors.items(), 2)
        for x, y in itertools.product(some, others)
    }
    chosen = []
    while missing:
        # The best of some: there are too many rows to look at all.
        some = [{name: draw.choice(f) for name, f in factors.items()} for _ in range(300)]
        best = max(some, key=lambda row: len(pairs(row) & missing))
        if pairs(best) & missing:
            chosen.append(best)
            missing -= pairs(best)
    return chosen


def block_case(row: dict[str, Any], integers: int, seed: int) -> Case:
    """A case of the covering set."""
    shape = SHAPES[row["block"]]
    batch = math.ceil(integers / (row["depth"] * math.prod(shape)))
    # On a coarse grid, larger states and updates: otherwise all updates would be rounded to 0.
    scale = max(1.0, 2.0 ** (1 - row["frac_bits"]))
    weights_key, x_key = jax.random.split(jax.random.key(seed))
    x = scale * jax.random.normal(x_key, (batch, *shape))
    params = stacked_params(
        row["block"], weights_key, row["depth"], shape[-1], 2 * shape[-1], gain=scale
    )
    block = make_block(row["block"], dropout=row["dropout"], parts=row["parts_as_steps"])
    step = BDIA(2.0 ** -row["m"], row["signs"], row["frac_bits"], row["r"])
    stack = Stack(block, params, x.astype(row["dtype"]), step)

    def descend(params, grads, state):
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), state

    @jax.jit
    def gradient(params, x, key):
        def loss(probe, params, x):
            update = None
            if row["update_in_backward"]:
                update = Update(descend, params, jnp.zeros(row["depth"]))
            adjoint = Online(probe, update)
            y = reversible_scan(block, params, x, key=key, step=step, adjoint=adjoint)
            return jnp.mean(jnp.sin(y.astype(jnp.float32)))

        report, *_ = gradients = jax.grad(loss, (0, 1, 2))(
            BackwardReport.zeros(row["depth"]), params, x
        )
        return report, gradients

    return Case(row, [stack], lambda key: gradient(params, stack.x, key)[0])


SMALL = {"width": 128, "depth": 6, "dropout": 0.1, "max_length": 128}
TWO = {"width": 128, "dropout": 0.1, "max_length": 128, "source_vocab": 256, "heads": 4}
MODELS: dict[str, Any] = {
    "ViT": ViTConfig(),
    "GPT-2": DecoderConfig(**SMALL),
    "Llama": llama(kv_heads=2, **SMALL),
    "Qwen 2": llama(kv_heads=2, qkv_bias=True, tied_head=True, **SMALL),
    "Qwen 3": llama(kv_heads=2, head_dim=64, qk_norm=True, **SMALL),
    "encoder-decoder": EncoderDecoderConfig(**TWO),
}
"""ViT of the size that is trained on CIFAR, small decoders of all families, and both stacks of an
encoder-decoder."""


def model_case(name: str, settings: dict[str, Any], integers: int, seed: int) -> Case:
    """A model of the library, with dropout."""
    config = dataclasses.replace(MODELS[name], **settings)
    model = KINDS[type(config)](config, rngs=nnx.Rngs(seed))
    stacks = {
        path[-1]: stack for path, stack in nnx.iter_modules(model) if hasattr(stack, "adjoint")
    }
    blocks = sum(stack.depth for stack in stacks.values())
    length = config.length if name == "ViT" else config.max_length
    batch = math.ceil(integers / (blocks * length * config.width))
    key = jax.random.key(seed)
    x = jax.random.normal(key, (batch, length, config.width), config.dtype)
    angles, present = None, jnp.ones((batch, length), jnp.int32)
    if getattr(config, "positions", None) == "rotary":
        angles = model.angles(jnp.broadcast_to(jnp.arange(length), (batch, length)))
    given = {"blocks": () if name == "ViT" else (angles, None)}
    given |= {"encoder": (None, present), "decoder": (x[::-1], present, present)}

    if name == "ViT":
        images = (batch, config.image_size, config.image_size, config.channels)
        inputs = (jax.random.normal(key, images),)
    else:
        sides = 2 if name == "encoder-decoder" else 1
        inputs = tuple(jax.random.randint(key, (sides, batch, length), 0, 256))
    graph, params, probes, rest = nnx.split(model, nnx.Param, Probe, ...)

    @jax.jit
    def gradient(params, probes, inputs, key):
        def loss(probes, params):
            y = nnx.merge(graph, params, probes, rest)(*inputs, key=key)
            return jnp.mean(jnp.sin(y))

        return jax.grad(loss, (0, 1))(probes, params)

    stack = next(iter(stacks.values()))
    about = {"block": name, "m": stack.step.m} | dataclasses.asdict(config) | {"depth": blocks}
    return Case(
        about,
        [Stack(*s.functional(), x, s.step, given[where]) for where, s in stacks.items()],
        lambda key: gradient(params, probes, inputs, key)[0],
    )


def cases(integers: int, seed: int, *, quick: bool) -> Iterator[Callable[[], Case]]:
    """What makes each of them, anywhere: blocks, then models, one of them smaller if ``quick``."""
    for row in covering(FACTORS):
        yield functools.partial(block_case, row, integers, seed)
    for name, dtype, parts in itertools.product(MODELS, ("float32", "bfloat16"), (False, True)):
        settings = {"dtype": dtype, "parts_as_steps": parts}
        if name == "ViT":
            size = {"width": 64, "heads": 2, "head_dim": 32, "hidden": 64} if quick else {}
            yield functools.partial(model_case, name, settings | size, integers, seed)
        else:
            # γ as for pretrained networks.
            settings |= {"gamma": 1 / 16, "signs": "sample"}
            yield functools.partial(model_case, name, settings, integers // 2, seed)
