"""What :mod:`accelerator` runs: phases of jobs, for as much time as there is."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Job(NamedTuple):
    """Commands that follow each other, in a process each."""

    name: str
    commands: tuple[str, ...]
    """From this folder; DATA, RUNS and CORES are filled in."""
    copies: int = 1
    """How often it is started: processes that share its runs."""


class Phase(NamedTuple):
    """Jobs side by side."""

    limit: int
    """Seconds."""
    jobs: tuple[Job, ...]


WAYS = (
    "--ways standard checkpointed 'checkpointed, chunks' BDIA 'BDIA, parts' 'BDIA, parts, m = 4' "
    "'BDIA, parts, chunks'"
)
COSTS = "measure/costs.py --workers 4 --part"
GAMMA = "measure/gamma.py --text DATA/tinyshakespeare.txt"
FINETUNE = "measure/gamma.py --data DATA/e2e-dataset.zip --work RUNS/gamma --parts finetuning"
SCRATCH = (
    "measure/gpt2_small_data.py --text DATA/tinyshakespeare.txt --share 0.1 --dropouts 0 "
    "--work RUNS/small --gammas 0.5 0.25 0.125 0.0625 --signs block sample minus"
)


def cifar10(steps: str, dtype: str = "bfloat16") -> tuple[Job, ...]:
    """BDIA-ViT and its ViT twin, of the published size.

    The rate is constant: the curves are comparable epoch by epoch, wherever they are cut off.
    """
    return tuple(
        Job(
            f"cifar10-{method}-{dtype}",
            (
                f"vit.py --out RUNS/cifar10-{method}-{dtype} --results OUT --resume "
                "--data cifar10 --data-dir DATA/tfds "
                "--model.width 512 --model.heads 8 --model.head-dim 64 --model.hidden 512 "
                f"--model.patch-size 4 --model.method {method} --model.dtype {dtype} "
                "--train.optimizer set-adam --train.learning-rate 1e-4 --train.clip-norm None "
                f"--train.schedule constant {steps}",
            ),
        )
        for method in ("bdia", "standard")
    )


def finetuning(steps: int, every: int) -> str:
    """Of SmolLM2, so many steps of 8 × 128 tokens."""
    return (
        f"{FINETUNE} --train.steps {steps} --train.batch-size 8 --train.warmup-steps {steps // 10} "
        f"--train.log-every {every} --train.eval-every {steps} --train.checkpoint-every {steps}"
    )


PHASES: dict[str, dict[str, Phase]] = {
    "hours": {
        "exactness": Phase(
            3600,
            (
                Job("exactness", ("exactness.py --workers CORES", "reliability.py")),
                Job("smollm2", (f"{GAMMA} --parts exactness --workers 4",)),
            ),
        ),
        "costs": Phase(
            7200,
            (
                Job(
                    "costs",
                    (
                        *(
                            f"{COSTS} {part} --networks vit vit-24 gpt2 gpt2-medium llama "
                            "--device-sized --dtypes bfloat16 float32"
                            for part in ("steps", "besides", "in-use")
                        ),
                        f"{COSTS} activations --networks stack --values 8 16 32 64",
                        f"{COSTS} activations --networks vit --values 6 12 24 48 96",
                        f"{COSTS} totals --networks vit gpt2 llama --values 12 24 48",
                        f"{COSTS} equal --networks vit gpt2 llama --fit 24 --device-sized "
                        "--dtypes bfloat16",
                        f"{COSTS} plans",
                    ),
                ),
            ),
        ),
        "models": Phase(
            # 400 epochs of each.
            12 * 3600,
            (
                *cifar10(
                    "--train.steps 156000 --train.eval-every 1950 --train.checkpoint-every 1950 "
                    "--train.log-every 195"
                ),
                Job("gamma", (f"{GAMMA} --parts perturbation gradients --workers 4",)),
                Job("texts", (finetuning(300, 50), f"{SCRATCH} --seeds 3"), 4),
            ),
        ),
    },
    "minutes": {
        "exactness": Phase(
            150,
            (Job("exactness", ("exactness.py --workers CORES --within 70",)),),
        ),
        "costs": Phase(
            240,
            tuple(
                Job(
                    f"steps-{network}",
                    (
                        f"{COSTS} steps --networks {network} --dtypes {dtypes} --device-sized "
                        f"--rounds 8 --turn RUNS/turn {WAYS}",
                    ),
                )
                for network, dtypes in (
                    ("vit", "bfloat16 float32"),
                    ("vit-24", "bfloat16"),
                    ("gpt2-medium", "bfloat16"),
                    ("llama", "bfloat16"),
                )
            ),
        ),
        "models": Phase(
            300,
            (
                *cifar10(
                    "--train.steps 156000 --train.eval-every 780 --train.checkpoint-every 3900 "
                    "--train.log-every 390 --train.keep-last 1"
                ),
                Job(
                    "gamma",
                    (
                        f"{GAMMA} --parts exactness --workers 4",
                        f"{GAMMA} --parts perturbation gradients --workers 4",
                    ),
                ),
                Job("texts", (finetuning(100, 20), f"{SCRATCH} --seeds 1"), 6),
                Job(
                    "memory",
                    (
                        f"{COSTS} activations --networks vit --values 6 24 48 --dtypes float32 "
                        f"bfloat16 {WAYS}",
                        f"{COSTS} in-use --networks vit-24 llama --dtypes bfloat16 --device-sized "
                        f"--workers 2 {WAYS}",
                    ),
                ),
            ),
        ),
    },
    # Nothing is learned from these: they are for a machine on which nothing ever ran.
    "seconds": {
        "exactness": Phase(
            90, (Job("exactness", ("exactness.py --quick --workers CORES --within 20",)),)
        ),
        "costs": Phase(
            120,
            tuple(
                Job(
                    f"steps-{network}",
                    (
                        f"{COSTS} steps --networks {network} --dtypes {dtypes} --rounds 1 "
                        "--turn RUNS/turn --ways checkpointed 'BDIA, parts'",
                    ),
                )
                for network, dtypes in (("vit", "bfloat16 float32"), ("llama", "bfloat16"))
            ),
        ),
        "models": Phase(
            240,
            (
                *cifar10(
                    "--train.steps 2 --train.batch-size 8 --train.eval-batch-size 1000 "
                    "--model.depth 2 --model.width 32 --model.hidden 32 --model.head-dim 4"
                ),
                Job(
                    "gamma",
                    (f"{GAMMA} --parts perturbation gradients --workers 4 --rows 1 --length 16",),
                ),
                Job(
                    "texts",
                    (
                        f"{finetuning(2, 1)} --validation 9 --inputs 2 --new-tokens 3 --seeds 1",
                        f"{SCRATCH} --seeds 1 --train.steps 20",
                    ),
                    2,
                ),
                Job("memory", (f"{COSTS} in-use --networks llama --ways 'BDIA, parts'",)),
            ),
        ),
    },
}
Size = Literal[tuple(PHASES)]
Name = Literal[tuple(PHASES["hours"])]
NEEDS = {
    "DATA/tfds": "tfds/cifar10",
    "DATA/tiny": "tinyshakespeare.txt",
    "DATA/e2e": "e2e-dataset.zip",
}
"""Files in DATA that commands need, by a part of the command."""
