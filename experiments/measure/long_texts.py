"""How memory grows with tokens, and how long a sequence fits: decoders with a base of few bits.

    python experiments/measure/long_texts.py --device rtx-4090      # on any machine; 25 minutes

Whole training steps with low-rank updates of a quantized base, one sequence per batch, compiled for
a device that need not be there, at two lengths. The bytes that a token takes are the slope between
both. The longest sequence that fits is about where the line through both meets the limit, whatever
length the model was trained for: it is compiled, too, and made shorter if it does not fit.

Writes long-texts-DEVICE.jsonl.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from bdia_jax.nn.quantized import Kind
from bdia_jax.planning import plan, targets
from bdia_jax.planning.command import parse_size
from bdia_jax.planning.shapes import SHAPES
from bdia_jax.planning.ways import check_ways
from bdia_jax.steps import Signs
from bdia_jax.train import command
from measure import records, sources

DEPENDS = (
    *sources.CORE,
    *sources.TEXT_LAYERS,
    *sources.ORDINARY_STEP,
    *(f"bdia_jax/nn/{name}.py" for name in ("lora", "quantized")),
    "bdia_jax/planning/*.py",
    "experiments/measure/long_texts.py",
)
UNIT = 128
WAYS = (
    "checkpointed",
    "checkpointed, chunks",
    "checkpointed, 8 bits",
    "checkpointed, nested, chunks",
    "checkpointed, in host memory, chunks",
    "BDIA, chunks",
    "BDIA, chunks, narrow cotangents",
    "BDIA, parts, chunks",
    "BDIA, chunks, bits in host memory",
)


@dataclasses.dataclass(frozen=True)
class LongTexts:
    """How memory grows with tokens, and how long a sequence fits."""

    models: tuple[str, ...] = ("llama-8b", "llama-deep")
    """Of bdia_jax.planning.shapes."""
    ways: tuple[str, ...] = WAYS
    """Of bdia_jax.planning.ways."""
    gammas: tuple[float, ...] = (1 / 16, 1 / 2)
    """Of BDIA."""
    signs: Signs = "sample"
    """Of γ."""
    lengths: tuple[int, int] = (4096, 32_768)
    """Tokens of the sequence."""
    lora: int = 8
    """Rank of the updates of q and v."""
    quantize: Kind = "nf4"
    """The base."""
    device: str = "rtx-4090"
    """What to compile for."""
    fit: str = "24GiB"
    """The memory that the longest sequence is to fit in."""
    out: pathlib.Path | None = None
    """Folder of the results; by default runs/results."""

    def __post_init__(self):
        check_ways(self.ways)
        if unknown := {*self.models} - SHAPES.keys():
            raise ValueError(f"models must be of {'; '.join(SHAPES)}; got {'; '.join(unknown)}")


def main(t: LongTexts) -> list[dict[str, Any]]:
    """Compiles it all."""
    limit = parse_size(t.fit)
    asked = [
        (name, way, gamma)
        for name in t.models
        for way in t.ways
        for gamma in (t.gammas if way.startswith("BDIA") else (None,))
    ]
    rows = []
    for name, way, gamma in tqdm(asked, unit="way"):
        config = dataclasses.replace(
            SHAPES[name],
            dtype="bfloat16",
            param_dtype="bfloat16",
            gamma=gamma or 0.5,
            signs=t.signs,
            max_length=2**20,
        )

        def need(length: int, config=config, way=way) -> plan.Need:
            options = {"lora": t.lora, "quantize": t.quantize, "device": t.device}
            return plan.plan(config, 1, length, ways=[way], **options)[0]

        short, long = map(need, t.lengths)
        tokens = t.lengths[1] - t.lengths[0]
        slope = (long.run - short.run) / tokens
        longest, most = fitting(need, (t.lengths[1], long.run), slope, limit)
        rows.append(
            {
                "model": name,
                "way": way if gamma is None else f"{way}, γ = 1/{round(1 / gamma)}",
                "GB at once": [short.run / 1e9, long.run / 1e9],
                "temporaries, GB": [short.temporaries / 1e9, long.temporaries / 1e9],
                "KB per token": (long.temporaries - short.temporaries) / tokens / 1e3,
                "longest": longest,
                "GB at the longest": most / 1e9,
            }
        )
        tqdm.write(table(rows[-1:]).splitlines()[-1])
    note = (
        f"{t.quantize} base, LoRA {t.lora} of q and v, bfloat16, one sequence of {t.lengths[0]:,} "
        f"and {t.lengths[1]:,} tokens; the longest that fits in {t.fit}, {limit / 1e9:.2f} GB."
    )
    kind = targets.devices(t.device)[0].device_kind
    path = records.write("long-texts", rows, DEPENDS, settings=t, out=t.out, device=kind, note=note)
    print(f"{table(rows)}\n\nsaved to {path}")
    return rows


def fitting(
    need: Callable[[int], plan.Need], known: tuple[int, int], slope: float, limit: int
) -> tuple[int, int]:
    """The tokens of a sequence that fits, and the bytes of its run, which come near the limit.

    Args:
      need: what a run of some tokens needs.
      known: the tokens of one that fits, and its bytes.
      slope: bytes per token.
      limit: in bytes.
    """
    while True:
        # A multiple of what kernels and chunks take at a time.
        tokens = int(known[0] + (limit - known[1]) / slope) // UNIT * UNIT
        if (size := need(tokens).run) <= limit:
            return tokens, size
        # Memory grows a little faster than the line.
        slope = (size - known[1]) / (tokens - known[0])


def table(rows: list[dict[str, Any]]) -> str:
    """A line per model and way."""
    header = ["model", "way", "run, GB", "temporaries, GB", "KB per token", "longest"]
    header += ["GB for it"]
    lines = [
        [
            row["model"],
            row["way"],
            *(" / ".join(f"{n:.2f}" for n in row[k]) for k in ("GB at once", "temporaries, GB")),
            f"{row['KB per token']:.0f}",
            f"{row['longest']:,}",
            f"{row['GB at the longest']:.2f}",
        ]
        for row in rows
    ]
    return records.markdown(header, lines)


if __name__ == "__main__":
    command.run(main, LongTexts, __doc__, told=logging.INFO)
