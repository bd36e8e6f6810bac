"""Fine-tunes a GPT-2 folder on the E2E restaurant data, and scores what it then says.

    python experiments/measure/finetune_e2e.py --model gpt2-medium --data e2e-dataset.zip

Standard and BDIA fine-tuning get the same budget, on shares of the data; texts of the test set are
decoded by beam search, and scored against all references by the challenge's five metrics.

Writes e2e-MODEL-DEVICE.jsonl.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import pathlib
import sys
import zipfile
from typing import Any

import numpy as np
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import command

from bdia_jax import files, interop
from bdia_jax.data import Tokenizer, completion, load_tokenizer, pack
from bdia_jax.nn import Decoder, add_lora, beam_search
from bdia_jax.steps import Signs
from bdia_jax.train import PackedTexts, TrainSettings
from measure import curves, e2e_metrics, records, sources
from measure.runs import Run, plain, run_all, training

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
    *sources.TEXTS,
    *sources.STEP,
    "bdia_jax/train/tasks/text.py",
    "experiments/measure/finetune_e2e.py",
    "experiments/measure/e2e_metrics.py",
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
        read(e.data, name) for name in ("trainset.csv", "devset.csv", "testset_w_refs.csv")
    )
    groups = grouped(test)[: e.inputs]
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
    rows = [*run_all(runs, e.work, DEPENDS, curves.told).values()]
    name = f"e2e-{pathlib.Path(e.model).name}{f'-lora{e.lora}' if e.lora else ''}"
    # Of a folder, its name.
    asked = dataclasses.replace(e, model=pathlib.Path(e.model).name)
    path = records.write(name, rows, DEPENDS, settings=asked, out=e.out)
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
        found = e2e_metrics.score(texts, [references for _, references in groups])
        return {"network": method, **about, "scores": found}

    asked = plain(e)
    for name in ("methods", "shares", "seeds", "work", "out", "data", "train"):
        del asked[name]
    batch = min(e.train.batch_size, len(task.train.tokens))
    return training(
        f"lora{e.lora}-{method}-{share:g}-seed{seed}",
        make,
        task,
        dataclasses.replace(e.train, seed=seed, batch_size=batch),
        asked | about | {"method": method},
        score,
    )


def decode(e: E2E, model: Decoder, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    """A text for each prompt, those of similar length together."""
    tokens = [tokenizer.prompt_tokens(prompt) for prompt in prompts]
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    texts = [""] * len(tokens)
    longest = model.config.max_length - e.new_tokens
    if len(tokens[order[-1]]) > longest:
        raise ValueError(
            f"a prompt has {len(tokens[order[-1]])} tokens; with new_tokens = "
            f"{e.new_tokens}, the model has room for {longest}"
        )
    for start in range(0, len(order), e.decode_batch):
        some = order[start : start + e.decode_batch]
        # The last batch is filled, so that it needs no program of its own.
        asked = [tokens[i] for i in some] + [tokens[some[-1]]] * (e.decode_batch - len(some))
        told = beam_search(
            model,
            asked,
            e.new_tokens,
            beams=e.beams,
            length_penalty=e.length_penalty,
            end=tokenizer.end,
        )
        for i, (text, _) in zip(some, told):
            # A text is one line.
            texts[i] = " ".join(tokenizer.decode(text).split())
    return texts


def read(data: pathlib.Path, name: str) -> list[tuple[str, str]]:
    """Prompts and texts of a file of the challenge.

    Raises:
      FileNotFoundError, ValueError: for data without that file, or a file without its columns.
    """
    if data.is_dir():
        if not (data / name).exists():
            raise FileNotFoundError(f"there is no {name} in {data}")
        raw = (data / name).read_bytes()
    else:
        with zipfile.ZipFile(data) as archive:
            inside = [n for n in archive.namelist() if n.rsplit("/", 1)[-1] == name]
            if not inside:
                raise FileNotFoundError(f"there is no {name} in {data}")
            raw = archive.read(inside[0])
    rows = list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"))))
    if not rows or not {"mr", "ref"} <= set(rows[0]):
        raise ValueError(f"{name} must have the columns mr and ref; got {list(rows[:1])}")
    return [(prompt(row["mr"]), " " + row["ref"].strip()) for row in rows]


def prompt(meaning: str) -> str:
    """``name[The Vaults], food[English]`` as ``name : The Vaults | food : English ||``."""
    slots = (slot.split("[", 1) for slot in meaning.rstrip("] ").split("], "))
    return " | ".join(f"{name.strip()} : {value}" for name, value in slots) + " ||"


def grouped(pairs: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Every prompt once, with all its references, in the order of the file."""
    found: dict[str, list[str]] = {}
    for asked, text in pairs:
        found.setdefault(asked, []).append(text.strip())
    return list(found.items())


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, and their standard deviations."""
    named = [row | {"network": f"{row['share']:.0%} of the data, {row['network']}"} for row in rows]
    return curves.table(named)


if __name__ == "__main__":
    command.run(main, E2E, __doc__, told=logging.WARNING)
