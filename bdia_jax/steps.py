"""What a network does from block to block: a step, as an object.

Every step here is one equation, in which h_k is the update of a block and γ_k = σ_k γ:

    x_{k+1} = γ_k x_{k-1} + (1 - γ_k) x_k + (1 + γ_k) h_k(x_k),        σ_k ∈ {-1, 0, +1}

=================  =======  ==================================  =============================
step               γ        σ_k                                 what it is for
=================  =======  ==================================  =============================
:class:`BDIA`      2^-m     drawn, or one sign throughout       training, taken back exactly
:class:`Midpoint`  1        +1                                  a network of its own
:class:`Euler`     0        (any)                               the standard network
=================  =======  ==================================  =============================

The first block of a network has no x_{-1}: there σ_0 = 0, which makes it an Euler step.

A step says what both passes compute, on the integers of the grid: :meth:`Step.up` goes from
(n_{k-1}, n_k) to n_{k+1}, :meth:`Step.down` goes back, :meth:`Step.pull` does what the derivative
does to the two cotangents. A new step is a subclass with other values, or other methods.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int32, Key, UInt

from bdia_jax import grid, maps, side_bits
from bdia_jax.states import per_sample

Signs = Literal["block", "sample", "minus", "plus"]
SIGNS = ("block", "sample", "minus", "plus")


class Down(NamedTuple):
    """What :meth:`Step.down` finds."""

    n_prev: Int32[Array, "batch *shape"]
    """The integers of x_{k-1}; of no meaning where σ = 0."""
    q: Int32[Array, "batch *shape"]
    """The rounded value, corrected by the tolerance bits."""
    y: Float[Array, "batch *shape"]
    """The recomputed value before rounding, in grid steps."""
    error: Int32[Array, "batch *shape"]
    """What the tolerance bits corrected, in grid steps; 0 without them."""


class Step:
    """What all steps have in common; each is a frozen dataclass (see the module's table)."""

    gamma: float
    """Magnitude of γ."""
    signs: str
    """How σ is chosen: of :data:`SIGNS`."""
    frac_bits: int | None
    """Fractional bits l of the grid; None for no grid."""
    tolerance_bits: int = 0
    """Bits of side information beyond m."""

    def __post_init__(self):
        if self.frac_bits is not None:
            object.__setattr__(self, "frac_bits", grid.check_frac_bits(self.frac_bits))

    def _set_tolerance_bits(self, m: int) -> None:
        bits = maps.check_tolerance_bits(self.tolerance_bits, m)
        object.__setattr__(self, "tolerance_bits", bits)

    @property
    def m(self) -> int:
        """``γ = σ 2^-m``; 0 for γ = 0.

        Raises:
          ValueError: if γ is not a power of two.
        """
        return maps.gamma_shift(self.gamma) if self.gamma else 0

    @property
    def bits(self) -> int:
        """Bits of side information that the inverse needs per element: m and the tolerance bits."""
        return self.m + self.tolerance_bits

    @property
    def grid_bits(self) -> int:
        """``frac_bits`` of a step that is on the grid."""
        if self.frac_bits is None:
            raise ValueError(f"{self} is not on a grid")
        return self.frac_bits

    @property
    def draws(self) -> bool:
        """Whether the signs are random, so that a scan needs a key."""
        return bool(self.gamma) and self.signs in ("block", "sample")

    @property
    def exact(self) -> bool:
        """Whether the states are integers of the grid, stepped by integer arithmetic."""
        return self.frac_bits is not None and (self.gamma == 0 or maps.is_shift(self.gamma))

    @property
    def network(self) -> Step:
        """The step of the network that is handed back, and that evaluation runs."""
        return self

    def sign(
        self, block_key: Key[Array, ""] | None, scan_key: Key[Array, ""] | None, batch: int
    ) -> Int32[Array, "batch"]:
        """σ of every sample, by a key of the block's part, or by one that all blocks share."""
        if self.draws:
            key = scan_key if self.signs == "sample" else block_key
            assert key is not None
            draw = maps.alternating_signs if self.signs == "sample" else maps.sample_signs
            return draw(key, batch)
        return jnp.full(batch, {"minus": -1}.get(self.signs, 1) if self.gamma else 0, jnp.int32)

    def scaled(self, sign: Int32[Array, "batch"], like: Float[Array, "batch *shape"]) -> Array:
        """γ_k = σ_k γ per sample, shaped to broadcast against ``like``, in its dtype."""
        return per_sample(sign, like).astype(like.dtype) * like.dtype.type(self.gamma)

    def up(
        self,
        n_prev: Int32[Array, "batch *shape"],
        n: Int32[Array, "batch *shape"],
        h: Float[Array, "batch *shape"],
        sign: Int32[Array, "batch"],
    ) -> tuple[Int32[Array, "batch *shape"], Float[Array, "batch *shape"]]:
        """``n_{k+1} = σ ((n_{k-1} + s) >> m) + q``; and the value y of which q is the rounding.

        ``h`` is the update in float32 (float64), which is what y is computed in.
        """
        y = self._before_rounding(n, h, sign)
        q = grid.round_to_int(y)
        return maps.bdia_step(n_prev, q, per_sample(sign, n), self.m), y

    def down(
        self,
        n_next: Int32[Array, "batch *shape"],
        n: Int32[Array, "batch *shape"],
        h: Float[Array, "batch *shape"],
        sign: Int32[Array, "batch"],
        kept: UInt[Array, "batch *words"] | None,
    ) -> Down:
        """``n_{k-1} = σ (n_{k+1} - q) 2^m - s``, with q computed again from ``n`` and ``h``.

        ``kept`` is what :meth:`keep` gave for n_{k-1}.
        """
        y = self._before_rounding(n, h, sign)
        q, sigma = grid.round_to_int(y), per_sample(sign, n)
        side = (
            jnp.uint32(0) if kept is None else side_bits.unpack_bits(kept, self.bits, n.shape[-1])
        )
        error = jnp.zeros_like(q)
        if self.tolerance_bits:
            half, remainder = 2 ** (self.tolerance_bits - 1), y - q.astype(y.dtype)
            error = jnp.where(
                sigma == 0,
                jnp.clip(q - n_next, -half, half),
                maps.rounding_error(n_next, q, remainder, side, sigma, self.m, self.tolerance_bits),
            )
            q -= error
        return Down(maps.bdia_inverse(n_next, q, side, sigma, self.m), q, y, error)

    def keep(self, n_prev: Int32[Array, "batch *shape"]) -> UInt[Array, "batch *words"] | None:
        """The side information of a state that is left behind, packed; None for 0 bits."""
        if not self.bits:
            return None
        side = maps.side_information(n_prev, self.m, self.tolerance_bits)
        return side_bits.pack_bits(side, self.bits)

    def pull(
        self,
        a_next: Float[Array, "batch *shape"],
        a: Float[Array, "batch *shape"] | None,
        sign: Int32[Array, "batch"],
    ) -> tuple[Array, Array, Array | None]:
        """The cotangents of h, x_k and x_{k-1}, from that of x_{k+1}.

        Args:
          a_next: the cotangent of x_{k+1}.
          a: of x_k, as far as it does not come through this step; None for zeros.
          sign: σ.

        Returns:
          ``(1 + γ) a_{k+1}``; ``a + (1 - γ) a_{k+1}``, to which the block's own derivative is to be
          added; ``γ a_{k+1}``, with γ = 0 None if ``a`` is.
        """
        if self.gamma == 0:
            return (a_next, a_next, None) if a is None else (a_next, a + a_next, jnp.zeros_like(a))
        gamma = self.scaled(sign, a_next)
        pulled = a_next - gamma * a_next
        return a_next + gamma * a_next, pulled if a is None else a + pulled, gamma * a_next

    def real(
        self,
        x_prev: Float[Array, "batch *shape"],
        x: Float[Array, "batch *shape"],
        h: Float[Array, "batch *shape"],
        sign: Int32[Array, "batch"],
    ) -> Float[Array, "batch *shape"]:
        """x_{k+1} in floats: the module's equation, without a grid."""
        if self.gamma == 0:
            return x + h.astype(x.dtype)
        x_prev, x_wide, h = (a.astype(grid.accumulator(x.dtype)) for a in (x_prev, x, h))
        gamma = self.scaled(sign, x_wide)
        return (gamma * x_prev + maps.pre_rounding(x_wide, h, gamma)).astype(x.dtype)

    def _before_rounding(self, n, h, sign) -> Array:
        """``y = 2^l [(1 - γ) x_k + (1 + γ) h_k]``, in grid steps."""
        x = grid.from_grid(n, self.grid_bits, h.dtype)
        return grid.scale(maps.pre_rounding(x, h, self.scaled(sign, x)), self.grid_bits)


@dataclasses.dataclass(frozen=True)
class BDIA(Step):
    """The average of an Euler step and the backward Euler step of the block before.

    It is taken back exactly where γ is a power of two, with m = -log2 γ bits per element and step.
    The network that it trains is the standard one: :attr:`network` is ``Euler(frac_bits)``.

    γ is a dial. γ = 1/2 with a sign per block is a strong regularizer, for training from scratch on
    little data. A small γ, often 1/16 or 1/32, hardly perturbs a network, and is for pretrained
    ones, at m = 4 or 5 bits. :func:`bdia_jax.choose_gamma` measures which γ a model tolerates.

    Args:
      gamma: magnitude of γ, in (0, 1]. With :class:`bdia_jax.Online` 2^-m, m in 0 … 16.
      signs: of γ. ``"block"``: drawn per sample and block (the paper). ``"sample"``: one for all
        blocks of a sample, drawn so that half of a batch has each: zero on average as well, but
        errors do not add up over the depth, since with one sign the deviation from the standard
        network telescopes. ``"minus"`` and ``"plus"``: one sign for all, which needs no key. Always
        minus is a momentum network: it deviates least, but not by zero on average, so that weights
        adapt to it.
      frac_bits: l; the grid has the spacing 2^-l. None for no grid, which only
        :class:`bdia_jax.Direct` and :class:`bdia_jax.Checkpoint` take.
      tolerance_bits: r more bits per element, with which the inverse corrects recomputed values
        that are off by less than 2^(r-1) - 1/2 grid steps (r = 1: 1/2).

    Sources: Zhang, Lewis, Kleijn, "On Exact Bit-level Reversible Transformers Without Changing
    Architecture", ICML 2025 (arXiv 2407.09093), with γ = 1/2 and a sign per block. Sander, Ablin,
    Blondel, Peyré, "Momentum Residual Neural Networks", ICML 2021, for ``"minus"``. General m,
    a sign per sample and tolerance bits are this library's.
    """

    gamma: float = 0.5
    signs: Signs = "block"
    frac_bits: int | None = 9
    tolerance_bits: int = 0

    def __post_init__(self):
        super().__post_init__()
        is_number = hasattr(self.gamma, "__float__") and not getattr(self.gamma, "ndim", 0)
        if isinstance(self.gamma, bool | Tracer) or not is_number:
            raise TypeError(f"gamma must be a number (static, not traced); got {self.gamma!r}")
        gamma = float(self.gamma)
        if not 0 < gamma <= 1 or math.isnan(gamma):
            raise ValueError(
                f"gamma, the magnitude of γ, must lie in (0, 1]; got {gamma}. The standard "
                "network, γ = 0, is Euler()"
            )
        object.__setattr__(self, "gamma", gamma)
        if self.signs not in SIGNS:
            raise ValueError(f"signs must be one of {', '.join(SIGNS)}; got {self.signs!r}")
        m = maps.gamma_shift(gamma) if maps.is_shift(gamma) else 0
        self._set_tolerance_bits(m)

    @property
    def network(self) -> Euler:
        """The standard network, on the same grid."""
        return Euler(self.frac_bits)


@dataclasses.dataclass(frozen=True)
class Midpoint(Step):
    """``x_{k+1} = x_{k-1} + 2 h_k(x_k)``, taken back with no bits at all.

    Another network than the standard one, in training as in evaluation. It is BDIA's equation
    with γ = 1 and σ = +1.

    Source: Chang, Meng, Haber, Ruthotto, Begert, Holtham, "Reversible Architectures for Arbitrarily
    Deep Residual Neural Networks", AAAI 2018; on the grid as :class:`BDIA`.
    """

    gamma: ClassVar[float] = 1.0
    signs: ClassVar[str] = "plus"
    frac_bits: int | None = 9
    tolerance_bits: int = 0

    def __post_init__(self):
        super().__post_init__()
        self._set_tolerance_bits(0)


@dataclasses.dataclass(frozen=True)
class Euler(Step):
    """``x_{k+1} = x_k + h_k(x_k)``: the standard network.

    It cannot be taken back: differentiate it with :class:`bdia_jax.Checkpoint` or
    :class:`bdia_jax.Direct`.

    Args:
      frac_bits: None for no grid; l to round every state to the grid of spacing 2^-l, as
        :class:`BDIA` does in evaluation.
    """

    gamma: ClassVar[float] = 0.0
    signs: ClassVar[str] = "plus"
    frac_bits: int | None = None
