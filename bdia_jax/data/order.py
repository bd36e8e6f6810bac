"""Random orders of many things, without a list of them; and turns by shares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

ROUNDS = 8


def permuted(
    places: Int64[np.ndarray, "n"], count: int, seed: Sequence[int]
) -> Int64[np.ndarray, "n"]:
    """What stands at some places of a random order of ``0, 1, … count - 1``.

    A place is encrypted, as a number of 2b bits, by a Feistel network with halves of b bits,
    ``(l, r) -> (r, l ^ f(r))`` per round, which has an inverse whatever f is. What comes out and
    is not below ``count`` is encrypted again, until it is: that has an inverse, too. Memory and
    time do not depend on ``count``.

    Source: Black, Rogaway, "Ciphers with Arbitrary Finite Domains", 2002 (cycle walking).

    Args:
      places: from 0 to ``count - 1``.
      count: of the things; at most 2^62.
      seed: numbers, not negative; each tuple of them has an order of its own.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(list(seed)).generate_state(ROUNDS, np.uint64)

    def encrypted(x):
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_scrambled(right ^ key) & mask)
        return left << half | right

    found = encrypted(places.astype(np.uint64))
    while (outside := found >= count).any():
        found[outside] = encrypted(found[outside])
    return found.astype(np.int64)


def _scrambled(x):
    """64 bits that each depend on all of x, by the finalizer of SplitMix64.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shares_of(weights: Sequence[float], sources: int) -> tuple[float, ...]:
    """Weights as shares of 1.

    Raises:
      ValueError: for another number of them, one that is negative or not finite, or all 0.
    """
    if len(weights) != sources:
        raise ValueError(
            f"weights must be one for each of the {sources} data; got {len(weights)}: {[*weights]}"
        )
    if not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"weights must be 0 or positive, and finite; got {[*weights]}")
    if not any(weights):
        raise ValueError(f"at least one of the weights must be positive; got {[*weights]}")
    return tuple(weight / sum(weights) for weight in weights)


def whose_turn(given: Sequence[int], shares: Sequence[float]) -> int:
    """The source of the next sample: the one that is furthest behind its share.

    After any number n of samples, no source has given more than a sample above ``n · share``.

    Args:
      given: samples that each source has given.
      shares: of all samples, by source; their sum is 1.
    """
    n = sum(given) + 1
    behind = [share * n - had if share else -np.inf for share, had in zip(shares, given)]
    return int(np.argmax(behind))
