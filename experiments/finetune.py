"""Fine-tunes a pretrained decoder (GPT-2, Llama, Qwen 2 or 3) reversibly, on a text of yours.

    python experiments/finetune.py --model gpt2-medium --data mine.jsonl --out runs/mine
    python experiments/finetune.py --model ./Llama-3.2-1B --data mine.txt --out mine --lora.rank 8
    python experiments/finetune.py ... --resume                            # continue

The data is a file of lines ``{"prompt": "...", "completion": "..."}`` (``*.jsonl``), of which the
completions are learned, or any text. Short texts are packed into full sequences, without attention
from one to another. What comes out, ``runs/mine/model``, is a folder that ``transformers`` loads:
the network is the one that went in.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import shutil

import command
from flax import nnx

from bdia_jax import interop
from bdia_jax.data import Example, load_tokenizer, pack, read_examples
from bdia_jax.nn import add_lora, freeze, generate, merge_lora
from bdia_jax.train import PackedTexts, TrainSettings, evaluate, plot_curves, train

SOME = TrainSettings(
    steps=500,
    batch_size=8,
    learning_rate=5e-5,
    warmup_steps=20,
    weight_decay=0.01,
    log_every=10,
    eval_every=100,
    checkpoint_every=100,
    keep_last=1,
)
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""What a Hugging Face folder may have beside the weights and their configuration."""


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Of low-rank updates (LoRA)."""

    rank: int = 0
    """Train low-rank updates only, of this rank; 0 trains all weights."""
    alpha: float | None = None
    """Updates are scaled by alpha / rank; None for alpha = rank."""
    targets: tuple[str, ...] = ("q", "v")
    """Linear layers of a block that get one: q, k, v, out, up, down, gate."""


@dataclasses.dataclass(frozen=True)
class FineTune:
    """Fine-tunes a pretrained decoder reversibly, on a text of yours."""

    model: str
    """A Hugging Face folder (config.json, *.safetensors, tokenizer.json), or a name on the hub."""
    data: pathlib.Path
    """*.jsonl with lines {"prompt": "...", "completion": "..."}, or any text file."""
    out: pathlib.Path
    """Folder of the run; the fine-tuned model will be its folder "model"."""
    eval_data: pathlib.Path | None = None
    """The same for evaluation; by default every tenth text of the data."""
    tokenizer: pathlib.Path | None = None
    """A tokenizer.json, or a folder with vocab.json and merges.txt; by default the model's."""
    length: int = 1024
    """Tokens per sequence."""
    method: str = "bdia"
    """bdia (one bit per activation and block), bdia-stored, standard or standard-checkpoint."""
    frac_bits: int = 9
    """Fractional bits of the grid."""
    tolerance_bits: int = 0
    """Bits for hardware that is not deterministic."""
    stored_blocks: int = 0
    """How many of the blocks keep their activations, for speed; python -m bdia_jax.plan --fit says
    how many fit."""
    ffn_chunk: int | None = None
    """Positions of which the hidden layer of a block exists at a time (128, say): less memory, and
    more time, since it is computed once more. None for all."""
    attention: str = "auto"
    """chunked, xla or cudnn; auto is cudnn on a GPU that has it, without dropout, and chunked
    elsewhere."""
    dtype: str = "bfloat16"
    """What the blocks compute in: bfloat16, float32 or float16."""
    param_dtype: str | None = None
    """What the weights are kept in: float32, or bfloat16. By default float32; but frozen ones, of
    which there are low-rank updates, stay in bfloat16 if they are so in the folder. The folder
    that is saved has the same; updates are added in float32, and the sum is rounded."""
    dropout: float = 0.0
    """On the embedding, the attention weights and both updates of a block."""
    freeze_embedding: bool = False
    """Leave embedding, positions and head as they are: no gradient, no optimizer state."""
    lora: LowRank = LowRank()
    """Low-rank updates."""
    resume: bool = False
    """Continue the run in the folder, if there is one."""
    train: TrainSettings = SOME
    """How to train: batches are of sequences, which hold many texts."""


def main(f: FineTune) -> dict[str, float]:
    """Runs it; validation loss and accuracy before and after."""
    folder = interop.resolve(f.model)
    config = interop.read_config(folder)
    length = min(f.length, config.max_length)
    if length < f.length:
        print(f"sequences have {length} tokens, the model's longest")
    tokenizer = load_tokenizer(f.tokenizer or folder)
    if tokenizer.size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} tokens, the model {config.vocab_size}: they do "
            "not belong together; give the model's tokenizer"
        )
    train_texts, eval_texts = split(f, tokenizer, length)
    task = PackedTexts(f.data.name, pack(train_texts, length), pack(eval_texts, length))
    print(
        f"{len(train_texts)} texts in {len(task.train.tokens)} sequences of {length} tokens; "
        f"{len(eval_texts)} texts for evaluation"
    )
    written = json.loads((folder / "config.json").read_text())
    stored = written.get("dtype", written.get("torch_dtype"))
    frozen = stored if f.lora.rank and stored == "bfloat16" else "float32"
    model = interop.load(
        folder,
        method=f.method,
        frac_bits=f.frac_bits,
        tolerance_bits=f.tolerance_bits,
        stored_blocks=f.stored_blocks,
        ffn_chunk=f.ffn_chunk,
        attention=f.attention,
        dtype=f.dtype,
        param_dtype=f.param_dtype or frozen,
        dropout=f.dropout,
    )
    if f.lora.rank:
        paths = add_lora(
            model, f.lora.rank, f.lora.alpha, f.lora.targets, rngs=nnx.Rngs(f.train.seed)
        )
        print(f"low-rank updates of {', '.join(paths)}")
    elif f.freeze_embedding:
        freeze(model, "^(embedding|positions|head)$")
    before = evaluate(model, task)
    print(f"before: validation loss {before['loss']:.4f}")
    about = json.loads(json.dumps(dataclasses.asdict(f), default=str))
    about = {name: about[name] for name in about if name not in ("train", "resume", "out")}
    result = train(model, task, f.train, f.out, resume=f.resume, about={"fine-tuning": about})
    plot_curves({f.method: f.out}, f.out / "loss.png", metric="loss")
    if f.lora.rank:
        merge_lora(model)
    interop.save(model, f.out / "model", config=written)
    if f.tokenizer is None:
        for name in BESIDE:
            if (folder / name).exists():
                shutil.copyfile(folder / name, f.out / "model" / name)
    else:
        tokenizer.save(f.out / "model")
    after = {name: result.last("eval", name) for name in ("loss", "accuracy")}
    print(
        f"after {result.step} steps: validation loss {after['loss']:.4f}, token accuracy "
        f"{before['accuracy']:.2%} -> {after['accuracy']:.2%}; "
        f"{result.seconds_per_step:.3g} s per step. Saved to {f.out / 'model'}"
    )
    show(model, tokenizer, eval_texts[0])
    return {"loss before": before["loss"], **after}


def split(f: FineTune, tokenizer, length: int) -> tuple[list[Example], list[Example]]:
    """Texts for training and for evaluation."""
    texts = read_examples(f.data, tokenizer, length)
    if f.eval_data is not None:
        return texts, read_examples(f.eval_data, tokenizer, length)
    if len(texts) < 10:
        raise ValueError(
            f"{f.data} has {len(texts)} texts, of which every tenth would be for evaluation: give "
            "more, or eval_data"
        )
    return [t for i, t in enumerate(texts) if i % 10 != 9], texts[9::10]


def show(model, tokenizer, example: Example) -> None:
    """Prints what the model makes of the first evaluation prompt."""
    given = [t for t, learned in zip(*example) if not learned] or example.tokens[:8]
    room = min(60, model.config.max_length - len(given))
    if room < 1:
        return
    model.eval()
    (told,) = generate(model, [given], room, end=tokenizer.end)
    print(f"{tokenizer.decode(given)!r}\n  -> {tokenizer.decode(told)!r}")


if __name__ == "__main__":
    command.run(main, FineTune, __doc__, told=logging.INFO)
