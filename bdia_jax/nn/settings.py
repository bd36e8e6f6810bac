"""How the blocks of a model are trained: short names on a command line, objects in the library.

This is the only place that reads a method's name. To add a method, add its name to :data:`Method`
and a line to :data:`MEANINGS`; every model, command and plan then takes it.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from bdia_jax.adjoints import Adjoint, Checkpoint, Direct, Online
from bdia_jax.checks import check_combination
from bdia_jax.memories import Memory
from bdia_jax.steps import BDIA, Euler, Midpoint, Signs, Step

Method = Literal[
    "bdia",
    "bdia-checkpoint",
    "bdia-direct",
    "standard",
    "standard-checkpoint",
    "midpoint",
    "midpoint-direct",
]
CoupledMethod = Literal["coupled", "coupled-direct"]
METHODS: tuple[str, ...] = get_args(Method)
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
DTYPES = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "float64": jnp.float64,
}


class Meaning(NamedTuple):
    """What a method's name stands for."""

    step: Callable[[ReversibleSettings], Step]
    adjoint: Adjoint


def _bdia(s: ReversibleSettings) -> Step:
    return BDIA(s.gamma, s.signs, s.frac_bits, s.tolerance_bits)


def _midpoint(s: ReversibleSettings) -> Step:
    return Midpoint(s.frac_bits, s.tolerance_bits)


def _standard(s: ReversibleSettings) -> Step:
    return Euler(s.frac_bits if s.quantize_standard else None)


MEANINGS: dict[str, Meaning] = {
    "bdia": Meaning(_bdia, Online()),
    "bdia-checkpoint": Meaning(_bdia, Checkpoint()),
    "bdia-direct": Meaning(_bdia, Direct()),
    "standard": Meaning(_standard, Direct()),
    "standard-checkpoint": Meaning(_standard, Checkpoint()),
    "midpoint": Meaning(_midpoint, Online()),
    "midpoint-direct": Meaning(_midpoint, Direct()),
}
COUPLED: dict[str, Online | Direct] = {"coupled": Online(), "coupled-direct": Direct()}
"""Methods of two streams (:class:`bdia_jax.nn.CoupledStack`), which have no step."""


@dataclasses.dataclass(frozen=True)
class ReversibleSettings:
    """How residual blocks are trained: what the configurations of all networks have.

    A configuration is checked when it is made: every field that has names has one of them, and
    step and adjoint fit each other. Errors are ``ValueError``.
    """

    method: Method = "bdia"
    """bdia, midpoint: every step is taken back. standard, -direct: activations are kept.
    -checkpoint: the input of every step is kept."""
    gamma: float = 0.5
    """Magnitude of γ: 2^-m for bdia, m bits per activation and step; any in (0, 1] for
    bdia-checkpoint and bdia-direct. 0.5 regularizes, for training from scratch; 1/16 or 1/32 is
    for pretrained networks."""
    signs: Signs = "block"
    """Of γ. block: drawn per sample and block; sample: per sample, one for all its blocks; minus,
    plus: always that one."""
    frac_bits: int | None = 9
    """Fractional bits l of the fixed-point grid."""
    tolerance_bits: int = 0
    """Bits of side information beyond those of γ, for hardware that is not deterministic."""
    quantize_standard: bool = False
    """Whether the standard methods run on the grid, too."""
    parts_as_steps: bool = False
    """Whether attention and feed-forward network are a step each, rather than their block: less
    memory for the derivative, side information for twice as many steps."""
    keep_in: Memory = "device"
    """Where each step keeps what the backward pass needs: on the device, or in the memory of the
    host, from where it is copied back."""
    narrow_cotangents: bool = False
    """Whether the cotangents between blocks have the dtype that the blocks compute in, rather than
    float32: 4 bytes per element less with bfloat16, and gradients that are rounded once more. For
    bdia and midpoint."""
    dtype: Dtype = "float32"
    """What the blocks compute in."""

    def __post_init__(self):
        check_names(self)
        adjoint = MEANINGS[self.method].adjoint if self.method in MEANINGS else None
        if self.keep_in != "device" and not isinstance(adjoint, Online | Checkpoint):
            raise ValueError(
                f"keep_in={self.keep_in!r} is for methods that keep something per step and compute "
                f"it again; got method={self.method!r}"
            )
        if self.parts_as_steps and self.method in COUPLED:
            raise ValueError(
                "parts_as_steps must be False: of two streams, each part has its own step anyhow; "
                f"got method={self.method!r}"
            )
        if self.narrow_cotangents and not isinstance(adjoint, Online):
            raise ValueError(
                "narrow_cotangents is for methods that take steps back (bdia, midpoint); got "
                f"method={self.method!r}"
            )
        if self.method in MEANINGS:
            check_combination(self.step(), self.adjoint())

    def step(self) -> Step:
        """What the network does from block to block, in training."""
        return MEANINGS[self.method].step(self)

    def adjoint(self) -> Adjoint:
        """How that is differentiated."""
        if self.method in COUPLED:
            return COUPLED[self.method]
        adjoint = MEANINGS[self.method].adjoint
        changes: dict[str, Any] = {} if isinstance(adjoint, Direct) else {"keep_in": self.keep_in}
        if isinstance(adjoint, Online):
            changes["narrow_cotangents"] = self.narrow_cotangents
        return dataclasses.replace(adjoint, **changes)

    def of_stack(self, depth: int, parts: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Keyword arguments of a :class:`bdia_jax.nn.ReversibleStack`.

        Args:
          depth: number of blocks.
          parts: those of a block, if it has any; used if they are to be steps.

        Raises:
          ValueError: if they are to be steps, and there are none.
        """
        if self.parts_as_steps and parts is None:
            raise ValueError(
                "parts_as_steps must be False: a block of this network has no parts that follow "
                "one another"
            )
        return {
            "depth": depth,
            "step": self.step(),
            "adjoint": self.adjoint(),
            "parts": parts if self.parts_as_steps else None,
        }


def fields_of(step: Step, adjoint: Adjoint) -> dict[str, Any]:
    """The fields of :class:`ReversibleSettings` that make this step and this adjoint.

    They are none for a step or an adjoint of another kind than a method's name stands for. What a
    field cannot say, such as the bits of rounded checkpoints, is left out.
    """
    plain = ReversibleSettings()
    fitting = (
        method
        for method, meaning in MEANINGS.items()
        if isinstance(step, type(meaning.step(plain))) and type(adjoint) is type(meaning.adjoint)
    )
    if (method := next(fitting, None)) is None:
        return {}
    names = ("gamma", "signs", "frac_bits", "tolerance_bits")
    found = {name: getattr(step, name) for name in names if hasattr(step, name)}
    if isinstance(step, Euler):
        found = {"quantize_standard": step.frac_bits is not None}
        found |= {} if step.frac_bits is None else {"frac_bits": step.frac_bits}
    elif isinstance(step, Midpoint):
        found = {name: found[name] for name in ("frac_bits", "tolerance_bits")}
    return found | {
        "method": method,
        "keep_in": getattr(adjoint, "keep_in", plain.keep_in),
        "narrow_cotangents": getattr(adjoint, "narrow_cotangents", plain.narrow_cotangents),
    }


def check_names(config: Any) -> None:
    """Raises ``ValueError`` unless every field with names (a ``Literal``) has one of them."""
    for name, annotation in typing.get_type_hints(type(config)).items():
        kinds = get_args(annotation) if _is_union(annotation) else (annotation,)
        allowed = [
            n for kind in kinds if typing.get_origin(kind) is Literal for n in get_args(kind)
        ]
        value = getattr(config, name)
        if allowed and value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
        if allowed and allowed[0] in DTYPES:
            check_dtype(value, name)


def check_dtype(name: str, what: str = "dtype") -> None:
    """Raises ``ValueError`` for a name that is not a dtype of blocks, or that JAX cannot have."""
    if name not in DTYPES:
        raise ValueError(f"{what} must be one of {', '.join(DTYPES)}; got {name!r}")
    if name == "float64" and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(f"{what}='float64' needs jax_enable_x64; it is not set")


def check_sizes(config: Any, *names: str) -> None:
    """Raises ``ValueError`` unless these fields are positive integers, or None where they may."""
    optional = {f.name for f in dataclasses.fields(config) if f.default is None}
    for name in names:
        value = getattr(config, name)
        if value is None and name in optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int >= 1; got {value!r}")


def check_dropout(config: Any) -> None:
    """Raises ``ValueError`` unless ``dropout`` is a probability below 1."""
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1); got {config.dropout}")


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
