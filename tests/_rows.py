"""Rows of settings that tests run with."""

import itertools
import random

import pytest


def fast(count, rows):
    """``rows``, of which the first ``count`` belong to the suite; the others are slow."""
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [
        pytest.param(*row, marks=[pytest.mark.slow] if i >= count else [])
        for i, row in enumerate(rows)
    ]


def covering(possible=lambda row: True, /, **factors):
    """Rows of settings in which every possible pair of settings meets; greedily few."""
    rows = [dict(zip(factors, row)) for row in itertools.product(*factors.values())]
    rows = [row for row in rows if possible(row)]
    pairs = [
        {a: x, b: y}
        for (a, xs), (b, ys) in itertools.combinations(factors.items(), 2)
        for x, y in itertools.product(xs, ys)
    ]
    missing = [pair for pair in pairs if any(holds(row, pair) for row in rows)]
    chosen, draw = [], random.Random(0)
    while missing:
        candidates = [row for row in rows if holds(row, missing[0])]
        candidates = draw.sample(candidates, min(len(candidates), 100))
        chosen.append(max(candidates, key=lambda row: sum(holds(row, p) for p in missing)))
        missing = [pair for pair in missing if not holds(chosen[-1], pair)]
    return chosen


def holds(row, settings):
    """Whether a row has all of these settings."""
    return all(row[name] == value for name, value in settings.items())


def names(rows):
    """Test ids of rows of settings."""
    return ["-".join(f"{key}={value}" for key, value in row.items()) for row in rows]
