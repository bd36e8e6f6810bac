"""Networks trained on text, from several seeds: where their losses end.

A row of a result has "network", "seed", "history" (the records of the run) and maybe "scores".
"""

from __future__ import annotations

from typing import Any

from bdia_jax.nn.settings import ReversibleSettings
from measure import records

Rows = list[dict[str, Any]]
DIGITS = {"at step": 0, "BLEU": 1, "chrF": 1}
"""Of a column, if not three."""


def named(name: str, config: ReversibleSettings) -> dict[str, Any]:
    """The fields of a row that say which network it is."""
    found = {"network": name, "method": config.method}
    if config.method.startswith("bdia"):
        found |= {"gamma": config.gamma, "signs": config.signs}
    return found


def file_name(name: str) -> str:
    """A part of one, for a network's name."""
    return name.replace(", ", "_").replace(" = ", "=").replace(": ", "=").replace(" ", "=")


def dial(rows: Rows) -> str:
    """Where validation ends, by γ and signs; the standard network in the first line.

    Of networks in words: the lowest loss, and BLEU if they translate.
    """
    cells: dict[tuple[str, str], list[dict[str, float]]] = {}
    for row in rows:
        found = {"loss": losses(row["history"])["validation, best"]} | row.get("scores", {})
        cells.setdefault((gamma_of(row), row.get("signs", "")), []).append(found)
    signs = [*dict.fromkeys(sign for _, sign in cells if sign)]

    def cell(gamma: str, sign: str) -> str:
        runs = cells.get((gamma, sign), cells.get((gamma, ""), []))
        texts = [records.spread([r["loss"] for r in runs])] if runs else []
        if runs and "BLEU" in runs[0]:
            texts.append(f"BLEU {records.spread([r['BLEU'] for r in runs], 1)}")
        return "; ".join(texts)

    gammas = [*dict.fromkeys(gamma for gamma, _ in cells)]
    return records.markdown(
        ["γ", *(f"signs: {sign}" for sign in signs)],
        [[gamma, *(cell(gamma, sign) for sign in signs)] for gamma in gammas],
    )


def gamma_of(row: dict[str, Any]) -> str:
    """As people write it."""
    return f"1/{1 / row['gamma']:g}" if "gamma" in row else f"0 ({row['method']})"


def losses(history: list[dict[str, Any]]) -> dict[str, float]:
    """At the end, and the lowest one of validation with its step."""
    last = {r["split"]: r["loss"] for r in history}
    best, step = min((r["loss"], r["step"]) for r in history if r["split"] == "eval")
    return {
        "training, last": last["train"],
        "validation, last": last["eval"],
        "validation, best": best,
        "at step": step,
    }


def told(record: dict[str, Any]) -> str:
    """A line about a run."""
    if record["error"]:
        return record["error"]
    found = losses(record["history"]) | record.get("scores", {})
    line = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    return f"{line}; {record['seconds per step'] * 1e3:.1f} ms per step"


def table(rows: Rows) -> str:
    """Means over seeds, and their standard deviations."""
    found: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        told = losses(row["history"]) | row.get("scores", {})
        found.setdefault(row["network"], []).append(told)
    columns = [*next(iter(found.values()))[0]]
    return records.markdown(
        ["loss in nats per token", *columns],
        [
            [name, *(records.spread([r[c] for r in runs], DIGITS.get(c, 3)) for c in columns)]
            for name, runs in found.items()
        ],
    )
