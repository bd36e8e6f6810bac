"""Frozen weights in few bits: linear layers whose kernels are numbers of 4 or 8 bits (QLoRA).

Dettmers, Pagnoni, Holtzman, Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs", 2023.
What is trained are low-rank updates (:func:`bdia_jax.nn.add_lora`), in float32.

A kernel is cut into groups of 64 inputs per output. A group has a scale, its largest magnitude, in
bfloat16; a number is a code of 4 or 8 bits, so that an element has 4.25 or 8.25 bits in all. The
arithmetic is qwix's. JAX stores two codes of 4 bits to a byte on CPUs, GPUs and TPUs alike.

A layer computes with its kernel in the dtype of the blocks, and expands it where it is used: one
kernel at a time, in both directions. Nothing of it is kept for the derivative but the codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bdia_jax.nn.lora import Frozen
from bdia_jax.nn.stacked import StackedBlocks

Kind = Literal["nf4", "int4", "int8"]
KINDS: tuple[str, ...] = get_args(Kind)
GROUP, SMALLEST_GROUP = 64, 16
"""Inputs that share a scale: the largest divisor of their number from 16 to 64."""


class Quantized(nnx.Variable):
    """Codes of a kernel, or their scales: a weight that is not trained."""


class Codes(NamedTuple):
    """A kernel in few bits."""

    codes: Array
    """int4, uint4 or int8 ``[*blocks, inputs, outputs]``."""
    scales: Array
    """bfloat16 ``[*blocks, groups, outputs]``."""


def encode(kernel: Float[Array, "*blocks inputs outputs"], kind: Kind) -> Codes:
    """The nearest codes; scales are the largest magnitude of a group over the largest code.

    Args:
      kernel: its inputs are cut into groups.
      kind: nf4 has 16 values at quantiles of a normal distribution, int4 and int8 have integers.

    Raises:
      ImportError: without qwix.
      ValueError: for another kind, and for a number of inputs with no divisor from 16 to 64.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    *blocks, inputs, _ = kernel.shape
    group = next((n for n in range(GROUP, SMALLEST_GROUP - 1, -1) if inputs % n == 0), None)
    if group is None:
        raise ValueError(
            f"the inputs of a quantized layer must come in groups of {SMALLEST_GROUP} to {GROUP}; "
            f"got {inputs} inputs, which no such number divides"
        )
    axis = len(blocks)
    found = _qwix().quantize(
        kernel.astype(jnp.float32),
        kind if kind == "nf4" else jnp.dtype(kind),
        channelwise_axes=(*range(axis), axis + 1),
        tiled_axes={axis: group},
        scale_dtype=jnp.bfloat16,
    )
    return Codes(found.qvalue, found.scale)


def decode(codes: Codes, kind: Kind) -> Float[Array, "*blocks inputs outputs"]:
    """The kernel that codes stand for, in float32."""
    qwix = _qwix()
    scales = codes.scales.astype(jnp.float32)
    if kind == "nf4":
        # JAX cannot lower every index of 4 bits.
        array = qwix.QArray(codes.codes.astype(jnp.uint8), scales, None, kind)
    else:
        array = qwix.QArray(codes.codes, scales, None, codes.codes.dtype)
    return qwix.dequantize(array)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a quantized layer says of its kernel."""

    shape: tuple[int, ...]
    dtype: Any

    def __getitem__(self, index):
        raise ValueError(
            "the kernel of this layer is quantized: expand the model's kernels first "
            "(bdia_jax.nn.expand_base(model))"
        )


class QuantizedLinear(nnx.Linear):
    """A linear layer whose kernel is :class:`Codes`, frozen; in a stack, with a block axis."""

    def __init__(self, base: nnx.Linear, kind: Kind):
        # Without the constructor of a layer, which would make a kernel.
        _copy(base, self, but=("kernel",))
        codes = encode(base.kernel[...], kind)
        self.kind: Kind = kind
        self.kept_in = base.kernel.dtype
        self.codes, self.scales = Quantized(codes.codes), Quantized(codes.scales)

    @property
    def kernel(self) -> Kernel:
        """Its shape and dtype, which is that of the layer before."""
        return Kernel(self.codes.shape, self.kept_in)

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """In the dtype that the layer computes in."""
        x = x.astype(self.dtype or x.dtype)

        # Computed again for the derivative, or each expanded kernel would be kept for it.
        @jax.checkpoint
        def product(x, codes):
            return x @ decode(codes, self.kind).astype(x.dtype)

        y = product(x, Codes(self.codes[...], self.scales[...]))
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def decoded(self) -> Float[Array, "*blocks inputs outputs"]:
        """The kernel that it computes with, in float32."""
        return decode(Codes(self.codes[...], self.scales[...]), self.kind)

    def expanded(self) -> nnx.Linear:
        """The layer with the kernel that it computes with, frozen, in the dtype it had before."""
        layer: Any = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        _copy(self, layer, but=("codes", "scales", "kind", "kept_in"))
        layer.kernel = Frozen(self.decoded().astype(self.kept_in))
        return layer


def _copy(layer: nnx.Module, other: nnx.Module, but: tuple[str, ...]) -> None:
    for name, value in vars(layer).items():
        if name not in but and not name.startswith("_"):
            setattr(other, name, value)


def quantize_base(model: nnx.Module, kind: Kind = "nf4") -> list[str]:
    """Quantizes the kernels of all linear layers of ``model``'s stacks, in place.

    They are not trained any more: give them low-rank updates afterwards, by
    :func:`bdia_jax.nn.add_lora`. Embedding, head, norms, biases and experts stay as they are. A
    folder is read into a quantized model by ``interop.load(path, quantize=kind)``, one tensor at a
    time.

    Args:
      model: with :class:`bdia_jax.nn.ReversibleStack` somewhere in it, without low-rank updates.
      kind: nf4, int4 or int8.

    Returns:
      The paths of the layers.

    Raises:
      ImportError: without qwix.
      ValueError: as :func:`encode`; and for a model without linear layers in a stack.
    """
    found = list(linear_layers(model))
    if not found:
        raise ValueError("there must be linear layers in a stack of the model; it has none")
    new = [QuantizedLinear(getattr(parent, name), kind) for parent, name, _ in found]
    for (parent, name, _), layer in zip(found, new, strict=True):
        setattr(parent, name, layer)
    return [path for _, _, path in found]


def expand_base(model: nnx.Module) -> None:
    """Replaces codes, in place, by the frozen kernels that the layers computed with."""
    for _, module in list(nnx.iter_modules(model)):
        for name, child in list(vars(module).items()):
            if isinstance(child, QuantizedLinear):
                setattr(module, name, child.expanded())


def linear_layers(model: nnx.Module) -> Iterator[tuple[nnx.Module, str, str]]:
    """Modules, names in them, and paths in the model, of the linear layers of all stacks."""
    for where, stack in list(nnx.iter_modules(model)):
        if not isinstance(stack, StackedBlocks):
            continue
        for inside, module in list(nnx.iter_modules(stack)):
            for name, child in list(vars(module).items()):
                if isinstance(child, nnx.Linear):
                    yield module, name, ".".join(map(str, (*where, *inside, name)))


def _qwix():
    try:
        import qwix
    except ImportError as error:
        raise ImportError(
            'quantized weights need qwix: pip install "bdia_jax[quantized]"'
        ) from error
    return qwix
