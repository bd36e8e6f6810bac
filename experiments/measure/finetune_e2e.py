"""Fine-tunes a GPT-2 folder on the E2E restaurant data, and scores what it then says.

    python experiments/measure/finetune_e2e.py --model gpt2-medium --data e2e-dataset.zip

Standard and BDIA fine-tuning get the same budget, on shares of the data; texts of the test set are
decoded by beam search, and scored against all references by the challenge's five metrics.

Writes e2e-MODEL-DEVICE.jsonl.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
import sys
from typing import Any

import numpy as np
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


from bdia_jax import files, interop
from bdia_jax.data import Tokenizer, completion, load_tokenizer, pack
from bdia_jax.nn import Decoder, add_lora, beam_search
from bdia_jax.steps import Signs
from bdia_jax.train import PackedTexts, TrainSettings, command
from measure import curves, decoding, e2e_data, e2e_metrics, records, sources
from measure.runs import Run, run_and_write, training

SOME = TrainSettings(
    steps=500,
    batch_size=8,
    learning_rate=1e-4,
    warmup_steps=50,
    weight_decay=0.01,
    log_every=50,
    eval_every=100,
    checkpoint_every=100,
    keep_last=1,
)
DEPENDS = (
    *sources.CORE,
    *sources.TEXT_LAYERS,
    "bdia_jax/nn/lora.py",
    "bdia_jax/nn/generation.py",
    "bdia_jax/nn/prompts.py",
    *sources.TEXTS,
    *sources.ORDINARY_STEP,
    "bdia_jax/train/tasks/text.py",
    *(
        f"experiments/measure/{name}.py"
        for name in ("finetune_e2e", "e2e_data", "e2e_metrics", "decoding")
    ),
)


@dataclasses.dataclass(frozen=True)
class E2E:
    """Fine-tunes a GPT-2 folder on the E2E restaurant data, and scores what it then says."""

    model: str
    """A Hugging Face folder with a tokenizer, or a name on the hub (gpt2-medium)."""
    data: pathlib.Path
    """e2e-dataset.zip, or the folder with trainset.csv, devset.csv and testset_w_refs.csv."""
    methods: tuple[str, ...] = ("standard", "bdia")
    """How to train."""
    gamma: float = 1 / 16
    """Magnitude of γ of bdia: small, for a pretrained network."""
    signs: Signs = "sample"
    """Of γ."""
    shares: tuple[float, ...] = (0.01, 0.05, 0.2, 1.0)
    """Of the training data."""
    lora: int = 0
    """Rank of low-rank updates of q and v; 0 trains all weights."""
    seeds: int = 1
    """Runs of each."""
    beams: int = 10
    """Of the beam search."""
    length_penalty: float = 0.9
    """Of the beam search."""
    new_tokens: int = 100
    """Most tokens of a text."""
    decode_batch: int = 32
    """Prompts decoded at a time."""
    inputs: int | None = None
    """Number of test inputs; None for all."""
    length: int = 512
    """Tokens per training sequence, which hold many texts."""
    dtype: str = "float32"
    """What the blocks compute in."""
    dropout: float = 0.1
    """On the embedding, the attention weights and both updates of a block."""
    work: pathlib.Path = pathlib.Path("runs/finetune_e2e")
    """Folder of the runs."""
    out: pathlib.Path | None = None
    """Folder of the results; by default runs/results."""
    train: TrainSettings = SOME
    """How to train: of each run, whatever its share of the data."""

    def __post_init__(self):
        if not self.methods or not self.shares or not all(0 < s <= 1 for s in self.shares):
            raise ValueError(
                "there must be at least one method, and shares in (0, 1]; got "
                f"{self.methods} and {self.shares}"
            )
        for name in ("seeds", "beams", "new_tokens", "decode_batch", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")


def main(e: E2E) -> str:
    """Runs what is missing; the table."""
    folder = interop.resolve(e.model)
    tokenizer = load_tokenizer(folder)
    train_pairs, dev_pairs, test = (
        e2e_data.read(e.data, name) for name in ("trainset.csv", "devset.csv", "testset_w_refs.csv")
    )
    groups = e2e_data.grouped(test)[: e.inputs]
    length = min(e.length, interop.read_config(folder).max_length)
    evaluation = pack([completion(tokenizer, *pair) for pair in dev_pairs], length)
    runs = []
    for seed in range(e.seeds):
        for share in e.shares:
            # Other texts for every seed: with few of them, which ones matters.
            order = np.random.default_rng(seed).permutation(len(train_pairs))
            some = [train_pairs[i] for i in order[: max(1, round(share * len(order)))]]
            packed = pack([completion(tokenizer, *pair) for pair in some], length)
            task = PackedTexts("e2e", packed, evaluation)
            about = {"share": share, "seed": seed, "texts": len(some)}
            runs += [run_of(e, folder, tokenizer, m, task, groups, about) for m in e.methods]
    name = f"e2e-{pathlib.Path(e.model).name}{f'-lora{e.lora}' if e.lora else ''}"
    # Of a folder, its name.
    asked = dataclasses.replace(e, model=pathlib.Path(e.model).name)
    rows, path = run_and_write(name, runs, e.work, DEPENDS, curves.told, settings=asked)
    text = table(rows)
    print(f"\n{text}\n\nSee {path}")
    return text


def run_of(
    e: E2E,
    folder: pathlib.Path,
    tokenizer: Tokenizer,
    method: str,
    task: PackedTexts,
    groups: list[tuple[str, list[str]]],
    about: dict[str, Any],
) -> Run:
    """A network fine-tuned on a share of the data: trains, decodes and scores."""
    share, seed = about["share"], about["seed"]

    def make() -> Decoder:
        settings = {"gamma": e.gamma, "signs": e.signs, "dtype": e.dtype, "dropout": e.dropout}
        model = interop.load(folder, method=method, **settings)
        if e.lora:
            add_lora(model, e.lora, rngs=nnx.Rngs(seed))
        return model

    def score(model: Decoder, place: pathlib.Path) -> dict[str, Any]:
        texts = decode(e, model, tokenizer, [prompt for prompt, _ in groups])
        files.write_text(place / "texts.txt", "\n".join(texts) + "\n")
        return {"scores": e2e_metrics.score(texts, [references for _, references in groups])}

    asked = records.plain(e, "methods", "shares", "seeds", "work", "out", "data", "train")
    batch = min(e.train.batch_size, len(task.train.tokens))
    return training(
        f"lora{e.lora}-{method}-{share:g}-seed{seed}",
        make,
        task,
        dataclasses.replace(e.train, seed=seed, batch_size=batch),
        asked | about | {"method": method},
        score,
        {"network": method, **about},
    )


def decode(e: E2E, model: Decoder, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    """A text for each prompt."""
    tokens = [tokenizer.prompt_tokens(prompt) for prompt in prompts]
    longest, room = max(map(len, tokens)), model.config.max_length - e.new_tokens
    if longest > room:
        raise ValueError(
            f"a prompt has {longest} tokens; with new_tokens = {e.new_tokens}, the model has room "
            f"for {room}"
        )
    search = functools.partial(
        beam_search,
        model,
        new_tokens=e.new_tokens,
        beams=e.beams,
        length_penalty=e.length_penalty,
        end=tokenizer.ends,
    )
    return decoding.by_length(tokens, e.decode_batch, search, tokenizer)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, and their standard deviations."""
    named = [row | {"network": f"{row['share']:.0%} of the data, {row['network']}"} for row in rows]
    return curves.table(named)


if __name__ == "__main__":
    command.run(main, E2E, __doc__, told=logging.WARNING)
