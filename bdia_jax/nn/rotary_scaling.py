"""How rotary positions are stretched beyond the lengths of the first training.

Each kind says what becomes of the frequencies, and of the length of the rotated vectors.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How Llama 3.1 stretches rotary positions beyond the length it was first trained at."""

    factor: float = 8.0
    """Low frequencies are divided by it."""
    low_freq_factor: float = 1.0
    """What turns less often than this over the original length is a low frequency."""
    high_freq_factor: float = 4.0
    """What turns more often than this is left as it is; between, a mixture."""
    original_length: int = 8192
    """Positions in the first training."""

    amplitude: ClassVar[float] = 1.0

    def frequencies(
        self, frequency: Float[Array, "pair"], theta: float, longest: int
    ) -> Float[Array, "pair"]:
        """Those of the pairs, stretched."""
        turns = self.original_length * frequency / (2 * math.pi)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = jnp.clip(share, 0, 1)
        return share * frequency + (1 - share) * frequency / self.factor


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All frequencies alike.

    (Chen, Wong, Chen, Tian, "Extending Context Window of Large Language Models via Positional
    Interpolation", 2023.)
    """

    kind: Literal["linear"] = "linear"
    """Tells it from others in a file of settings."""
    factor: float = 8.0
    """Frequencies are divided by it."""

    amplitude: ClassVar[float] = 1.0

    def frequencies(
        self, frequency: Float[Array, "pair"], theta: float, longest: int
    ) -> Float[Array, "pair"]:
        """Those of the pairs, stretched."""
        return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """Low frequencies, with a ramp to the high ones, which are left as they are.

    (Peng, Quesnelle, Fan, Shippole, "YaRN: Efficient Context Window Extension of Large Language
    Models", 2023.)
    """

    kind: Literal["yarn"] = "yarn"
    """Tells it from others in a file of settings."""
    factor: float = 4.0
    """Low frequencies are divided by it."""
    fast: float = 32.0
    """What turns more often than this over the original length is left as it is."""
    slow: float = 1.0
    """What turns less often than this is a low frequency."""
    original_length: int = 4096
    """Positions in the first training."""
    amplitude: float = 1.0
    """What cosines and sines are multiplied by."""
    truncate: bool = True
    """Whether the ramp begins and ends at whole pairs."""

    def frequencies(
        self, frequency: Float[Array, "pair"], theta: float, longest: int
    ) -> Float[Array, "pair"]:
        """Those of the pairs, stretched."""
        pairs = len(frequency)

        def pair(turns: float) -> float:
            """Which one turns so often."""
            return pairs * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(theta)

        low, high = pair(self.fast), pair(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        ramp = (jnp.arange(pairs, dtype=frequency.dtype) - low) / (high - low or 1e-3)
        share = 1 - jnp.clip(ramp, 0, 1)
        return share * frequency + (1 - share) * frequency / self.factor


@dataclasses.dataclass(frozen=True)
class LongScaling:
    """A factor for every pair: one set of them for short sequences, another one for long ones.

    The longest sequence of the network decides which set is used, so that a text, and what is
    cached of it, never changes from one to the other. (Ding et al., "LongRoPE: Extending LLM
    Context Window Beyond 2 Million Tokens", 2024.)
    """

    kind: Literal["long"] = "long"
    """Tells it from others in a file of settings."""
    short: tuple[float, ...] = ()
    """What the frequencies of the pairs are divided by in a network of short sequences."""
    long: tuple[float, ...] = ()
    """The same in one of long sequences."""
    original_length: int = 4096
    """Positions in the first training; sequences that are longer are long."""
    amplitude: float = 1.0
    """What cosines and sines are multiplied by."""

    def frequencies(
        self, frequency: Float[Array, "pair"], theta: float, longest: int
    ) -> Float[Array, "pair"]:
        """Those of the pairs, stretched."""
        factors = self.long if longest > self.original_length else self.short
        return frequency / jnp.asarray(factors, frequency.dtype)


Scaling = RotaryScaling | LinearScaling | YarnScaling | LongScaling
"""Each is asked for ``frequencies`` of the pairs, of a base ``theta``, in a network whose longest
sequence has ``longest`` positions; and has an ``amplitude``, by which cosines and sines are
multiplied."""
